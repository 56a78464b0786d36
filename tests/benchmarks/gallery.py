"""The models of the gallery: the bound that each guide reaches, and that of Pyro's ``AutoNormal``.

Both train the same model from the same seed with the same optimizer for the same number of steps, once with
each of two learning rates, which rise over the first fifth of the steps and fall to zero by a cosine; the
better bound counts, and a training that diverges has none. Held-out rows are scored given the shared latents
that training left, so that their bound has no term for these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import SVI

from pyro_guides import optim
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Table, Tier
from tests.gallery import EXAMPLES, Data, Example

__all__ = ["Bound", "Row", "bound", "held_out_bound", "measure", "run", "table"]

RATES = (0.01, 0.03)
DRAWS = 30


@dataclass(frozen=True)
class Bound:
    """An ELBO in nats per row, and the standard error of its mean over draws."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f}"


@dataclass(frozen=True)
class Row:
    """What one example reached.

    Attributes:
        example: the example.
        guide: the bound on the training rows.
        held_out: the bound on rows that training never saw.
        autoguide: AutoNormal's on the training rows, or why there is none.
        rates: the learning rates that were better, of the guide and of AutoNormal.
        seconds: of training the guide once.
    """

    example: Example
    guide: Bound
    held_out: Bound
    autoguide: Bound | str
    rates: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class _Fit:
    rate: float
    train: Bound
    held_out: Bound | None
    seconds: float


def bound(
    example: Example, model: Callable[..., Any], guide: Callable[..., Any], data: Data, draws: int
) -> Bound:
    """The ELBO per training row."""
    elbo = example.elbo()
    losses = [sum(elbo.loss(model, guide, *batch) for batch in data.batches) for _ in range(draws)]
    return _per_row(losses, data.rows)


def held_out_bound(
    example: Example, model: Callable[..., Any], guide: Callable[..., Any], data: Data, draws: int
) -> Bound:
    """The ELBO per held-out row, given draws of what rows share."""
    elbo, losses = example.elbo(), []
    for _ in range(draws):
        values = guide(*data.held_out)
        given = {name: values[name].detach() for name in example.shared}
        rest = [
            poutine.block(poutine.condition(part, data=given), hide=list(given)) for part in (model, guide)
        ]
        losses.append(elbo.loss(*rest, *data.held_out))
    return _per_row(losses, data.held_out_rows)


def measure(example: Example, *, steps: int | None = None, draws: int = DRAWS) -> Row:
    """Train with either guide and either rate."""
    steps = steps or example.steps
    ours = [_fit(example, rate, steps, draws, amortized=True) for rate in RATES]
    best = max(ours, key=lambda fit: fit.train.value)
    if isinstance(example.autoguide, str):
        other, rates = example.autoguide, (best.rate,)
    else:
        fits = [_fit(example, rate, steps, draws, amortized=False) for rate in RATES]
        theirs = max(fits, key=lambda fit: fit.train.value)
        other, rates = theirs.train, (best.rate, theirs.rate)
    return Row(example, best.train, best.held_out, other, rates, best.seconds)


def table(rows: Sequence[Row]) -> Table:
    """What was reached."""
    columns = ("example", "the guide", "nats per", "guide", "`AutoNormal`", "guide, held-out rows")
    cells = [
        [
            row.example.name,
            f"`{_one_line(row.example)}`",
            row.example.row,
            *map(str, (row.guide, row.autoguide, row.held_out)),
        ]
        for row in rows
    ]
    note = f"Evidence lower bounds in nats, means of {DRAWS} draws; higher is better."
    return Table("Bounds of the gallery", columns, cells, note)


def run(tier: Tier) -> Report:
    """Train everything; nothing if it is to be quick."""
    if tier == "quick":
        return Report()
    rows = []
    for example in EXAMPLES:
        rows.append(measure(example))
        print(f"{example.name}: {rows[-1].seconds:.0f} s a training, rates {rows[-1].rates}", flush=True)
    return Report([result for row in rows for result in _results(row)], [table(rows)])


def _results(row: Row) -> list[Result]:
    where = f"{row.example.name}, per {row.example.row}"
    results = [
        Result("loss of the guide, nats", where, -row.guide.value, row.guide.error),
        Result("loss on held-out rows, nats", where, -row.held_out.value, row.held_out.error),
    ]
    if isinstance(row.autoguide, Bound):
        difference = row.autoguide.value - row.guide.value
        error = math.hypot(row.autoguide.error, row.guide.error)
        results.append(Result("loss of the guide minus AutoNormal's, nats", where, difference, error, 0.0))
    return results


def _fit(example: Example, rate: float, steps: int, draws: int, *, amortized: bool) -> _Fit:
    data = example.data()
    with isolated():
        pyro.set_rng_seed(SEED)
        model = example.model()
        if amortized:
            guide = example.guide(model)
        else:
            model, guide = example.autoguide(model)
        adam = optim.Adam({"lr": rate}, schedule=partial(_schedule, steps=steps))
        svi = SVI(model, guide, adam, example.elbo())
        start = time.process_time()
        try:
            for step in range(steps):
                svi.step(*data.batches[step % len(data.batches)])
        except ValueError:  # values that are not finite: this rate is too high
            lost = Bound(-math.inf, 0.0)
            return _Fit(rate, lost, lost, 0.0)
        seconds = time.process_time() - start
        train = bound(example, model, guide, data, draws)
        held_out = held_out_bound(example, model, guide, data, draws) if amortized else None
    return _Fit(rate, train, held_out, seconds)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, 5.0 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _per_row(losses: Sequence[float], rows: int) -> Bound:
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
    return Bound(-statistics.fmean(losses) / rows, error / rows)


def _one_line(example: Example) -> str:
    return example.lines.splitlines()[-1].removeprefix("guide = ")
