"""Any flow of the package zuko, or any module that maps a context to a distribution, as a family."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from pyro_guides.arguments import check_count, check_flags
from pyro_guides.distributions.flow import fixed_scale
from pyro_guides.distributions.normal import VectorNormal
from pyro_guides.distributions.vector import Shape, VectorDistribution, score_parts
from pyro_guides.families.base import BoundFamily, Family
from pyro_guides.families.flow import BoundAround, check_base
from pyro_guides.families.normal import FullRankNormal

__all__ = ["ZukoFlow"]


@final
@dataclass(frozen=True)
class ZukoFlow(Family):
    r"""Flows that others wrote: :math:`u = \mu + S v`, v drawn from a flow given the context h.

    λ = (λ of a normal, which gives μ and S, and h). Zuko's flows are turned round first, because they
    sample slowly as they come: ``Flow(flow.transform.inv, flow.base)``. Where zeroing the last layers of
    their networks makes them the identity (NICE, coupling and autoregressive splines, MAF), they start there.

    For coupling flows :class:`NormalizingFlow` does the same in less time, also where sites are masked.

    Args:
        build: ``build(features, context)`` returns zuko's lazy flow, or any module that maps a context
            ``(..., context)`` to a PyTorch distribution over vectors of size ``features``.
        context_size: the size of h.
        base: the normal family that gives μ and S.
        stick_the_landing: see :class:`DiagonalNormal`. It costs another density per step, which is slow
            for autoregressive flows.

    Raises:
        TypeError: ``build`` cannot be called or returns no module, or an argument has the wrong type.
        ValueError: ``context_size`` is less than 1.
        ImportError: zuko is missing, when the family is first used.
        NotImplementedError: draws have no gradient path, or single sites are masked.

    Source: François Rozet and others, "Zuko: Normalizing flows in PyTorch", 2022, doi:10.5281/zenodo.7625672.

    Example:
        >>> import torch
        >>> class Shifted(torch.nn.Linear):
        ...     def forward(self, context):
        ...         loc = super().forward(context)
        ...         return torch.distributions.Independent(torch.distributions.StudentT(5.0, loc), 1)
        >>> q = ZukoFlow(lambda features, context: Shifted(context, features), context_size=4).bind(2)
        >>> q(q.initial(torch.zeros(7, 2), 0.1)).rsample().shape
        torch.Size([7, 2])
    """

    build: Callable[[int, int], nn.Module]
    context_size: int = 64
    base: Family = FullRankNormal()  # noqa: RUF009 - immutable
    stick_the_landing: bool = False

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(
                "ZukoFlow: build must be a function of (features, context) that returns a flow, such as "
                f"lambda features, context: zuko.flows.NSF(features, context), got {self.build!r}"
            )
        check_count("ZukoFlow", "context_size", self.context_size, 1, "take 16 or more")
        check_base("ZukoFlow", self.base)
        check_flags("ZukoFlow", stick_the_landing=self.stick_the_landing)

    def bind(self, size: int) -> BoundFamily:
        with _validation_kept():
            flow = self._built(size)
            _start_at_identity(flow, size, self.context_size)
        return _BoundZuko(self.base.bind(size), flow, self.context_size, self.stick_the_landing)

    def _built(self, size: int) -> nn.Module:
        try:
            flow: Any = self.build(size, self.context_size)
        except ModuleNotFoundError as error:
            if error.name != "zuko":
                raise
            raise ImportError('ZukoFlow needs zuko: pip install "pyro-guides[flows]"') from error
        if not isinstance(flow, nn.Module):
            raise TypeError(
                f"ZukoFlow: build({size}, {self.context_size}) returned {type(flow).__name__}, expected a "
                "module that maps a context to a distribution, such as zuko.flows.NSF(features, context)"
            )
        if type(flow).__module__.partition(".")[0] == "zuko" and hasattr(flow, "transform"):
            turn: Any = importlib.import_module("zuko.flows").Flow
            return cast("nn.Module", turn(cast("Any", flow.transform).inv, flow.base))  # draws the fast way
        return flow


@final
class _BoundZuko(BoundAround):
    def __init__(
        self, base: BoundFamily, flow: nn.Module, context_size: int, stick_the_landing: bool
    ) -> None:
        super().__init__(base, context_size, stick_the_landing)
        self.scorer = _Scorer(flow)

    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> VectorDistribution:
        if scored is not None:
            raise NotImplementedError(
                "ZukoFlow cannot leave single sites out of its density, as their mask asks; give masked "
                "sites a group of their own, or take NormalizingFlow(), which can"
            )
        normal, context = self.parts(parameters)
        return _Placed(normal, self.scorer, context, stick_the_landing=self.stick_the_landing)


@final
class _Scorer(nn.Module):
    """The log density of values under a flow, as a module so that its weights can be held fixed."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, context: Tensor, value: Tensor) -> Tensor:
        with _unvalidated():
            log_prob: Tensor = self.flow(context).log_prob(value)
        return log_prob

    def draw(self, context: Tensor, prefix: torch.Size) -> tuple[Tensor, Tensor]:
        """Draw v, with its log density."""
        with _unvalidated():
            q = self.flow(context)
            if hasattr(q, "rsample_and_log_prob"):
                value, log_prob = q.rsample_and_log_prob(prefix)
            else:
                value = q.rsample(prefix)
                log_prob = q.log_prob(value)
        return value, log_prob


@final
class _Placed(VectorDistribution):
    """The distribution of u = μ + S v; the origin of a draw is its log density."""

    def __init__(
        self, normal: VectorNormal, scorer: _Scorer, context: Tensor, *, stick_the_landing: bool
    ) -> None:
        super().__init__(context.shape[:-1], normal.event_shape[0], stick_the_landing=stick_the_landing)
        self.normal = normal
        self.scorer = scorer
        self.context = context
        # Under a functional call the weights are others only until it returns.
        self.held_fixed = not any(weight.requires_grad for weight in scorer.parameters())

    def generate(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        prefix, context = shape[: len(shape) - self.context.dim()], self.context
        if shape[:-1] != prefix + context.shape[:-1]:  # expanded along existing dimensions
            prefix, context = torch.Size(), context.expand(*shape[:-1], context.shape[-1])
        value, log_prob = self.scorer.draw(context, prefix)
        scale = self.normal.scale
        return self.normal.loc + scale.multiply(value), log_prob - scale.log_determinant()

    def trace_back(self, value: Tensor) -> Tensor:
        return self._log_density(value, self.normal, self.context, held_fixed=self.held_fixed)

    def log_prob_from(self, origin: Tensor) -> Tensor:
        return origin

    def score_parts(self, value: Tensor) -> ScoreParts:
        log_prob = self.log_prob_from(self.origin_of(value))
        if not (self.stick_the_landing and torch.is_grad_enabled()):
            return score_parts(log_prob, log_prob)
        if self.path_twin is not None:
            return score_parts(log_prob, self.path_twin.log_prob(value))
        fixed = VectorNormal(self.normal.loc.detach(), fixed_scale(self.normal.scale))
        context, value = self.context.detach(), detach_provenance(value)
        return score_parts(log_prob, self._log_density(value, fixed, context, held_fixed=True))

    def expand(self, batch_shape: Shape, _instance: VectorDistribution | None = None) -> VectorDistribution:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        new = _Placed(self.normal, self.scorer, self.context, stick_the_landing=self.stick_the_landing)
        new._batch_shape = torch.Size(batch_shape)
        new.path_twin, new.held_fixed = self.path_twin, self.held_fixed
        return new

    def _log_density(
        self, value: Tensor, normal: VectorNormal, context: Tensor, *, held_fixed: bool
    ) -> Tensor:
        placed = normal.scale.solve(value - normal.loc)
        if held_fixed:
            weights = {name: weight.detach() for name, weight in self.scorer.named_parameters()}
            log_prob = functional_call(self.scorer, weights, (context, placed))
        else:
            log_prob = self.scorer(context, placed)
        return log_prob - normal.scale.log_determinant()


@contextmanager
def _validation_kept() -> Iterator[None]:
    """Importing zuko switches off the validation of all distributions; this switches it on again."""
    before = Distribution._validate_args, Distribution.arg_constraints
    try:
        yield
    finally:
        Distribution._validate_args, Distribution.arg_constraints = before  # type: ignore[method-assign]


@contextmanager
def _unvalidated() -> Iterator[None]:
    """No validation: zuko's distributions are not made for it."""
    before = Distribution._validate_args
    Distribution._validate_args = False
    try:
        yield
    finally:
        Distribution._validate_args = before


@torch.no_grad()
def _start_at_identity(flow: nn.Module, size: int, context_size: int) -> None:
    """Zero the last layers of zuko's networks, if that makes the flow a standard normal."""
    networks = [m.hyper for m in flow.modules() if isinstance(getattr(m, "hyper", None), nn.Module)]
    weights = [weight for network in networks for weight in _last_layer(cast("nn.Module", network))]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    some = torch.linspace(-2.0, 2.0, 5 * size).reshape(5, size).cos()
    with _unvalidated():
        q = flow(torch.zeros(5, context_size))
        if not q.has_rsample:
            raise NotImplementedError(
                f"ZukoFlow: draws of {type(flow).__name__} have no gradient path; for a mixture take "
                "NormalMixture(), else a flow that transforms normal noise"
            )
        got = q.log_prob(some)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(some).sum(-1)
    if not torch.allclose(got, expected, atol=1e-3):
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


def _last_layer(network: nn.Module) -> list[nn.Parameter]:
    # Not all of zuko's linear layers are PyTorch's.
    layers = [module for module in network.modules() if isinstance(getattr(module, "weight", None), Tensor)]
    return [weight for layer in layers[-1:] for weight in layer.parameters()]
