"""Bijections from unconstrained vectors to every support that a latent site may have.

PyTorch's ``biject_to`` knows most supports; the triangular and positive-definite ones are missing there
because its matrix transforms ignore the upper triangle and so are not bijections. Here their
unconstrained space is the vector of free entries, with the log-determinants that densities need.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    ComposeTransform,
    CorrCholeskyTransform,
    IndependentTransform,
    StickBreakingTransform,
    Transform,
)
from torch.nn.functional import logsigmoid, softplus

__all__ = ["bijection", "is_fixed", "strip_independent"]


def bijection(support: Constraint) -> Transform:
    """The bijection from unconstrained values to ``support``.

    Raises:
        NotImplementedError: the support has none (discrete and spherical ones, for instance).

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> bijection(constraints.lower_cholesky).inverse_shape(torch.Size([3, 3]))
        torch.Size([6])
    """
    if isinstance(support, constraints.independent):
        base = bijection(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    factory = _OWN.get(type(support))
    return biject_to(support) if factory is None else factory()


def strip_independent(transform: Transform) -> Transform:
    """The transform below all ``IndependentTransform`` wrappers, whose log-determinant is finest."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def is_identity(transform: Transform) -> bool:
    """Whether the transform does nothing."""
    base = strip_independent(transform)
    return isinstance(base, ComposeTransform) and not base.parts


def is_fixed(support: Constraint) -> bool:
    """Whether the support holds no tensor, so that it is the same at every call of a model."""

    def fixed(value: Any) -> bool:
        if isinstance(value, Constraint):
            return all(fixed(part) for part in vars(value).values())
        if isinstance(value, (list, tuple)):
            return all(fixed(part) for part in value)
        return not isinstance(value, Tensor)

    return fixed(support)


class _TriangularTransform(Transform):
    """Vectors of the n (n + 1) / 2 free entries, row by row, to lower triangular matrices."""

    bijective = True
    domain = constraints.real_vector
    codomain: Constraint = constraints.lower_cholesky
    _diagonal = 0  # -1 leaves the diagonal out

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def _size(self, length: int) -> int:
        return (math.isqrt(8 * length + 1) - 1) // 2 - self._diagonal

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        size = self._size(shape[-1])
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        size = shape[-1] + self._diagonal
        return torch.Size([*shape[:-2], size * (size + 1) // 2])

    def _matrix(self, x: Tensor) -> Tensor:
        size = self._size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, self._diagonal, device=x.device)
        flat = x.new_zeros(*x.shape[:-1], size * size)
        return flat.index_copy(-1, rows * size + columns, x).unflatten(-1, (size, size))

    def _vector(self, matrix: Tensor) -> Tensor:
        size = matrix.shape[-1]
        rows, columns = torch.tril_indices(size, size, self._diagonal, device=matrix.device)
        return matrix[..., rows, columns]

    def _positive(self, entries: Tensor) -> Tensor:
        return entries.exp()

    def _positive_inverse(self, diagonal: Tensor) -> Tensor:
        return diagonal.log()

    def _log_slopes(self, entries: Tensor) -> Tensor:
        return entries

    def _call(self, x: Tensor) -> Tensor:
        matrix = self._matrix(x)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return matrix.tril(-1) + self._positive(diagonal).diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        diagonal = self._positive_inverse(y.diagonal(dim1=-2, dim2=-1))
        return self._vector(y.tril(-1) + diagonal.diag_embed())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._log_slopes(self._matrix(x).diagonal(dim1=-2, dim2=-1)).sum(-1)


@final
class LowerCholeskyTransform(_TriangularTransform):
    """To lower triangular matrices with a positive diagonal, by exp on the diagonal."""


@final
class SoftplusLowerCholeskyTransform(_TriangularTransform):
    """To lower triangular matrices with a positive diagonal, by softplus on the diagonal."""

    codomain = pyro_constraints.softplus_lower_cholesky

    def _positive(self, entries: Tensor) -> Tensor:
        return softplus(entries)

    def _positive_inverse(self, diagonal: Tensor) -> Tensor:
        return diagonal + (-(-diagonal).expm1()).log()

    def _log_slopes(self, entries: Tensor) -> Tensor:
        return logsigmoid(entries)


@final
class UnitLowerCholeskyTransform(_TriangularTransform):
    """To lower triangular matrices with ones on the diagonal."""

    codomain = pyro_constraints.unit_lower_cholesky
    _diagonal = -1

    def _call(self, x: Tensor) -> Tensor:
        matrix = self._matrix(x)
        return matrix + torch.eye(matrix.shape[-1], dtype=x.dtype, device=x.device)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._vector(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])


@final
class PositiveDefiniteTransform(_TriangularTransform):
    r"""To positive-definite matrices L Lᵀ, with L as in :class:`LowerCholeskyTransform`.

    .. math:: \log|\det J| = n \log 2 + \sum_{i=1}^n (n - i + 2) \log L_{ii}
    """

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_diagonal = self._matrix(x).diagonal(dim1=-2, dim2=-1)
        size = log_diagonal.shape[-1]
        powers = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2.0) + (powers * log_diagonal).sum(-1)


@final
class SimplexTransform(StickBreakingTransform):
    """Torch's stick breaking, with a log-determinant that stays finite however short the stick gets."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        sticks = torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)
        x = x - sticks.log()
        left = logsigmoid(-x)
        before = left.cumsum(-1) - left  # the log of what is left when a piece is broken off
        return (left + logsigmoid(x) + before).sum(-1)


@final
class CorrCholesky(CorrCholeskyTransform):
    r"""Torch's, with a log-determinant that stays exact however close correlations come to one.

    With :math:`z = \tanh u`, an entry of row i and column j < i counts
    :math:`(1 + \tfrac{i - j - 1}{2}) \log(1 - z^2)`.
    """

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, intermediates: Any = None) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], -1, device=x.device)
        times = 1.0 + (row - column - 1).to(x) / 2.0
        return (times * 2.0 * (math.log(2.0) - x - softplus(-2.0 * x))).sum(-1)


_OWN: dict[type[Constraint], type[Transform]] = {
    type(constraints.simplex): SimplexTransform,
    type(constraints.corr_cholesky): CorrCholesky,
    type(constraints.lower_cholesky): LowerCholeskyTransform,
    type(constraints.positive_definite): PositiveDefiniteTransform,
    type(pyro_constraints.softplus_lower_cholesky): SoftplusLowerCholeskyTransform,
    type(pyro_constraints.unit_lower_cholesky): UnitLowerCholeskyTransform,
}
