"""What judging and repairing many rows costs: refinement, calibration, streaming to a file."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_guides import AmortizedGuide, calibrate, to_netcdf
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Tier

__all__ = ["run"]

REPEATS = 5
STEPS = 100


def run(tier: Tier) -> Report:
    """All comparisons, on one thread; calibration alone if it is to be quick."""
    parts = [_refinement, _calibration, _streaming] if tier == "full" else [_calibration]
    with isolated():
        pyro.set_rng_seed(SEED)
        return Report([part() for part in parts])


def curved(x: torch.Tensor) -> None:
    """Four latents and twenty observations per row."""
    weights = torch.linspace(-1.0, 1.0, 80).reshape(4, 20)
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.tanh(z) @ weights, 0.5).to_event(1), obs=x)


def flat(x: torch.Tensor) -> None:
    """Two latents per row."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def _refinement() -> Result:
    """As many steps for 1,000 rows at once as for one."""
    x = torch.randn(1000, 20)
    guide = AmortizedGuide(curved).setup(x)

    def steps(rows: int) -> Callable[[], Any]:
        posterior = guide.posterior(x[:rows], num_draws=100)
        return lambda: posterior.refine(max_steps=STEPS)

    seconds = {rows: _fastest(steps(rows)) for rows in (1, 1000)}
    return Result(
        "refine 1,000 rows at once / one row", f"{STEPS} steps each", seconds[1000] / seconds[1], target=3.0
    )


def _calibration() -> Result:
    """A thousand simulations with a thousand draws each of two latents."""
    posterior = AmortizedGuide(flat).setup(torch.randn(100, 2)).posterior(torch.randn(100, 2))
    seconds = _fastest(lambda: calibrate(posterior, num_simulations=1000, num_draws=1000))
    return Result("calibrate, seconds", "1,000 simulations x 1,000 draws, D = 2", seconds, target=10.0)


def _streaming() -> Result:
    """Peak memory of a process that streams 10,000 rows x 1,000 draws to netCDF."""
    command = [sys.executable, "-c", "from tests.benchmarks import judgement; judgement.stream()"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = float(run.stdout.split()[-1])
    return Result("stream to netCDF, peak GB", "10,000 rows x 1,000 draws, D = 2", peak, target=1.5)


def stream() -> None:
    """Do it, and print the peak in GB."""
    torch.set_num_threads(1)
    x = torch.randn(10_000, 2)
    guide = AmortizedGuide(flat).setup(x)
    with tempfile.TemporaryDirectory() as folder:
        to_netcdf(guide.posteriors(x.split(500)), Path(folder) / "draws.nc", along="row")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def _fastest(step: Callable[[], Any]) -> float:
    """Seconds of CPU, the least of some repeats."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times)
