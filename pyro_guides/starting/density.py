"""Log p(x, u) as a function of all unconstrained values of a call, side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.groups import Group, lone_piece
from pyro_guides.posterior import Query

__all__ = ["ONCE", "Density", "Repeats"]

_TERMS_PER_PASS = 4_000_000  # bounds the memory of second derivatives


@final
@dataclass(frozen=True)
class Repeats:
    """How often the rows at hand count, which stand for more of them.

    Attributes:
        plates: the plates that the rows are in.
        times: how often each counts.
    """

    plates: frozenset[str] = frozenset()
    times: float = 1.0

    def of(self, plates: Collection[str]) -> float:
        """How often a site in these plates counts."""
        return self.times if self.plates & set(plates) else 1.0


ONCE = Repeats()


@final
class Density:
    """Log p(x, u), Jacobians included, up to a constant; u is ``(N)``, all latents of a call side by side.

    Args:
        query: the rows at hand; all of its latents are continuous.
        repeats: how often these count, beyond what the model itself makes of a subsample.
        first: the latents that come first in u; the others are in the model's order.

    Attributes:
        query: the rows at hand.
        size: N.
        counts: how many values each value stands for, ``(N)``: those of a row as many as there are rows like
            it.
    """

    def __init__(self, query: Query, repeats: Repeats = ONCE, first: Collection[str] = ()) -> None:
        self.query = query
        structure = query.structure
        self._repeats = {name: repeats.of(site.plates) for name, site in structure.observed.items()}
        self._repeats |= {name: repeats.of(site.plates) for name, site in structure.latents.items()}
        order = sorted(query.latents, key=lambda name: name not in first)
        self._latents = {name: query.latents[name] for name in order}
        self._stands_for = {
            name: self._repeats[name] * math.prod(plate.scale for plate in structure.plates_of(latent.plates))
            for name, latent in self._latents.items()
        }
        self._pieces = {name: lone_piece(latent) for name, latent in self._latents.items()}
        self._shapes = {
            name: torch.Size((*structure.batch_shape(latent.plates), latent.size))
            for name, latent in self._latents.items()
        }
        self.size = sum(shape.numel() for shape in self._shapes.values())
        self.counts = torch.cat(
            [torch.full((shape.numel(),), self._stands_for[name]) for name, shape in self._shapes.items()]
        )
        terms = structure.batch_shape(structure.plates).numel()
        self._at_once = max(1, _TERMS_PER_PASS // max(terms, self.size))

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values ``(M, *natural shape)`` of all latents as u, ``(M, N)``."""
        parts = [latent.unconstrain(values[name]) for name, latent in self._latents.items()]
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=-1)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site, ``(M, *batch, size)``, from u ``(M, N)``."""
        shapes = self._shapes
        parts = zip(shapes, u.split([shape.numel() for shape in shapes.values()], dim=-1), strict=True)
        return {name: part.reshape(len(u), *shapes[name]) for name, part in parts}

    def positions(self, group: Group) -> Tensor:
        """Where in u the values of a group stand, ``(*batch, D)``."""
        by_site = self.unpack(torch.arange(self.size).unsqueeze(0))
        return torch.cat([by_site[name][0] for name in group.sites], dim=-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log p(x, u), ``(M, N) -> (M)``; what is not finite becomes very small."""
        own = self.unpack(u)
        values = {name: self._pieces[name].constrain(part) for name, part in own.items()}
        jacobians = {
            name: times * self._pieces[name].log_jacobian(own[name], values[name])
            for name, times in self._stands_for.items()
        }
        scores = self.query.model.score(values, self.query.held).log_prob
        scores = {name: self._repeats.get(name, 1.0) * score for name, score in scores.items()}
        log_prob = self.query.by_row(scores, ()) + self.query.summed(jacobians, ())
        return torch.nan_to_num(log_prob, nan=-1e30, posinf=-1e30, neginf=-1e30)

    def expand(self, u: Tensor, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log p(x, u) at one point ``(N)``, its gradient, and blocks of minus its Hessian.

        The blocks take one product with a vector for each column of theirs. They are exact if elements of a
        block do not interact, as those of a plate do not given everything else.

        Args:
            u: ``(N)``.
            blocks: positions ``(E, D)`` of elements that have a matrix each.

        Returns:
            Log p ``()``, the gradient ``(N)``, and of each block matrices ``(E, D, D)``.
        """
        columns = [block[:, at] for block in blocks for at in range(block.shape[-1])]
        step = self._at_once
        passes = [self._products(u, columns[at : at + step]) for at in range(0, len(columns), step)]
        log_prob, slope, _ = passes[0]
        products = torch.cat([own for _, _, own in passes])
        found, start = [], 0
        for block in blocks:
            stop = start + block.shape[-1]
            matrix = -products[start:stop, block].movedim(0, -1)
            found.append((matrix + matrix.mT) / 2)
            start = stop
        return log_prob, slope.nan_to_num(0.0, 0.0, 0.0), found

    def _products(self, u: Tensor, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log p, its gradient, and the Hessian times the sum of the unit vectors in each column."""
        points = u.detach().expand(len(columns), -1).clone().requires_grad_()
        with torch.enable_grad():
            log_prob = self.log_prob(points)
            slopes = _gradient(log_prob.sum(), points, again=True)
            along = torch.stack([row[at].sum() for row, at in zip(slopes, columns, strict=True)]).sum()
        return log_prob[0].detach(), slopes[0].detach(), _gradient(along, points)


def _gradient(value: Tensor, at: Tensor, *, again: bool = False) -> Tensor:
    if not value.requires_grad:  # linear in u, or flat
        return torch.zeros_like(at)
    (gradient,) = torch.autograd.grad(value, at, create_graph=again, allow_unused=True)
    return torch.zeros_like(at) if gradient is None else gradient
