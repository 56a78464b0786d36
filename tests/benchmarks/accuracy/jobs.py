"""What is trained, in which tier."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

from tests.benchmarks.accuracy.fitting import OURS, PYROS, trained, workplace
from tests.benchmarks.accuracy.hierarchies import hierarchies
from tests.benchmarks.accuracy.mixtures import mixtures
from tests.benchmarks.accuracy.regressions import generalized, linear
from tests.benchmarks.accuracy.scoring import DRAWS, Score, score
from tests.benchmarks.accuracy.series import series
from tests.benchmarks.accuracy.targets import Target
from tests.benchmarks.report import Tier

__all__ = ["Job", "done", "jobs", "targets"]

_QUICK = (
    "sblrc",
    "kidscore_momhsiq",
    "eight_schools_noncentered",
    "seeds_stanified",
    "hmm_example",
    "low_dim_gauss_mix_collapse",
)
_QUICK_STEPS = 250
_STEPS, _HIERARCHY_STEPS = 750, 3000


@dataclass(frozen=True)
class Job:
    """One guide to train on one target."""

    target: str
    guide: str
    seed: int = 0
    steps: int = _STEPS
    draws: int = DRAWS


@cache
def targets() -> dict[str, Target]:
    """All targets by name, in the order in which they are shown."""
    found = [*linear(), *generalized(), *hierarchies(), *series(), *mixtures()]
    return {target.name: target for target in found}


def jobs(tier: Tier) -> list[Job]:
    """All that the tier trains: the quick one six models, a third of the steps."""
    if tier == "quick":
        guides = (*OURS, PYROS[-1])
        return [
            Job(name, guide, steps=_QUICK_STEPS) for name in _QUICK for guide in guides if _fits(name, guide)
        ]
    work = [(name, guide) for name in targets() for guide in (*OURS, *PYROS) if _fits(name, guide)]
    return [Job(name, guide, steps=_steps(name)) for name, guide in work]


def _steps(name: str) -> int:
    return _HIERARCHY_STEPS if targets()[name].kind == "hierarchy" else _STEPS


def _fits(name: str, guide: str) -> bool:
    """Mixtures are for posteriors with several modes."""
    return guide != "mixture" or targets()[name].kind == "bimodal"


def done(job: Job) -> Score | str:
    """How far the guide is from the reference; or why it could not be trained."""
    target = targets()[job.target]
    with workplace(job.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            guide, seconds = trained(target, job.guide, job.steps, job.seed)
            found = score(target, guide, seconds, job.draws)
            print(job, found, flush=True)  # hours of work do not end with the loss of all
            return found
        except (
            ArithmeticError,
            RuntimeError,
            ValueError,
        ) as error:  # hours of work do not end with one failure
            return f"{type(error).__name__}: {error}".partition("\n")[0]
