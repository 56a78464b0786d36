r"""Where values that others depend on lie once these are integrated out, by Laplace's method.

The scales of a hierarchy are seen wrongly by a normal over all values at once: log p rises into a spike or
has walls, and the curvature there tells of neither location nor spread of the marginal. Given the scales, the
rest is close to normal, so that

.. math:: \log p(x, s) \approx \log p(x, s, \hat r(s)) + \tfrac12 \log\det 2\pi \Sigma(s)

is the marginal, which is climbed along one coordinate after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_guides.starting.climb import Normal, relaxed
from pyro_guides.starting.density import Density

__all__ = ["profiled"]

_SWEEPS = 8  # at most
_WORK = 8000  # sweeps times first values times values: more would take minutes
_MOST_FIRST, _MOST = 16, 256  # values: each sweep integrates the rest out anew for every first one
_REACH = (-4.0, -2.0, 2.0, 4.0)  # in units of the width along a coordinate
_FAR_OFF = 2.0  # nats: where a place is so much better, widths here tell nothing of widths there
_GAIN = 0.01  # nats that are worth another sweep
_SETTLED = 0.3  # of the logarithm of a width
_CHANGE = 4.0  # by which a width may change in a sweep


def profiled(density: Density, normal: Normal, starts: Sequence[Tensor], first: int, wide: Tensor) -> Normal:
    """A normal over all values, of which the first have location and widths of their marginal.

    Args:
        density: log p.
        normal: where the search starts, and a guess at the widths.
        starts: other places u, ``(N)``. Each coordinate may jump to where it is there, for steps by the width
            of a spike, which is high but holds nothing, would not lead out of it.
        first: how many values come first, V.
        wide: the spread of the prior, ``(N)``.

    Beyond 16 first or 256 values the normal is left as it is.

    Source: Havard Rue, Sara Martino, Nicolas Chopin, "Approximate Bayesian Inference for Latent Gaussian
    Models by Using Integrated Nested Laplace Approximations", JRSS B 2009.
    """
    if first > _MOST_FIRST or density.size > _MOST:
        return normal
    width = (normal.roots[0][0] @ normal.roots[0][0].mT).diagonal()[:first].sqrt()
    here = _marginal(density, normal.loc, first, wide)
    for j in range(first):
        there = max((_marginal(density, _moved(here[1], j, u[j]), first, wide) for u in starts), key=_height)
        if _height(there) > _height(here) + _FAR_OFF:
            here, width[j] = there, wide[j]
    for _ in range(min(_SWEEPS, max(1, _WORK // (first * density.size)))):
        start, before = here, width.clone()
        for j in range(first):
            here, width[j] = _along(density, here, j, width[j], wide[:first], wide)
        if here is start and bool(((width / before).log().abs() < _SETTLED).all()):
            break
    _, _, (precision,) = density.expand(here[1], normal.blocks)
    return _joined(precision[0], here[1], width, wide)


Point = tuple[float, Tensor]  # the log marginal, and u


def _along(
    density: Density, here: Point, j: int, width: Tensor, widest: Tensor, wide: Tensor
) -> tuple[Point, Tensor]:
    """The best of some points along one coordinate, and what is known of the width there then."""

    def at(reach: float) -> Point:
        return _marginal(density, _moved(here[1], j, here[1][j] + reach * width), len(widest), wide)

    tried = {reach: at(reach) for reach in _REACH}
    best = max([here, *tried.values()], key=_height)
    factor = 2.0 if best is tried[-4.0] or best is tried[4.0] else 1.0  # the top is far away
    if best is here:
        below, above = (_height(here) - _height(tried[reach]) for reach in (-2.0, 2.0))
        bend = (below + above) / 4.0  # of a parabola, in units of the width
        factor = min(max(max(bend, 1e-9) ** -0.5, 1.0 / _CHANGE), _CHANGE)
        if bend > 0.0:
            top = at((below - above) / (4.0 * bend))
            best = top if _height(top) > _height(here) + _GAIN else here
    return best, torch.minimum(factor * width, widest[j])


def _moved(u: Tensor, j: int, value: Tensor) -> Tensor:
    u = u.clone()
    u[j] = value
    return u


def _height(point: Point) -> float:
    return point[0]


def _marginal(density: Density, u: Tensor, first: int, wide: Tensor) -> Point:
    """Laplace's log marginal of the first values of u, and u with the others where they are best."""
    u = relaxed(density, u, first, wide)
    block = torch.arange(first, density.size).unsqueeze(0)
    height, _, precisions = density.expand(u, [block])
    root = Normal.around(u[first:], [block - first], precisions, wide[first:]).roots[0]
    return float(height + root.diagonal(dim1=-2, dim2=-1).log().sum()), u


def _joined(precision: Tensor, u: Tensor, width: Tensor, wide: Tensor) -> Normal:
    """The normal of which the first values have these widths, and the others their curvature given them."""
    first = len(width)
    rest = _whole(precision[first:, first:], u[first:], wide[first:])
    (inner,), (root,) = rest.precisions[0], rest.roots[0]
    across = precision[first:, :first]
    through = across.mT @ root @ root.mT @ across
    above = _whole(precision[:first, :first] - through, u[:first], wide[:first]).precisions[0][0]
    factor = 1.0 / (width * above.diagonal().sqrt())
    above = above * factor * factor.unsqueeze(-1) + through
    return _whole(torch.cat([torch.cat([above, across.mT], 1), torch.cat([across, inner], 1)]), u, wide)


def _whole(precision: Tensor, u: Tensor, wide: Tensor) -> Normal:
    return Normal.around(u, [torch.arange(len(u)).unsqueeze(0)], [precision.unsqueeze(0)], wide)
