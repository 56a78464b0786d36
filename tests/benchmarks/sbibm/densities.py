"""Distributions of observations that neither Pyro nor PyTorch has: densities with gradients, and draws.

All are of one data set per batch element; their parameters broadcast over any batch shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Distracted", "FourPoints", "Moon", "SpikeTrain", "TwoScales"]

_ROOT_TWO = math.sqrt(2.0)


class Data(dist.TorchDistribution):
    """A distribution of vectors that is a function of a few tensors, batch dimensions first.

    Args:
        parameters: by name, each ``(*batch, n)``.
        size: the length of a draw.
        shared: what all batch elements share.
    """

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, parameters: dict[str, Tensor], size: int, **shared: Any) -> None:
        self.parameters = parameters
        self.shared = shared
        vars(self).update(parameters, **shared)
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in parameters.values()))
        super().__init__(batch, torch.Size([size]), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Data:
        """The same, for a larger batch."""
        new = object.__new__(type(self))
        parameters = {name: value.expand(*batch_shape, -1) for name, value in self.parameters.items()}
        Data.__init__(new, parameters, self.event_shape[0], **self.shared)
        return new


class Moon(Data):
    """A noisy half circle of radius 0.1 around a point that θ says, up to a reflection.

    The density is zero left of the centre and unbounded at it.
    """

    theta: Tensor

    def __init__(self, theta: Tensor) -> None:
        super().__init__({"theta": theta}, 2)

    def _centre(self) -> Tensor:
        shift = torch.stack([-self.theta.sum(-1).abs(), self.theta[..., 1] - self.theta[..., 0]], -1)
        return shift / _ROOT_TWO + self.theta.new_tensor([0.25, 0.0])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as in PyTorch
        """Draw an angle and a radius."""
        centre = self._centre().expand(self._extended_shape(sample_shape))
        angle = math.pi * (torch.rand_like(centre[..., 0]) - 0.5)
        radius = 0.1 + 0.01 * torch.randn_like(angle)
        return centre + radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The density of the radius, spread over the half circle."""
        u, v = (x - self._centre()).unbind(-1)
        radius = (u.square() + v.square() + 1e-20).sqrt()
        ring = dist.Normal(0.1, 0.01, validate_args=False).log_prob(radius) - (math.pi * radius).log()
        return torch.where(u > 0.0, ring, torch.full_like(ring, -math.inf))


class TwoScales(Data):
    """An equal mixture of two normals around θ; both elements of a draw come from the same one."""

    theta: Tensor
    scales = (1.0, 0.1)

    def __init__(self, theta: Tensor) -> None:
        super().__init__({"theta": theta}, theta.shape[-1])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw a scale, then the point."""
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.theta.dtype)
        wide = torch.rand_like(noise[..., :1]) < 0.5
        return self.theta + noise * torch.where(wide, *noise.new_tensor(self.scales))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log of the mean of both densities."""
        parts = [dist.Normal(self.theta, s, validate_args=False).log_prob(x).sum(-1) for s in self.scales]
        return torch.stack(parts).logsumexp(0) - math.log(2.0)


class FourPoints(Data):
    """Four independent draws from a normal in the plane, whose five parameters are a simple function of θ."""

    theta: Tensor

    def __init__(self, theta: Tensor) -> None:
        super().__init__({"theta": theta}, 8)

    def _scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """The elements of the Cholesky factor: covariances have 1e-6 on the diagonal more than s²."""
        first, second = self.theta[..., 2].square(), self.theta[..., 3].square()
        a = (first.square() + 1e-6).sqrt()
        b = self.theta[..., 4].tanh() * first * second / a
        # 1 - tanh² without cancellation, so that nearly perfect correlations keep their digits.
        rest = self.theta[..., 4].cosh().square().reciprocal() * (first * second / a).square()
        left = 1e-6 * (1.0 + (second / a).square())
        return a, b, (rest + left).sqrt()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw the points, one after the other."""
        a, b, c = (part.unsqueeze(-1) for part in self._scales())
        shape = torch.Size(sample_shape) + self.batch_shape + torch.Size([4])
        e, f = torch.randn((2, *shape), dtype=self.theta.dtype)
        mean = self.theta[..., None, :2]
        return (mean + torch.stack([a * e, b * e + c * f], -1)).flatten(-2)

    def log_prob(self, x: Tensor) -> Tensor:
        """The sum over the points."""
        a, b, c = (part.unsqueeze(-1) for part in self._scales())
        first, second = (x.unflatten(-1, (4, 2)) - self.theta[..., None, :2]).unbind(-1)
        e = first / a
        f = (second - b * e) / c
        return (-0.5 * (e.square() + f.square()) - math.log(2.0 * math.pi) - a.log() - c.log()).sum(-1)


class Distracted(Data):
    """A draw of another distribution, then noise that knows nothing of θ, both in a fixed shuffled order.

    Its log density is that of the informative elements: the noise would add a constant for each data set.

    Args:
        informative: the distribution that depends on θ.
        noise: draws the rest, from a shape.
        order: element i of the whole is element ``order[i]`` of (informative, noise).
    """

    def __init__(self, informative: Data, noise: Callable[[torch.Size], Tensor], order: Tensor) -> None:
        kinds = {"kind": type(informative), "noise": noise, "order": order}
        super().__init__(informative.parameters, len(order), **kinds)

    def _informative(self) -> Data:
        return self.shared["kind"](**self.parameters)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw both parts, and shuffle."""
        known = self._informative().sample(sample_shape)
        return torch.cat([known, self.shared["noise"](known.shape[:-1])], -1)[..., self.shared["order"]]

    def log_prob(self, x: Tensor) -> Tensor:
        """Of the informative elements alone."""
        informative = self._informative()
        where = self.shared["order"].argsort()[: informative.event_shape[0]]
        return informative.log_prob(x[..., where])


class SpikeTrain(Data):
    """Independent spikes with logits X θ, seen through the statistic Xᵀ y, which is sufficient.

    The log density is that of the spikes themselves, y, which depends on them through Xᵀ y alone.

    Args:
        theta: the weights, ``(*batch, n)``.
        design: X, ``(T, n)``.
        summed: whether to see Xᵀ y, or y.
    """

    theta: Tensor

    def __init__(self, theta: Tensor, design: Tensor, *, summed: bool) -> None:
        size = design.shape[1] if summed else design.shape[0]
        super().__init__({"theta": theta}, size, design=design, summed=summed)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw spikes, and their statistic."""
        logits = (self.theta @ self.shared["design"].T).expand(
            torch.Size(sample_shape) + self.batch_shape + self.shared["design"].shape[:1]
        )
        spikes = torch.bernoulli(logits.sigmoid())
        return spikes @ self.shared["design"] if self.shared["summed"] else spikes

    def log_prob(self, x: Tensor) -> Tensor:
        """θ·Xᵀy − Σ log(1 + exp(X θ))."""
        design = self.shared["design"]
        statistic = x if self.shared["summed"] else x @ design
        logits = self.theta @ design.T
        return (self.theta * statistic).sum(-1) - torch.nn.functional.softplus(logits).sum(-1)
