"""From the gradients of one backward pass to those of a step: averaged, limited, and known to be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

__all__ = ["Clip", "Limit", "average"]

Limit = float | Literal["auto", "normalize"] | None
_DECAY = 0.99
_GENEROUS = 10.0


@final
class Clip:
    """Limits the norm of all gradients together.

    Args:
        limit: the largest norm; "auto" for ten times the running mean of norms, which leaves ordinary steps
            alone in a loss of any scale; "normalize" to give every step the norm 1; None for no limit.
    """

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._weight = 0.0
        self._sum = 0.0

    @torch.no_grad()
    def __call__(self, parameters: Sequence[Tensor]) -> float:
        """Limit the gradients in place; returns the norm they had, which is finite if they all are."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm) and norm > 0.0:
            factor = self._most(norm) / norm
            if factor < 1.0 or self.limit == "normalize":
                torch._foreach_mul_(gradients, factor)
            self._note(min(norm, norm * factor))
        return norm

    def _most(self, norm: float) -> float:
        if self.limit is None:
            return norm
        if self.limit == "normalize":
            return 1.0
        if self.limit == "auto":
            return _GENEROUS * self._sum / self._weight if self._weight else norm
        return float(self.limit)

    def _note(self, norm: float) -> None:
        self._weight = _DECAY * self._weight + (1.0 - _DECAY)
        self._sum = _DECAY * self._sum + (1.0 - _DECAY) * norm

    def state_dict(self) -> dict[str, float]:
        """What it remembers."""
        return {"weight": self._weight, "sum": self._sum}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Remember what another one did."""
        self._weight, self._sum = state["weight"], state["sum"]


@torch.no_grad()
def average(loss: Tensor, parameters: Sequence[Tensor], reduce: Callable[..., Any]) -> Tensor:
    """Give every process the mean of all processes' gradients, in one message.

    Args:
        loss: this process's loss.
        parameters: the same on all processes.
        reduce: averages a tensor over the processes.

    Returns:
        The mean loss.
    """
    pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    sizes = [piece.numel() for piece in pieces]
    total: Tensor = reduce(torch.cat([*pieces, loss.detach().reshape(1).to(pieces[0])]), reduce_op="mean")
    *means, mean_loss = total.split([*sizes, 1])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)
    return mean_loss.squeeze(0)
