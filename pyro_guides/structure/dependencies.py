"""Which latents a guide must know of when it draws another one.

The guide draws groups of latents in the model's order. What group G still depends on, given the data and
the groups before it, follows from the model's graph: those groups that a path reaches from G through
sites not yet drawn, in the graph that joins every site with its parents, children and co-parents.

Source: Stefan Webb et al., "Faithful Inversion of Generative Models for Effective Amortized Inference",
2018, arXiv:1712.00287.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance, get_dependencies
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_guides.structure.reading import is_left_to_model, mask_inside
from pyro_guides.structure.values import feasible_value

__all__ = ["Graph", "dependencies", "live_sites", "upstream"]


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """How the sites of a model depend on each other.

    Attributes:
        neighbours: for each latent, the latents it shares a factor of the posterior with.
        children: for each latent, the latent and observed sites whose distribution it decides about.
    """

    neighbours: Mapping[str, set[str]]
    children: Mapping[str, set[str]]

    def descendants(self, names: Collection[str]) -> set[str]:
        """The named sites and all that depend on them, however indirectly.

        Example:
            >>> sorted(Graph({}, {"a": {"b"}, "b": {"x"}}).descendants(["a"]))
            ['a', 'b', 'x']
        """
        reached, waiting = set(names), list(names)
        while waiting:
            new = self.children.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        return reached


def dependencies(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Run the model and find out which sites depend on which.

    What a simulator makes of latents depends on these, though it has no density that would say so.
    """
    with poutine.block():
        model = _Placed()(model)
        try:
            found: Any = get_dependencies(model, args, kwargs)
        except NotImplementedError:
            with _DrawsForDensities():
                found = get_dependencies(model, args, kwargs)
    shared = found["posterior_dependencies"]
    neighbours: dict[str, set[str]] = {name: set() for name in shared}
    for name, others in shared.items():
        for other in others:
            if other in neighbours and other != name:
                neighbours[name].add(other)
                neighbours[other].add(name)
    children: dict[str, set[str]] = {name: set() for name in shared}
    for child, parents in found["prior_dependencies"].items():
        for parent in parents:
            if parent in children and parent != child:
                children[parent].add(child)
    return Graph(neighbours, children)


class _Placed(Messenger):
    """Gives latents feasible values: some of torch's samplers fail where parameters are tracked.

    Those that ask a parameter for a ``new`` tensor (exponential, Laplace, Cauchy, Pareto, Weibull) get one
    of the wrong shape.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not site_is_subsample(msg) and not is_left_to_model(msg):
            msg["value"] = detach_provenance(feasible_value(msg))


class _DrawsForDensities(Messenger):
    """Puts a normal around a draw in the place of what is observed: it depends on the same latents."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not site_is_subsample(msg):
            fn = msg["fn"]
            msg["fn"] = dist.Normal(fn().to(torch.get_default_dtype()), 1.0).to_event(fn.event_dim)


def upstream(groups: Sequence[Sequence[str]], graph: Mapping[str, set[str]]) -> list[set[int]]:
    """For each group of sites, the earlier groups that it depends on given all earlier ones.

    Example:
        >>> chain = {"a": {"b"}, "b": {"a", "c"}, "c": {"b"}}
        >>> upstream([["a"], ["b"], ["c"]], chain)
        [set(), {0}, {1}]
    """
    owner = {name: index for index, group in enumerate(groups) for name in group}
    return [_reached(group, index, owner, graph) for index, group in enumerate(groups)]


def _reached(
    group: Sequence[str], index: int, owner: dict[str, int], graph: Mapping[str, set[str]]
) -> set[int]:
    seen: set[str] = set(group)
    waiting = list(group)
    reached = set()
    while waiting:
        for name in graph.get(waiting.pop(), set()) - seen:
            seen.add(name)
            if owner.get(name, index) < index:
                reached.add(owner[name])
            else:
                waiting.append(name)
    return reached


def live_sites(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """The latents whose support, mask or scale is computed from other latents."""
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.block(),
        TrackProvenance(),
    ):
        trace = poutine.trace(_Placed()(model)).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    latents = {name: site for name, site in nodes.items() if not site_is_subsample(site)}
    return frozenset(
        name
        for name, site in latents.items()
        if get_provenance(
            [_tensors(site["fn"].support), site["mask"], mask_inside(site["fn"])[0], site["scale"]]
        )
        & set(latents)
    )


def _tensors(constraint: Any) -> list[Tensor]:
    if isinstance(constraint, Tensor):
        return [constraint]
    if isinstance(constraint, Constraint):
        constraint = list(vars(constraint).values())
    if isinstance(constraint, (list, tuple)):
        return [tensor for part in constraint for tensor in _tensors(part)]
    return []
