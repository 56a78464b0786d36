"""Regressions on columns as they come, with coefficients from 1e-3 to 1e5: does ``fit`` find the posterior?

Default settings, 3,000 steps, one full-rank normal, nothing scaled by hand. The reference is Stan's (see
``tests/problems/regressions.py``): its own standard errors are up to 0.011 sd and 0.8 % of the sds, ours, of
20,000 draws, 0.007 sd and 0.5 %. Minibatches are of 128 rows; nothing is held out, for all rows belong to
the posterior. Pyro's ``AutoMultivariateNormal``, with as many steps of Adam, is the control. Seed: 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_guides import AmortizedGuide, FullRankNormal, fit
from tests.benchmarks.clock import SEED
from tests.benchmarks.report import Result
from tests.problems import Reference
from tests.problems.regressions import Problem, scaled

__all__ = ["run"]

WHOLE = ("sblrc", "earn_height", "logearn_height_male", "diamonds")
IN_BATCHES = ("earn_height", "diamonds")
CONTROL = "sblrc"
STEPS = 3000
DRAWS = 20_000
LIMIT = 0.05


def errors(draws: Mapping[str, Tensor], reference: Reference) -> tuple[float, float]:
    """The worst error of a mean, in sds, and the worst distance of a ratio of sds from one."""
    worst_mean = worst_sd = 0.0
    for site, (mean, sd) in reference.sites().items():
        found = draws[site].detach().reshape(len(draws[site]), -1)
        worst_mean = max(worst_mean, float(((found.mean(0) - mean) / sd).abs().max()))
        worst_sd = max(worst_sd, float((found.std(0) / sd - 1.0).abs().max()))
    return worst_mean, worst_sd


def fitted(problem: Problem, batch_size: int | None) -> tuple[float, float]:
    """The errors of a guide after ``fit``."""
    pyro.set_rng_seed(SEED)
    pyro.clear_param_store()
    guide = AmortizedGuide(problem.model, family=FullRankNormal())
    options = {"batch_size": batch_size, "validation": None, "max_steps": STEPS, "seed": SEED}
    fit(problem.model, guide, problem.data, **options)
    return errors(guide.posterior(*problem.data, num_draws=DRAWS).draws, problem.reference)


def control(problem: Problem) -> tuple[float, float]:
    """The errors of Pyro's guide."""
    pyro.set_rng_seed(SEED)
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(problem.model)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(*problem.data)
    draws = [guide(*problem.data) for _ in range(DRAWS // 20)]
    return errors({site: torch.stack([d[site] for d in draws]) for site in draws[0]}, problem.reference)


def run() -> list[Result]:
    """All errors."""
    problems = scaled()
    results = []
    for name in WHOLE:
        results += _shown(name, fitted(problems[name], None))
    for name in IN_BATCHES:
        results += _shown(f"{name}, B=128", fitted(problems[name], 128))
    mean, sd = control(problems[CONTROL])
    where = f"{CONTROL}, AutoMultivariateNormal"
    return [*results, Result("worst mean, sds off", where, mean), Result("worst sd, share off", where, sd)]


def _shown(where: str, found: tuple[float, float]) -> list[Result]:
    mean, sd = found
    return [
        Result("worst mean, sds off", where, mean, target=LIMIT),
        Result("worst sd, share off", where, sd, target=LIMIT),
    ]
