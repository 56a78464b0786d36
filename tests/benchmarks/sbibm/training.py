"""How a guide is trained for each task: on simulated data sets, never on those it is judged by."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_guides import MLP, AmortizedGuide, Family, FullRankNormal, NormalizingFlow, NormalMixture, optim
from pyro_guides.objectives import ForwardKL
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.sbibm.tasks import TASKS, Task

__all__ = ["PLANS", "Plan", "Trained", "train"]

SETUP = 20_000  # data sets by which encoders standardize
WARM = 0.05  # the share of the steps in which the rate rises


@dataclass(frozen=True)
class Plan:
    """What one task takes.

    Attributes:
        family: of q.
        steps: how many.
        rate: the largest learning rate.
        batch: how many data sets a step simulates.
        simulated: train by ``ForwardKL``; by the ELBO of simulated data sets if not.
        scale: the sd of unconstrained parameters at the start; 1.8 is that of a uniform prior.
    """

    family: Family
    steps: int
    rate: float = 3e-3
    batch: int = 256
    simulated: bool = True
    scale: float = 0.5

    def shortened(self, share: float) -> Plan:
        """The same with fewer steps."""
        return replace(self, steps=max(1, int(share * self.steps)))


@dataclass(frozen=True)
class Trained:
    """A guide, what it took, and the mean loss per data set of the last tenth of the steps."""

    guide: AmortizedGuide
    seconds: float
    simulations: int
    loss: float


PLANS = {
    "two_moons": Plan(NormalMixture(16), 2000, 5e-3, scale=1.0),
    "gaussian_linear": Plan(FullRankNormal(), 400, 1e-2, simulated=False),
    "gaussian_linear_uniform": Plan(NormalizingFlow(2, hidden=(64,)), 1500, scale=1.5),
    "gaussian_mixture": Plan(NormalMixture(4), 1500, 5e-3),
    "slcp": Plan(NormalizingFlow(6), 4000, 2e-3, scale=1.8),
    "slcp_distractors": Plan(NormalizingFlow(6), 4000, 2e-3, scale=1.8),
    "bernoulli_glm": Plan(FullRankNormal(), 1500, 1e-2, simulated=False),
    "bernoulli_glm_raw": Plan(FullRankNormal(), 1500, 1e-2, simulated=False),
    "sir": Plan(NormalMixture(4), 1500, 5e-3),
    "lotka_volterra": Plan(FullRankNormal(), 2000, 5e-3),
}


def rate(step: int, steps: int) -> float:
    """A factor that rises, and falls to zero by a cosine."""
    return min(1.0, (step + 1) / (WARM * steps)) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


def train(task: Task, plan: Plan) -> Trained:
    """Train a new guide from the same seed."""
    with isolated():
        pyro.set_rng_seed(SEED)
        start = time.perf_counter()
        guide = AmortizedGuide(task, MLP(), plan.family, inputs=task.features, init_scale=plan.scale)
        guide.setup(task.simulate(SETUP)[1])
        adam = optim.Adam({"lr": plan.rate}, schedule=partial(rate, steps=plan.steps))
        objective: Any = ForwardKL() if plan.simulated else Trace_ELBO()
        svi = SVI(task, guide, adam, objective)
        blank = torch.ones(plan.batch, task.size)  # ForwardKL simulates data of this shape
        losses = [
            svi.step(blank if plan.simulated else task.simulate(plan.batch)[1]) / plan.batch
            for _ in range(plan.steps)
        ]
        seconds = time.perf_counter() - start
    last = losses[-max(1, len(losses) // 10) :]
    return Trained(guide, seconds, SETUP + plan.steps * plan.batch, sum(last) / len(last))


def trained(name: str, share: float = 1.0) -> Trained:
    """The guide of a task by its plan, or by a share of its steps."""
    return train(TASKS[name], PLANS[name].shortened(share))
