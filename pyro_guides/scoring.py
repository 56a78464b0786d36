"""Runs a model at many draws of its latents, each exactly as one call of the model would.

Most users' models are written for one value per latent and do not broadcast over draws; ``torch.vmap`` runs
them on all draws at once with the meaning of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, final

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_guides.blocks import Blocks
from pyro_guides.structure.reading import mask_inside
from pyro_guides.vectorized import Vectorized, draw
from pyro_guides.vectorized import count as number_of_draws

__all__ = ["ModelCall", "Scores", "Simulation"]

_VALUES_PER_PASS = 2_000_000  # bounds the memory of one pass

PerSite = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says about S draws.

    Attributes:
        log_prob: of every latent and observed site, masked and scaled, ``(S, *batch)``.
        likelihood: of every observed site, ``(S, *batch)``, not scaled; zero where it is masked.
        observed: the observed values.
        counted: which of these are not masked, ``(*batch, *event)``, of the sites that have a mask.
    """

    log_prob: PerSite
    likelihood: PerSite
    observed: PerSite
    counted: PerSite


@final
@dataclass(frozen=True, eq=False)
class Simulation:
    """What a model has drawn S times.

    Attributes:
        values: by site, ``(S, *natural shape)``.
        plates: the dimension of each of a site's plates, by name.
        event_dims: how many dimensions one value has.
        observed: the sites that are observed, or computed from others, when the model is not simulated.
    """

    values: PerSite
    plates: Mapping[str, Mapping[str, int]]
    event_dims: Mapping[str, int]
    observed: frozenset[str]

    def outside(self, plate: str) -> PerSite:
        """The latents outside of a plate."""
        return {
            n: x for n, x in self.values.items() if n not in self.observed and plate not in self.plates[n]
        }


@final
@dataclass(frozen=True, eq=False)
class _Sites:
    """The sites of a model that have a density: what is observed, their plates, how large they are.

    And any values of those that do not count.
    """

    observed: PerSite
    counted: PerSite
    plates: Mapping[str, set[str]]
    event_dims: Mapping[str, int]
    size: int
    unseen: PerSite

    @property
    def names(self) -> list[str]:
        return list(self.plates)


@final
@dataclass(eq=False)
class ModelCall:
    """A model with its arguments, to be run at draws of its latents.

    Attributes:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        indices: the elements that subsampled plates take.
        blocks: where the model subsamples a plate by itself and all its elements are asked for; the model is
            run on one subsample after the other.
        unseen: sites that the model draws by itself and that do not count, for nothing depends on them.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    blocks: Blocks | None = None
    unseen: frozenset[str] = frozenset()
    _scoring: Vectorized = field(default_factory=Vectorized)
    _simulating: Vectorized = field(default_factory=Vectorized)
    _known: _Sites | None = None

    def score(self, draws: PerSite, held: Mapping[str, Tensor] | None = None) -> Scores:
        """Log densities of draws ``(S, *natural shape)``; differentiable where gradients are on.

        Args:
            draws: values of latents.
            held: values of all other latents, the same for each draw.

        Raises:
            NotImplementedError: the model draws other latents itself.
        """
        if self.blocks is None:
            return self._score(draws, held or {}, self.indices)
        return self._score_blocks(self.blocks, draws, held or {})

    def simulate(
        self,
        draws: PerSite,
        held: Mapping[str, Tensor] | None = None,
        *,
        count: int | None = None,
    ) -> Simulation:
        """What the model draws at values of its latents; observed sites are drawn anew.

        Args:
            draws: values of latents, ``(S, *natural shape)``; those that are left out are drawn, too.
            held: values of more latents, the same for each draw.
            count: S; that of ``draws`` if None.

        Raises:
            ValueError: the model expects values of other shapes.
        """
        count = number_of_draws(draws) if count is None else count
        with torch.no_grad():
            if self.blocks is None:
                return self._simulate(draws, held or {}, self.indices, count)
            blocks, parts, outside = self.blocks, list[Simulation](), PerSite()
            for index in blocks.indices:
                own, fixed = blocks.part(draws, index), blocks.part(held or {}, index)
                parts.append(self._simulate({**own, **outside}, fixed, {blocks.plate.name: index}, count))
                if not outside:  # all blocks share what lies outside of them
                    outside = parts[0].outside(blocks.plate.name)
        event_dims = {
            n: parts[0].event_dims[n] for n, own in parts[0].plates.items() if blocks.plate.name in own
        }
        values = blocks.joined([part.values for part in parts], event_dims)
        return replace(parts[0], values=values)

    def _simulate(
        self, draws: PerSite, held: Mapping[str, Tensor], indices: Mapping[str, Tensor], count: int
    ) -> Simulation:
        inputs = (draws, torch.empty(count, 0))  # an empty row per draw: there may be no draws to run over

        def run(values: PerSite, _: Tensor) -> Trace:
            return self._run({**held, **values}, indices, _Hide({*draws, *held}))

        first = run(*draw(inputs, 0))
        sites: dict[str, Any] = {name: site for name, site in first.nodes.items() if _is_random(site)}
        given = {*draws, *held}
        new = [name for name in sites if name not in given and sites[name]["value"].numel()]  # no factors

        def values(*own: Any) -> PerSite:
            nodes = run(*own).nodes
            return {name: torch.as_tensor(nodes[name]["value"]) for name in new}

        drawn = {name: torch.as_tensor(sites[name]["value"]) for name in new}
        if count == 1:  # which the first run has drawn: a model may be slow to simulate
            found = {name: value.unsqueeze(0) for name, value in drawn.items()}
        else:
            size = sum(value.numel() for value in drawn.values())
            found = self._simulating(values, inputs, max(1, _VALUES_PER_PASS // max(1, size)))
        return Simulation(
            found,
            {name: {f.name: f.dim for f in sites[name]["cond_indep_stack"] if f.vectorized} for name in new},
            {name: _event_dim(sites[name]) for name in new},
            frozenset(name for name in new if not _was_latent(sites[name])),
        )

    def _score(self, draws: PerSite, held: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> Scores:
        found = self._known or self._find(draws, held, indices)
        if self.blocks is None:
            self._known = found

        def score(values: PerSite) -> tuple[PerSite, PerSite]:
            nodes = self._scored({**found.unseen, **held, **values}, indices).nodes
            log_prob = {name: _full(nodes[name], "log_prob") for name in found.names}
            return log_prob, {name: _likelihood(nodes[name]) for name in found.observed}

        at_once = max(1, _VALUES_PER_PASS // max(1, found.size))
        log_prob, likelihood = self._scoring(score, (dict(draws),), at_once)
        return Scores(log_prob, likelihood, found.observed, found.counted)

    def _find(self, draws: PerSite, held: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> _Sites:
        """The sites that have a density, from one run at the first draw."""
        with torch.no_grad(), pyro.validation_enabled(False):  # weights that are NaN are told of by row
            nodes = self._scored({**held, **draw(draws, 0)}, indices).nodes
        sites = {name: site for name, site in nodes.items() if _is_random(site) and not _is_computed(site)}
        latent = [name for name, site in sites.items() if not site["is_observed"]]
        unseen = {name: torch.as_tensor(sites.pop(name)["value"]) for name in latent if name in self.unseen}
        if drawn := [name for name in latent if name not in {*draws, *held, *unseen}]:
            raise NotImplementedError(
                f"the model itself draws {drawn}, which the guide leaves to it (enumerated sites, for "
                "instance), so log p of the other latents alone is not to be had"
            )
        values = {name: torch.as_tensor(site["value"]) for name, site in sites.items()}
        data = [name for name, site in sites.items() if site["is_observed"] and values[name].numel()]
        observed = {name: values[name] for name in data}  # a factor has no value
        inside = {name: {f.name for f in site["cond_indep_stack"]} for name, site in sites.items()}
        size = sum(value.numel() for value in values.values())
        event_dims = {name: _event_dim(site) for name, site in sites.items()}
        masks = {name: _counted(sites[name]) for name in observed}
        counted = {name: mask for name, mask in masks.items() if mask is not None}
        return _Sites(observed, counted, inside, event_dims, size, unseen)

    def _score_blocks(self, blocks: Blocks, draws: PerSite, held: Mapping[str, Tensor]) -> Scores:
        """Scores of all elements of a plate, from subsamples of the model's own size."""
        plate = blocks.plate
        parts = [
            self._score(blocks.part(draws, index), blocks.part(held, index), {plate.name: index})
            for index in blocks.indices
        ]
        first = blocks.indices[0]
        found = self._find(blocks.part(draws, first), blocks.part(held, first), {plate.name: first})
        event_dims = {n: found.event_dims[n] for n, plates in found.plates.items() if plate.name in plates}
        none = dict.fromkeys(event_dims, 0)
        log_prob = blocks.joined([scores.log_prob for scores in parts], none)
        return Scores(
            {name: value / plate.scale if name in none else value for name, value in log_prob.items()},
            blocks.joined([scores.likelihood for scores in parts], none),
            blocks.joined([scores.observed for scores in parts], event_dims),
            blocks.joined([scores.counted for scores in parts], event_dims),
        )

    def _scored(self, values: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> Trace:
        trace = self._run(values, indices)
        trace.compute_log_prob()
        return trace

    def _run(
        self,
        values: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        handler: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it has no state
    ) -> Trace:
        model = poutine.replay(self.model, trace=_trace_of({**values, **indices}))
        with poutine.block(), handler:
            return poutine.trace(model).get_trace(*self.args, **self.kwargs)


@final
class _Hide(Messenger):
    """Draws observed sites anew; what is computed from others is computed still.

    Args:
        given: the latents whose values must be what the model expects.
    """

    def __init__(self, given: Collection[str]) -> None:
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not _is_computed(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            msg["infer"]["was_observed"] = True
        if msg["value"] is None and not site_is_subsample(msg):
            # Not rsample, which pyro.sample would take: it draws in place, and vmap cannot follow.
            msg["value"] = msg["fn"].sample()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.given:
            return
        expected, got = tuple(msg["fn"].shape()), tuple(msg["value"].shape)
        if got != expected:
            raise ValueError(
                f"the draws of '{msg['name']}' have shape {got}, but the model with these arguments expects "
                f"{expected}; give guide.posterior(...) arguments for the same rows"
            )


def _full(site: Any, key: str) -> Tensor:
    """A site's log density in the full batch shape of the site."""
    value = torch.as_tensor(site[key])
    return value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape))


def _likelihood(site: Any) -> Tensor:
    """An observed site's log density, not scaled; zero where it is masked."""
    value = _full(site, "unscaled_log_prob")
    mask = site["mask"]
    if mask is None or mask is True:
        return value
    return torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))


def _counted(site: Any) -> Tensor | None:
    """Which elements of an observed value are not masked, in its full shape; None if nothing is."""
    fn, outer = site["fn"], site["mask"]
    inner, inner_dim = mask_inside(fn)
    masks = [] if inner is None else [inner.reshape(inner.shape + (1,) * (fn.event_dim - inner_dim))]
    if outer is not None and outer is not True:
        own = torch.as_tensor(outer)
        masks.append(own.reshape(own.shape + (1,) * fn.event_dim))
    if not masks:
        return None
    return torch.stack([mask.expand(fn.shape()) for mask in masks]).all(0)


def _is_random(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


def _is_computed(site: Any) -> bool:
    """Whether it is a ``pyro.deterministic``, which has no density."""
    return bool(site["infer"].get("_deterministic"))


def _event_dim(site: Any) -> int:
    """How many dimensions one value has; a ``pyro.deterministic`` may leave that open."""
    event_dim: int = site["fn"].event_dim
    if _is_computed(site) and event_dim == site["value"].dim():
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        depth = max((-frame.dim for frame in frames), default=0)
        shape = site["value"].shape[:depth]
        if len(shape) == depth and all(shape[frame.dim] == frame.size for frame in frames):
            return event_dim - depth
    return event_dim


def _was_latent(site: Any) -> bool:
    return not site["infer"].get("was_observed") and not site["is_observed"] and not _is_computed(site)


def _trace_of(values: Mapping[str, Tensor]) -> Trace:
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", name=name, is_observed=False, value=value, infer={})
    return trace
