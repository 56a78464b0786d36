r"""From a normal over all latents to λ of each learned group, and the coordinates it is learned in.

Of the normal :math:`N(a, P^{-1})` a group takes what its q can hold. Its location is linear in the upstream
values that it sees, :math:`a_g + C_g (u_{<g} - a_{<g})`, C being the regression of the group on them. With
:math:`M = (I - C)^{-1}` the covariance of each element is the inverse of its block of :math:`M^T P M`, which
maximizes the ELBO given C: the normal itself where groups see all they depend on, and the *conditional*
covariance given everything that q makes independent - of diagonal families, given all other elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from pyro_guides.families import BoundFamily, BoundMixture
from pyro_guides.heads import AmortizedHead, Head, LearnedHead, WhitenedHead
from pyro_guides.network import Network
from pyro_guides.starting.climb import Normal
from pyro_guides.structure import Plate

__all__ = ["Place", "centre", "learned", "places", "settle", "settle_apart"]


@final
@dataclass(frozen=True, eq=False)
class Place:
    """Where one group goes.

    Attributes:
        loc: a, ``(*batch, D)``.
        scale: L, ``(*batch, D)`` if diagonal, else ``(*batch, D, D)``.
        slope: C, how the location follows upstream values, ``(*batch, D, V)``; None if it does not.
        seen: a of these, by group; what the network makes upstream values of.
        spread: the standard deviation of q, in units of L.
    """

    loc: Tensor
    scale: Tensor
    slope: Tensor | None = None
    seen: Mapping[int, Tensor] | None = None
    spread: float = 1.0

    def in_units(self, many: float) -> Place:
        """The same q in units of that many times L."""
        return replace(self, scale=self.scale * many, spread=self.spread / many)


def learned(head: Head) -> LearnedHead | None:
    """The parameters behind a head, if it is learned and has not been promoted."""
    inner = head.inner if isinstance(head, WhitenedHead) else head
    return inner if isinstance(inner, LearnedHead) else None


def places(
    network: Network, normal: Normal, positions: Mapping[int, Tensor], plates: Mapping[str, Plate]
) -> dict[int, Place]:
    """Where every learned group goes, by position.

    Args:
        network: the network.
        normal: of all learned groups: of one block, or of one for each, which leaves out what correlates
            them.
        positions: where the values of each of these stand in u, ``(*batch, D)``.
        plates: this call's plates.

    Raises:
        NotImplementedError: a group sees others than these.
    """
    locs = {index: normal.loc[at] for index, at in positions.items()}
    if not normal.whole:
        return {
            index: Place(locs[index], _scale(network.family(index), p.reshape(*positions[index].shape, -1)))
            for index, p in zip(positions, normal.precisions, strict=True)
        }
    (precision,), (root,) = normal.precisions[0], normal.roots[0]
    covariance = root @ root.mT
    follow, slopes = torch.zeros_like(precision), dict[int, Tensor | None]()
    for index, at in positions.items():
        above = _upstream(network, index, positions, plates)
        slope = slopes[index] = None if above is None else _regression(covariance, at, above)
        if above is not None and slope is not None:
            above = above.expand(*at.shape[:-1], -1)
            follow[at.unsqueeze(-1), above.unsqueeze(-2)] = slope
    eye = torch.eye(len(precision)).to(precision)
    mixed = torch.linalg.inv(eye - follow)
    given = mixed.mT @ precision @ mixed
    return {
        index: Place(
            locs[index],
            _scale(network.family(index), given[at.unsqueeze(-1), at.unsqueeze(-2)]),
            slopes[index],
            locs,
        )
        for index, at in positions.items()
    }


def settle(network: Network, index: int, place: Place, plates: Mapping[str, Plate]) -> None:
    """Put q of one group in its place, and let it be learned in the place's units from there.

    Args:
        network: the network; upstream groups are settled already.
        index: the group's position.
        place: where it goes.
        plates: this call's plates.
    """
    family, inner = network.family(index), learned(network.head(index))
    if inner is None:
        raise TypeError(f"{network.parts[index].group} are not learned, or promoted")
    moving = family.moving
    loc, scale = place.loc.to(inner.bias), place.scale.to(inner.bias)
    bias = family.initial(torch.zeros_like(loc), place.spread)
    if inner.weight is not None:
        inner.weight.zero_()
        if place.slope is not None and place.seen is not None:
            weight, middle = _weight(network, index, place, plates)
            inner.weight.copy_(weight)
            bias = bias + (weight @ (inner.origin - middle).unsqueeze(-1)).squeeze(-1)
    inner.bias.copy_(bias)
    network.heads[index] = WhitenedHead(inner, moving, loc, scale, inner.dims)


def settle_apart(network: Network, index: int, locs: Tensor, covariances: Tensor, shares: Tensor) -> None:
    """Put the components of a mixture on modes ``(M, D)``, in units of the narrowest."""
    family, inner = network.family(index), learned(network.head(index))
    if inner is None or not isinstance(family, BoundMixture):
        raise TypeError(f"{network.parts[index].group} are no learned mixture")
    middle = shares @ locs
    unit = covariances.diagonal(dim1=-2, dim2=-1).amin(0).sqrt()
    inner.bias.copy_(family.placed((locs - middle) / unit, covariances / (unit.unsqueeze(-1) * unit), shares))
    network.heads[index] = WhitenedHead(inner, family.moving, middle, unit, inner.dims)


def centre(network: Network, index: int, loc: Tensor, spread: float) -> bool:
    """Let q of all elements of an amortized group start at one place; whether it does.

    Args:
        network: the network.
        index: the group's position.
        loc: where q starts, ``(D,)``.
        spread: the standard deviation of q.
    """
    head = network.head(index)
    if not isinstance(head, AmortizedHead):
        return False
    head.forget(network.family(index).initial(loc.to(head.output.bias), spread))
    return True


def _weight(network: Network, index: int, place: Place, plates: Mapping[str, Plate]) -> tuple[Tensor, Tensor]:
    """What λ of v multiplies upstream values with, ``(*batch, W, V)``, and where these lie at a."""
    seen, slope = place.seen or {}, place.slope
    links = network.parts[index].links.upstream

    def unit(other: int) -> tuple[Tensor, Tensor] | None:
        frame = network.frame(other, {})
        return None if frame is None else (torch.zeros_like(frame[0]), frame[1])

    values = [seen[other] for other in links]
    middle = network.upstream(index, values, plates, lambda other: network.frame(other, {})).values
    per_unit = network.upstream(index, [torch.ones_like(a) for a in values], plates, unit).values
    if middle is None or per_unit is None or slope is None:
        raise RuntimeError(f"{network.parts[index].group} see no upstream values")
    own = slope / per_unit.unsqueeze(-2)
    if place.scale.dim() == place.loc.dim():
        own = own / place.scale.unsqueeze(-1)
    else:
        own = torch.linalg.solve_triangular(place.scale, own, upper=False)
    return _shifts(network.family(index)).to(own) @ own, middle


def _shifts(family: BoundFamily) -> Tensor:
    """How λ changes as u is shifted, ``(W, D)``."""
    zero = torch.zeros(family.size, dtype=torch.float64)
    start, unit = family.initial(zero, 1.0), torch.ones_like(zero)
    still = family.moving(start, zero, unit)
    return torch.stack([family.moving(start, one, unit) - still for one in torch.diag(unit)], dim=-1)


def _upstream(
    network: Network, index: int, positions: Mapping[int, Tensor], plates: Mapping[str, Plate]
) -> Tensor | None:
    """Where the upstream values that a group sees stand in u, ``(*batch, V)``."""
    group, links = network.parts[index].group, network.parts[index].links
    if not positions.keys() >= {*links.upstream}:
        raise NotImplementedError(f"{group} are learned, but see latents that are not")
    values = [positions[other].double() for other in links.upstream]
    found = network.upstream(index, values, plates, lambda _: None).values
    return None if found is None else found.long()


def _regression(covariance: Tensor, own: Tensor, above: Tensor) -> Tensor:
    """C of own values ``(*batch, D)`` on those above, ``(*batch, V)``: ``(*batch, D, V)``."""
    above = above.expand(*own.shape[:-1], -1)
    among = covariance[above.unsqueeze(-1), above.unsqueeze(-2)]
    across = covariance[above.unsqueeze(-1), own.unsqueeze(-2)]
    unit = among.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
    return (torch.linalg.solve(among / (unit * unit.mT), across / unit) / unit).mT


def _scale(family: BoundFamily, precision: Tensor) -> Tensor:
    """The scale of elements with these precisions ``(*batch, D, D)``, as far as the family can hold it."""
    unit = precision.diagonal(dim1=-2, dim2=-1).sqrt()
    if family.closed_under != "triangular":
        return 1.0 / unit
    flipped = (precision / (unit.unsqueeze(-1) * unit.unsqueeze(-2))).flip(-1, -2)
    # The root L of the inverse is triangular as well, and so is its own inverse: P = L⁻ᵀ L⁻¹.
    inverse = torch.linalg.cholesky(flipped).flip(-1, -2).mT
    eye = torch.eye(unit.shape[-1]).to(unit).expand_as(precision)
    return torch.linalg.solve_triangular(inverse, eye, upper=False) / unit.unsqueeze(-1)
