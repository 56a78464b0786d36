"""How a step grows with rows, latents, components and particles, and posterior draws with their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.infer import Trace_ELBO

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
)
from tests.benchmarks.clock import Effort, Step, allocations, compare, seeded
from tests.benchmarks.report import Table
from tests.benchmarks.speed.steps import Model, Size, data, ours

__all__ = ["Axis", "axes", "table"]


@dataclass(frozen=True)
class Axis:
    """One quantity that grows.

    Attributes:
        what: its name, and what is measured.
        values: from small to large.
        make: from a value to a step.
    """

    what: str
    values: Sequence[int]
    make: Callable[[int], Step]


def particles(count: int, size: Size) -> Step:
    """A step with vectorized particles."""
    return ours(size, elbo=Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=1))


def draws(count: int, size: Size) -> Step:
    """Posterior draws of a batch of rows, with log q and log p of each."""
    model, x = Model(size), data(size)
    guide = AmortizedGuide(model, family=FullRankNormal()).setup(x)
    return lambda: guide.posterior(x, num_draws=count).log_weights


def axes(batch: int = 128) -> list[Axis]:
    """All of them: 20 values per row, 10 latents and batches of 128, unless they are what grows."""
    size = Size(20, 10, batch)
    found = [
        Axis("N, rows of the data set", (10**3, 10**4, 10**5, 10**6), lambda n: ours(size, rows=n)),
        Axis("B, rows of the batch", (32, 128, 512, 2048), lambda n: ours(Size(20, 10, n))),
    ]
    families: dict[str, Any] = {
        "DiagonalNormal()": DiagonalNormal(),
        "LowRankNormal(4)": LowRankNormal(4),
        "FullRankNormal()": FullRankNormal(),
        "NormalizingFlow()": NormalizingFlow(),
    }
    for name, family in families.items():

        def make(n: int, family: Any = family) -> Step:
            return ours(Size(20, n, batch), family=family)

        found.append(Axis(f"D, latents of {name}", (2, 8, 32, 128), make))
    return [
        *found,
        Axis("K, components", (1, 4, 16), lambda n: ours(size, family=NormalMixture(n))),
        Axis("particles, vectorized", (1, 4, 16, 64), lambda n: particles(n, size)),
        Axis("S, posterior draws of 16 rows", (10, 100, 1000), lambda n: draws(n, Size(20, 10, 16))),
    ]


def table(found: Sequence[Axis], effort: Effort) -> Table:
    """Time and allocated bytes, in units of those at the smallest value."""
    rows: list[list[str | float]] = []
    for axis in found:
        steps = {str(value): seeded(axis.make, value) for value in axis.values}
        timings = compare(steps, effort)
        first, *_ = steps
        memory = {name: allocations(step).bytes for name, step in steps.items()}
        for name, timing in timings.items():
            own = [timing.milliseconds, timing.over(timings[first])[0], memory[name] / memory[first]]
            rows.append([axis.what, f"{int(name):,}", *[f"{number:.3g}" for number in own]])
    columns = ("what grows", "to", "ms of CPU", "time, ratio", "bytes allocated, ratio")
    note = "Ratios are to the smallest value of each. 20 values per row, 10 latents, batches of 128."
    return Table("How the cost grows", columns, rows, note)
