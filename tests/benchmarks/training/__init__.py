"""What ``fit`` is worth: stopping, warm-up, restarts, the ladder, scales, and what a step of it costs.

Every part states its problem, its seeds and what would be a failure; nothing but ``fit`` trains, except where
something else is the yardstick.
"""

from __future__ import annotations

import time

import pyro

from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Tier
from tests.benchmarks.training import collapse, ladder, overhead, scales, starts, stopping

__all__ = ["run"]

PARTS = (stopping, collapse, starts, ladder, scales, overhead)


def run(tier: Tier) -> Report:
    """All parts, on one thread; none if it is to be quick."""
    return Report(_all_parts() if tier == "full" else ())


def _all_parts() -> list[Result]:
    results = []
    for part in PARTS:
        start = time.monotonic()
        with isolated():
            pyro.set_rng_seed(SEED)
            results += part.run()
        name = part.__name__.rpartition(".")[2]
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return results
