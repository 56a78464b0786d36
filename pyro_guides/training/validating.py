"""The ELBO of rows that are held out, row by row where model and guide allow it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import pyro
import torch
from torch import Tensor, nn

from pyro_guides.layers import evaluated
from pyro_guides.objectives import IWELBO
from pyro_guides.objectives.rows import Rows as RowSites
from pyro_guides.objectives.rows import random_sites, read_rows, traces_of
from pyro_guides.objectives.scales import split_scales
from pyro_guides.objectives.terms import Terms, evaluate
from pyro_guides.training import randomness
from pyro_guides.training.data import Arguments, Rows, Source, Whole
from pyro_guides.training.faults import without_warnings
from pyro_guides.training.objective import Objective
from pyro_guides.training.processes import Processes
from pyro_guides.training.rows import counting

__all__ = ["Validation", "quiet"]

# A look costs about as much as five steps, however many rows are held out.
_MOST_ROWS = 1000
_DRAWS = 2000  # of all rows together
_MOST_RUNS = 8
_ROWS_PER_PASS = 500
_PARTS = 16  # to tell the noise from, where rows cannot be told apart


@final
class Validation:
    """Measures the ELBO of held-out rows, in nats per row, with the same random numbers each time.

    Rows have values of their own if what they share is drawn outside of their plates; what is shared counts
    for each of N rows of training. Otherwise, and for ELBOs that sum latents out, values are those of parts
    of the rows, or of single evaluations.

    Args:
        objective: what is trained.
        held: the held-out rows.
        processes: the devices.
        seed: of the random numbers.
    """

    def __init__(self, objective: Objective, held: Source, processes: Processes, seed: int) -> None:
        if isinstance(held, Whole):  # which has rows of its own, and as many as it has
            objective = replace(objective, counting=counting(objective.model, held))
        self._objective = objective
        self._held = held
        self._processes = processes
        self._seed = seed
        self._sites = self._row_sites()

    def measure(self) -> Tensor:
        """The values, ``(n,)``, whose mean is the ELBO per row."""
        values = None
        if self._processes.first:
            modules = [self._objective.model, self._objective.guide]
            with randomness.own_numbers(self._seed), quiet(modules), torch.no_grad():
                values = torch.cat([value.reshape(-1).double() for value in self._values()])
        measured: Tensor = self._processes.same(values)
        return measured

    def _values(self) -> Iterator[Tensor]:
        batches = list(self._batches())
        per_batch = sum(rows for rows, _ in batches) / len(batches)
        for rows, batch in batches:
            if self._sites is not None:
                yield self._by_row(self._sites, batch)
            else:  # a part counts by its rows in the mean of all values
                yield self._of_part(batch, rows) * (rows / per_batch if rows else 1.0)

    def _batches(self) -> Iterator[tuple[int, Arguments]]:
        """The held-out rows in batches, with how many there are in each."""
        held = self._held
        if not isinstance(held, Rows):
            seen = 0
            for batch in held.epoch(self._seed, 0):
                yield batch.count or 0, self._processes.receive(batch)
                seen += batch.count or 1
                if seen >= _MOST_ROWS or isinstance(held, Whole):
                    return
            return
        everything = torch.arange(min(held.count, _MOST_ROWS))
        whole = self._sites is not None
        parts = (
            everything.split(_ROWS_PER_PASS)
            if whole
            else everything.tensor_split(min(_PARTS, len(everything)))
        )
        for index in parts:
            yield len(index), self._processes.receive(held.take(index))

    def _row_sites(self) -> RowSites | None:
        """The sites of rows, if rows can be told apart."""
        if isinstance(self._held, Whole):
            return None
        objective = self._objective
        batch = self._processes.receive(self._held.first())
        plates, depth = objective.counting.plates, getattr(objective.elbo, "max_plate_nesting", math.inf)
        with randomness.own_numbers(self._seed), quiet([objective.model, objective.guide]), torch.no_grad():
            try:
                sites = read_rows(objective.model, objective.guide, batch.args, batch.kwargs, plates, depth)
                self._by_row(sites, batch)
            except (NotImplementedError, ValueError):
                return None
        return sites

    def _by_row(self, sites: RowSites, batch: Arguments) -> Tensor:
        """The ELBO of each row, or another bound, with its part of what rows share."""
        objective = self._objective
        if isinstance(objective.elbo, IWELBO):
            count, runs = objective.elbo.num_particles, 1
        else:  # in runs of their own, which every model bears
            rows = min(self._held.count or _MOST_ROWS, _MOST_ROWS)
            count, runs = 1, min(max(2, _DRAWS // rows), _MOST_RUNS)
        found = [_evaluated(objective, batch, sites, count) for _ in range(runs)]
        return torch.stack([self._value(terms) for terms in found]).mean(0)

    def _value(self, terms: Terms) -> Tensor:
        by_row = terms.log_weights.logsumexp(0) - math.log(terms.count)
        return by_row.reshape(-1) + terms.shared / self._objective.counting.total

    def _of_part(self, part: Arguments, rows: int) -> Tensor:
        counting = self._objective.counting
        objective = replace(self._objective, counting=counting.of(rows) if rows else counting)
        return torch.tensor([-objective.value(part)])


def _evaluated(objective: Objective, batch: Arguments, sites: RowSites, count: int) -> Terms:
    """One run of guide and model, with particles only if there are several."""
    functions = objective.model, objective.guide
    if count > 1:
        return evaluate(*functions, batch.args, batch.kwargs, sites, count)
    said, drawn = traces_of(*functions, batch.args, batch.kwargs)
    latents = {site["name"] for site in random_sites(said) if not site["is_observed"]}
    if alone := latents - {site["name"] for site in random_sites(drawn)}:
        raise ValueError(f"the guide does not draw {sorted(alone)}, so that rows have no ELBO of draws")
    scale = split_scales([*random_sites(said), *random_sites(drawn)], sites)
    return Terms(sites, 1, scale, said, drawn)


@contextmanager
def quiet(functions: Sequence[Any]) -> Iterator[None]:
    """Modules in evaluation mode, no validation of arguments, no handler that listens."""
    owners = [getattr(function, "__self__", function) for function in functions]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    with evaluated(modules), pyro.poutine.block(), pyro.validation_enabled(False), without_warnings():
        yield
