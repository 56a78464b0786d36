"""Restarts: of two modes, how often is the better one found, by one start and by the best of eight?

A number m of which four rows tell the square, so that ±1 explain them equally well; a factor makes the
positive mode better by two nats. The guide starts at a draw of the prior, 0 ± 2, unwhitened, so that the
sign of the start decides. Half of all seeds are right by luck; eight starts are all wrong in one of 256.
Each has 40 steps to show what it is worth, in which the default learning rate would move it by no more than
0.3, so that nearness to a mode would count for more than the mode: it is three times the default. Seeds: 0
to 19.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyro_guides import AmortizedGuide, fit
from tests.benchmarks.report import Result

__all__ = ["run"]

SEEDS = 20
STEPS = 400
RATE = 0.03


def two_sided(x: Tensor) -> None:
    """The model."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 2.0))
    pyro.factor("better", m)
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(m**2, 0.5), obs=x)


def finds_better(restarts: int, seed: int) -> bool:
    """Whether q ends up at the positive mode."""
    pyro.set_rng_seed(seed)
    x = torch.tensor([0.9, 1.0, 1.1, 1.2], dtype=torch.float64)
    guide = AmortizedGuide(two_sided, init_loc_fn=init_to_sample)
    fit(
        two_sided,
        guide,
        x,
        batch_size=None,
        max_steps=STEPS,
        learning_rate=RATE,
        whiten=False,
        restarts=restarts,
        seed=seed,
    )
    return float(guide.median(x)["m"]) > 0.0


def run() -> list[Result]:
    """How often the worse mode, and how often, by luck, the better one."""
    found = {restarts: sum(finds_better(restarts, seed) for seed in range(SEEDS)) for restarts in (1, 8)}
    where = f"two modes, {SEEDS} seeds"
    return [
        Result("one start: seeds in the better mode", where, found[1], target=13),
        Result("restarts=8: seeds in the worse mode", where, SEEDS - found[8], target=1),
    ]
