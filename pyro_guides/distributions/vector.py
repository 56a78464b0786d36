r"""What every q(u; λ) is to Pyro: a distribution over vectors that knows its own draws.

A guide scores what it has just drawn. The noise behind a draw already determines its log density,
so nothing needs to be inverted: a :class:`VectorDistribution` remembers its last draw and recognises
it *by identity* when it is asked to score it. Any other value is scored by inversion.

The entropy term of the gradient is *sticking the landing*: with the parameters λ held fixed inside
the density, :math:`\nabla_\lambda \log q(u(\lambda, \varepsilon); \bar\lambda)` drops the score
function, whose mean is zero, and with it all gradient noise once q equals the posterior.

Source: Geoffrey Roeder, Yuhuai Wu, David Duvenaud, "Sticking the Landing: Simple, Lower-Variance
Gradient Estimators for Variational Inference", 2017, arXiv:1703.09194.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, final

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Mark", "Shape", "VectorDistribution", "score_parts"]

Shape = torch.Size | list[int] | tuple[int, ...]


def score_parts(log_prob: Tensor, entropy_term: Tensor) -> ScoreParts:
    """Pyro's record of a fully reparameterized site, which has no score function."""
    no_score: Any = 0.0
    return ScoreParts(log_prob, no_score, entropy_term)


@final
class Mark:
    """Recognises a tensor, unless it was changed in place since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = _version(tensor)

    def matches(self, other: Tensor) -> bool:
        """Whether ``other`` is the tensor, as it was."""
        return other is self.tensor and _version(other) == self.version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count


class VectorDistribution(TorchDistribution):
    """A reparameterized distribution over vectors u of size D that recognises its own draws.

    To write one, implement the five methods below for parameters of any batch shape. Noise always
    has the shape ``(*sample_shape, *batch_shape, D)``; parameters broadcast against it.

    Args:
        batch_shape: the batch shape, usually the plates' sizes.
        size: D.
        stick_the_landing: whether the gradient of the entropy follows the path of u alone.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, batch_shape: torch.Size, size: int, *, stick_the_landing: bool = True) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([size]), validate_args=False)
        self.stick_the_landing = stick_the_landing
        # The same density with the weights behind λ held fixed but the upstream values live; set by
        # a guide whose λ depends on upstream draws, whose paths must stay in the entropy.
        self.path_twin: VectorDistribution | None = None
        self._drawn: tuple[Mark, Tensor] | None = None

    @abstractmethod
    def push(self, noise: Tensor) -> Tensor:
        """Turn noise into a draw u, both ``(..., D)``."""

    @abstractmethod
    def pull(self, value: Tensor) -> Tensor:
        """Turn u into the noise it came from, both ``(..., D)``: the inverse of :meth:`push`."""

    @abstractmethod
    def noise_log_prob(self, noise: Tensor) -> Tensor:
        """Log q of the draw made from ``noise``, ``(...)``."""

    @abstractmethod
    def slope(self, noise: Tensor) -> Tensor:
        r"""The score :math:`-\nabla_u \log q(u)` at the draw made from ``noise``, ``(..., D)``."""

    @abstractmethod
    def sample_noise(self, shape: torch.Size) -> Tensor:
        """Draw noise of the given shape, in the dtype and on the device of the parameters."""

    @abstractmethod
    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        """The same distribution with a larger batch shape, drawn independently along it."""

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw u with a gradient path to λ: ``(*sample_shape, *batch_shape, D)``."""
        noise = self.sample_noise(self._extended_shape(torch.Size(sample_shape)))
        value = self.push(noise)
        self._drawn = (Mark(value), noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of given values ``(..., D)``, without inversion if they were just drawn here."""
        return self.noise_log_prob(self._noise_of(value))

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Pyro's hook for gradient estimators: log q, no score function, the entropy's path."""
        noise = self._noise_of(value)
        log_prob = self.noise_log_prob(noise)
        if not (self.stick_the_landing and torch.is_grad_enabled()):
            return score_parts(log_prob, log_prob)
        return score_parts(log_prob, self._path_log_prob(value, noise, log_prob))

    def _path_log_prob(self, value: Tensor, noise: Tensor, log_prob: Tensor) -> Tensor:
        if self.path_twin is not None:
            return self.path_twin.log_prob(value)
        # Value and gradient of log q(u; sg λ) without a second density: its slope in u is known.
        value = detach_provenance(value)
        with torch.no_grad():
            slope = self.slope(noise)
        return log_prob.detach() - (slope * (value - value.detach())).sum(-1)

    def _noise_of(self, value: Tensor) -> Tensor:
        value = detach_provenance(value)  # a tracked value hides the identity of the draw
        if self._drawn is not None and self._drawn[0].matches(value):
            return self._drawn[1]
        return self.pull(value)
