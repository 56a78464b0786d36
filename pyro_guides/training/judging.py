"""The validation ELBO: how good the guide is on rows that it does not train on, and whether that still grows.

Every look draws the same random numbers, and compares row by row with the best one so far: most of the noise,
of draws as well as of rows, is the same in both and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Judge", "Look", "mean_and_error"]


@final
@dataclass(frozen=True)
class Look:
    """One evaluation of the validation ELBO.

    Attributes:
        step: after how many steps.
        elbo: its mean, in nats per row.
        error: the standard error of that mean, over rows and draws.
    """

    step: int
    elbo: float
    error: float


@final
class Judge:
    """Keeps the best weights, and says when they no longer get better.

    Args:
        measure: returns the ELBO of each validation row, or of each of several draws, ``(n,)``; in the same
            order and with the same random numbers each time.
        snapshot: copies the weights.
        patience: after how many looks without a gain beyond noise to stop; None for never.
    """

    def __init__(
        self,
        measure: Callable[[], Tensor],
        snapshot: Callable[[], dict[str, Tensor]],
        patience: int | None,
    ) -> None:
        self._measure = measure
        self._snapshot = snapshot
        self._patience = patience
        self.looks: list[Look] = []
        self.best: Look | None = None
        self.best_weights: dict[str, Tensor] = {}
        self._best_values = torch.empty(0)
        self._reference = torch.empty(0)  # what the next gain is measured from
        self._waited = 0

    def look(self, step: int, *, patient: bool = False) -> Look:
        """Measure, remember, and keep the weights if they are the best so far.

        Args:
            step: after how many steps.
            patient: whether no gain was to be expected yet, so that none does not count.
        """
        values = self._measure().double().cpu()
        look = Look(step, *mean_and_error(values))
        self.looks.append(look)
        if not math.isfinite(look.elbo):
            self._waited += not patient
            return look
        if self.best is None or look.elbo > self.best.elbo:
            self.best, self._best_values, self.best_weights = look, values, self._snapshot()
        self._waited += not patient
        if not len(self._reference) or _gained(values - self._reference):
            self._reference, self._waited = values, 0
        return look

    @property
    def settled(self) -> bool:
        """Whether the ELBO has not grown beyond its noise for as long as patience lasts."""
        return self._patience is not None and self._waited >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """All that was seen."""
        return {
            "looks": [[look.step, look.elbo, look.error] for look in self.looks],
            "best": None if self.best is None else [self.best.step, self.best.elbo, self.best.error],
            "best_weights": self.best_weights,
            "best_values": self._best_values,
            "reference": self._reference,
            "waited": self._waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what another one saw."""
        self.looks = [Look(*look) for look in state["looks"]]
        self.best = None if state["best"] is None else Look(*state["best"])
        self.best_weights = state["best_weights"]
        self._best_values, self._reference = state["best_values"], state["reference"]
        self._waited = state["waited"]


def mean_and_error(values: Tensor, alone: float = math.nan) -> tuple[float, float]:
    """A mean and its standard error, which is ``alone`` where there are not two values."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else alone
    return float(values.mean()), error


def _gained(differences: Tensor) -> bool:
    """Whether a mean of paired differences is above zero by more than its standard error."""
    mean, error = mean_and_error(differences)
    return mean > (0.0 if math.isnan(error) else error)
