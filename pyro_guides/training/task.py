"""What one call of ``fit`` trains, and on what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, final

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_guides.guide import AmortizedGuide
from pyro_guides.starting import Repeats, rows_at_once, start_from
from pyro_guides.training import randomness
from pyro_guides.training.data import Arguments, Rows, Source, Whole
from pyro_guides.training.faults import without_warnings
from pyro_guides.training.judging import Judge
from pyro_guides.training.objective import Objective
from pyro_guides.training.processes import Processes
from pyro_guides.training.rows import Counting, counting
from pyro_guides.training.run import Remembers, Run
from pyro_guides.training.settings import Settings
from pyro_guides.training.validating import Validation, quiet
from pyro_guides.training.weights import Weights

__all__ = ["Task"]

_MOST_SETUP_ROWS = 10_000
_EVALUATIONS = 16


@final
@dataclass(eq=False)
class Task:
    """Model and guide, the rows to train on and to validate with, and how.

    Attributes:
        model: the model.
        guide: the guide; its network may be replaced by a richer one.
        elbo: the loss.
        train: the rows of training.
        held: those of validation; None without any.
        settings: how to train.
        processes: the devices.
        tempering: what weighs the latents' terms.
        seed: of all random numbers.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    elbo: ELBO
    train: Source
    held: Source | None
    settings: Settings
    processes: Processes
    tempering: AbstractContextManager[Any] | None
    seed: int

    def __post_init__(self) -> None:
        self.counting: Counting = counting(self.model, self.train)
        self.objective = Objective(self.elbo, self.model, self.guide, self.counting)
        counting_themselves: tuple[Any, ...] = (self.tempering, self.elbo)
        self._counters = [(x, x.state_dict()) for x in counting_themselves if isinstance(x, Remembers)]
        self.validation: Validation | None = None
        self.prepare()
        self._check_pooling()

    def prepare(self) -> None:
        """Set the guide up, find what trains, bring it to its device; again after the network has changed."""
        batch = self.processes.receive(self.train.first())
        if isinstance(self.guide, AmortizedGuide):
            everything = self.processes.receive(self.most())
            self.guide.setup(*everything.args, **everything.kwargs)
        # What is wrong is found, and named, when training begins.
        with pyro.validation_enabled(False), without_warnings():
            self.weights = Weights(self.model, self.guide, lambda: self.objective.value(batch))
        self.processes.align(self.weights)
        if self.held is not None:
            seed = randomness.seed_of(self.seed, -1)
            self.validation = Validation(self.objective, self.held, self.processes, seed)

    def _check_pooling(self) -> None:
        """Raise a ValueError if an encoder pools what it would see only part of."""
        if isinstance(self.train, Whole) or not isinstance(self.guide, AmortizedGuide):
            return
        rows = self.counting.plates
        for part in self.guide.network.parts:
            pooled = any(rows & set(encoding.source.plates) for encoding in part.encodings)
            if pooled and not rows <= set(part.group.plates):
                raise ValueError(
                    f"{part.group} lie outside of the plates {sorted(rows)} of the rows, but are amortized: "
                    "their encoder would see a minibatch as if it were all data. Give batch_size=None to "
                    "pass all rows in every step, or amortize=[...] without them, so that they are learned"
                )

    def find_start(self) -> None:
        """Let what an untrained guide learns begin where the posterior lies."""
        guide = self.guide
        if not isinstance(guide, AmortizedGuide) or guide.is_trained:
            return
        amortized = [bool(part.encodings) for part in guide.network.parts]
        if all(amortized):
            return
        batch, repeats = self._some_rows(guide) if any(amortized) else (self._all_rows(), Repeats())
        batch = self.processes.receive(batch)
        start_from(guide, batch.args, batch.kwargs, repeats)
        self.prepare()

    def _all_rows(self) -> Arguments:
        return self.train.data if isinstance(self.train, Rows) else self.train.first()

    def _some_rows(self, guide: AmortizedGuide) -> tuple[Arguments, Repeats]:
        """A few rows from everywhere in the data, and how often each of them counts."""
        batch, plates = self.train.first(), self.counting.plates
        if isinstance(self.train, Whole):
            return batch, Repeats()
        rows = self.train if isinstance(self.train, Rows) else Rows(batch, 1)
        own = self.processes.receive(batch)
        count = min(rows.count, rows_at_once(guide, own.args, own.kwargs, plates))
        index = torch.linspace(0, rows.count - 1, count).long()
        return rows.take(index), Repeats(plates, self.counting.of(count).repeat)

    def most(self) -> Arguments:
        """As many rows of training as one call should take."""
        if isinstance(self.train, Rows) and self.train.count > _MOST_SETUP_ROWS:
            return self.train.take(torch.arange(_MOST_SETUP_ROWS))
        return self._all_rows()

    def new_run(self, *, tempered: bool = True) -> Run:
        """A run from the weights as they are."""
        objective = replace(self.objective, tempering=self.tempering if tempered else None)
        judge = None
        if self.validation is not None:
            judge = Judge(self.validation.measure, self.weights.state, self.settings.patience)
        for counter, state in self._counters:  # every run begins where the first one did
            counter.load_state_dict(copy.deepcopy(state))
        counters = tuple(x for x, _ in self._counters if tempered or id(x) != id(self.tempering))
        return Run(
            objective, self.weights, self.train, self.settings, self.processes, self.seed, judge, counters
        )

    def measure(self) -> Tensor:
        """How good the weights are, in nats per row: of validation rows, or of draws for training rows."""
        if self.validation is not None:
            return self.validation.measure()
        batch = self.processes.receive(self.train.first())
        with randomness.own_numbers(self.seed, 6), quiet([self.model, self.guide]):
            values = torch.tensor([-self.objective.value(batch) for _ in range(_EVALUATIONS)])
        measured: Tensor = self.processes.same(values)
        return measured
