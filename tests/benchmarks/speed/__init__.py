"""What training and serving cost, on one thread of CPU: ratios of what takes turns on the same machine.

*A step*: our guide against the same network in a hand-written guide of Pyro, in a plain PyTorch loop, against
Pyro's autoguides, and with flows against hand-written guides on zuko. *Growth*: with the rows of the data set
and of the batch, latents, components, particles and draws. *New rows*: one pass of a trained guide against
variational inference or NUTS for every row.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.clock import Effort, isolated
from tests.benchmarks.report import Report, Result, Tier
from tests.benchmarks.speed import growth, others, rows, steps

__all__ = ["run"]


def run(tier: Tier) -> Report:
    """All measurements, or the core of them."""
    with isolated():
        return _full(Effort()) if tier == "full" else _quick(Effort(rounds=10, steps=5, warmup=5))


def _quick(effort: Effort) -> Report:
    results = [*_each_size(steps.against_hand, effort), *others.against_autoguides(effort)]
    few = rows.new_rows(rows.Size(steps=500, rows=1, row_steps=300, nuts=False))
    return Report([*results, *few.results], few.tables)


def _full(effort: Effort) -> Report:
    short = Effort(rounds=15, steps=5, warmup=5)
    results = [
        *_each_size(steps.against_hand, effort),
        *_each_size(steps.families, effort),
        *steps.against_reading(steps.LARGE, effort),
        *steps.against_rows(steps.SMALL, effort),
        *_each_size(steps.against_particles, effort),
        *others.against_autoguides(effort),
        *others.against_zuko(steps.SMALL, short),
        *others.against_npe(short),
    ]
    served = rows.new_rows(rows.Size())
    return Report([*results, *served.results], [growth.table(growth.axes(), short), *served.tables])


def _each_size(measure: Callable[..., list[Result]], effort: Effort) -> list[Result]:
    return [result for size in (steps.LARGE, steps.SMALL) for result in measure(size, effort)]
