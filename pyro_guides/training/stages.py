"""From a start to a result: the best of several starts, training, and the ladder."""

from __future__ import annotations

import logging
import math
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.families import Family
from pyro_guides.guide import AmortizedGuide
from pyro_guides.network import Network
from pyro_guides.training import randomness
from pyro_guides.training.data import Arguments, Rows, Whole
from pyro_guides.training.judging import mean_and_error
from pyro_guides.training.ladder import Evidence, How, Rung, climb, examine
from pyro_guides.training.legs import Legs
from pyro_guides.training.restarts import scatter
from pyro_guides.training.run import Run

__all__ = ["Stages"]

logger = logging.getLogger("pyro_guides")

_SHORT = 0.1  # of all steps, for each start
_EXAMINED = 40  # rows, to find out what holds q back
_MOST_TOGETHER = 500  # rows, to find out about what they share


@final
class Stages:
    """Carries out a task.

    Args:
        legs: what runs.
        restarts: how many starts to try.
        ladder: the families to climb.
    """

    def __init__(self, legs: Legs, restarts: int, ladder: tuple[Family, ...]) -> None:
        self._legs = legs
        self._task = legs.task
        self._done = legs.done
        self._restarts = restarts
        self._ladder = ladder
        self._networks: list[Network] = []  # those that were climbed from
        for family, how in zip(ladder, self._done.hows, strict=False):  # again, if this is a resume
            self._climb_to(family, how)

    def go(self) -> None:
        """All stages, from where a checkpoint was written."""
        try:
            self._choose_start()
            if self._ladder:
                self._climb()
            else:
                run = self._leg("fit", self._task.settings.max_steps, state=self._done.best_start)
                self._done.ended_by = "patience" if run.settled else "steps"
        except KeyboardInterrupt:
            logger.warning("interrupted: the best weights so far are kept")
            if self._legs.run is not None:
                self._legs.keep(self._legs.run)
            self._step_back_if_worse()
            self._done.ended_by = "interrupt"
        self._legs.write()

    # --- restarts

    def _choose_start(self) -> None:
        """Several short runs, of which the best will go on."""
        done, task = self._done, self._task
        short = max(1, math.ceil(_SHORT * task.settings.max_steps))
        wanted = self._restarts if self._restarts > 1 and not done.losses else 0
        if wanted and done.origin is None:
            done.origin = task.weights.state()
        while len(done.scores) < wanted:
            number = len(done.scores)
            task.weights.load(done.origin or {})
            if number:
                with randomness.own_numbers(task.seed, number):
                    scatter(task.model, task.guide, task.train.first())
            name, score = f"start {number + 1} of {wanted}", -math.inf
            try:
                run = self._legs.start(name, short)
                score = _or_worst(float(task.measure().mean()))
                if score > max(done.scores, default=-math.inf):
                    done.best_start = run.state_dict()
            except FloatingPointError as error:
                if done.best_start is None and number + 1 == wanted:
                    raise
                logger.warning("%s is given up: %s", name, error)
            done.scores.append(score)
            logger.info("%s came to %.3f nats per row", name, score)
        if wanted and done.best_start is None:
            raise FloatingPointError(
                f"none of {wanted} starts came to a finite ELBO: look at the model's log densities of the "
                "validation rows, or lower learning_rate"
            )
        done.origin = None  # not needed any more

    # --- runs that count

    def _leg(
        self, what: str, last: int, *, state: dict[str, Any] | None = None, tempered: bool = True
    ) -> Run:
        run = self._legs.start(what, last, state=state, tempered=tempered)
        self._legs.keep(run)
        return run

    # --- the ladder

    def _climb(self) -> None:
        """Train, judge, and give the guide a richer family, as long as that is what it gains from."""
        done, all_steps = self._done, self._task.settings.max_steps
        probe = math.ceil(all_steps / (2 * len(self._ladder)))  # so that all rungs take half of that
        while not done.ended_by:
            rung = len(done.hows)
            last = rung == len(self._ladder) or done.polishing
            what = f"rung {rung}" + (", settled" if done.polishing else "")
            state = None if rung else done.best_start
            run = self._leg(what, all_steps if last else probe, state=state, tempered=not rung)
            if done.polishing or not self._go_on(run, rung):
                done.ended_by = "patience" if run.settled else "steps"

    def _go_on(self, run: Run, rung: int) -> bool:
        """Judge a rung; whether there is more to do."""
        done, values = self._done, self._task.measure()
        gain, error = self._gain(values)
        evidence = self._examine(rung)
        top = rung == len(self._ladder)
        said = f"gained {gain:.3f} ± {error:.3f}; {evidence}" if rung else str(evidence)
        if rung and not gain > error and (top or not evidence.family_holds_back):
            self._note(run, evidence.gap, f"{said}: back to the family before")
            self._step_back()
            done.polishing = True
            return True
        if top:
            self._note(run, evidence.gap, f"{said}: the last family")
            return False
        if not evidence.family_holds_back:
            self._note(run, evidence.gap, f"{said}: rich enough, trained to the end")
            done.polishing = True
            return True
        how: How = "anew" if evidence.modes_are_lost else "promoted"
        self._note(run, evidence.gap, f"{said}: next is {self._ladder[rung]}, {how}")
        done.before = {"weights": self._task.weights.state(), "values": values}
        done.hows.append(how)
        self._climb_to(self._ladder[rung], how)
        return True

    def _gain(self, values: Tensor) -> tuple[float, float]:
        """What the last climb gained, in nats per row, with its error."""
        if self._done.before is None:
            return math.inf, 0.0
        return mean_and_error(values - self._done.before["values"], 0.0)

    def _examine(self, rung: int) -> Evidence:
        task = self._task
        with randomness.own_numbers(task.seed, 3, rung):
            found = None
            if task.processes.first:
                found = examine(self._guide, self._some_rows(), self._all_rows())
        evidence: Evidence = task.processes.same(found)
        return evidence

    def _some_rows(self) -> Arguments:
        source = self._task.held if self._task.held is not None else self._task.train
        if isinstance(source, Rows):
            return self._task.processes.receive(source.take(torch.arange(min(_EXAMINED, source.count))))
        return self._task.processes.receive(source.first())

    def _all_rows(self) -> Arguments | None:
        """The rows of training, if they can be looked at together."""
        train = self._task.train
        if isinstance(train, Rows) and train.count <= _MOST_TOGETHER:
            return self._task.processes.receive(train.take(torch.arange(train.count)))
        return self._task.processes.receive(train.first()) if isinstance(train, Whole) else None

    @property
    def _guide(self) -> AmortizedGuide:
        guide = self._task.guide
        if not isinstance(guide, AmortizedGuide):
            raise TypeError(f"a ladder takes an AmortizedGuide, got a {type(guide).__name__}")
        return guide

    def _climb_to(self, family: Family, how: How) -> None:
        self._networks.append(self._guide.network)
        rung = len(self._networks)
        with randomness.own_numbers(self._task.seed, 4, rung):
            climb(self._guide, family, how, self._task.most())
            self._task.prepare()

    def _step_back(self) -> None:
        """Leave the last rung for the one below."""
        done = self._done
        before = done.before or {}
        done.hows.pop()
        self._guide.replace_network(self._networks.pop())
        self._task.prepare()
        self._task.weights.load(before["weights"])
        done.before = None

    def _step_back_if_worse(self) -> None:
        if self._done.before is None:
            return
        gain, _ = self._gain(self._task.measure())
        if not gain > 0.0:
            self._step_back()

    def _note(self, run: Run, gap: float, verdict: str) -> None:
        done = self._done
        how: How = done.hows[-1] if done.hows else "as it was"
        families = dict.fromkeys(str(family) for family in self._guide.families)
        elbo = float(self._task.measure().mean()) if done.best is None else done.best.elbo
        done.rungs.append(Rung(", ".join(families), how, run.step, elbo, gap, verdict))
        logger.info("ladder: %s: %s", done.rungs[-1].family, verdict)


def _or_worst(score: float) -> float:
    """A score that can be compared: NaN is no better than the worst."""
    return -math.inf if math.isnan(score) else score
