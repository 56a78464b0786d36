"""Where the posterior of the learned groups lies, alone or beside groups that are amortized."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_guides.groups import Group
from pyro_guides.guide import AmortizedGuide
from pyro_guides.posterior import Query
from pyro_guides.starting.climb import Normal, best_normal, peaks, relaxed
from pyro_guides.starting.density import Density, Repeats
from pyro_guides.starting.placing import Place, places
from pyro_guides.starting.profile import profiled
from pyro_guides.structure import Structure

__all__ = [
    "DRAWS",
    "MOST_CORRELATED",
    "location_and_spread",
    "posterior_modes",
    "posterior_places",
    "rows_at_once",
    "values_in",
    "whole_groups",
]

DRAWS = 256  # of the prior
MOST_CORRELATED = 256  # values whose Hessian is taken whole
_FEWEST_ROWS, _MOST_ROWS = 8, 128
_STARTS = 5  # climbs at most: from where q starts, from zero, and from draws of the prior
_SEARCHES = 16  # climbs that look for several modes
_LARGEST_ELEMENT = 512  # values of one element, whose Hessian is always taken whole
_WIDEST = 10.0  # standard deviations of the posterior: the largest units


def posterior_places(query: Query, repeats: Repeats) -> tuple[dict[int, Place], dict[int, Tensor]]:
    r"""Where the posterior of the learned groups lies, by position, and the middles ``(D,)`` of the others.

    Beside others the learned groups take the marginal of the normal over all latents. If each of R rows
    counts :math:`k = N/R` times, it is as narrow as for N rows, but lies where R rows put it, which is off by
    about :math:`\sqrt k` standard deviations; that many make up the units, then.

    Args:
        query: the rows at hand; all latents are continuous.
        repeats: how often these count.

    Raises:
        NotImplementedError: log p cannot be climbed.
    """
    network, plates = query.guide.network, query.structure.plates
    groups = {index: network.parts[index].group for index in whole_groups(query)}
    shared = {above for part in network.parts for above in part.links.upstream if above in groups}
    others = {i: part.group for i, part in enumerate(network.parts) if i not in groups}
    alone = not others
    first = [groups[i] for i in shared] if alone and shared else [*groups.values()]
    density = Density(query, repeats, {name for group in first for name in group.sites})
    positions = {index: density.positions(group) for index, group in groups.items()}
    if not alone and density.size > MOST_CORRELATED:
        raise NotImplementedError(f"too many rows: {density.size:,} values, of at most {MOST_CORRELATED}")
    start = density.pack(query.draws_of(query.run(1)))
    if not alone and _has_parameters(density, start):
        raise NotImplementedError("the model has parameters of its own, which are not trained yet")
    drawn, wide = _prior(density, start)
    # Zero is nobody's best guess, but near the posterior by the measure of a prior that is as good as flat.
    starts = [*start, torch.zeros_like(drawn[0]), *drawn[: _STARTS - 2]]
    normal = _normal(density, starts, wide, list(positions.values()))
    if alone and shared and normal.whole:
        count = sum(positions[i].numel() for i in shared)
        normal = profiled(density, normal, starts, count, wide)
    if alone:
        return places(network, normal, positions, plates), {}
    if normal.size < 1.0:  # the walls of a funnel, between which a narrow normal is not the marginal
        raise NotImplementedError("log p is far from that of any normal")
    marginal = normal.first(sum(at.numel() for at in positions.values()))
    units = min(math.sqrt(float(density.counts.max())), _WIDEST)
    found = places(network, marginal, positions, plates)
    locs = {i: normal.loc[density.positions(group)] for i, group in others.items()}
    middles = {i: loc.reshape(-1, loc.shape[-1]).mean(0) for i, loc in locs.items()}
    return {index: place.in_units(units) for index, place in found.items()}, middles


def posterior_modes(query: Query, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Locations ``(M, D)``, covariances ``(M, D, D)`` and shares ``(M)`` of the modes of a lone group.

    Raises:
        NotImplementedError: there are too many values.
    """
    density = Density(query)
    if density.size > MOST_CORRELATED:
        raise NotImplementedError(f"{density.size:,} values, of at most {MOST_CORRELATED}")
    drawn, wide = _prior(density, density.pack(query.draws_of(query.run(1))))
    found = peaks(density, [*drawn[:_SEARCHES]], [torch.arange(density.size).unsqueeze(0)], wide)
    at = density.positions(group)
    locs = torch.stack([normal.loc[at] for _, normal in found])
    roots = torch.stack([normal.roots[0][0][at] for _, normal in found])
    return locs, roots @ roots.mT, locs.new_tensor([elbo for elbo, _ in found]).softmax(-1)


def values_in(structure: Structure, plates: Collection[str] = ()) -> int:
    """How many unconstrained values a call has, of the latents in some of these plates, if there are any."""
    latents = [x for x in structure.latents.values() if not plates or {*plates} & {*x.plates}]
    return sum(structure.batch_shape(x.plates).numel() * x.size for x in latents)


def rows_at_once(
    guide: AmortizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any], plates: Collection[str]
) -> int:
    """From how many rows learned groups beside amortized ones are to start.

    Args:
        guide: the guide, set up.
        args: the model's arguments, with rows like any others.
        kwargs: its keyword arguments.
        plates: those that rows are in.
    """
    structure = guide._structure(args, kwargs, complete=True)
    rows = max((plate.batch for plate in structure.plates.values() if plate.name in plates), default=1)
    inside = max(1, values_in(structure, plates))
    outside = values_in(structure) - inside
    return min(max((MOST_CORRELATED - outside) * rows // inside, _FEWEST_ROWS), _MOST_ROWS)


def whole_groups(query: Query, settled: Collection[int] = ()) -> list[int]:
    """The learned groups, by position, of which this call has every element, without those settled."""
    network, structure = query.guide.network, query.structure
    return [
        index
        for index, part in enumerate(network.parts)
        if index not in settled
        and all(name in structure.plates for name in part.group.plates)
        and network.head(index).learned_shape == tuple(structure.batch_shape(part.group.plates))
    ]


def location_and_spread(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The median of draws, and a standard deviation that heavy tails do not widen."""
    draws = draws.detach().nan_to_num(0.0)
    middle = draws.median(0).values
    spread = 1.4826 * (draws - middle).abs().median(0).values
    return middle, torch.where(spread > 0, spread, torch.ones_like(spread))


def _normal(density: Density, starts: list[Tensor], wide: Tensor, groups: Sequence[Tensor]) -> Normal:
    """The normal over all latents, from climbs."""
    blocks = [torch.arange(density.size).unsqueeze(0)]
    if density.size > MOST_CORRELATED:
        blocks = [at.reshape(-1, at.shape[-1]) for at in groups]
        if (most := max(at.shape[-1] for at in blocks)) > _LARGEST_ELEMENT:
            raise NotImplementedError(f"{most:,} values are correlated, of at most {_LARGEST_ELEMENT}")
    wide = wide / density.counts.to(wide).sqrt()
    own = sum(at.numel() for at in groups)
    if own < density.size:
        starts = [relaxed(density, u, own, wide) for u in starts]
    normal = best_normal(density, starts, blocks, wide)
    if normal is None:
        raise NotImplementedError("log p is finite nowhere")
    return normal


def _prior(density: Density, start: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of the prior, ``(M, N)``, and its spread."""
    query = density.query
    try:
        drawn = density.pack(query.model.simulate({}, query.held, count=DRAWS).values)
    except NotImplementedError:  # an improper prior
        drawn = start + torch.randn(DRAWS, density.size).to(start)
    return drawn, location_and_spread(drawn)[1]


def _has_parameters(density: Density, u: Tensor) -> bool:
    """Whether log p has a gradient other than along u."""
    with torch.enable_grad():
        return density.log_prob(u).requires_grad
