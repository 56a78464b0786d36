"""Runs one after the other, each from where the last one left the weights, with a checkpoint at any time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

import torch

from pyro_guides.training import randomness
from pyro_guides.training.checkpoints import Checkpoints
from pyro_guides.training.judging import Look
from pyro_guides.training.ladder import How, Rung
from pyro_guides.training.reporting import Report
from pyro_guides.training.run import Run
from pyro_guides.training.task import Task

__all__ = ["Done", "Legs"]

Tree = dict[str, Any]


@final
@dataclass(eq=False)
class Done:
    """What is done of a task: with the state of the run that is under way, all that a checkpoint holds.

    Attributes:
        scores: of the starts that were tried, in nats per row.
        origin: the weights that they all began with.
        best_start: the state of the best of their runs.
        hows: how the guide got to each richer family.
        rungs: what the ladder did, and why.
        before: the weights below the rung that is being tried, with their ELBOs.
        polishing: whether the family is settled.
        losses: of the runs that ended.
        looks: of the runs that ended.
        best: the look whose weights the last of these kept.
        skipped: how many of these steps were skipped.
        ended_by: why all is done; empty if it is not.
    """

    scores: list[float] = field(default_factory=list)
    origin: Tree | None = None
    best_start: Tree | None = None
    hows: list[How] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    before: Tree | None = None
    polishing: bool = False
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: Look | None = None
    skipped: int = 0
    ended_by: str = ""

    def state_dict(self) -> Tree:
        """All of it, as a file holds it."""
        state = {**vars(self), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        state["rungs"] = [asdict(rung) for rung in self.rungs]
        state["looks"] = [asdict(look) for look in self.looks]
        state["best"] = None if self.best is None else asdict(self.best)
        return state

    @classmethod
    def of(cls, state: Tree) -> Done:
        """What :meth:`state_dict` told."""
        best = state["best"]
        return cls(
            **{
                **state,
                "losses": state["losses"].tolist(),
                "rungs": [Rung(**rung) for rung in state["rungs"]],
                "looks": [Look(**look) for look in state["looks"]],
                "best": None if best is None else Look(**best),
            }
        )


@final
class Legs:
    """Carries out runs and remembers what they came to.

    Args:
        task: what to train.
        done: what was done before.
        pending: the state of the run that a checkpoint was written in; the first leg goes on from it.
        checkpoints: where to write.
        report: what to show.
    """

    def __init__(
        self, task: Task, done: Done, pending: Tree | None, checkpoints: Checkpoints, report: Report
    ) -> None:
        self.task = task
        self.done = done
        self._pending = pending
        self._checkpoints = checkpoints
        self._report = report
        self.run: Run | None = None

    def start(self, what: str, last: int, *, state: Tree | None = None, tempered: bool = True) -> Run:
        """One run to step ``last``; its random numbers depend on what it is called, and on nothing before.

        Args:
            what: its name, for the progress bar.
            last: how many steps.
            state: the state of another run that it goes on from.
            tempered: whether the latents' terms are weighed.
        """
        task, pending = self.task, self._pending
        self._pending = None
        with randomness.own_numbers(task.seed, task.processes.rank, *what.encode()):
            run = self.run = task.new_run(tempered=tempered)
            if pending is not None or state is not None:
                run.load_state_dict(pending or state or {})
            else:
                task.processes.align(task.weights)
                self.write(first=not self.done.losses and not self.done.scores)
            with self._report.over(run, last, what) as reporter:
                for step in run.steps(last):
                    reporter.step()
                    if self._checkpoints.due(step):
                        self.write()
        return run

    def keep(self, run: Run) -> None:
        """Restore the best weights of a run, and count it as done."""
        done, start = self.done, len(self.done.losses)
        if run.judge is not None:
            if not run.judge.looks or run.judge.looks[-1].step != run.step:
                run.judge.look(run.step)
            if run.judge.best is not None:
                run.weights.load(run.judge.best_weights)
                done.best = replace(run.judge.best, step=start + run.judge.best.step)
            done.looks += [replace(look, step=start + look.step) for look in run.judge.looks]
        self.task.processes.align(run.weights)  # buffers are each process's own
        done.losses += run.losses
        done.skipped += run.skipped
        self.run = None

    def write(self, *, first: bool = False) -> None:
        """Write a checkpoint, unless the user interrupts: then the run goes on from the one before."""
        if self.done.ended_by == "interrupt" or not self._checkpoints.wanted:
            return
        run = None if self.run is None else self.run.state_dict()
        weights = self.task.weights.state() if self.run is None else None
        state = {"done": self.done.state_dict(), "run": run, "weights": weights}
        self._checkpoints.write(self.task.seed, state, first=first)
