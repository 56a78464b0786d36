"""The contract between guides and families.

A family turns variational parameters λ into a distribution over vectors u, and knows nothing else: not
whether λ is learned, amortized by an encoder or refined for one datum, nor what u stands for. A
:class:`Family` is what users write down (cheap, immutable, comparable); bound to a size D it becomes a
:class:`BoundFamily`, a module that may own weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pyro_guides.distributions import VectorDistribution

__all__ = ["BoundFamily", "Family"]


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
    """

    size: int
    width: int
    factorized: bool = False
    has_quantiles: bool = False

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

    def select(
        self, parameters: Tensor, start: int, stop: int, scored: Tensor | None = None
    ) -> VectorDistribution:
        """The marginal of elements ``start:stop`` of u, for factorized families only."""
        raise NotImplementedError(f"{type(self).__name__} does not factorize over u")
