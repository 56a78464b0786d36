"""What a training run tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from pyro_guides.guide import AmortizedGuide
from pyro_guides.training.judging import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_guides.training.ladder import Rung
    from pyro_guides.training.legs import Done
    from pyro_guides.training.task import Task

__all__ = ["FitResult"]


@final
@dataclass(frozen=True, eq=False)
class FitResult:
    """How a call of :func:`~pyro_guides.fit` went.

    Attributes:
        losses: the loss of every step in nats per row, NaN where a step was skipped.
        looks: the validation ELBOs, in nats per row, with their standard errors.
        best: the look whose weights were kept; None without validation.
        stopped_by: "steps" (all were made), "patience" (validation rows gained no more), "interrupt"
            (Ctrl-C).
        seconds: how long it took, over all resumes.
        seed: what the random numbers were made from.
        skipped: how many steps had no finite loss or gradient.
        restarts: the scores of the short runs, in nats per row, best is highest; empty without restarts.
        rungs: what the ladder did and why; empty without one.
        families: those of the guide at the end, group by group.
    """

    losses: NDArray[np.float64] = field(repr=False)
    looks: tuple[Look, ...] = field(repr=False)
    best: Look | None
    stopped_by: str
    seconds: float
    seed: int
    skipped: int
    restarts: tuple[float, ...] = ()
    rungs: tuple[Rung, ...] = ()
    families: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, done: Done, seconds: float) -> FitResult:
        """What is to be told of a task that was carried out."""
        return cls(
            losses=np.array(done.losses),
            looks=tuple(done.looks),
            best=done.best,
            stopped_by=done.ended_by,
            seconds=seconds,
            seed=task.seed,
            skipped=done.skipped,
            restarts=tuple(done.scores),
            rungs=tuple(done.rungs),
            families=tuple(map(str, task.guide.families)) if isinstance(task.guide, AmortizedGuide) else (),
        )

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.losses)

    def __repr__(self) -> str:
        parts = [f"{self.steps} steps in {self.seconds:.1f} s", f"stopped by {self.stopped_by}"]
        if self.best is not None:
            elbo = f"{self.best.elbo:.3f} ± {self.best.error:.3f} nats per row"
            parts.append(f"validation ELBO {elbo}, at step {self.best.step}")
        else:
            parts.append(f"last losses {_late_mean(self.losses):.3f} nats per row")
        if self.skipped:
            parts.append(f"{self.skipped} steps skipped")
        if self.rungs:
            parts.append(f"ended as {', '.join(dict.fromkeys(x.partition('(')[0] for x in self.families))}")
        return f"FitResult({'; '.join(parts)})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The losses, and the negative validation ELBO with its error.

        Args:
            ax: where to draw.

        Example:
            >>> import numpy as np
            >>> from matplotlib.figure import Figure
            >>> from pyro_guides.training import FitResult, Look
            >>> looks = (Look(2, -4.5, 0.1), Look(4, -4.0, 0.1))
            >>> result = FitResult(np.array([9.0, 5.0, 4.0, 4.0]), looks, looks[1], "steps", 0.1, 0, 0)
            >>> result.plot(Figure().subplots()).get_ylabel()
            'loss, nats per row'
        """
        from pyro_guides import plots

        ax = plots.losses(self.losses, ax)
        if self.looks:
            steps, elbos, errors = np.array([[x.step, x.elbo, x.error] for x in self.looks]).T
            options: Any = {"color": "C1", "label": "validation"}
            ax.errorbar(steps - 1, -elbos, np.nan_to_num(errors), **options)
            ax.legend(loc="upper right")
        ax.set_ylabel("loss, nats per row")
        return ax


def _late_mean(losses: NDArray[np.float64]) -> float:
    late = losses[-max(1, len(losses) // 20) :]
    return float(np.nanmean(late)) if np.isfinite(late).any() else float("nan")
