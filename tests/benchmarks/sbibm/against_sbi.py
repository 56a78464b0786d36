"""The package sbi on the same simulations: its scores and times beside ours.

Runs ``with_sbi.py`` in another interpreter; data go and come as files of arrays.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyro
import torch

from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Table
from tests.benchmarks.sbibm import stored
from tests.benchmarks.sbibm.scores import c2st
from tests.benchmarks.sbibm.stages import Outcome
from tests.benchmarks.sbibm.tasks import TASKS
from tests.benchmarks.workers import each

__all__ = ["run"]

SIMULATIONS = 10_000
DRAWS = 10_000
COMPARED = ("two_moons", "slcp", "lotka_volterra")
SCRIPT = Path(__file__).resolve().with_name("with_sbi.py")


def run(
    interpreter: str | None,
    outcomes: list[Outcome],
    scores: dict[str, dict[str, np.ndarray]],
    count: int,
    *,
    quick: bool,
) -> Report:
    """Scores and seconds of sbi next to ours; a note if there is no interpreter that has it."""
    title = "The package sbi, NPE"
    if not interpreter or quick:
        why = "in the full tier only" if interpreter else "SBI_PYTHON names no interpreter that has it"
        return Report(tables=[Table(title, ["not run"], [[why]])])
    rows, results = [], []
    ours = {outcome.task: outcome for outcome in outcomes}
    estimates = each(partial(scored, interpreter, count), COMPARED)
    for task, (found, training) in zip(COMPARED, estimates, strict=True):
        own = scores[task]
        times = [f"{training:.0f}", f"{ours[task].training:.0f}"]
        means = [f"{s.mean():.3f}" for s in (found, own["amortized"], own["resampled"])]
        published = f"{stored.published()[task, 'NPE', SIMULATIONS]['c2st_mean']:.3f}"
        rows.append([task, means[0], published, *means[1:], *times])
        results.append(Result(f"seconds of training, ours / sbi, {task}", "", ours[task].training / training))
    columns = ["task", "sbi", "published NPE", "amortized", "resampled", "sbi, s", "ours, s"]
    note = f"sbi: {SIMULATIONS:,} simulations, defaults and a neural spline flow; means of {count}."
    return Report(results, [Table(title, columns, rows, note)])


def scored(interpreter: str, count: int, task: str) -> tuple[np.ndarray, float]:
    """C2ST of sbi's posteriors, by observation, and seconds of training."""
    draws, training = estimate(interpreter, task, count)
    return c2st([stored.reference(task, i) for i in range(count)], draws), training


def estimate(interpreter: str, task: str, count: int) -> tuple[np.ndarray, float]:
    """Draws of sbi's posteriors, ``(observations, draws, n)``, and seconds of training."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, **exchange(task, count))
        command = [interpreter, str(SCRIPT), str(source), str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        with np.load(target) as found:
            return found["draws"], float(found["training"])


def exchange(task: str, count: int) -> dict[str, np.ndarray]:
    """What the script is to know of a task."""
    with isolated():
        pyro.set_rng_seed(SEED)
        theta, x = TASKS[task].simulate(SIMULATIONS)
    base = TASKS[task].prior().base_dist
    if task == "lotka_volterra":
        prior = {"loc": base.loc, "scale": base.scale}
    else:
        prior = {"low": base.low, "high": base.high}
    parts: dict[str, torch.Tensor] = {"theta": theta, "x": x, **prior}
    given = {name: part.numpy() for name, part in parts.items()}
    observations = stored.observations(task)[:count].numpy()
    return {**given, "observations": observations, "num_draws": np.array(DRAWS)}
