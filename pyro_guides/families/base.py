"""The contract between guides and families.

A family turns variational parameters λ into a distribution over vectors u, and knows nothing else: not
whether λ is learned, amortized by an encoder or refined for one datum, nor what u stands for. A
:class:`Family` is what users write down (cheap, immutable, comparable); bound to a size D it becomes a
:class:`BoundFamily`, a module that may own weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from pyro_guides.distributions import VectorDistribution

__all__ = [
    "BASELINES",
    "Baseline",
    "BoundFamily",
    "Family",
    "Maps",
    "Moving",
]

# What takes the noise out of a score function, where a family has one.
Baseline = Literal["auto", "amortized", "leave_one_out", "running_mean"] | None
BASELINES = ("auto", "amortized", "leave_one_out", "running_mean", None)
# Matrices L for which v -> a + L v turns a family's distributions into its own.
Maps = Literal["triangular", "diagonal"] | None


class Family(ABC):
    """A kind of distribution, before it is known how many values it covers."""

    @abstractmethod
    def bind(self, size: int) -> BoundFamily:
        """The family for vectors u of size D = ``size``."""


class BoundFamily(nn.Module, ABC):
    """A family for vectors of a known size.

    To write one, set ``width``, and implement ``initial`` and ``forward`` for λ of any batch shape.

    Attributes:
        size: D, the size of u.
        width: W, the length of λ for one plate element.
        factorized: whether the elements of u are independent given λ; then each site of a group can
            be drawn, scaled and masked on its own.
        has_quantiles: whether the distribution has ``quantile(probability)`` for each element of u.
        baseline: what controls the noise of its score function; None for families without one.
        stratified: whether draws are mixtures' and may be taken component by component.
        closed_under: the triangular or diagonal matrices L for which v -> a + L v turns distributions of this
            family into others of it; None if nothing is known of any.
    """

    size: int
    width: int
    factorized: bool = False
    has_quantiles: bool = False
    baseline: Baseline = None
    stratified: bool = False
    closed_under: Maps = None

    @abstractmethod
    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """λ at which q is centred on ``loc`` ``(..., D)`` with standard deviations ``scale``."""

    @abstractmethod
    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> VectorDistribution:
        """q(u; λ) for λ ``(..., W)``.

        Args:
            parameters: λ.
            scored: which elements of u count in the density, boolean ``(..., D)``; the others are
                independent of them. All count if None.
        """

    def frame(self, parameters: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where u lies and how far it spreads, ``(..., D)`` each; None if there is no closed form."""
        q: Any = self(parameters)
        try:
            return q.mean, q.variance.sqrt()
        except NotImplementedError:
            return None

    def select(
        self, parameters: Tensor, start: int, stop: int, scored: Tensor | None = None
    ) -> VectorDistribution:
        """The marginal of elements ``start:stop`` of u, for factorized families only."""
        raise NotImplementedError(f"{type(self).__name__} does not factorize over u")

    def move(self, parameters: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        r"""λ of :math:`a + L v`, where v has the distribution at ``parameters``; differentiable.

        Args:
            parameters: λ, ``(..., W)``.
            loc: a, ``(..., D)``.
            scale: L, ``(..., D)`` if diagonal, or lower triangular ``(..., D, D)``; its diagonal is positive.
        """
        raise NotImplementedError(f"{type(self).__name__} is not closed under affine maps")

    @property
    def moving(self) -> Moving:
        """What of the family :meth:`move` needs, as a module."""
        return Moving(self)

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        """λ of this family at which q is the one that ``other`` has at ``parameters``.

        Differentiable, so that what led to the other family's λ can be trained on.

        Raises:
            ValueError: this family cannot be that q, or nothing is known about how.
        """
        raise ValueError(
            "the new family cannot hold what the old one has learned; steps that lose nothing lead from "
            "DiagonalNormal to LowRankNormal, FullRankNormal and NormalMixture(covariance='diagonal'), "
            "from any of these normals to FullRankNormal, NormalMixture and NormalizingFlow, from "
            "LowRankNormal and NormalMixture to more ranks and components. For any other family train a new "
            "guide"
        )


@final
class Moving(nn.Module):
    """From λ of v to λ of a + L v, see :meth:`BoundFamily.move`.

    Args:
        family: a family of which λ may be the first part; the rest stays as it is.
    """

    def __init__(self, family: BoundFamily) -> None:
        super().__init__()
        self.family = family

    def forward(self, parameters: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """λ, ``(..., W)``."""
        own, rest = parameters.tensor_split([self.family.width], dim=-1)
        moved = self.family.move(own, loc, scale)
        return torch.cat([moved, rest], dim=-1) if rest.shape[-1] else moved
