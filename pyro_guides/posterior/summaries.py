"""Quantiles of latents: in closed form where q has it, from draws elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_guides.distributions.transforms import strip_independent
from pyro_guides.structure import Latent

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior
    from pyro_guides.posterior.query import Query

__all__ = ["floating", "median", "quantiles"]


def median(posterior: Posterior) -> dict[str, Tensor]:
    """See ``Posterior.median``."""
    network = posterior.guide.network
    closed = all(network.family(index).has_quantiles for index in range(len(network.parts)))
    if closed and not posterior.resampled:
        return _place(posterior.query, torch.tensor(0.5))
    return {name: values[0] for name, values in quantiles(posterior, torch.tensor([0.5])).items()}


def quantiles(posterior: Posterior, levels: Tensor) -> dict[str, Tensor]:
    """See ``Posterior.quantiles``."""
    if posterior.resampled or not _has_closed_quantiles(posterior.query):
        return {name: _of_draws(draws, levels) for name, draws in posterior.draws.items()}
    placed = [_place(posterior.query, level) for level in levels]
    return {name: torch.stack([values[name] for values in placed]) for name in placed[0]}


def floating(draws: Tensor) -> Tensor:
    """Draws that have a mean."""
    return draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())


def _of_draws(draws: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantiles; of discrete values those that occur."""
    ordered = draws.sort(0).values  # torch.quantile refuses more than 16 million values
    at = levels.double() * (len(draws) - 1)
    if not draws.is_floating_point():
        return ordered[at.round().long()]
    low, high = ordered[at.floor().long()], ordered[at.ceil().long()]
    weight = (at - at.floor()).to(ordered).reshape(-1, *[1] * (ordered.dim() - 1))
    return torch.lerp(low, high, weight)


def _place(query: Query, level: Tensor) -> dict[str, Tensor]:
    placed = query.place(lambda q: q.quantile(level.to(q.mean)))
    return {name: placed[name] for name in query.latents}


def _has_closed_quantiles(query: Query) -> bool:
    network = query.guide.network
    alone = all(
        not part.upstream and network.family(index).has_quantiles for index, part in enumerate(network.parts)
    )
    latents = query.structure.latents
    return alone and not any(map(query.is_live, latents)) and all(map(_is_increasing, latents.values()))


def _is_increasing(latent: Latent) -> bool:
    """Whether each value is an increasing function of one unconstrained value."""
    transform = strip_independent(latent.require_transform())
    try:
        increases = bool((torch.as_tensor(transform.sign) == 1).all())  # a tensor where bounds are tensors
        return transform.codomain.event_dim == 0 and increases
    except NotImplementedError:
        return False
