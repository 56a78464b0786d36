"""The multivariate normal with any linear scale."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from pyro_guides.distributions.scales import Scale, broadcast
from pyro_guides.distributions.vector import PushForward, Shape, VectorDistribution

__all__ = ["VectorNormal"]


@final
class VectorNormal(PushForward):
    r"""The normal distribution of u = μ + S ε, ε ~ N(0, I).

    Log q of an own draw needs neither u - μ nor a solve:

    .. math:: \log q(u) = -\log|\det S| - \tfrac12 |\varepsilon|^2 - \tfrac D2 \log 2\pi

    Args:
        loc: μ, ``(..., D)``.
        scale: the linear map S.
        stick_the_landing: see :class:`VectorDistribution`.

    Example:
        >>> import torch
        >>> from pyro_guides.distributions import DiagonalScale, VectorNormal
        >>> q = VectorNormal(torch.zeros(2), DiagonalScale(torch.ones(2)))
        >>> q.log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def __init__(self, loc: Tensor, scale: Scale, *, stick_the_landing: bool = True) -> None:
        batch_shape = broadcast(loc.shape[:-1], scale.batch_shape)
        super().__init__(batch_shape, loc, scale.scored, stick_the_landing=stick_the_landing)
        self.loc = loc
        self.scale = scale

    @property
    def mean(self) -> Tensor:
        """μ, ``(*batch_shape, D)``."""
        return self.loc.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """The marginal variances, ``(*batch_shape, D)``."""
        return self.scale.variance().expand(self._extended_shape())

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale.multiply(noise), self.scale.log_determinant()

    def pull(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale.solve(value - self.loc), self.scale.log_determinant()

    def slope(self, noise: Tensor) -> Tensor:
        r"""The score :math:`-\nabla_u \log q(u)` at the draw made from ``noise``, ``(..., D)``."""
        return self.scale.solve_transposed(noise if self.scored is None else noise * self.scored)

    def path_log_prob(self, value: Tensor, origin: tuple[Tensor, Tensor], log_prob: Tensor) -> Tensor:
        # No second density is needed: the slope in u is known.
        with torch.no_grad():
            slope = self.slope(origin[0])
        return log_prob.detach() - (slope * (value - value.detach())).sum(-1)

    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        new = VectorNormal(self.loc, self.scale, stick_the_landing=self.stick_the_landing)
        new._batch_shape = torch.Size(batch_shape)
        new.path_twin = self.path_twin
        return new

    def quantile(self, probability: Tensor) -> Tensor:
        """Marginal quantiles of u at ``probability``, broadcast against ``(*batch_shape, D)``."""
        return self.mean + self.variance.sqrt() * torch.special.ndtri(probability)
