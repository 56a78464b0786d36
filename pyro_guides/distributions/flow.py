"""A normal distribution bent by a conditional flow."""

from __future__ import annotations

import copy
from typing import Protocol, final

import torch
from torch import Tensor

from pyro_guides.distributions.scales import Scale, broadcast
from pyro_guides.distributions.vector import PushForward, Shape, VectorDistribution

__all__ = ["Transform", "VectorFlow", "fixed_scale"]


class Transform(Protocol):
    """An invertible map of vectors, bound to its context and its weights."""

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the context."""

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The image of noise ``(..., D)`` and the log-volume of the map there, ``(...)``."""

    def inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that ``value`` is the image of, and the log-volume of the map there."""

    def fixed(self) -> Transform:
        """The same map without gradient paths to its context and its weights."""


@final
class VectorFlow(PushForward):
    r"""The distribution of :math:`u = \mu + S f(\varepsilon; h)`, ε ~ N(0, I).

    .. math:: \log q(u) = \log N(\varepsilon; 0, I) - \log |\det \partial f / \partial \varepsilon|
              - \log |\det S|

    Location and scale stay apart from the flow f, which therefore only has to bend a standard normal.

    Args:
        loc: μ, ``(..., D)``.
        scale: the linear map S.
        transform: f(·; h). Elements that ``scale`` does not score must not influence the others.
        stick_the_landing: see :class:`VectorDistribution`. It costs one inverse of f per step.

    Example:
        >>> import torch
        >>> from pyro_guides.distributions import DiagonalScale
        >>> from pyro_guides.families.couplings import CouplingFlow
        >>> f = CouplingFlow(2, 4).condition(torch.zeros(4))  # at first the identity
        >>> q = VectorFlow(torch.zeros(2), DiagonalScale(torch.ones(2)), f)
        >>> q.log_prob(torch.zeros(2)).item()
        -1.83787...
    """

    def __init__(
        self, loc: Tensor, scale: Scale, transform: Transform, *, stick_the_landing: bool = True
    ) -> None:
        batch_shape = broadcast(broadcast(loc.shape[:-1], scale.batch_shape), transform.batch_shape)
        super().__init__(batch_shape, loc, scale.scored, stick_the_landing=stick_the_landing)
        self.loc = loc
        self.scale = scale
        self.transform = transform

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        bent, log_volume = self.transform.forward(noise)
        return self.loc + self.scale.multiply(bent), log_volume + self.scale.log_determinant()

    def pull(self, value: Tensor) -> tuple[Tensor, Tensor]:
        noise, log_volume = self.transform.inverse(self.scale.solve(value - self.loc))
        return noise, log_volume + self.scale.log_determinant()

    def path_log_prob(self, value: Tensor, origin: tuple[Tensor, Tensor], log_prob: Tensor) -> Tensor:
        fixed = VectorFlow(self.loc.detach(), fixed_scale(self.scale), self.transform.fixed())
        return fixed.log_prob(value)

    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        new = VectorFlow(self.loc, self.scale, self.transform, stick_the_landing=self.stick_the_landing)
        new._batch_shape = torch.Size(batch_shape)
        new.path_twin = self.path_twin
        return new


def fixed_scale(scale: Scale) -> Scale:
    """The same linear map without gradient paths, of whichever kind it is."""
    new = copy.copy(scale)
    for name, value in vars(scale).items():
        if isinstance(value, Tensor):
            setattr(new, name, value.detach())
    return new
