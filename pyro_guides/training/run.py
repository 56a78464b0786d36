"""One training run: where it is, and how it goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final, runtime_checkable

import pyro
import torch
from torch import Tensor

from pyro_guides.training import randomness
from pyro_guides.training.data import Arguments, Source
from pyro_guides.training.faults import fault, without_warnings
from pyro_guides.training.gradients import Clip, average
from pyro_guides.training.judging import Judge
from pyro_guides.training.objective import Objective
from pyro_guides.training.processes import Processes
from pyro_guides.training.settings import Settings
from pyro_guides.training.weights import Weights

__all__ = ["Remembers", "Run"]

logger = logging.getLogger("pyro_guides")


@runtime_checkable
class Remembers(Protocol):
    """What counts steps of its own, and must go on counting after a resume."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@final
class Run:
    """Steps on one source of rows, and all that the next one depends on.

    Args:
        objective: what gets smaller.
        weights: what is changed.
        source: where batches come from.
        settings: how to train.
        processes: the devices.
        seed: of the order of rows.
        judge: looks at validation rows; None without any.
        counters: what else counts steps: schedules of the objective.

    Attributes:
        step: how many steps were made, skipped ones included.
        losses: the loss of each, in nats per row; NaN where it was skipped.
        skipped: how many had no finite loss or gradient.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        source: Source,
        settings: Settings,
        processes: Processes,
        seed: int,
        judge: Judge | None = None,
        counters: tuple[Remembers, ...] = (),
    ) -> None:
        self._objective = objective
        self._source = source
        self._settings = settings
        self._processes = processes
        self._seed = seed
        self._counters = counters
        self._clip = Clip(settings.clip)
        self.weights = weights
        self.judge = judge
        self._names = [list(weights.parameters)]  # of what the optimizer was given at a time
        self.optimizer = settings.make_optimizer(list(weights.parameters.values()))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.epoch, self.position = 0, 0, 0
        self.losses: list[float] = []
        self.skipped, self._in_a_row = 0, 0

    def steps(self, last: int) -> Iterator[int]:
        """Go on to step ``last``, or until validation rows gain no more; yields after every step.

        Raises:
            FloatingPointError: too many steps in a row had no finite loss or gradient.
        """
        while self.step < last and not self.settled:
            before = self.step
            seed = randomness.seed_of(self._seed, self.epoch)
            with _validated(self.epoch == 0):  # every row is checked once
                for batch in self._source.epoch(seed, self.position):
                    self._advance(batch)
                    yield self.step
                    if self.step == last or self.settled:
                        return
            if self.step == before and self.position == 0:
                raise ValueError(
                    "the DataLoader gives no batch; give one with rows, or a smaller batch_size in it"
                )
            self.epoch, self.position = self.epoch + 1, 0

    @property
    def settled(self) -> bool:
        """Whether validation rows gain no more."""
        return self.judge is not None and self.judge.settled

    def _advance(self, batch: Arguments) -> None:
        batch = self._processes.receive(batch)
        try:
            loss = self._gradient(batch)
            if self.weights.outgrown:
                self._take_in(batch)
            norm = self._clip(list(self.weights.parameters.values()))
            if math.isfinite(loss) and math.isfinite(norm):
                self._follow_schedule()
                self.optimizer.step()
                self.losses.append(loss)
                self._in_a_row = 0
            else:
                self._skip(batch, loss)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.step, self.position = self.step + 1, self.position + 1
        if self.judge is not None and self.step % self._settings.every == 0:
            self.judge.look(self.step, patient=self._objective.warms_up)

    def _gradient(self, batch: Arguments) -> float:
        loss = self._loss(batch)
        if loss is None:
            loss = torch.tensor(math.nan)  # which the other processes, who wait for it, have to know
        else:
            loss.backward()
        if self._processes.several:
            loss = average(loss, list(self.weights.parameters.values()), self._processes.reduce)
        return float(loss.detach())

    def _loss(self, batch: Arguments) -> Tensor | None:
        """The loss; None if distributions refuse numbers that are not finite."""
        try:
            with without_warnings():
                return self._objective(batch)
        except ValueError:
            if fault(self._objective.model, self._objective.guide, batch) is None:
                raise  # validation found something else
            return None

    def _take_in(self, batch: Arguments) -> None:
        """Train parameters that the model made only now.

        Raises:
            NotImplementedError: other processes may have made none.
        """
        new = self.weights.find(lambda: self._objective.value(batch))
        if new and self._processes.several:
            raise NotImplementedError(
                f"the model made the parameters {list(new)} only in step {self.step}, maybe in one process "
                "alone; make them in every call of the model, or train with devices=1"
            )
        self._add(list(new))

    def _add(self, names: list[str]) -> None:
        """Give the optimizer more parameters."""
        if names:
            self._names.append(names)
            self.optimizer.add_param_group({"params": [self.weights.parameters[name] for name in names]})
            self._rates.append(self.optimizer.param_groups[-1]["lr"])

    def _follow_schedule(self) -> None:
        factor = self._settings.rate(self.step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _skip(self, batch: Arguments, loss: float) -> None:
        self.losses.append(math.nan)
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        found = fault(self._objective.model, self._objective.guide, batch)
        said = found or ("its gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}")
        logger.warning("step %d is skipped: %s", self.step, said)
        if self._in_a_row >= self._settings.max_skips:
            raise FloatingPointError(
                f"{self._in_a_row} steps in a row had no finite loss or gradient, up to step {self.step}: "
                f"{said}. The parameters are those before these steps; look at these rows, mask missing "
                "values, bound scales away from zero, or lower learning_rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, and what the last ones were."""
        return {
            "at": [self.step, self.epoch, self.position, self.skipped, self._in_a_row],
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "weights": self.weights.state(),
            "names": [list(names) for names in self._names],
            "optimizer": _detached(self.optimizer.state_dict()),
            "rates": list(self._rates),
            "clip": self._clip.state_dict(),
            "judge": None if self.judge is None else self.judge.state_dict(),
            "own": self._processes.all(self._own()),
        }

    def _own(self) -> dict[str, Any]:
        """What every process has for itself."""
        buffers = self.weights.buffers if self._processes.several else {}
        return {
            "buffers": {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()},
            "baselines": {name: value.cpu().clone() for name, value in self.weights.baselines.items()},
            "counters": [dict(counter.state_dict()) for counter in self._counters],
            "random": randomness.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what another run had come to.

        Raises:
            ValueError: it trained other parameters.
        """
        own = state["own"][self._processes.rank]
        self.weights.load({**state["weights"], **own["buffers"]})
        self.weights.load_baselines(own["baselines"])
        self._load_optimizer(state)
        self._clip.load_state_dict(state["clip"])
        self.step, self.epoch, self.position, self.skipped, self._in_a_row = state["at"]
        self.losses = state["losses"].tolist()
        if self.judge is not None:
            self.judge.load_state_dict(state["judge"])
        for counter, known in zip(self._counters, own["counters"], strict=True):
            counter.load_state_dict(known)
        randomness.load_state(own["random"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """An optimizer that was given parameters as the other run's was, and what has come since."""
        first, *later = state["names"]
        self._names, self._rates = [list(first)], []
        self.optimizer = self._settings.make_optimizer([self.weights.parameters[name] for name in first])
        for names in later:
            self._add(list(names))
        self.optimizer.load_state_dict(_detached(state["optimizer"]))  # it would change these tensors
        self._rates = list(state["rates"])
        given = {name for names in self._names for name in names}
        self._add([name for name in self.weights.parameters if name not in given])


@contextmanager
def _validated(wanted: bool) -> Iterator[None]:
    """Check the arguments of distributions only if it is wanted, here and by the user."""
    with pyro.validation_enabled(wanted and pyro.settings.get("validate_distributions_pyro")):
        yield


def _detached(state: Any) -> Any:
    """A copy that later steps do not change."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _detached(value) for key, value in state.items()}
    return [_detached(value) for value in state] if isinstance(state, (list, tuple)) else state
