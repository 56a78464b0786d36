r"""Control variates for score functions, in whatever ELBO they end up.

An ELBO multiplies a score function by the costs that depend on the draw, and so hands those costs back as
the gradient of the score: :func:`controlled` passes a score through unchanged and corrects its gradient on
the way back. It needs no option of the ELBO, and fits every batch and particle shape.

What may be subtracted from the cost of one element without bias is anything that does not depend on its
own draw: the mean cost of other elements (if their costs do not depend on it, either), the mean cost of
earlier steps, or what a network predicts from the element's inputs.

Source: Andriy Mnih, Karol Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014,
arXiv:1402.0030 (running mean, input-dependent baseline); Wouter Kool, Herke van Hoof, Max Welling, "Buy 4
REINFORCE Samples, Get a Baseline for Free!", 2019 (leave-one-out).
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["ControlVariate"]


@final
class ControlVariate(nn.Module):
    """Takes the predictable part of the costs out of a score function's gradient.

    Args:
        depth: how many dimensions on the right of a score belong to plates; those on their left are
            particles.
        local: dimensions of the plates, negative, over whose other elements costs may be averaged: none
            of these costs may depend on the element's own draw.
        decay: how much of the running moments of the costs a new batch leaves.
    """

    def __init__(self, depth: int, local: tuple[int, ...] = (), decay: float = 0.9) -> None:
        super().__init__()
        self.depth = depth
        self.local = local
        self.decay = decay
        # Sums with a common weight, so that the first steps are not biased towards zero.
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))
        self.moments: Tensor

    def forward(
        self, score: Tensor, prediction: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """The same score with a controlled gradient.

        Args:
            score: log q of what was drawn, ``(particles, *batch)``.
            prediction: what a network says about each element's cost, in units of the running
                moments; it is trained by the same backward pass. None without a network.
            counted: which elements are not masked; all of them if None.
        """
        if prediction is None:
            prediction = score.new_zeros(())
        if counted is None:
            counted = torch.ones((), dtype=torch.bool, device=score.device)
        controlled: Any = _Controlled.apply(score, prediction, counted, self)
        return controlled

    def residual(self, cost: Tensor, prediction: Tensor, counted: Tensor) -> Tensor:
        """What is left of the costs of elements that count; others cost nothing, and say nothing."""
        mean, scale = self._mean_and_scale(cost)
        residual = torch.where(counted, cost - mean - scale * prediction, torch.zeros_like(cost))
        dims = self._averaged(cost)
        if dims:
            others = counted.sum(dims, keepdim=True) - counted.to(torch.int64)
            mean_of_others = (residual.sum(dims, keepdim=True) - residual) / others.clamp_min(1)
            residual = torch.where(counted & (others > 0), residual - mean_of_others, residual)
        return residual

    def target(self, cost: Tensor) -> Tensor:
        """The costs in units of the running moments: what a network learns to predict."""
        mean, scale = self._mean_and_scale(cost)
        return (cost - mean) / scale

    def note(self, cost: Tensor, counted: Tensor) -> None:
        """Take costs into the running moments, for the steps to come."""
        seen = cost[counted].double()
        if not len(seen) or not bool(seen.isfinite().all()):
            return
        new = torch.stack([torch.ones_like(seen[0]), seen.mean(), seen.square().mean()])
        self.moments.mul_(self.decay).add_((1.0 - self.decay) * new.to(self.moments))

    def _mean_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        weight, first, second = self.moments
        mean = torch.where(weight > 0, first / weight.clamp_min(1e-12), torch.zeros_like(first))
        variance = second / weight.clamp_min(1e-12) - mean.square()
        scale = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()
        return mean.to(like), scale.to(like)

    def _averaged(self, cost: Tensor) -> tuple[int, ...]:
        """The dimensions of the particles if there are several, of local plates otherwise."""
        particles = tuple(range(-cost.dim(), -self.depth))
        if cost.shape[: len(particles)].numel() > 1:
            return particles
        return tuple(dim for dim in self.local if -dim <= cost.dim())


@final
class _Controlled(torch.autograd.Function):
    """The identity on a score, whose gradient is what the control variate leaves of the costs."""

    @staticmethod
    def forward(
        ctx: Any, score: Tensor, prediction: Tensor, counted: Tensor, control: ControlVariate
    ) -> Tensor:
        ctx.control = control
        ctx.save_for_backward(prediction, counted)
        return score.clone()

    @staticmethod
    def backward(ctx: Any, cost: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        prediction, counted = ctx.saved_tensors
        counted = counted.expand(cost.shape)
        residual = ctx.control.residual(cost, prediction, counted)
        error = None
        if ctx.needs_input_grad[1]:
            error = torch.where(counted, prediction - ctx.control.target(cost), torch.zeros_like(cost))
            error = (error / error.numel()).sum_to_size(prediction.shape)
        ctx.control.note(cost, counted)
        return residual, error, None, None
