"""Mixtures of normals."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, final

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_guides.arguments import check_choice, check_count, check_flags
from pyro_guides.distributions import VectorMixture
from pyro_guides.families.base import BASELINES, Baseline, BoundFamily, Family
from pyro_guides.families.normal import DiagonalNormal, FullRankNormal

__all__ = ["BoundMixture", "NormalMixture"]

# How far apart components start, in their own standard deviations, that must not change q: its square adds
# to the variance.
_SPLIT = 0.03

_COVARIANCES = {"full": FullRankNormal, "diagonal": DiagonalNormal}


@final
@dataclass(frozen=True)
class NormalMixture(Family):
    r"""A mixture of normals: :math:`q(u) = \sum_k \pi_k N(u; \mu_k, \Sigma_k)`.

    For posteriors with several modes, heavy tails or banana shapes. λ = (logits of π, λ of each
    component), so that weights, too, are a function of the datum. Components start apart, because equal
    ones would stay equal.

    Draws carry gradients for the components; the weights get a score function whose noise a baseline
    takes out, so the guide works under ``Trace_ELBO``, ``TraceGraph_ELBO`` and ``TraceEnum_ELBO``.

    Args:
        components: K, at least 1.
        covariance: "full", or "diagonal" within each component.
        learn_weights: whether π is learned; otherwise each weighs 1/K, and draws are fully
            reparameterized.
        spread: how far apart the components start: the standard deviation of their means, in units of
            unconstrained space (a normal prior of scale 1 has 1).
        baseline: as in :class:`~pyro_guides.Discrete`.
        stratified: under ``TraceEnum_ELBO``, draw every component and weight it by π. Less noise, for K
            times the cost of the model, which must broadcast over a dimension on the left.
        stick_the_landing: see :class:`DiagonalNormal`.

    Raises:
        TypeError: ``components`` is no int, ``spread`` no number, or a flag no bool.
        ValueError: ``components`` is less than 1, ``spread`` is not positive, or an unknown
            ``covariance`` or ``baseline``.

    Source: Christopher M. Bishop, Neil D. Lawrence, Tommi Jaakkola, Michael I. Jordan, "Approximating
    Posterior Distributions in Belief Networks Using Mixtures", NeurIPS 1997; Warren Morningstar et al.,
    "Automatic Differentiation Variational Inference with Mixtures", 2021, arXiv:2003.01687.

    Example:
        >>> import torch
        >>> q = NormalMixture(3).bind(2)
        >>> q(q.initial(torch.zeros(5, 2), 0.1)).sample((4,)).shape
        torch.Size([4, 5, 2])
    """

    components: int
    covariance: Literal["full", "diagonal"] = "full"
    learn_weights: bool = True
    spread: float = 1.0
    baseline: Baseline = "auto"
    stratified: bool = False
    stick_the_landing: bool = True

    def __post_init__(self) -> None:
        check_count("NormalMixture", "components", self.components, 1, "one normal is FullRankNormal()")
        check_choice("NormalMixture", "covariance", self.covariance, list(_COVARIANCES))
        check_choice("NormalMixture", "baseline", self.baseline, BASELINES)
        check_flags(
            "NormalMixture",
            learn_weights=self.learn_weights,
            stratified=self.stratified,
            stick_the_landing=self.stick_the_landing,
        )
        if self.stratified and not self.learn_weights:
            raise ValueError("NormalMixture: fixed weights leave nothing to stratify; take stratified=False")
        if isinstance(self.spread, bool) or not isinstance(self.spread, Real):
            raise TypeError(f"NormalMixture: spread must be a number, got {self.spread!r}")
        if not 0.0 < self.spread < float("inf"):
            raise ValueError(f"NormalMixture: spread must be a positive number, got {self.spread!r}")

    def bind(self, size: int) -> BoundFamily:
        return BoundMixture(self, size)


@final
class BoundMixture(BoundFamily):
    """λ = (logits ``(K,)`` if weights are learned, K times λ of the component)."""

    def __init__(self, family: NormalMixture, size: int) -> None:
        super().__init__()
        component = _COVARIANCES[family.covariance](stick_the_landing=family.stick_the_landing)
        self.component = component.bind(size)
        self.count = family.components
        self.size = size
        self.closed_under = self.component.closed_under
        self.learned = family.learn_weights and family.components > 1
        self.width = self.count * (self.component.width + self.learned)
        self.baseline = family.baseline if self.learned else None
        self.stratified = family.stratified and self.learned
        self.stick_the_landing = family.stick_the_landing
        self.spread = family.spread
        self.register_buffer("directions", _apart(self.count, size))
        self.directions: Tensor

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        locs = loc.unsqueeze(-2) + self.spread * self.directions.to(loc)
        logits = loc.new_zeros(*loc.shape[:-1], self.count if self.learned else 0)
        return torch.cat([logits, self.component.initial(locs, scale).flatten(-2)], dim=-1)

    def placed(self, locs: Tensor, covariances: Tensor, shares: Tensor) -> Tensor:
        """λ ``(W,)`` of normals ``(M, D)``, ``(M, D, D)`` with weights ``(M,)``; components take turns."""
        source = torch.arange(self.count, device=locs.device) % len(locs)
        scale = torch.linalg.cholesky(covariances)
        if self.closed_under != "triangular":
            scale = torch.linalg.inv(covariances).diagonal(dim1=-2, dim2=-1).rsqrt()
        parts = self.component.move(self.component.initial(torch.zeros_like(locs), 1.0), locs, scale)
        parts = self._split(parts.index_select(-2, source), source)
        weights = (shares / torch.bincount(source, minlength=len(locs))).index_select(-1, source)
        return torch.cat([weights.log(), parts.flatten()] if self.learned else [parts.flatten()], dim=-1)

    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> VectorMixture:
        logits, rest = parameters.tensor_split([self.count if self.learned else 0], dim=-1)
        if not self.learned:
            logits = parameters.new_zeros(self.count)
        parts = rest.unflatten(-1, (self.count, self.component.width))
        components = self.component(parts, None if scored is None else scored.unsqueeze(-2))
        return VectorMixture(
            components, logits, learned=self.learned, stick_the_landing=self.stick_the_landing
        )

    def move(self, parameters: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        logits, parts = self._parts_of(self, parameters)
        each = scale.unsqueeze(-2 if scale.dim() == loc.dim() else -3)
        moved = self.component.move(parts, loc.unsqueeze(-2), each).flatten(-2)
        return torch.cat([logits, moved], dim=-1)

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        logits, parts = self._parts_of(other, parameters)
        known = parts.shape[-2]
        equal = not logits.shape[-1] and self.count % known == 0
        if known > self.count or not (self.learned or equal):
            return super().adopt(other, parameters)
        source = torch.arange(self.count, device=parameters.device) % known
        component = other.component if isinstance(other, BoundMixture) else other
        adopted = self.component.adopt(component, parts).index_select(-2, source)
        copies = torch.bincount(source)[source]
        if known < self.count:
            adopted = self._split(adopted, source)
        if not self.learned:
            return adopted.flatten(-2)
        if not logits.shape[-1]:
            logits = parameters.new_zeros(*parameters.shape[:-1], known)
        logits = logits.index_select(-1, source) - copies.to(logits).log()
        return torch.cat([logits, adopted.flatten(-2)], dim=-1)

    def _parts_of(self, other: BoundFamily, parameters: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(other, BoundMixture):
            return parameters[..., :0], parameters.unsqueeze(-2)
        logits, rest = parameters.tensor_split([other.count if other.learned else 0], dim=-1)
        return logits, rest.unflatten(-1, (other.count, other.component.width))

    def _split(self, parts: Tensor, source: Tensor) -> Tensor:
        """Move copies of one component slightly apart around it, for equal ones would stay equal."""
        siblings = (source == source.unsqueeze(-1)).to(parts)
        directions = self.directions.to(parts)
        directions = directions - siblings @ directions / siblings.sum(-1, keepdim=True)
        shift = _SPLIT * self.component(parts).variance.sqrt() * directions
        loc, rest = parts.tensor_split([self.size], dim=-1)
        return torch.cat([loc + shift, rest], dim=-1)


def _apart(count: int, size: int) -> Tensor:
    """Points in general position around zero, about a standard normal: ``(count, size)``."""
    points = SobolEngine(size, scramble=True).draw(count).clamp(1e-3, 1.0 - 1e-3)
    normal = torch.special.ndtri(points)
    return normal - normal.mean(0)
