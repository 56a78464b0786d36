"""What a run shows while it goes: a progress bar, and a logger's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

from tqdm import tqdm

from pyro_guides.statistics.arguments import flag
from pyro_guides.training.run import Run

__all__ = ["MetricsLogger", "Report"]

_SMOOTH = 0.98


class MetricsLogger(Protocol):
    """What Lightning's loggers have."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> Any: ...


@final
class Report:
    """Shows how a run goes.

    Args:
        progress: whether to draw a bar; only in a terminal if None.
        logger: one of Lightning's loggers, or None.
        every: how many steps lie between two metrics that go to the logger.
    """

    def __init__(self, progress: bool | None, logger: MetricsLogger | None, every: int = 10) -> None:
        if progress is not None:
            flag("progress", progress)
        if logger is not None and (isinstance(logger, type) or not hasattr(logger, "log_metrics")):
            raise TypeError(f"logger must be one of Lightning's, with log_metrics(...), got {logger!r}")
        self._progress = progress
        self._logger = logger
        self._every = every

    @contextmanager
    def over(self, run: Run, last: int, what: str) -> Iterator[Reporter]:
        """Report the steps up to ``last``."""
        disable = None if self._progress is None else not self._progress
        with tqdm(total=last, initial=run.step, desc=what, disable=disable, mininterval=0.5) as bar:
            yield Reporter(run, bar, self._logger, self._every)

    def finish(self) -> None:
        """Let the logger write what it still holds."""
        finalize = getattr(self._logger, "finalize", None)
        if callable(finalize):
            finalize("success")


@final
class Reporter:
    """Reports one run, step by step."""

    def __init__(self, run: Run, bar: Any, logger: MetricsLogger | None, every: int) -> None:
        self._run = run
        self._bar = bar
        self._logger = logger
        self._every = every
        self._smooth = math.nan

    def step(self) -> None:
        """Report the last step."""
        if self._bar.disable and self._logger is None:
            return
        loss = self._run.losses[-1]
        if math.isfinite(loss):
            self._smooth = loss if math.isnan(self._smooth) else _SMOOTH * self._smooth + (1 - _SMOOTH) * loss
        self._bar.set_postfix(self._metrics(), refresh=False)
        self._bar.update()
        if self._logger is not None and self._run.step % self._every == 0:
            self._logger.log_metrics({"loss": loss, **self._metrics()}, self._run.step)

    def _metrics(self) -> dict[str, float]:
        metrics = {"smooth_loss": self._smooth}
        if self._run.judge is not None and self._run.judge.looks:
            metrics["validation_elbo"] = self._run.judge.looks[-1].elbo
        if self._run.skipped:
            metrics["skipped"] = float(self._run.skipped)
        return metrics
