"""What flows cost: ours against zuko's, and the full-rank normal against PyTorch's.

Both sides get the same number of layers, hidden sizes and bins, and a context that needs a gradient, as an
encoder's does. Zuko's flows are fast in one direction only, so each task is also measured on them inverted,
and the faster way counts. The spline flows of zuko are measured in both of its constructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal
from torch.nn.functional import softplus

from pyro_guides.distributions.vector import PushForward
from pyro_guides.families import SMALLEST_SCALE, FullRankNormal
from pyro_guides.families.flow import NormalizingFlow
from tests.benchmarks.clock import Effort, Step, compare, isolated, seeded
from tests.benchmarks.report import Report, Result, Tier

__all__ = ["against_torch", "against_zuko", "run"]

BATCH = 256
CONTEXT = 64
TRANSFORMS = 4
HIDDEN = (64, 64)
BINS = 8
SIZES = (2, 8, 32, 64)
KINDS = ("affine", "spline")
# log q of an own draw, and log q of a given value: ours may cost at most this share of zuko's best
TARGETS = {"sampling": 0.75, "scoring": 0.5}


@contextmanager
def unvalidated() -> Iterator[None]:
    """As importing zuko leaves it: without the validation of distributions, which afterwards is back."""
    before = Distribution._validate_args, Distribution.arg_constraints
    try:
        Distribution._validate_args, Distribution.arg_constraints = False, {}
        yield
    finally:
        Distribution._validate_args, Distribution.arg_constraints = before


def step_of(draw: Callable[[], Tensor], weights: list[nn.Parameter], context: Tensor) -> Step:
    """Forward and backward of a task, whose result ``draw`` returns, into weights and context."""
    wanted = [context, *weights]
    return lambda: torch.autograd.grad(draw().sum(), wanted)


def ours(kind: str, size: int, task: str) -> Step:
    """Our flow alone: the normal around it is the base distribution of zuko's."""
    family: Any = NormalizingFlow(TRANSFORMS, kind, hidden=HIDDEN, bins=BINS, context_size=CONTEXT).bind(size)
    disturb(family)
    context, value = torch.randn(BATCH, CONTEXT, requires_grad=True), torch.randn(BATCH, size)
    weights = [*family.flow.parameters()]

    def sampling() -> Tensor:
        noise = torch.randn(BATCH, size)
        draw, log_volume = family.flow(noise, context)
        return draw.sum(-1) + normal(noise) - log_volume

    def scoring() -> Tensor:
        noise, log_volume = family.flow.inverse(value, context)
        return normal(noise) - log_volume

    return step_of({"sampling": sampling, "scoring": scoring}[task], weights, context)


def normal(noise: Tensor) -> Tensor:
    """The log density of standard normal noise."""
    return -0.5 * noise.square().sum(-1) - 0.9189385 * noise.shape[-1]


def disturb(module: nn.Module) -> None:
    """Leave the start, at which some gradients are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


def zuko(construction: str, size: int, task: str, *, inverted: bool) -> Step:
    """A flow of zuko's."""
    from zuko.flows import NICE, NSF, Flow
    from zuko.transforms import MonotonicRQSTransform

    options: dict[str, Any] = {"transforms": TRANSFORMS, "hidden_features": HIDDEN}
    if construction == "NICE":
        flow: Any = NICE(size, CONTEXT, **options)
    elif construction == "NSF":
        flow = NSF(size, CONTEXT, bins=BINS, passes=2, **options)
    else:
        shapes = [(BINS,), (BINS,), (BINS - 1,)]
        flow = NICE(size, CONTEXT, univariate=MonotonicRQSTransform, shapes=shapes, **options)
    if inverted:
        flow = Flow(flow.transform.inv, flow.base)
    context, value = torch.randn(BATCH, CONTEXT, requires_grad=True), torch.randn(BATCH, size)
    weights = [*flow.parameters()]

    def sampling() -> Tensor:
        draw, log_prob = flow(context).rsample_and_log_prob()
        return draw.sum(-1) + log_prob

    def scoring() -> Tensor:
        return flow(context).log_prob(value)

    return step_of({"sampling": sampling, "scoring": scoring}[task], weights, context)


def against_zuko(kind: str, size: int, effort: Effort) -> list[Result]:
    """Our time over that of zuko's fastest way, for both tasks."""
    constructions = {"affine": ["NICE"], "spline": ["NSF", "coupling"]}[kind]
    results = []
    for task, target in TARGETS.items():
        steps = {"ours": seeded(ours, kind, size, task)}
        for construction in constructions:
            for inverted in (False, True):
                name = f"{construction}{' inverted' if inverted else ''}"
                steps[name] = seeded(zuko, construction, size, task, inverted=inverted)
        timings = compare(steps, effort)
        own = timings.pop("ours")
        best = min(timings, key=lambda name: timings[name].milliseconds)
        where = f"D={size}, B={BATCH}"
        what = f"{kind} flow, {task} / zuko {best}"
        results.append(Result(what, where, *own.over(timings[best]), target=target))
        results.append(Result(f"{kind} flow, {task}, ms of CPU", where, own.milliseconds))
    return results


def against_torch(size: int, effort: Effort) -> list[Result]:
    """The full-rank normal against PyTorch's, both from the same λ: a draw and its log q."""
    family = FullRankNormal().bind(size)
    parameters = seeded(torch.randn, BATCH, family.width).requires_grad_()
    rows, columns = torch.tril_indices(size, size, offset=-1)

    def total(q: Distribution | PushForward) -> tuple[Tensor, ...]:
        draw = q.rsample()
        return torch.autograd.grad((draw.sum(-1) + q.log_prob(draw)).sum(), parameters)

    def torch_normal() -> Any:
        loc, raw, couplings = parameters.tensor_split([size, 2 * size], -1)
        diagonal = softplus(raw) + SMALLEST_SCALE
        tril = torch.diag_embed(torch.ones_like(diagonal))
        tril[..., rows, columns] = couplings / size**0.5
        return total(MultivariateNormal(loc, scale_tril=diagonal.unsqueeze(-1) * tril, validate_args=False))

    timings = compare({"ours": lambda: total(family(parameters)), "torch": torch_normal}, effort)
    ratio = timings["ours"].over(timings["torch"])
    return [Result("full-rank normal / MultivariateNormal", f"D={size}, B={BATCH}", *ratio, target=0.8)]


def run(tier: Tier) -> Report:
    """All measurements of this module, or those of one size and fewer rounds."""
    full = tier == "full"
    effort = Effort(rounds=20 if full else 5, steps=5, warmup=5)
    results = []
    with isolated():
        for kind in KINDS:
            for size in SIZES if full else (8,):
                with unvalidated():
                    results += against_zuko(kind, size, effort)
        results += against_torch(8, effort)
    return Report(results)
