"""The mixture of normals: paths for the components, a score function for the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_guides.distributions.normal import VectorNormal
from pyro_guides.distributions.scales import broadcast
from pyro_guides.distributions.vector import Shape, VectorDistribution, score_parts

__all__ = ["VectorMixture", "VectorStratum"]

Control = Callable[[Tensor], Tensor]


@final
class VectorMixture(VectorDistribution):
    r"""A mixture of normals, :math:`q(u) = \sum_k \pi_k N(u; \mu_k, S_k S_k^T)`, with low-variance gradients.

    *Components.* A draw moves with all components in proportion to their responsibilities r at it,

    .. math:: \mathrm d u = \sum_k r_k(u) \, (\mathrm d \mu_k + \mathrm d S_k \, e_k),
              \qquad e_k = S_k^{-1} (u - \mu_k),

    which transports q exactly, whichever component u came from. *Weights.* No smooth path moves mass
    between separate modes without exploding, so they get the score function of q with everything else
    held fixed, :math:`\sum_k r_k \nabla \log \pi_k`, whose noise a control variate takes away. If the
    weights are known to be fixed, the path is all there is, and ``has_rsample`` is true.

    Args:
        components: the normals, of batch shape ``(..., K)``.
        logits: unnormalized log weights, ``(..., K)``.
        learned: whether the weights carry gradients.
        stick_the_landing: see :class:`VectorDistribution`.

    Source: Martin Jankowiak, Theofanis Karaletsos, "Pathwise Derivatives for Multivariate Distributions",
    2019, arXiv:1806.01856 (transport of mixture components).
    """

    def __init__(
        self,
        components: VectorNormal,
        logits: Tensor,
        *,
        learned: bool = True,
        stick_the_landing: bool = True,
    ) -> None:
        batch = broadcast(components.batch_shape[:-1], logits.shape[:-1])
        super().__init__(batch, components.event_shape[0], stick_the_landing=stick_the_landing)
        self.components = components
        self.log_weights = logits.log_softmax(-1)
        self.learned = learned
        self.control: Control | None = None

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether gradients of draws are all there is, which holds for fixed weights."""
        return not self.learned

    @property
    def mean(self) -> Tensor:
        """The mean of q, ``(*batch_shape, D)``."""
        mean = (self.log_weights.exp().unsqueeze(-1) * self.components.loc).sum(-2)
        return mean.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """The marginal variances, ``(*batch_shape, D)``."""
        second = self.components.variance + (self.components.loc - self.mean.unsqueeze(-2)).square()
        return (self.log_weights.exp().unsqueeze(-1) * second).sum(-2).expand(self._extended_shape())

    def generate(self, shape: torch.Size) -> tuple[Tensor, Any]:
        noise = self.components.sample_noise(shape).unsqueeze(-2)
        with torch.no_grad():  # a traced ELBO forgets this, and needs each detach
            chosen = _choose(self.log_weights.expand(*shape[:-1], -1)).unsqueeze(-1)
            u = (chosen * self.components.push(noise)[0]).sum(-2).detach()
            found, log_volumes = (part.detach() for part in self.trace_back(u))
            residuals = torch.where(chosen, noise, found)  # that of the chosen one is exact
            weights = self._responsibilities((residuals, log_volumes)).unsqueeze(-1).detach()
        moved = self.components.push(residuals)[0]
        return u + (weights * (moved - moved.detach())).sum(-2), (residuals, log_volumes)

    def trace_back(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals e_k of all components ``(..., K, D)`` and their log-volumes."""
        return self.components.pull(value.unsqueeze(-2))

    def log_prob_from(self, origin: tuple[Tensor, Tensor]) -> Tensor:
        return (self.log_weights + self.components.log_prob_from(origin)).logsumexp(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of given values ``(..., D)``."""
        if torch.is_grad_enabled():  # what is remembered of an own draw has no path to the parameters
            return self.log_prob_from(self.trace_back(detach_provenance(value)))
        return super().log_prob(value)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Log q, the score function of the weights, and the entropy's path."""
        value = detach_provenance(value)
        if not torch.is_grad_enabled():
            log_prob = self.log_prob(value)
            return score_parts(log_prob, log_prob)
        with torch.no_grad():
            origin = self.origin_of(value)
            component_log_prob = self.components.log_prob_from(origin).detach()
        score = (self.log_weights + component_log_prob).logsumexp(-1)
        log_prob = entropy_term = self.path_log_prob(value, origin, score.detach())
        if self.path_twin is not None and self.stick_the_landing:
            entropy_term = self.path_twin.log_prob(value)
        if not self.learned:
            return score_parts(log_prob, entropy_term)
        return ScoreParts(log_prob, score if self.control is None else self.control(score), entropy_term)

    def path_log_prob(self, value: Tensor, origin: tuple[Tensor, Tensor], log_prob: Tensor) -> Tensor:
        """Log q of an own draw along its path alone, unless the landing is not to be stuck."""
        if not (self.stick_the_landing and value.requires_grad):
            return self.log_prob(value)  # a given value, whose density is what is to be trained
        with torch.no_grad():
            weights = self._responsibilities(origin).unsqueeze(-1)
            slope = (weights * self.components.slope(origin[0])).sum(-2)
        return log_prob.detach() - (slope.detach() * (value - value.detach())).sum(-1)

    def _responsibilities(self, origin: tuple[Tensor, Tensor]) -> Tensor:
        return (self.log_weights + self.components.log_prob_from(origin)).softmax(-1)

    def stratum(self, component: Tensor) -> VectorStratum:
        """The share of q that one component draws, for each element of ``component`` ``(...)``."""
        return VectorStratum(self, component)

    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        new = VectorMixture(
            self.components,
            self.log_weights,
            learned=self.learned,
            stick_the_landing=self.stick_the_landing,
        )
        new._batch_shape = torch.Size(batch_shape)
        new.path_twin, new.control = self.path_twin, self.control
        return new


@final
class VectorStratum(VectorDistribution):
    r"""What one given component k adds to a mixture: its draws, scored by the whole mixture.

    .. math:: \log q(u \mid k) := \log q(u) - \log \pi_k

    This is no density. Summed over an enumerated k with weights π, the terms of an ELBO become the
    *stratified* estimate: every component is drawn once and weighted, which leaves no choice to chance.

    Args:
        mixture: the mixture.
        component: k, ``(...)``; may have dimensions on the left of the mixture's batch shape.

    Source: Warren Morningstar et al., "Automatic Differentiation Variational Inference with Mixtures",
    2021, arXiv:2003.01687.
    """

    def __init__(self, mixture: VectorMixture, component: Tensor) -> None:
        batch = broadcast(mixture.batch_shape, component.shape)
        super().__init__(batch, mixture.event_shape[0], stick_the_landing=mixture.stick_the_landing)
        self.mixture = mixture
        self.component = component
        count = mixture.log_weights.shape[-1]
        self._chosen = component.unsqueeze(-1) == torch.arange(count, device=component.device)

    def generate(self, shape: torch.Size) -> tuple[Tensor, Any]:
        noise = self.mixture.components.sample_noise(shape).unsqueeze(-2)
        drawn = self.mixture.components.push(noise)[0]
        return torch.where(self._chosen.unsqueeze(-1), drawn, torch.zeros_like(drawn)).sum(-2), None

    def trace_back(self, value: Tensor) -> Any:
        return self.mixture.trace_back(value)

    def log_prob_from(self, origin: Any) -> Tensor:
        return self.mixture.log_prob_from(origin) - self._log_weight()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(u) of the whole mixture, minus log π of the component."""
        return self.log_prob_from(self.trace_back(detach_provenance(value)))

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The log density of the mixture along the path of u, and no score function."""
        if not torch.is_grad_enabled():
            log_prob = self.log_prob(value)
            return score_parts(log_prob, log_prob)
        twin, value = self.mixture.path_twin, detach_provenance(value)
        if twin is not None and self.stick_the_landing and value.requires_grad:
            log_q = twin.log_prob(value)
        else:
            with torch.no_grad():
                origin = self.trace_back(value)
                log_q = self.mixture.log_prob_from(origin)
            log_q = self.mixture.path_log_prob(value, origin, log_q)
        log_prob = log_q - self._log_weight()  # whose gradient cancels that of the component's own site
        return score_parts(log_prob, log_prob)

    def _log_weight(self) -> Tensor:
        log_weights = self.mixture.log_weights
        return torch.where(self._chosen, log_weights, torch.zeros_like(log_weights)).sum(-1)

    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        new = VectorStratum(self.mixture, self.component)
        new._batch_shape = torch.Size(batch_shape)
        return new


def _choose(log_weights: Tensor) -> Tensor:
    """One component per batch element as a mask ``(..., K)``, by the Gumbel trick."""
    uniform = torch.rand_like(log_weights).clamp_min(torch.finfo(log_weights.dtype).tiny)
    highest = (log_weights - (-uniform.log()).log()).argmax(-1, keepdim=True)
    return highest == torch.arange(log_weights.shape[-1], device=log_weights.device)
