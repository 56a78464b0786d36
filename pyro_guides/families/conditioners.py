r"""The small networks inside coupling layers, on columns: ``(features, N)``.

Functions called *backward*, here and beside the other parts of a layer, are gradients written out: at these
sizes autograd's bookkeeping costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

__all__ = ["Layer", "Weights", "eager", "perceptron", "perceptron_backward", "project"]

Layer = tuple[Tensor, Tensor, float]  # bias, weight and gain


class Weights(NamedTuple):
    """What the conditioner of one layer is made of, besides its share of the projected context."""

    source: Tensor | None  # None if it sees nothing but the context
    layers: tuple[Layer, ...]

    def tensors(self) -> list[Tensor]:
        """All weights in a fixed order."""
        first = [] if self.source is None else [self.source]
        return first + [tensor for bias, weight, _ in self.layers for tensor in (bias, weight)]

    def replaced(self, tensors: list[Tensor]) -> Weights:
        """The same with other tensors, which are taken off the front of the list."""
        source = None if self.source is None else tensors.pop(0)
        return Weights(source, tuple((tensors.pop(0), tensors.pop(0), gain) for *_, gain in self.layers))


def perceptron(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, list[Tensor]]:
    """Linear layers, each after a ReLU: y = g W relu(x) + b.

    Args:
        x: columns ``(F, N)``, not activated yet.
        layers: what to apply.

    Returns:
        The outputs, ``(outputs, N)``, and what went into each layer.
    """
    inputs = []
    for bias, weight, gain in layers:
        inputs.append(torch.relu(x))
        x = torch.addmm(bias.unsqueeze(1), weight, inputs[-1], alpha=gain)
    return x, inputs


def perceptron_backward(
    gradient: Tensor, inputs: Sequence[Tensor], layers: Sequence[Layer], *, weights: bool
) -> tuple[Tensor, list[Tensor]]:
    """From the gradient in the outputs to that in x, and if wanted those in each bias and weight."""
    slopes: list[Tensor] = []
    for x, (_, weight, gain) in zip(reversed(inputs), reversed(layers), strict=True):
        # With beta=0 the first argument lends no more than its shape: a product scaled in passing.
        if weights:
            slopes += [torch.addmm(weight, gradient, x.t(), beta=0.0, alpha=gain), gradient.sum(1)]
        gradient = torch.addmm(x, weight.t(), gradient, beta=0.0, alpha=gain).mul_(x.sign())
    return gradient, slopes[::-1]


def eager(device: torch.device) -> bool:
    """Whether a gradient is wanted, and one that is written out will serve.

    It will not where operations must be known: to compilers, which fuse by themselves, to tracing, functional
    transforms and mixed precision.
    """
    return torch.is_grad_enabled() and not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(device.type)
    )


def project(contexts: Tensor, layer: Layer) -> Tensor:
    r"""What contexts add in the first layers of all conditioners, as columns ``(features, N)``.

    Args:
        contexts: rows h ``(N, H)`` of any magnitude: what enters is :math:`h / \sqrt{1 + |h|^2 / H}`, which
            is bounded like layer normalization, but smooth at zero, where contexts start.
        layer: the linear layer that follows.
    """
    bias, weight, gain = layer
    if eager(contexts.device):
        projected: Tensor = _Projection.apply(contexts, bias, weight, gain)
        return projected
    bounded = rms_norm(contexts, contexts.shape[-1:], eps=1.0)
    return torch.addmm(bias.unsqueeze(1), weight, bounded.t(), alpha=gain)


@final
class _Projection(torch.autograd.Function):
    """The same as one node."""

    @staticmethod
    def forward(ctx: Any, contexts: Tensor, bias: Tensor, weight: Tensor, gain: float) -> Tensor:
        size = contexts.shape[-1]
        shrink = (
            torch.linalg.vector_norm(contexts, dim=-1, keepdim=True).square_().div_(size).add_(1.0).rsqrt_()
        )
        bounded = contexts * shrink
        ctx.save_for_backward(contexts, bias, weight, bounded, shrink)
        ctx.gain = gain
        return torch.addmm(bias.unsqueeze(1), weight, bounded.t(), alpha=gain)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        contexts, bias, weight, bounded, shrink = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            rows = rms_norm(contexts, contexts.shape[-1:], eps=1.0)
            projected = torch.addmm(bias.unsqueeze(1), weight, rows.t(), alpha=ctx.gain)
            inputs = (contexts, bias, weight)
            return *torch.autograd.grad(projected, inputs, gradient, create_graph=True), None
        in_weight = torch.addmm(weight, gradient, bounded, beta=0.0, alpha=ctx.gain)
        in_bounded = torch.addmm(bounded, gradient.t(), weight, beta=0.0, alpha=ctx.gain)
        along = (in_bounded * bounded).sum(-1, keepdim=True).div_(-bounded.shape[-1])
        in_contexts = torch.addcmul(in_bounded, bounded, along).mul_(shrink)
        return in_contexts, gradient.sum(1), in_weight, None
