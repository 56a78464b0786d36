"""The posterior density of each row as a function of unconstrained values, whatever q says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from pyro_guides.groups import lone_piece
from pyro_guides.posterior.query import Query

__all__ = ["Landscape", "StudentT"]

_FREEDOM = 5.0  # degrees of freedom: tails that cover what a normal would miss


@final
class Landscape:
    """Log p(x, u) of each row, u being all latents of a row side by side.

    Args:
        query: the rows; all of its latents are continuous.

    Attributes:
        size: D, how many unconstrained values a row has.
        rows: the shape of the rows.
    """

    def __init__(self, query: Query) -> None:
        self.query = query
        structure = query.structure
        plates = structure.plates_of(query.row_plates)
        self.rows = torch.Size(plate.batch for plate in plates)
        self._dims = [plate.dim for plate in plates]
        self._shapes: dict[str, tuple[int, ...]] = {
            name: (*structure.batch_shape(latent.plates), latent.size)
            for name, latent in query.latents.items()
        }
        self._sizes = {n: math.prod(shape) // self.rows.numel() for n, shape in self._shapes.items()}
        self.size = sum(self._sizes.values())

    def pack(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Values ``(M, *natural)`` of all latents as u, ``(M, *rows, D)``."""
        parts = []
        for name, latent in self.query.latents.items():
            u = latent.unconstrain(draws[name]).reshape(-1, *self._shapes[name])
            parts.append(self._rows_first(u).reshape(len(u), *self.rows, -1))
        return torch.cat(parts, dim=-1)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site ``(M, *batch, size)`` from u."""
        found = {}
        parts = u.split(list(self._sizes.values()), dim=-1)
        for part, (name, shape) in zip(parts, self._shapes.items(), strict=True):
            moved = self._rows_first(torch.empty(1, *shape, device="meta"))
            back = part.reshape(len(u), *moved.shape[1:])
            found[name] = back.movedim(list(range(1, 1 + len(self._dims))), [dim - 1 for dim in self._dims])
        return found

    def log_prob(self, u: Tensor) -> Tensor:
        """Log p(x, u) per row, ``(M, *rows, D) -> (M, *rows)``; −inf or NaN become very small."""
        values, jacobian = self._constrained(u)
        scores = self.query.model.score(values, self.query.held)
        return _finite(self.query.by_row(scores.log_prob) + jacobian)

    @torch.no_grad()
    def log_q(self, u: Tensor) -> Tensor:
        """Log q(u) per row."""
        values, jacobian = self._constrained(u)
        parts = []
        for some in self.query.passes(len(u)):
            own = {name: value[some] for name, value in values.items()}
            parts.append(self.query.log_q_of(self.query.run(some.stop - some.start, own)))
        return _finite(torch.cat(parts) + jacobian)

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(x, u) per row and its gradient."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            log_prob = self.log_prob(u)
            (gradient,) = torch.autograd.grad(log_prob.sum(), u)
        return log_prob.detach(), torch.nan_to_num(gradient, 0.0, 0.0, 0.0)

    def _constrained(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of all latents, and the log volume change from u per row."""
        values, jacobians = {}, {}
        for name, own in self.unpack(u).items():
            latent = self.query.structure.latents[name]
            piece = lone_piece(latent)
            value = piece.constrain(own)
            jacobians[name] = piece.log_jacobian(own, value)
            values[name] = value
        return values, self.query.summed(jacobians)

    def _rows_first(self, x: Tensor) -> Tensor:
        """Move the dimensions of rows behind that of draws; ``x`` is ``(M, *batch, size)``."""
        return x.movedim([dim - 1 for dim in self._dims], list(range(1, 1 + len(self._dims))))


@final
class StudentT:
    """A multivariate t distribution per row.

    Args:
        location: ``(*rows, D)``.
        factor: the triangular root of its covariance but for a constant, ``(*rows, D, D)``.
    """

    def __init__(self, location: Tensor, factor: Tensor) -> None:
        self.location = location
        self.factor = factor

    def sample(self, count: int) -> Tensor:
        """Draws, ``(count, *rows, D)``."""
        noise = torch.randn(count, *self.location.shape).to(self.location)
        squares = torch.distributions.Chi2(_FREEDOM).sample(noise.shape[:-1]).to(noise)
        stretch = (_FREEDOM / squares).sqrt().unsqueeze(-1)
        return self.location + stretch * (self.factor @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density, ``(M, *rows, D) -> (M, *rows)``."""
        size = u.shape[-1]
        centred = (u - self.location).movedim(0, -1)  # all draws of a row solve one system
        scaled = torch.linalg.solve_triangular(self.factor, centred, upper=False).square().sum(-2)
        constant = (
            math.lgamma((_FREEDOM + size) / 2)
            - math.lgamma(_FREEDOM / 2)
            - 0.5 * size * math.log(_FREEDOM * math.pi)
        )
        volume = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        tails = -(_FREEDOM + size) / 2 * (scaled / _FREEDOM).log1p()
        return constant - volume + tails.movedim(-1, 0)


def _finite(log_prob: Tensor) -> Tensor:
    return torch.nan_to_num(log_prob, nan=-1e30, neginf=-1e30)
