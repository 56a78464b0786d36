"""The loss of one batch per row, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.objectives import differentiable_loss
from pyro_guides.training.data import Arguments
from pyro_guides.training.rows import Counting, RowScale

__all__ = ["Objective"]


@final
@dataclass(frozen=True, eq=False)
class Objective:
    """What a step makes smaller: an ELBO of model and guide, in nats per row.

    Attributes:
        elbo: one of Pyro's, or of this package.
        model: the model.
        guide: the guide.
        counting: how the model counts its rows.
        tempering: what weighs the latents' terms; each use of it is a step.
    """

    elbo: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    counting: Counting
    tempering: AbstractContextManager[Any] | None = None

    def __call__(self, batch: Arguments) -> Tensor:
        """The loss, with the ELBO's gradient."""
        with self.tempering or nullcontext(), self.counted():
            loss = differentiable_loss(self.elbo, self.model, self.guide, *batch.args, **batch.kwargs)
        return loss / self.counting.size

    @property
    def warms_up(self) -> bool:
        """Whether a schedule still holds latents' terms down."""
        return float(getattr(self.tempering, "weight", 1.0)) < 1.0

    def counted(self) -> AbstractContextManager[Any]:
        """Counts every row of a batch as often as it has to."""
        if self.counting.repeat == 1.0:
            return nullcontext()
        return RowScale(self.counting.plates, self.counting.repeat)

    @torch.no_grad()
    def value(self, batch: Arguments) -> float:
        """The untempered loss alone."""
        with self.counted():
            return (
                float(self.elbo.loss(self.model, self.guide, *batch.args, **batch.kwargs))
                / self.counting.size
            )
