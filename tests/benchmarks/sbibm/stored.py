"""What is given: observations, evidences, published scores, and the benchmark's reference draws."""

from __future__ import annotations

import bz2
import csv
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["OBSERVATIONS", "log_evidence", "noise", "observations", "published", "reference", "table"]

DATA = Path(__file__).parents[1] / "data"
OBSERVATIONS = 10
# Two tasks share the parameters, and so the posteriors, of another.
SHARED = {"slcp_distractors": "slcp", "bernoulli_glm_raw": "bernoulli_glm"}


@cache
def table(name: str) -> Tensor:
    """One of the arrays that are stored beside the benchmark."""
    with np.load(DATA / "sbibm.npz") as stored:
        return torch.from_numpy(stored[name])


def observations(task: str) -> Tensor:
    """The ten observations, ``(10, n)``."""
    return table(f"{task}_observations")


def log_evidence(task: str) -> Tensor:
    """Log p(x) of each, in nats; without the density of what does not depend on θ."""
    return table(f"{SHARED.get(task, task)}_log_evidence")


@cache
def noise() -> tuple[Tensor, Tensor]:
    """Location and Cholesky factor of the twenty components of the distractors."""
    with np.load(DATA / "sbibm_noise.npz") as stored:
        loc, packed = torch.from_numpy(stored["loc"]), torch.from_numpy(stored["tril"])
    size = loc.shape[1]
    tril = torch.zeros(len(loc), size, size)
    rows, columns = torch.tril_indices(size, size)
    tril[:, rows, columns] = packed
    return loc, tril


@cache
def published() -> dict[tuple[str, str, int], dict[str, float]]:
    """C2ST and minutes per observation of other methods, by task, algorithm and number of simulations."""
    with (DATA / "sbibm_published.csv").open(newline="") as lines:
        return {
            (row["task"], row["algorithm"], int(row["simulations"])): {
                key: float(row[key]) for key in ("c2st_mean", "c2st_median", "minutes")
            }
            for row in csv.DictReader(lines)
        }


def reference(task: str, observation: int) -> np.ndarray:
    """The 10,000 reference draws of an observation, counted from zero: ``(10000, n)``.

    Raises:
        ModuleNotFoundError: the distribution ``sbibm``, in which they come, is not installed.
    """
    path = _installed() / SHARED.get(task, task) / "files" / f"num_observation_{observation + 1}"
    with bz2.open(path / "reference_posterior_samples.csv.bz2", "rt") as lines:
        return np.loadtxt(lines, delimiter=",", skiprows=1, dtype=np.float32)


def _installed() -> Path:
    """Where the tasks of ``sbibm`` lie; it is read, not imported."""
    spec = find_spec("sbibm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the reference draws come in the package sbibm, of which nothing else is needed: "
            "pip install --no-deps sbibm==1.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "tasks"
