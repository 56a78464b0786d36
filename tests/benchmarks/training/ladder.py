"""The ladder: does it end at the family that the posterior asks for, and for how many steps more?

*Four modes* (``tests/test_multimodal.py``): the signs of both latents are lost, so that only the last rung,
a mixture of four, holds the posterior. Its gap to the exact log evidence is that of 500 rows that ``fit``
has not seen, and its steps are compared with those of the mixture alone. Nothing stops early, for that ends
both at random times. *One mode*: a linear factor model, whose posterior is normal and correlated; the ladder
should stop at full rank, and its gap is exact, too. Seeds: 0 to 2, each with rows and weights of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_guides import AmortizedGuide, DiagonalNormal, FitResult, FullRankNormal, NormalMixture, fit
from pyro_guides.families import Family
from tests.benchmarks.report import Result
from tests.test_multimodal import four_modes, four_modes_evidence

__all__ = ["run"]

SEEDS = 3
STEPS = 1200
TRAIN, TEST = 1000, 500
LADDER = (FullRankNormal(), NormalMixture(4))
LOADINGS = torch.tensor([[1.0, 0.5, -0.3], [0.9, 0.6, 0.1]])
NOISE = 0.5

Problem = tuple[Callable[[Tensor], None], Callable[[int], Tensor], Callable[[Tensor], Tensor]]


def factors(x: Tensor) -> None:
    """A linear factor model."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)


def factor_evidence(x: Tensor) -> Tensor:
    """Log p(x) per row."""
    covariance = LOADINGS.T @ LOADINGS + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


def factor_rows(count: int) -> Tensor:
    """Rows of the model."""
    return torch.randn(count, 2) @ LOADINGS + NOISE * torch.randn(count, 3)


def four_modes_rows(count: int) -> Tensor:
    """Rows of the model."""
    return torch.randn(count, 2).abs() + 0.3 * torch.randn(count, 2)


FOUR_MODES: Problem = four_modes, four_modes_rows, four_modes_evidence
ONE_MODE: Problem = factors, factor_rows, factor_evidence


def trained(problem: Problem, family: Family, seed: int, **options: Any) -> tuple[FitResult, float]:
    """What a run came to, and its mean gap to the evidence in nats; 200 draws, standard error 0.005."""
    model, rows, evidence = problem
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    train, test = rows(TRAIN), rows(TEST)
    guide = AmortizedGuide(model, family=family)
    result = fit(model, guide, train, max_steps=STEPS, seed=seed, **options)
    posterior = guide.posterior(test, num_draws=200)
    gap = evidence(test) - (posterior.log_p - posterior.log_q).mean(0)
    return result, float(gap.mean())


def run() -> list[Result]:
    """Both problems."""
    return [*_four_modes(), *_one_mode()]


def _four_modes() -> list[Result]:
    where = f"four modes, {SEEDS} seeds"
    climbed = [
        trained(FOUR_MODES, DiagonalNormal(), seed, ladder=LADDER, patience=None) for seed in range(SEEDS)
    ]
    direct = [trained(FOUR_MODES, LADDER[-1], seed, patience=None) for seed in range(SEEDS)]
    ratios = [ours.steps / theirs.steps for (ours, _), (theirs, _) in zip(climbed, direct, strict=True)]
    short = sum("Mixture" not in result.families[0] for result, _ in climbed)
    return [
        Result("ladder: seeds not at the mixture", where, short, target=0),
        Result("ladder: gap, nats, worst", where, max(gap for _, gap in climbed), target=0.05),
        Result("mixture alone: gap, nats, worst", where, max(gap for _, gap in direct)),
        Result("ladder: steps / mixture alone", where, statistics.median(ratios), target=1.5),
    ]


def _one_mode() -> list[Result]:
    where = f"linear factors, {SEEDS} seeds"
    climbed = [trained(ONE_MODE, DiagonalNormal(), seed, ladder=LADDER) for seed in range(SEEDS)]
    astray = sum("FullRank" not in result.families[0] for result, _ in climbed)
    return [
        Result("ladder: seeds not at full rank", where, astray, target=0),
        Result("ladder: gap, nats, worst", where, max(gap for _, gap in climbed), target=0.05),
    ]
