r"""Where values that others depend on lie once these are integrated out, by Laplace's method.

The scales of a hierarchy are seen wrongly by a normal over all values at once: log p rises into a spike or
has walls, and the curvature there tells of neither location nor spread of the marginal. Given the scales, the
rest is close to normal, so that

.. math:: \log p(x, s) \approx \log p(x, s, \hat r(s)) + \tfrac12 \log\det 2\pi \Sigma(s)

is the marginal, which is climbed along one coordinate after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_guides.starting.climb import Normal, relaxed
from pyro_guides.starting.density import Density

__all__ = ["profiled"]

_SWEEPS = 4  # at most
_MOST_FIRST, _MOST = 16, 128  # values: each sweep integrates the rest out anew for every first one
_REACH = (-4.0, -2.0, 2.0, 4.0)  # in units of the width along a coordinate
_CHANGE = 4.0  # by which a width may change in a sweep


def profiled(density: Density, normal: Normal, first: int, wide: Tensor) -> Normal:
    """A normal over all values, of which the first have location and widths of their marginal.

    Args:
        density: log p.
        normal: where the search starts, and a guess at the widths.
        first: how many values come first, V.
        wide: the spread of the prior, ``(N)``.

    Beyond 16 first or 128 values the normal is left as it is.

    Source: Havard Rue, Sara Martino, Nicolas Chopin, "Approximate Bayesian Inference for Latent Gaussian
    Models by Using Integrated Nested Laplace Approximations", JRSS B 2009.
    """
    if first > _MOST_FIRST or density.size > _MOST:
        return normal
    width = (normal.roots[0][0] @ normal.roots[0][0].mT).diagonal()[:first].sqrt()
    here = _marginal(density, normal.loc, first, wide)
    for _ in range(_SWEEPS):
        start = here
        for j in range(first):
            here, width[j] = _along(density, here, j, width[j], wide[:first], wide)
        if here is start:
            break
    _, _, (precision,) = density.expand(here[1], normal.blocks)
    return _joined(precision[0], here[1], width, wide)


Point = tuple[float, Tensor]  # the log marginal, and u


def _along(
    density: Density, here: Point, j: int, width: Tensor, widest: Tensor, wide: Tensor
) -> tuple[Point, Tensor]:
    """The best of some points along one coordinate, and what is known of the width there then."""
    tried = [here]
    for reach in _REACH:
        u = here[1].clone()
        u[j] += reach * width
        tried.append(_marginal(density, u, len(widest), wide))
    best = max(tried, key=lambda point: point[0])
    factor = 2.0  # the top is further away than thought
    if best is here:
        bend = (2.0 * here[0] - tried[2][0] - tried[3][0]) / 4.0  # of a parabola, in units of the width
        factor = min(max(max(bend, 1e-9) ** -0.5, 1.0 / _CHANGE), _CHANGE)
    return best, torch.minimum(factor * width, widest[j])


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
