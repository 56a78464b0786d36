"""The multivariate normal with any linear scale."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from pyro_guides.distributions.scales import Scale, broadcast
from pyro_guides.distributions.vector import Shape, VectorDistribution

__all__ = ["VectorNormal"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


@final
class VectorNormal(VectorDistribution):
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
        super().__init__(batch_shape, loc.shape[-1], stick_the_landing=stick_the_landing)
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

    def push(self, noise: Tensor) -> Tensor:
        return self.loc + self.scale.multiply(noise)

    def pull(self, value: Tensor) -> Tensor:
        return self.scale.solve(value - self.loc)

    def noise_log_prob(self, noise: Tensor) -> Tensor:
        quadratic = self.scale.sum_scored(0.5 * noise.square() + _HALF_LOG_TWO_PI)
        return -quadratic - self.scale.log_determinant()

    def slope(self, noise: Tensor) -> Tensor:
        scored = self.scale.scored
        return self.scale.solve_transposed(noise if scored is None else noise * scored)

    def sample_noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

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
