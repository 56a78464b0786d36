r"""Linear maps S that spread standard noise: u = μ + S ε.

Each map multiplies, solves, and knows the log-determinant that a density needs. Elements of u that a
model has masked out are *unscored*: the map decouples them from all others, so that the density of the
remaining ones is their exact marginal, obtained by leaving the unscored terms out of the sum.

Shapes: ``(..., D)`` for vectors; parameters carry batch dimensions on the left that broadcast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

__all__ = ["CholeskyScale", "DiagonalScale", "LowRankScale", "Scale", "broadcast"]


def broadcast(first: torch.Size, second: torch.Size) -> torch.Size:
    """``torch.broadcast_shapes``, which takes its time, for shapes that are mostly equal."""
    return first if first == second else torch.broadcast_shapes(first, second)


class Scale(ABC):
    """A linear map of ``(..., D)`` with positive ``diagonal`` ``(..., D)``.

    Args:
        diagonal: positive scales.
        scored: which elements count in the density, boolean ``(..., D)``; all of them if None.
    """

    def __init__(self, diagonal: Tensor, scored: Tensor | None = None) -> None:
        self.diagonal = diagonal
        self.scored = scored

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the parameters without D."""
        shape = self.diagonal.shape[:-1]
        return shape if self.scored is None else broadcast(shape, self.scored.shape[:-1])

    @abstractmethod
    def multiply(self, vector: Tensor) -> Tensor:
        """S v."""

    @abstractmethod
    def solve(self, vector: Tensor) -> Tensor:
        """The solution x of S x = v."""

    @abstractmethod
    def solve_transposed(self, vector: Tensor) -> Tensor:
        """The solution x of Sᵀ x = v."""

    @abstractmethod
    def variance(self) -> Tensor:
        """The diagonal of S Sᵀ, ``(..., D)``: the marginal variances of u."""

    def covariance(self) -> Tensor:
        """S Sᵀ, ``(..., D, D)``."""
        matrix = self.matrix()
        return matrix @ matrix.mT

    def matrix(self) -> Tensor:
        """S, ``(..., D, D)``."""
        eye = torch.eye(self.diagonal.shape[-1], dtype=self.diagonal.dtype, device=self.diagonal.device)
        images = [self.multiply(unit) for unit in eye]
        return torch.stack(torch.broadcast_tensors(*images), dim=-1)

    def triangular_root(self) -> Tensor:
        """The triangular L with L Lᵀ = S Sᵀ, ``(..., D, D)``."""
        return triangular_root(self.matrix())

    def log_determinant(self) -> Tensor:
        r"""Log \|det S\| over the scored elements, ``(...)``."""
        return self.sum_scored(self.diagonal.log())

    def sum_scored(self, terms: Tensor) -> Tensor:
        """Sum terms ``(..., D)`` over the scored elements of u."""
        if self.scored is not None:
            terms = torch.where(self.scored, terms, torch.zeros_like(terms))
        return terms.sum(-1)


@final
class DiagonalScale(Scale):
    """Independent elements: S = diag(s)."""

    def multiply(self, vector: Tensor) -> Tensor:
        return self.diagonal * vector

    def solve(self, vector: Tensor) -> Tensor:
        return vector / self.diagonal

    def solve_transposed(self, vector: Tensor) -> Tensor:
        return vector / self.diagonal

    def variance(self) -> Tensor:
        return self.diagonal.square()


@final
class CholeskyScale(Scale):
    """Any covariance: S = diag(s) (I + T) with T strictly lower triangular.

    Couplings are relative to each row's own scale, so they may start at exactly zero.

    Args:
        diagonal: s, ``(..., D)``.
        couplings: the entries of T row by row, ``(..., D (D - 1) / 2)``.
        scored: see :class:`Scale`.
    """

    def __init__(self, diagonal: Tensor, couplings: Tensor, scored: Tensor | None = None) -> None:
        super().__init__(diagonal, scored)
        size = diagonal.shape[-1]
        rows, columns = torch.tril_indices(size, size, offset=-1, device=diagonal.device)
        if scored is not None:
            couplings = couplings * (scored[..., rows] & scored[..., columns])
        matrix = couplings.new_zeros(*couplings.shape[:-1], size, size)
        self.strict = (
            matrix.flatten(-2).index_copy(-1, rows * size + columns, couplings).unflatten(-1, (size, size))
        )

    def multiply(self, vector: Tensor) -> Tensor:
        return self.diagonal * (vector + _matvec(self.strict, vector))

    def solve(self, vector: Tensor) -> Tensor:
        return self._solve(vector / self.diagonal, transposed=False)

    def solve_transposed(self, vector: Tensor) -> Tensor:
        return self._solve(vector, transposed=True) / self.diagonal

    def variance(self) -> Tensor:
        return self.diagonal.square() * (1.0 + self.strict.square().sum(-1))

    def _solve(self, vector: Tensor, *, transposed: bool) -> Tensor:
        matrix = self.strict.mT if transposed else self.strict
        shape = broadcast(matrix.shape[:-2], vector.shape[:-1])
        return torch.linalg.solve_triangular(
            matrix.expand(*shape, *matrix.shape[-2:]),
            vector.expand(*shape, vector.shape[-1]).unsqueeze(-1),
            upper=transposed,
            unitriangular=True,
        ).squeeze(-1)


@final
class LowRankScale(Scale):
    r"""Few directions of correlation: S = diag(d) (I + U Uᵀ), always invertible.

    Its determinant and inverse need an r × r matrix only (Woodbury).

    Args:
        diagonal: d, ``(..., D)``.
        directions: U, ``(..., D, r)``.
        scored: see :class:`Scale`.
    """

    def __init__(self, diagonal: Tensor, directions: Tensor, scored: Tensor | None = None) -> None:
        super().__init__(diagonal, scored)
        if scored is not None:
            directions = directions * scored.unsqueeze(-1)
        self.directions = directions
        gram = directions.mT @ directions
        self.gram = gram
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        self.root = torch.linalg.cholesky(eye + gram)

    def multiply(self, vector: Tensor) -> Tensor:
        projected = _matvec(self.directions.mT, vector)
        return self.diagonal * (vector + _matvec(self.directions, projected))

    def solve(self, vector: Tensor) -> Tensor:
        return self._solve(vector / self.diagonal)

    def solve_transposed(self, vector: Tensor) -> Tensor:
        return self._solve(vector) / self.diagonal

    def variance(self) -> Tensor:
        # The rows of (I + U Uᵀ)² = I + U (2 I + UᵀU) Uᵀ.
        inner = self.directions @ self.gram + 2.0 * self.directions
        return self.diagonal.square() * (1.0 + (inner * self.directions).sum(-1))

    def log_determinant(self) -> Tensor:
        low_rank = 2.0 * self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return super().log_determinant() + low_rank

    def _solve(self, vector: Tensor) -> Tensor:
        projected = _matvec(self.directions.mT, vector).unsqueeze(-1)
        root = self.root.expand(*projected.shape[:-2], *self.root.shape[-2:])
        inner = torch.cholesky_solve(projected, root).squeeze(-1)
        return vector - _matvec(self.directions, inner)


def triangular_root(matrix: Tensor) -> Tensor:
    """The triangular root L of a covariance, L Lᵀ = M Mᵀ, from any other root M of it, ``(..., D, D)``.

    A QR decomposition finds it even where variances differ by more than a Cholesky factorization can take:
    M Mᵀ has twice as many digits between its largest and smallest values as M.
    """
    _, upper = torch.linalg.qr(matrix.mT)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (upper * signs.unsqueeze(-1)).mT


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
