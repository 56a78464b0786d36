"""One pass through all layers of a coupling flow, in either direction, and its gradient.

Vectors are columns here, ``(D, N)``, so that halves and parameters are contiguous blocks of rows. In ordinary
eager mode the whole pass is one node of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from pyro_guides.families.affine import affine, affine_backward
from pyro_guides.families.conditioners import Weights, eager, perceptron, perceptron_backward
from pyro_guides.families.splines import spline, spline_backward

__all__ = ["Plan", "pass_through"]


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass needs to know.

    Attributes:
        orders: for each pair of layers, how it arranges the elements and the way back, ``(pairs, 2, D)``.
        kind: ``"affine"`` or ``"spline"``.
        bound: where splines end.
        inverse: whether to map back.
        shape: the batch of which there are N vectors.
        contexts: the batch of contexts, which broadcasts with ``shape``.
        scored: which elements count, ``(D, N)``; all of them if None.
    """

    orders: Tensor
    kind: str
    bound: float
    inverse: bool
    shape: torch.Size
    contexts: torch.Size
    scored: Tensor | None

    def stages(self, count: int) -> list[tuple[int, list[int]]]:
        """The pairs of layers, in the order of the pass, each with its layers."""
        pairs = [(i, [*range(2 * i, min(2 * i + 2, count))]) for i in range(len(self.orders))]
        return [(i, layers[::-1]) for i, layers in reversed(pairs)] if self.inverse else pairs

    def reorders(self, stage: int) -> bool:
        """Whether a pair of layers does not see the elements as they come."""
        return stage > 0 and self.orders.shape[-1] > 2

    def split(self, x: Tensor) -> list[Tensor]:
        """The two halves of columns; of a single element, the first is empty."""
        return [*x.split([len(x) // 2, len(x) - len(x) // 2])]

    def target(self, layer: int) -> int:
        """Which half a layer maps."""
        return 0 if layer % 2 and self.orders.shape[-1] > 1 else 1


def pass_through(
    plan: Plan, x: Tensor, projected: Tensor, weights: Sequence[Weights]
) -> tuple[Tensor, Tensor]:
    """Map columns by all layers.

    Args:
        plan: what to do.
        x: columns ``(D, N)``, zero where not scored.
        projected: what each context adds in the first layer of all conditioners, one column each.
        weights: those of each layer.

    Returns:
        The mapped columns, and the log-volume of the map (in both directions) at each, ``(N,)``.
    """
    if eager(x.device):
        tensors = [tensor for held in weights for tensor in held.tensors()]
        fused: tuple[Tensor, Tensor] = _Pass.apply(plan, weights, x, projected, *tensors)
        return fused
    return _run(plan, x, projected, weights, [])


class _Step(NamedTuple):
    """What the gradient of one layer needs."""

    source: Tensor
    inputs: list[Tensor]  # of the conditioner's layers
    scored: Tensor | None
    mapped: Any  # what the map left behind


def _run(
    plan: Plan, x: Tensor, projected: Tensor, weights: Sequence[Weights], tape: list[_Step]
) -> tuple[Tensor, Tensor]:
    """The pass by differentiable operations; the tape takes down what happened."""
    contexts, log_slopes = projected.chunk(len(weights)), []
    for stage, layers in plan.stages(len(weights)):
        order, back = plan.orders[stage].unbind()
        reorders, scored = plan.reorders(stage), plan.scored
        halves = plan.split(x.index_select(0, order) if reorders else x)
        counts: list[Tensor | None] = [None, None]
        if scored is not None:
            counts = [*plan.split(scored.index_select(0, order) if reorders else scored)]
        for i in layers:
            target = plan.target(i)
            source = halves[1 - target]
            parameters, inputs = _condition(plan, weights[i], contexts[i], source)
            halves[target], log_slope, mapped = _map(plan, parameters, halves[target], counts[target])
            log_slopes.append(log_slope)
            tape.append(_Step(source, inputs, counts[target], mapped))
        x = torch.cat(halves)
        if reorders:
            x = x.index_select(0, back)
    return x, torch.cat(log_slopes).sum(0)


def _run_backward(
    plan: Plan,
    gradients: tuple[Tensor, ...],
    weights: Sequence[Weights],
    tape: list[_Step],
    *,
    everything: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the gradients in the results to those in x, in the projected contexts and in all weights."""
    in_x, in_log_volume = gradients
    in_contexts: dict[int, Tensor] = {}
    in_weights: dict[int, list[Tensor]] = {}
    for stage, layers in reversed(plan.stages(len(weights))):
        order, back = plan.orders[stage].unbind()
        reorders = plan.reorders(stage)
        slopes = plan.split(in_x.index_select(0, order) if reorders else in_x)
        for i in reversed(layers):
            step, target = tape.pop(), plan.target(i)
            in_parameters, slopes[target] = _map_backward(plan, step, slopes[target], in_log_volume)
            slope, in_contexts[i], in_weights[i] = _condition_backward(
                plan, step, in_parameters, weights[i], everything
            )
            source = weights[i].source
            if source is not None:
                slopes[1 - target] = torch.addmm(slopes[1 - target], source.t(), slope)
        in_x = torch.cat(slopes)
        if reorders:
            in_x = in_x.index_select(0, back)
    count = range(len(weights))
    return in_x, torch.cat([in_contexts[i] for i in count]), [s for i in count for s in in_weights[i]]


@final
class _Pass(torch.autograd.Function):
    """The pass as one node, with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, weights: Sequence[Weights], x: Tensor, *tensors: Tensor) -> Any:
        ctx.plan, ctx.weights, ctx.tape = plan, weights, []
        ctx.save_for_backward(x, *tensors)
        return _run(plan, x, tensors[0], weights, ctx.tape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which also checks that nothing was changed in place
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            return None, None, *_again(ctx.plan, ctx.weights, saved, gradients, needed)
        everything = any(needed[2:])
        in_x, in_projected, in_weights = _run_backward(
            ctx.plan, gradients, ctx.weights, [*ctx.tape], everything=everything
        )
        rest = in_weights if everything else [None] * len(needed[2:])
        return None, None, in_x, in_projected, *rest


def _again(
    plan: Plan, weights: Sequence[Weights], saved: Sequence[Tensor], gradients: Any, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradient, by operations that autograd takes down."""
    x, projected, *tensors = saved
    results = _run(plan, x, projected, [held.replaced(tensors) for held in weights], [])
    inputs = [tensor for tensor, wanted in zip(saved, needed, strict=True) if wanted]
    slopes = iter(torch.autograd.grad(results, inputs, gradients, create_graph=True))
    return [next(slopes) if wanted else None for wanted in needed]


def _condition(plan: Plan, weights: Weights, context: Tensor, source: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A conditioner's outputs for the halves ``(d, N)`` that it sees, and what they came from."""
    if weights.source is None:  # one column per context
        x, inputs = perceptron(context, weights.layers)
        return _spread(plan, x), inputs
    if plan.shape == plan.contexts:
        x = torch.addmm(context, weights.source, source)
    else:
        x = torch.mm(weights.source, source) + _spread(plan, context)
    return perceptron(x, weights.layers)


def _condition_backward(
    plan: Plan, step: _Step, gradient: Tensor, weights: Weights, everything: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the gradient in the outputs to those in the first layer, its context and the weights."""
    if weights.source is None:
        gradient = _gather(plan, gradient)
    slope, slopes = perceptron_backward(gradient, step.inputs, weights.layers, weights=everything)
    if weights.source is None:
        return slope, slope, slopes
    return slope, _gather(plan, slope), [torch.mm(slope, step.source.t()), *slopes] if everything else []


def _spread(plan: Plan, columns: Tensor) -> Tensor:
    """One column per vector, from one per context."""
    if plan.shape == plan.contexts:
        return columns
    return columns.view(_aligned(plan, columns)).expand(-1, *plan.shape).reshape(len(columns), -1)


def _gather(plan: Plan, columns: Tensor) -> Tensor:
    """The sum over the vectors that share a context."""
    if plan.shape == plan.contexts:
        return columns
    return columns.view(-1, *plan.shape).sum_to_size(_aligned(plan, columns)).reshape(len(columns), -1)


def _aligned(plan: Plan, columns: Tensor) -> list[int]:
    return [len(columns), *[1] * (len(plan.shape) - len(plan.contexts)), *plan.contexts]


def _map(plan: Plan, parameters: Tensor, x: Tensor, scored: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """Map a half ``(d, N)`` by a conditioner's outputs: image, log-slopes, and what is left behind."""
    parameters = parameters.to(x.dtype).view(-1, *x.shape)  # mixed precision ends here
    mapped: Any
    if plan.kind == "affine":
        value, log_slope, mapped = affine(parameters, x, inverse=plan.inverse)
    else:
        value, log_slope, mapped = spline(parameters, x, plan.bound, inverse=plan.inverse)
    if scored is not None:
        value, log_slope = (torch.where(scored, y, torch.zeros_like(y)) for y in (value, log_slope))
    return value, log_slope, mapped


def _map_backward(plan: Plan, step: _Step, in_value: Tensor, in_log_slope: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients in the results to those in the parameters and in x."""
    if step.scored is not None:
        in_value, in_log_slope = in_value * step.scored, in_log_slope * step.scored
    if plan.kind == "affine":
        slopes = affine_backward(step.mapped, in_value, in_log_slope, inverse=plan.inverse)
    else:
        slopes = spline_backward(step.mapped, in_value, in_log_slope, plan.bound, inverse=plan.inverse)
    return slopes[0].view(-1, in_value.shape[-1]), slopes[1]
