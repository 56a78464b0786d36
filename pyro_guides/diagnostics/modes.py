r"""Finds the modes of each row's posterior that q has lost.

Importance weights know only of where q draws; a q that sits on one of two modes looks perfect. So modes are
looked for from overdispersed starts - draws of the prior, draws of q thrown far, draws of q itself - that
climb log p(x, u). Two ends belong to one mode unless log p dips between them. A mode's share of the
posterior comes from importance sampling around all of them; its share of q from how many draws of q lie
nearest to it, or climb to it, whichever is more. A mode is lost if q has less than a quarter of its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.diagnostics.landscape import Landscape, StudentT
from pyro_guides.distributions import triangular_root
from pyro_guides.posterior import Posterior
from pyro_guides.statistics import arguments

__all__ = ["Modes", "find_modes"]

_STEPS = 300  # of the climb
_RATE = 0.1  # of a step, in units that shrink from the prior's spread to that of q
_BARRIER = 1.5  # nats by which log p dips between two modes
_POINTS = 9  # where it is looked at in between
_MOST = 8  # modes per row
_LEAST_SHARE = 0.05  # of the posterior, for a mode to matter
_DRAWS = 256  # per mode, to weigh it


@final
@dataclass(frozen=True, eq=False)
class Modes:
    """The modes of each row's posterior, the highest first.

    Attributes:
        location: unconstrained values, ``(modes, *rows, D)``.
        share: of the posterior, ``(modes, *rows)``; zero where a row has fewer modes.
        share_of_q: of q, ``(modes, *rows)``.
    """

    location: Tensor
    share: Tensor
    share_of_q: Tensor

    @property
    def missing(self) -> Tensor:
        """The share of the posterior in modes that q has lost, ``(*rows)``."""
        lost = (self.share >= _LEAST_SHARE) & (self.share_of_q < self.share / 4)
        return torch.where(lost, self.share - self.share_of_q, torch.zeros_like(self.share)).sum(0)

    @property
    def count(self) -> Tensor:
        """How many modes hold at least 5 % of the posterior, ``(*rows)``."""
        return (self.share >= _LEAST_SHARE).sum(0)


def find_modes(posterior: Posterior, *, starts: int = 48) -> Modes:
    """Look for modes of the posterior, and for q's share of each.

    Args:
        posterior: the rows.
        starts: how many climbs a row gets: a third from draws of q, a third from draws of q thrown far, a
            third from draws of the prior.

    Raises:
        ValueError: a latent is discrete, or ``starts`` is less than 6.

    Source: the climbs and weights follow no one paper; for importance sampling around modes see Lu Zhang, Bob
    Carpenter, Andrew Gelman, Aki Vehtari, "Pathfinder: Parallel Quasi-Newton Variational Inference", 2022,
    arXiv:2108.03782.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, find_modes
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z.abs(), 0.3), obs=x)  # which sign had z?
        >>> find_modes(AmortizedGuide(model).posterior(torch.tensor([1.5])), starts=24).count
        tensor([2])
    """
    if not isinstance(posterior, Posterior):
        kind = type(posterior).__name__
        raise TypeError(f"find_modes takes what guide.posterior(...) returns, got a {kind}")
    arguments.count("starts", starts, least=6)
    query = posterior.query.remembering()
    if discrete := [name for name, latent in query.latents.items() if latent.discrete]:
        raise ValueError(f"modes are looked for among continuous values, but {discrete} are discrete")
    landscape = Landscape(query)
    of_q = landscape.pack(posterior.draws)
    begin, wide, narrow = _starts(landscape, of_q, starts // 3)
    ends, heights = _climb(landscape, begin, wide, narrow)
    label, tops = _cluster(landscape, ends, heights)
    found = range(len(tops))
    peaks = _Peaks(landscape, tops, narrow, torch.stack([(label == mode).any(0) for mode in found]))
    climbed = torch.stack([(label[: starts // 3] == mode).to(tops).mean(0) for mode in found])
    nearest = peaks.nearest(of_q[:_DRAWS])
    lie = torch.stack([(nearest == mode).to(tops).mean(0) for mode in found])
    return Modes(tops, peaks.shares(), torch.maximum(climbed, lie))


def _starts(landscape: Landscape, u: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where climbs start, ``(3 count, *rows, D)``, and the spread of the prior and of q."""
    narrow = u.std(0).clamp(min=1e-6) if len(u) > 1 else torch.ones_like(u[0])
    chosen = u[torch.linspace(0, len(u) - 1, count).long()]
    tails = torch.distributions.StudentT(3.0).sample(chosen.shape).to(u)
    thrown = chosen + 5.0 * narrow * tails
    try:
        drawn = landscape.pack(landscape.query.model.simulate({}, landscape.query.held, count=count).values)
    except NotImplementedError:  # an improper prior has no draws: more of those thrown far
        drawn = chosen + 25.0 * narrow * tails.flip(0)
    return torch.cat([chosen, thrown, drawn]), torch.maximum(drawn.std(0), narrow), narrow


def _climb(landscape: Landscape, u: Tensor, wide: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """Adam on log p from each start: ends and their heights.

    A step is a tenth of the prior's spread at first and of that of q at last, so that climbs get anywhere and
    come to rest.
    """
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    for step in range(_STEPS):
        _, gradient = landscape.gradient(u)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        move = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-12)
        along = step / (_STEPS - 1)
        u = u + _RATE * wide ** (1 - along) * (narrow * 0.1) ** along * move.clamp(-3.0, 3.0)
    with torch.no_grad():
        return u, landscape.log_prob(u)


@torch.no_grad()
def _cluster(landscape: Landscape, ends: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """Which mode each end belongs to, ``(ends, *rows)``, -1 for none; and the highest end of each mode."""
    label = torch.full(heights.shape, -1)
    leaders = []
    for mode in range(_MOST):
        free = label == -1
        if not bool(free.any()):
            break
        leader = torch.where(free, heights, torch.full_like(heights, -math.inf)).argmax(0)
        index = leader[None, ..., None].expand(1, *ends.shape[1:])
        top = ends.gather(0, index)
        peak = heights.gather(0, leader.unsqueeze(0))
        dip = _dips(landscape, ends, heights, top, peak)
        label = torch.where(free & (dip < _BARRIER), torch.full_like(label, mode), label)
        leaders.append(top.squeeze(0))
    return label, torch.stack(leaders)


def _dips(landscape: Landscape, ends: Tensor, heights: Tensor, top: Tensor, peak: Tensor) -> Tensor:
    """By how much log p dips between each end and the top of a mode."""
    lowest = torch.minimum(heights, peak)
    floor = lowest
    for at in torch.linspace(0, 1, _POINTS + 2)[1:-1].tolist():
        floor = torch.minimum(floor, landscape.log_prob(ends + at * (top - ends)))
    return lowest - floor


class _Peaks:
    """A t distribution around each mode, as wide as log p is curved there.

    Args:
        landscape: the posterior densities.
        tops: where modes are, ``(modes, *rows, D)``.
        narrow: the spread of q, ``(*rows, D)``.
        there: which rows have which modes, ``(modes, *rows)``.
    """

    def __init__(self, landscape: Landscape, tops: Tensor, narrow: Tensor, there: Tensor) -> None:
        self.landscape = landscape
        self.there = there
        self.modes = [StudentT(top, _factor(landscape, top, narrow)) for top in tops]

    def nearest(self, u: Tensor) -> Tensor:
        """The mode whose t distribution is densest at u, ``(M, *rows)``."""
        return self._densities(u).argmax(0)

    @torch.no_grad()
    def shares(self) -> Tensor:
        """Each mode's share of the posterior, by importance sampling from all of the t distributions."""
        u = torch.cat([mode.sample(_DRAWS) for mode in self.modes])
        densities = self._densities(u)
        there = self.there.repeat_interleave(_DRAWS, dim=0)
        log_weights = self.landscape.log_prob(u) - densities.logsumexp(0)
        log_weights = log_weights.masked_fill(~there, -math.inf)
        weights = (log_weights - log_weights.logsumexp(0)).exp().nan_to_num()
        nearest = densities.argmax(0)
        return torch.stack([(weights * (nearest == mode)).sum(0) for mode in range(len(self.modes))])

    def _densities(self, u: Tensor) -> Tensor:
        """Log density of u ``(M, *rows, D)`` around each mode, ``(modes, M, *rows)``; −inf without a mode."""
        densities = torch.stack([mode.log_prob(u) for mode in self.modes])
        return densities.masked_fill(~self.there.unsqueeze(1), -math.inf)


def _factor(landscape: Landscape, top: Tensor, narrow: Tensor) -> Tensor:
    """A triangular root of the inverse of minus the Hessian of log p at a point, ``(*rows, D, D)``."""
    step = 0.1 * narrow
    basis = torch.eye(landscape.size, dtype=top.dtype).reshape(-1, *[1] * (top.dim() - 1), landscape.size)
    _, ahead = landscape.gradient(top + step * basis)
    _, behind = landscape.gradient(top - step * basis)
    # Rows of the Hessian in units of q's spread.
    hessian = ((ahead - behind) * narrow / 0.2).movedim(0, -2)
    hessian = -(hessian + hessian.mT) / 2
    values, vectors = torch.linalg.eigh(torch.nan_to_num(hessian, 0.0, 0.0, 0.0))
    values = values.clamp(min=0.05)  # flat and rising directions are given some width
    return narrow.unsqueeze(-1) * triangular_root(vectors * values.reciprocal().sqrt().unsqueeze(-2))
