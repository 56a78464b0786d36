r"""What every q(u; λ) is to Pyro: a distribution over vectors that knows its own draws.

A guide scores what it has just drawn. The *origin* of a draw - the noise behind it, say - already
determines its log density, so nothing needs to be inverted: a :class:`VectorDistribution` remembers the
origin of its last draw and recognises the draw *by identity* when it is asked to score it. Any other
value is first traced back to where it would have come from.

The entropy term of the gradient is *sticking the landing*: with the parameters λ held fixed inside
the density, :math:`\nabla_\lambda \log q(u(\lambda, \varepsilon); \bar\lambda)` drops the score
function, whose mean is zero, and with it all gradient noise once q equals the posterior.

Source: Geoffrey Roeder, Yuhuai Wu, David Duvenaud, "Sticking the Landing: Simple, Lower-Variance
Gradient Estimators for Variational Inference", 2017, arXiv:1703.09194.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, final

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Mark", "PushForward", "Shape", "VectorDistribution", "score_parts"]

Shape = torch.Size | list[int] | tuple[int, ...]

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


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
    # Inference tensors keep no count, and a compiler follows changes in place by itself.
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class VectorDistribution(TorchDistribution):
    """A distribution over vectors u of size D that recognises its own draws.

    To write one, implement the five methods below for parameters of any batch shape; or take
    :class:`PushForward`, if draws are an invertible function of normal noise.

    Args:
        batch_shape: the batch shape, usually the plates' sizes.
        size: D, how long the vectors are.
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
        self._drawn: tuple[Mark, Any] | None = None

    @abstractmethod
    def generate(self, shape: torch.Size) -> tuple[Tensor, Any]:
        """Draw u of the given shape ``(..., D)`` with a gradient path to λ; returns it with its origin."""

    @abstractmethod
    def trace_back(self, value: Tensor) -> Any:
        """The origin that a given u ``(..., D)`` would have."""

    @abstractmethod
    def log_prob_from(self, origin: Any) -> Tensor:
        """Log q of the u that has this origin, ``(...)``."""

    @abstractmethod
    def score_parts(self, value: Tensor) -> ScoreParts:
        """Pyro's hook for gradient estimators."""

    @abstractmethod
    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        """The same distribution with a larger batch shape, drawn independently along it."""

    def __call__(self, sample_shape: Shape = ()) -> Tensor:
        """Draw u: what ``pyro.sample`` calls, with a gradient path even where it is not all there is."""
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw u with a gradient path to λ: ``(*sample_shape, *batch_shape, D)``."""
        value, origin = self.generate(self._extended_shape(torch.Size(sample_shape)))
        self._drawn = (Mark(value), origin)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of given values ``(..., D)``, without inversion if they were just drawn here."""
        return self.log_prob_from(self.origin_of(value))

    def origin_of(self, value: Tensor) -> Any:
        """The origin of u: the one remembered if u was just drawn here."""
        value = detach_provenance(value)  # a tracked value hides the identity of the draw
        if self._drawn is not None and self._drawn[0].matches(value):
            return self._drawn[1]
        return self.trace_back(value)


class PushForward(VectorDistribution):
    r"""Normal noise pushed through an invertible map: :math:`u = F(\varepsilon), \varepsilon \sim N(0, I)`.

    .. math:: \log q(u) = \log N(\varepsilon; 0, I) - \log |\det \partial F / \partial \varepsilon|

    Noise always has the shape ``(*sample_shape, *batch_shape, D)``; parameters broadcast against it. The
    origin of a draw is its noise and the log-volume of the map there.

    Args:
        batch_shape: the batch shape.
        like: a tensor with D elements in the last dimension, and the dtype and device of the noise.
        scored: which elements of u count in the density, ``(..., D)``; all of them if None.
        stick_the_landing: see :class:`VectorDistribution`.
    """

    def __init__(
        self, batch_shape: torch.Size, like: Tensor, scored: Tensor | None, *, stick_the_landing: bool = True
    ) -> None:
        super().__init__(batch_shape, like.shape[-1], stick_the_landing=stick_the_landing)
        self.scored = scored
        self._like = like

    @abstractmethod
    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn noise ``(..., D)`` into u; returns it with the log-volume of the map there, ``(...)``."""

    @abstractmethod
    def pull(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that u came from, with the log-volume of :meth:`push` there."""

    @abstractmethod
    def path_log_prob(self, value: Tensor, origin: tuple[Tensor, Tensor], log_prob: Tensor) -> Tensor:
        """Log q(u; λ) with λ held fixed inside the density: its only gradient is that in u."""

    def sample_noise(self, shape: torch.Size) -> Tensor:
        """Draw noise of the given shape."""
        return torch.randn(shape, dtype=self._like.dtype, device=self._like.device)

    def generate(self, shape: torch.Size) -> tuple[Tensor, Any]:
        noise = self.sample_noise(shape)
        value, log_volume = self.push(noise)
        return value, (noise, log_volume)

    def trace_back(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.pull(value)

    def log_prob_from(self, origin: tuple[Tensor, Tensor]) -> Tensor:
        noise, log_volume = origin
        terms = 0.5 * noise.square() + _HALF_LOG_TWO_PI
        if self.scored is not None:
            terms = torch.where(self.scored, terms, torch.zeros_like(terms))
        return -terms.sum(-1) - log_volume

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Log q, no score function, and the entropy's path."""
        origin = self.origin_of(value)
        log_prob = self.log_prob_from(origin)
        if not (self.stick_the_landing and torch.is_grad_enabled()):
            return score_parts(log_prob, log_prob)
        if self.path_twin is not None:
            return score_parts(log_prob, self.path_twin.log_prob(value))
        return score_parts(log_prob, self.path_log_prob(detach_provenance(value), origin, log_prob))
