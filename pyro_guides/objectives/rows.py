"""Which sites of a guide and a model belong to rows that are independent of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_guides.guide import AmortizedGuide

__all__ = ["Guide", "Model", "Rows", "Site", "is_delta", "random_sites", "read_rows", "scale_of", "traces_of"]

Model: TypeAlias = Callable[..., Any]
Guide: TypeAlias = Callable[..., Any]
Site: TypeAlias = Any  # a message of Pyro's


@final
@dataclass(frozen=True)
class Rows:
    """The plates whose elements are rows, and where they lie.

    Attributes:
        plates: their names; without any, guide and model have one joint posterior.
        depth: how many dimensions the plates of guide and model take.
    """

    plates: frozenset[str]
    depth: int

    @property
    def particle_dim(self) -> int:
        """The dimension of particles, left of all plates."""
        return -self.depth - 1

    def hold(self, site: Site) -> bool:
        """Whether a site lies inside of a row; all do if there are no rows."""
        return self.plates <= {frame.name for frame in site["cond_indep_stack"]}

    def dims(self, site: Site) -> set[int]:
        """The dimensions of the rows, which every site inside of them knows."""
        return {frame.dim for frame in site["cond_indep_stack"] if frame.name in self.plates}

    def scale(self, site: Site) -> float:
        """How many rows each row stands for: full over subsampled size."""
        return math.prod(scale_of(frame) for frame in site["cond_indep_stack"] if frame.name in self.plates)

    def sum(self, site: Site, value: Tensor) -> Tensor:
        """A site's values summed within rows, ``(K or 1, *rows)`` with ones for all other plates.

        Raises:
            ValueError: the value has dimensions left of the particles.
        """
        full = torch.broadcast_shapes(value.shape, site["fn"].batch_shape)
        if len(full) > self.depth + 1:
            raise ValueError(
                f"the log density of site '{site['name']}' has the shape {tuple(full)}, which is more than "
                f"particles and {self.depth} plate dimensions; set max_plate_nesting={len(full) - 1}"
            )
        aligned = value.expand(full).reshape((1,) * (self.depth + 1 - len(full)) + full)
        others = [dim for dim in range(-self.depth, 0) if dim not in self.dims(site)]
        return aligned.sum(others, keepdim=True) if others else aligned


def read_rows(
    model: Model,
    guide: Guide,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plates: Collection[str] | None,
    depth: float,
) -> Rows:
    """Find the rows of a guide and a model, from one run of both that nobody sees.

    Args:
        model: the model.
        guide: the guide.
        args: their arguments.
        kwargs: their keyword arguments.
        plates: the names of the rows' plates; if None, the plates common to all latents that are in plates,
            of an amortized guide those whose elements its structure shows to be independent.
        depth: how many dimensions plates take; infinity if that is to be found out.

    Raises:
        ValueError: a plate is unknown or sequential.
    """
    with torch.no_grad(), poutine.block():
        traces = traces_of(model, guide, args, kwargs)
    frames = [frame for trace in traces for site in random_sites(trace) for frame in site["cond_indep_stack"]]
    if depth == math.inf:
        depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
    latents = [site for site in random_sites(traces[1]) if not site["is_observed"]]
    if plates is None:
        found = _amortized_plates(guide, frames) if isinstance(guide, AmortizedGuide) else _common(latents)
    else:
        found = frozenset(plates)
        known = {frame.name for frame in frames if frame.vectorized}
        if unknown := sorted(found - known):
            raise ValueError(f"plates={sorted(found)} names {unknown}, but the plates are {sorted(known)}")
    return Rows(found, int(depth))


def traces_of(
    model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace]:
    """Run the guide, and the model at its draws; their traces, the model's first."""
    inner: Any = poutine.unwrap(guide)
    if isinstance(inner, GuideMessenger):  # which runs the model itself
        guide(*args, **kwargs)
        traces: tuple[Trace, Trace] = inner.get_traces()
        return traces
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace


def random_sites(trace: Trace) -> list[Site]:
    """The sites of a run that have a density, subsamples not among them."""
    nodes = prune_subsample_sites(trace).nodes.values()
    return [site for site in nodes if site["type"] == "sample" and not _is_computed(site)]


def is_delta(fn: Any) -> bool:
    """Whether a site is a function of others in the guise of a draw."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _is_computed(site: Site) -> bool:
    """Whether a site is a ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


def _amortized_plates(guide: AmortizedGuide, frames: Iterable[Any]) -> frozenset[str]:
    """The plates over which groups with an encoder share no cost; of all groups if none has one."""
    dims = {frame.name: frame.dim for frame in frames if frame.vectorized}
    parts = [
        part for part in guide.network.parts if part.group.plates and set(part.group.plates) <= set(dims)
    ]
    chosen = [part for part in parts if part.encodings] or parts
    own = [{name for name in part.group.plates if dims[name] in part.local} for part in chosen]
    return frozenset(set.intersection(*own)) if own else frozenset()


def _common(latents: Iterable[Site]) -> frozenset[str]:
    """The plates that all latents inside of plates have in common.

    Raises:
        ValueError: a latent is in a sequential plate.
    """
    stacks = []
    for site in latents:
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"latent '{site['name']}' lies in the sequential plate '{frame.name}', whose rows cannot "
                    f"be weighed side by side; open it as 'with pyro.plate(\"{frame.name}\", ...):'"
                )
        stacks.append({frame.name for frame in site["cond_indep_stack"]})
    own = [names for names in stacks if names]
    return frozenset(set.intersection(*own)) if own else frozenset()


def scale_of(frame: Any) -> float:
    """How many elements of a plate each element of its subsample stands for."""
    return 1.0 if frame.full_size is None else float(frame.full_size) / float(frame.size)
