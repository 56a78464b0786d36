"""Data sets that a model draws itself, with the latents that made them, in the place of the real data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from pyro_guides.simulating import as_argument, check_reach
from pyro_guides.structure import Latent, Observed

if TYPE_CHECKING:
    from pyro_guides.posterior import Posterior, Query

__all__ = ["Simulated", "amortized", "coordinates", "in_rows", "other_plates", "simulate"]

_LIBRARY, _FEATURES = 250, 200  # what simulated data are compared with, and by how many of their values
_LARGEST = 100.0  # where unconstrained values of float32 end

PerSite = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Simulated:
    """What the model has drawn M times, n = M · rows in all.

    Attributes:
        truths: the latents, ``(M, *natural shape)``.
        data: the observed sites, ``(M, *natural shape)``.
        references: for each row, unconstrained values that made data like its own, ``(n, D)``.
    """

    truths: PerSite
    data: PerSite
    references: Tensor


# --- what can be judged


def amortized(posterior: Posterior) -> Query:
    """The posterior of all latents whose λ comes from an encoder, given those whose λ is learned.

    Raises:
        ValueError: there are none, or the posterior was refined or resampled.
        NotImplementedError: the model subsamples by itself, or masks latents.
    """
    query = posterior.query
    if posterior.resampled or query.refinement is not None:
        how = "resampled" if posterior.resampled else "refined"
        raise ValueError(
            f"this posterior was {how} for its own rows, in which simulated data have no part; calibrate the "
            "one that guide.posterior(...) returned"
        )
    if query.opened:
        raise NotImplementedError(
            f"the model subsamples {sorted(query.opened)} by itself, and simulates such a subsample only; "
            "use a model that takes the rows it is given whole"
        )
    parts = posterior.guide.network.parts
    own = [(turn, name) for turn in query.turns for name in turn.group.sites if name in query.latents]
    learned = [name for turn, name in own if not parts[turn.part].encodings]
    if len(learned) == len(own):
        raise ValueError(
            f"λ of {learned} was learned for this one data set, so simulations from the prior cannot be put "
            "through the guide; amortize it with an encoder, or judge it by posterior.k_hat"
        )
    judged = query
    if learned:
        judged = query.holding(query.central_draw({name: posterior.draws[name] for name in learned}))
    if masked := [name for name, latent in judged.latents.items() if not _is_whole(latent)]:
        raise NotImplementedError(
            f"the model masks the latents {masked}, and what is masked has no true value; pass arguments "
            "that mask none of them"
        )
    return judged


def _is_whole(latent: Latent) -> bool:
    return latent.mask is None and latent.inner_mask is None


# --- simulations


def simulate(query: Query, rows: int) -> Simulated:
    """Draw data sets like the given one, with at least so many rows in all; what is held stays held.

    Raises:
        ValueError: simulated data cannot take the place of the real ones, or do not reach the encoders.
    """
    per_set = math.prod(query.structure.batch_shape(query.row_plates))
    count = math.ceil(rows / per_set)
    more = min(count, math.ceil(_LIBRARY / per_set))
    values = query.model.simulate({}, query.held, count=count + more).values
    data = {
        name: as_argument(query.structure, query.args, query.kwargs, name, values.get(name))
        for name in query.structure.observed
    }
    _check_reach(query, {name: value[0] for name, value in data.items()})
    seen, library = _features(query, data, (count + more) * per_set).tensor_split([count * per_set])
    nearest = [torch.cdist(some, library[:_LIBRARY]).argmin(-1) for some in seen.split(4096)]
    made_by = coordinates(query, {name: values[name][count:] for name in query.latents})
    return Simulated(
        {name: values[name][:count] for name in query.latents},
        {name: value[:count] for name, value in data.items()},
        made_by[torch.cat(nearest)],
    )


def _check_reach(query: Query, data: PerSite) -> None:
    sources = {encoding.source for part in query.guide.network.parts for encoding in part.encodings}
    check_reach(sources, query.structure, query.args, query.kwargs, data)


def _features(query: Query, data: PerSite, count: int) -> Tensor:
    """Some of the data of each row, in units of their spread, ``(n, F)``; a zero if it has none."""
    sites = query.structure.observed
    inside = [name for name in data if set(query.row_plates) <= set(sites[name].plates)]
    rows = [in_rows(query, data[name], sites[name]).reshape(count, -1).float() for name in inside]
    found = torch.cat(rows, dim=-1) if rows else torch.zeros(count, 1)
    found = found[:, torch.randperm(found.shape[-1], device=found.device)[:_FEATURES]]
    return found / (found.std(0) + 1e-12)


# --- layouts


def other_plates(query: Query, site: Latent | Observed) -> tuple[str, ...]:
    """The plates of a site within a row, outermost first."""
    return tuple(p.name for p in query.structure.plates_of(set(site.plates) - set(query.row_plates)))


def in_rows(query: Query, value: Tensor, site: Latent | Observed, lead: int = 0) -> Tensor:
    """A site's values ``(..., M, *batch, *event)``, row by row: ``(..., n, *plates in a row, *event)``.

    Args:
        query: what is judged.
        value: the values.
        site: the site.
        lead: how many dimensions are left of that of data sets.
    """
    structure = query.structure
    end = lead + 1 + len(structure.batch_shape(site.plates))
    rows = structure.plates_of(query.row_plates)
    value = value.movedim([end + p.dim for p in rows], [lead + 1 + at for at in range(len(rows))])
    within = [structure.plates[name].batch for name in other_plates(query, site)]
    return value.reshape(*value.shape[:lead], -1, *within, *value.shape[end:])


def coordinates(query: Query, values: PerSite, lead: int = 0) -> Tensor:
    """Unconstrained values of all latents of each row, ``(..., n, D)``."""
    found = []
    for name, latent in query.latents.items():
        rows = in_rows(query, query.unconstrained(name, values[name]), latent, lead)
        found.append(rows.reshape(*rows.shape[: lead + 1], -1).double())
    return torch.cat(found, dim=-1).nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)
