"""Normal families: diagonal, full-rank and low-rank."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_guides.arguments import check_count, check_flags
from pyro_guides.distributions import (
    CholeskyScale,
    DiagonalScale,
    LowRankScale,
    Scale,
    VectorNormal,
)
from pyro_guides.families.base import BoundFamily, Family, Maps

__all__ = ["SMALLEST_SCALE", "DiagonalNormal", "FullRankNormal", "LowRankNormal"]

# Keeps log q and its gradients finite when an encoder overshoots; far below any posterior's scale.
SMALLEST_SCALE = 1e-6
# Zero directions would be a saddle point: their gradient vanishes with them.
_INITIAL_DIRECTIONS = 0.01
# For directions that must not change q: their squares vanish beside one, their gradients do not.
_NEGLIGIBLE_DIRECTIONS = 1e-6


@final
@dataclass(frozen=True)
class DiagonalNormal(Family):
    r"""Independent normals: :math:`q(u) = \prod_d N(u_d; \mu_d, s_d^2)`, λ = (μ, s), W = 2D.

    The cheapest family. It finds the posterior means of nearly normal posteriors, but its standard
    deviations are the conditional ones, too small whenever latents are correlated.

    Args:
        stick_the_landing: drop the zero-mean part of the entropy's gradient, so that the gradient's
            variance vanishes when q is exact (Roeder et al. 2017, arXiv:1703.09194).

    Source: Diederik P. Kingma, Max Welling, "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.

    Example:
        >>> import torch
        >>> q = DiagonalNormal().bind(2)
        >>> q(q.initial(torch.zeros(2), 0.5)).variance
        tensor([0.2500, 0.2500])
    """

    stick_the_landing: bool = True

    def __post_init__(self) -> None:
        check_flags("DiagonalNormal", stick_the_landing=self.stick_the_landing)

    def bind(self, size: int) -> BoundFamily:
        return _BoundDiagonal(size, stick_the_landing=self.stick_the_landing)


@final
@dataclass(frozen=True)
class FullRankNormal(Family):
    r"""The normal with any covariance: :math:`u = \mu + \mathrm{diag}(s)(I + T)\varepsilon`.

    T is strictly lower triangular and starts at zero, so the family starts as the diagonal one.
    λ = (μ, s, √D T) has W = 2D + D(D - 1)/2 values; beyond D of about 32 take :class:`LowRankNormal`.

    Args:
        stick_the_landing: see :class:`DiagonalNormal`.

    Source: Michalis Titsias, Miguel Lázaro-Gredilla, "Doubly Stochastic Variational Bayes for
    non-Conjugate Inference", ICML 2014.

    Example:
        >>> import torch
        >>> q = FullRankNormal().bind(3)
        >>> q(q.initial(torch.zeros(7, 3), 0.1)).rsample((5,)).shape
        torch.Size([5, 7, 3])
    """

    stick_the_landing: bool = True

    def __post_init__(self) -> None:
        check_flags("FullRankNormal", stick_the_landing=self.stick_the_landing)

    def bind(self, size: int) -> BoundFamily:
        return _BoundFullRank(size, stick_the_landing=self.stick_the_landing)


@final
@dataclass(frozen=True)
class LowRankNormal(Family):
    r"""A normal correlated along few directions: :math:`u = \mu + \mathrm{diag}(d)(I + UU^T)\varepsilon`.

    U is D × r. Determinant and inverse cost O(D r²), and the map is always invertible.
    λ = (μ, d, U) has W = (2 + r) D values.

    Args:
        rank: r, at least 1.
        stick_the_landing: see :class:`DiagonalNormal`.

    Raises:
        ValueError: ``rank`` is less than 1.

    Source: Victor M.-H. Ong, David J. Nott, Michael S. Smith, "Gaussian Variational Approximation with
    a Factor Covariance Structure", 2018, arXiv:1701.03208 (another parameterization of the idea).

    Example:
        >>> LowRankNormal(2).bind(100).width
        400
    """

    rank: int
    stick_the_landing: bool = True

    def __post_init__(self) -> None:
        check_count("LowRankNormal", "rank", self.rank, 1, "for no correlation use DiagonalNormal()")
        check_flags("LowRankNormal", stick_the_landing=self.stick_the_landing)

    def bind(self, size: int) -> BoundFamily:
        rank = min(self.rank, size)
        return _BoundLowRank(size, rank, stick_the_landing=self.stick_the_landing)


class _BoundNormal(BoundFamily):
    """λ = (μ, unconstrained scales, couplings); subclasses say what the couplings couple."""

    has_quantiles = True
    closed_under: Maps = "diagonal"

    def __init__(self, size: int, couplings: int, *, stick_the_landing: bool) -> None:
        super().__init__()
        self.size = size
        self.width = 2 * size + couplings
        self.stick_the_landing = stick_the_landing

    @abstractmethod
    def scale(self, diagonal: Tensor, couplings: Tensor, scored: Tensor | None) -> Scale:
        """The linear map of u = μ + S ε."""

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        if type(other) is type(self) and other.width == self.width:
            return parameters
        return super().adopt(other, parameters)

    def move(self, parameters: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        inner, raw, couplings = self.split(parameters)
        diagonal = scale * (softplus(raw) + SMALLEST_SCALE)
        return torch.cat([loc + scale * inner, raw_scale(diagonal), couplings], dim=-1)

    def split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """λ as (μ, unconstrained scales, couplings)."""
        return parameters.split([self.size, self.size, self.width - 2 * self.size], dim=-1)

    def initial_couplings(self, loc: Tensor) -> Tensor:
        """Couplings that leave q (nearly) diagonal."""
        return loc.new_zeros(*loc.shape[:-1], self.width - 2 * self.size)

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        return torch.cat([loc, raw_scale(torch.full_like(loc, scale)), self.initial_couplings(loc)], dim=-1)

    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> VectorNormal:
        loc, raw, couplings = self.split(parameters)
        scale = self.scale(softplus(raw) + SMALLEST_SCALE, couplings, scored)
        return VectorNormal(loc, scale, stick_the_landing=self.stick_the_landing)


def raw_scale(scale: Tensor) -> Tensor:
    """The element of λ that gives a scale: the inverse of softplus."""
    excess = (scale - SMALLEST_SCALE).clamp_min(torch.finfo(scale.dtype).tiny)
    return excess + (-(-excess).expm1()).log()


@final
class _BoundDiagonal(_BoundNormal):
    factorized = True

    def __init__(self, size: int, *, stick_the_landing: bool) -> None:
        super().__init__(size, 0, stick_the_landing=stick_the_landing)

    def scale(self, diagonal: Tensor, couplings: Tensor, scored: Tensor | None) -> Scale:
        return DiagonalScale(diagonal, scored)

    def select(self, parameters: Tensor, start: int, stop: int, scored: Tensor | None = None) -> VectorNormal:
        if (start, stop) == (0, self.size):
            return self(parameters, scored)
        loc = parameters[..., start:stop]
        raw = parameters[..., self.size + start : self.size + stop]
        scale = DiagonalScale(softplus(raw) + SMALLEST_SCALE, scored)
        return VectorNormal(loc, scale, stick_the_landing=self.stick_the_landing)


@final
class _BoundFullRank(_BoundNormal):
    closed_under: Maps = "triangular"

    def __init__(self, size: int, *, stick_the_landing: bool) -> None:
        super().__init__(size, size * (size - 1) // 2, stick_the_landing=stick_the_landing)

    def scale(self, diagonal: Tensor, couplings: Tensor, scored: Tensor | None) -> Scale:
        if self.size == 1:
            return DiagonalScale(diagonal, scored)
        # D couplings add up in a row; so scaled, a step of all of them moves u as one of s does.
        return CholeskyScale(diagonal, couplings / math.sqrt(self.size), scored)

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        if isinstance(other, _BoundDiagonal):
            couplings = parameters.new_zeros(*parameters.shape[:-1], self.width - 2 * self.size)
            return torch.cat([parameters, couplings], dim=-1)
        if isinstance(other, _BoundLowRank):
            return self._factorized(other(parameters))
        return super().adopt(other, parameters)

    def _factorized(self, q: VectorNormal) -> Tensor:
        """λ of any normal, by the triangular root of its covariance."""
        return self._from_root(q.loc, q.scale.triangular_root())

    def move(self, parameters: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == loc.dim():
            return super().move(parameters, loc, scale)
        inner, raw, couplings = self.split(parameters)
        diagonal = softplus(raw) + SMALLEST_SCALE
        strict = CholeskyScale(diagonal, couplings / math.sqrt(self.size)).strict
        eye = torch.eye(self.size, dtype=strict.dtype, device=strict.device)
        moved = loc + (scale @ inner.unsqueeze(-1)).squeeze(-1)
        return self._from_root(moved, scale @ (diagonal.unsqueeze(-1) * (eye + strict)))

    def _from_root(self, loc: Tensor, root: Tensor) -> Tensor:
        """λ of the normal with a given triangular root of its covariance."""
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1, device=root.device)
        couplings = (root / diagonal.unsqueeze(-1))[..., rows, columns] * math.sqrt(self.size)
        return torch.cat([loc, raw_scale(diagonal), couplings], dim=-1)


@final
class _BoundLowRank(_BoundNormal):
    def __init__(self, size: int, rank: int, *, stick_the_landing: bool) -> None:
        super().__init__(size, size * rank, stick_the_landing=stick_the_landing)
        self.rank = rank
        self.register_buffer("seeds", _NEGLIGIBLE_DIRECTIONS * torch.randn(size, rank), persistent=True)
        self.seeds: Tensor

    def scale(self, diagonal: Tensor, couplings: Tensor, scored: Tensor | None) -> Scale:
        directions = couplings.unflatten(-1, (self.size, self.rank))
        return LowRankScale(diagonal, directions, scored)

    def initial_couplings(self, loc: Tensor) -> Tensor:
        shape = (*loc.shape[:-1], self.width - 2 * self.size)
        return _INITIAL_DIRECTIONS * torch.randn(shape, dtype=loc.dtype, device=loc.device)

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        known = other.rank if isinstance(other, _BoundLowRank) else 0
        if not isinstance(other, _BoundDiagonal | _BoundLowRank) or known > self.rank:
            return super().adopt(other, parameters)
        marginal, couplings = parameters.tensor_split([2 * self.size], dim=-1)
        directions = couplings.unflatten(-1, (self.size, known))
        seeds = self.seeds[:, known:].to(parameters).expand(*parameters.shape[:-1], -1, -1)
        return torch.cat([marginal, torch.cat([directions, seeds], dim=-1).flatten(-2)], dim=-1)
