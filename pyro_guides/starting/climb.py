r"""Normal approximations along climbs of log p(x, u), of which the one with the highest ELBO is kept.

A climb goes in rounds. Each takes the curvature P where it is, yields the normal
:math:`N(u + P^{-1} \nabla \log p, P^{-1})`, and goes as far towards its centre as log p grows, so that scales
and correlations of the data do not matter. The mode itself may be a spike that holds no mass, as of a funnel;
the ELBO of the normals on the way tells.

Values of a row that stands for k rows count k times: log p grows with k, and P with it, but each of the k
rows has uncertainty of its own. Given the values before them, such values are as wide as they are in one
row, and their entropy counts k times. Without that, scales that rows share would look best as spikes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.distributions import triangular_root
from pyro_guides.starting.density import Density

__all__ = ["Normal", "best_normal", "peaks", "relaxed"]

_ROUNDS = 40  # most climbs take fewer than ten
_PATIENCE = 8  # of these without a higher ELBO
_LENGTHS = (-7.0, 0.0, 29)  # of steps that are tried: powers of ten, and how many
_SIZES = (1.0, 0.5, 0.25)  # in which a normal is tried: in a funnel, only a narrow one avoids its walls
_ALIKE = 0.05  # nats per value that a wider normal may cost
_SETTLED = 1e-4  # nats per round; the normal is a step ahead
_AGREED = 1.0  # nats between the ELBOs of two climbs that need no third
_SLIGHT = 5.0  # nats by which a mode's ELBO may lie below the best: it holds less than a hundredth, then
_DISTINCT = 4.0  # standard deviations between modes
_COARSE = 0.05  # standard deviations by which rounding may move a draw
_NOWHERE = -1e29  # what stands for an infinite ELBO
_NOISE = 64  # draws per ELBO
_FLAT = 0.1  # how much wider than the prior a normal gets before it is taken to be as wide as that
_LEAST_CURVATURE = {torch.float64: 1e-11, torch.float32: 1e-6}  # in units of the diagonal's


@final
@dataclass(frozen=True, eq=False)
class Normal:
    """A normal over u, of blocks that are independent.

    Attributes:
        loc: ``(N)``.
        blocks: positions ``(E, D)`` of elements that have a covariance each.
        precisions: the inverses of these, ``(E, D, D)``, of every block.
        roots: their triangular roots, ``(E, D, D)``.
        size: how many times as wide it is as the curvature says.
    """

    loc: Tensor
    blocks: Sequence[Tensor]
    precisions: Sequence[Tensor]
    roots: Sequence[Tensor]
    size: float = 1.0

    @classmethod
    def around(
        cls, u: Tensor, blocks: Sequence[Tensor], precisions: Sequence[Tensor], wide: Tensor
    ) -> Normal:
        """The normal at u with these precisions, made positive; ``wide``, ``(N)``, where log p is flat."""
        pairs = [_positive(p, wide[block]) for p, block in zip(precisions, blocks, strict=True)]
        return cls(u, blocks, [precision for precision, _ in pairs], [root for _, root in pairs])

    @property
    def whole(self) -> bool:
        """Whether one block holds all of u."""
        return self.blocks[0].numel() == len(self.loc) and len(self.blocks[0]) == 1

    def spread(self, noise: Tensor) -> Tensor:
        """L ε, ``(..., N)``."""
        return self._mapped(noise, self.roots)

    def solve(self, slope: Tensor) -> Tensor:
        """The step from a slope of log p to where it is level if curvature stays as it is, ``(N)``."""
        return self.spread(self._mapped(slope, [root.mT for root in self.roots]))

    def moved(self, step: Tensor) -> Normal:
        """The same elsewhere."""
        return Normal(self.loc + step, self.blocks, self.precisions, self.roots)

    def scaled(self, size: float) -> Normal:
        """The same with standard deviations that many times as large."""
        precisions = [precision / size**2 for precision in self.precisions]
        return Normal(self.loc, self.blocks, precisions, [root * size for root in self.roots], size)

    def first(self, count: int) -> Normal:
        """The marginal normal of the first values, of a normal of one block."""
        root = self.roots[0][:, :count, :count]
        inverse = torch.linalg.inv(root)
        return Normal(self.loc[:count], [self.blocks[0][:, :count]], [inverse.mT @ inverse], [root])

    def elbos(self, density: Density, noise: Tensor) -> list[float]:
        """The ELBO in each size up to a constant, for noise ``(M, N)``; minus infinity in one too small.

        Too small it is if numbers are too coarse for its draws: in a spike, values come out equal that would
        differ, and log p too high.
        """
        sizes = torch.tensor(_SIZES).to(noise).reshape(-1, 1, 1)
        counts = density.counts.to(noise)
        noise = counts.sqrt() * noise
        points = self.loc + sizes * self.spread(noise)
        inverses = [torch.linalg.inv(root) for root in self.roots]
        rounded = (self._mapped(points - self.loc, inverses) / sizes - noise).abs().amax((1, 2))
        widths = torch.zeros_like(counts)
        for block, root in zip(self.blocks, self.roots, strict=True):
            widths[block] = root.diagonal(dim1=-2, dim2=-1)
        volume = (counts * (widths * counts.sqrt()).log()).sum()
        heights = density.log_prob(points.flatten(0, 1)).reshape(len(sizes), -1).mean(-1)
        elbos = heights + volume + counts.sum() * sizes.flatten().log()
        return torch.where(rounded < _COARSE, elbos, -math.inf).tolist()

    def _mapped(self, vector: Tensor, maps: Sequence[Tensor]) -> Tensor:
        mapped = torch.zeros_like(vector)
        for block, matrix in zip(self.blocks, maps, strict=True):
            mapped[..., block] = (matrix @ vector[..., block].unsqueeze(-1)).squeeze(-1)
        return mapped


def best_normal(
    density: Density, starts: Sequence[Tensor], blocks: Sequence[Tensor], wide: Tensor
) -> Normal | None:
    """The normal with the highest ELBO met on the way from the starts, until two agree; None if none is met.

    Args:
        density: log p.
        starts: where climbs start, ``(N)`` each.
        blocks: which values are to be correlated.
        wide: the spread of the prior, ``(N)``.

    Source: Lu Zhang, Bob Carpenter, Andrew Gelman, Aki Vehtari, "Pathfinder: Parallel quasi-Newton
    variational inference", 2022, arXiv:2108.03782; here with the Hessian itself.
    """
    noise = torch.randn(_NOISE, density.size).to(wide)
    highest, best = -math.inf, None
    for u in starts:
        elbos, normal = _best_met(_climb(density, u, blocks, wide), density, noise)
        elbo = max(elbos)
        agreed = abs(elbo - highest) < _AGREED and elbo == elbos[0]  # narrow ones may be in two spikes
        if elbo > highest:
            slack = _ALIKE * float(density.counts.sum())
            highest, best = (
                elbo,
                normal.scaled(_SIZES[[found >= elbo - slack for found in elbos].index(True)]),
            )
        if agreed:
            break
    return best if highest > _NOWHERE else None


def peaks(
    density: Density, starts: Sequence[Tensor], blocks: Sequence[Tensor], wide: Tensor
) -> list[tuple[float, Normal]]:
    """The normals that climbs from all starts lead to, each mode once, with their ELBOs, the best one first.

    Args:
        density: log p.
        starts: where climbs start, ``(N)`` each.
        blocks: one that holds all values.
        wide: the spread of the prior, ``(N)``.
    """
    noise = torch.randn(_NOISE, density.size).to(wide)
    met = [_best_met(_climb(density, u, blocks, wide), density, noise) for u in starts]
    found: list[tuple[float, Normal]] = []
    for (elbo, *_), normal in sorted(met, key=lambda pair: -pair[0][0]):
        away = [normal.loc - other.loc for _, other in found]
        near = [
            d @ other.precisions[0][0] @ d < _DISTINCT**2 for d, (_, other) in zip(away, found, strict=True)
        ]
        if elbo > max(_NOWHERE, found[0][0] - _SLIGHT if found else _NOWHERE) and not any(near):
            found.append((elbo, normal))
    return found


def relaxed(density: Density, u: Tensor, first: int, wide: Tensor) -> Tensor:
    """Where a climb from u ends that leaves the first values as they are, ``(N)``.

    Scales that rows share fit to the rows' values from there, not to those that a prior has drawn.
    """
    block = torch.arange(first, density.size).unsqueeze(0)
    own, before = torch.arange(density.size - first).unsqueeze(0), torch.tensor(-math.inf)
    for _ in range(_ROUNDS):
        height, slope, precisions = density.expand(u, [block])
        if not height > before + _SETTLED:
            break
        before = height
        step = Normal.around(u[first:], [own], precisions, wide[first:]).solve(slope[first:])
        u = _highest(density, u, torch.cat([torch.zeros_like(u[:first]), step]))
    return u


def _best_met(way: Iterator[Normal], density: Density, noise: Tensor) -> tuple[list[float], Normal]:
    """The normal with the highest ELBO on a way up, and its ELBOs; left where it leads into a spike."""
    normal = next(way)
    elbos, since = normal.elbos(density, noise), 0
    for other in way:
        found = other.elbos(density, noise)
        since += max(elbos) > _NOWHERE
        if max(found) > max(elbos):
            elbos, normal, since = found, other, 0
        if since >= _PATIENCE:
            break
    return elbos, normal


def _climb(density: Density, u: Tensor, blocks: Sequence[Tensor], wide: Tensor) -> Iterator[Normal]:
    """Normals on the way up from u."""
    before, last, towards = torch.tensor(-math.inf), torch.zeros_like(u), torch.zeros_like(u)
    for _ in range(_ROUNDS):
        height, slope, precisions = density.expand(u, blocks)
        here = Normal.around(u, blocks, precisions, wide)
        step = here.solve(slope)
        yield here.moved(step)
        if not height > before + _SETTLED:
            return
        towards = step if here.whole else _conjugate(step, slope, last, towards)
        before, last = height, slope
        u = _highest(density, u, towards)


def _conjugate(step: Tensor, slope: Tensor, last: Tensor, towards: Tensor) -> Tensor:
    """The direction of preconditioned conjugate gradients (Polak, Ribière), for want of Newton's step.

    Args:
        step: the preconditioned slope.
        slope: the slope of log p.
        last: the slope one round ago.
        towards: the direction one round ago.
    """
    old = last @ towards
    if not old > 0:
        return step
    turned = step + ((slope - last) @ step / old).clamp(min=0.0) * towards
    return turned if slope @ turned > 0 else step


def _highest(density: Density, u: Tensor, step: Tensor) -> Tensor:
    """The highest of some points along a step, u itself included."""
    lengths = torch.cat([torch.zeros(1), torch.logspace(*_LENGTHS)]).to(u)
    points = u + lengths.unsqueeze(-1) * step
    return points[density.log_prob(points).argmax()]


def _positive(precision: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """The precision with positive curvature in every direction, and the triangular root of its inverse."""
    least = _LEAST_CURVATURE.get(precision.dtype, 1e-4)
    exact = precision.double().nan_to_num(0.0, 0.0, 0.0)
    unit = exact.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    flat = unit * wide < _FLAT
    unit = torch.where(flat, 1.0 / wide.double(), unit)
    scaled = exact / (unit.unsqueeze(-1) * unit.unsqueeze(-2)) + flat.double().diag_embed()
    values, vectors = torch.linalg.eigh(scaled)
    values = values.abs().clamp(min=least)
    directions = vectors * unit.unsqueeze(-1)
    positive = (directions * values.unsqueeze(-2)) @ directions.mT
    root = triangular_root(vectors / unit.unsqueeze(-1) * (1.0 / values).sqrt().unsqueeze(-2))
    return positive.to(precision), root.to(precision)
