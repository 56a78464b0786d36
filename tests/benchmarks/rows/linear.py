"""Factor models of images, whose evidence and best diagonal normal are known in closed form.

z ~ N(0, I) of K values, x ~ N(μ + W z, diag(ψ)); μ, W and ψ are those of highest likelihood for 1,497 images
of scikit-learn's digits, W turned so that factors correlate a posteriori. 300 other images are judged. The
posterior is normal and its mean linear in x, so that a full-rank normal has nothing to lose.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    optim,
)
from pyro_guides.families import Family
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Table, Tier
from tests.benchmarks.workers import each

__all__ = ["FactorModel", "Found", "Task", "digits", "run", "trained"]

FAMILIES: dict[str, Family] = {
    "DiagonalNormal()": DiagonalNormal(),
    "LowRankNormal(4)": LowRankNormal(4),
    "FullRankNormal()": FullRankNormal(),
    "NormalMixture(2)": NormalMixture(2),
    "NormalizingFlow()": NormalizingFlow(),
}
EXACT = ("FullRankNormal()", "NormalMixture(2)", "NormalizingFlow()")  # those that hold the posterior
RATE = 5e-3
BATCH = 128
DRAWS = 2000
SHORT = 0.02  # nats that a guide may stay behind the best of its family


class Task(NamedTuple):
    """A number of factors and the name of a family."""

    factors: int
    family: str


class Found(NamedTuple):
    """Means over images: the exact log p(x), the ELBO and its error over draws, and what is best possible."""

    task: Task
    evidence: float
    elbo: float
    error: float
    best: float | None
    seconds: float


TASKS: dict[Tier, list[Task]] = {
    "full": [Task(*pair) for pair in itertools.product((16, 8), FAMILIES)],
    "quick": [Task(16, "DiagonalNormal()"), Task(16, "FullRankNormal()")],
}
STEPS = 3000


def digits() -> tuple[Tensor, Tensor]:
    """1,497 images to train with and 300 to judge by, their pixels that vary."""
    pixels = load_digits().data[np.random.default_rng(0).permutation(1797)]
    inked = pixels[:1497].var(axis=0) > 0.5
    train, test = torch.tensor(pixels[:, inked], dtype=torch.float32).split([1497, 300])
    return train, test


class FactorModel:
    """The model of highest likelihood, and its exact answers."""

    def __init__(self, factors: int, x: Tensor) -> None:
        fitted = FactorAnalysis(factors, svd_method="lapack", tol=1e-6, max_iter=5000).fit(x.double().numpy())
        turned = fitted.components_.T @ ortho_group.rvs(factors, random_state=0)
        self.factors = factors
        self.mean, self.weights, self.noise = map(
            torch.tensor, (fitted.mean_, turned, fitted.noise_variance_)
        )
        self.precision = torch.eye(factors) + self.weights.T @ (self.weights / self.noise[:, None])

    def __call__(self, x: Tensor) -> None:
        """The Pyro model."""
        mean, weights, scale = self.mean.float(), self.weights.float(), self.noise.sqrt().float()
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.factors), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean + z @ weights.T, scale).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each image."""
        marginal = torch.distributions.LowRankMultivariateNormal(self.mean, self.weights, self.noise)
        return marginal.log_prob(x.double())

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact means ``(rows, K)`` and standard deviations ``(K,)`` of the factors."""
        covariance = torch.linalg.inv(self.precision)
        mean = (x.double() - self.mean) / self.noise @ self.weights @ covariance
        return mean, covariance.diagonal().sqrt()

    def diagonal_gap(self) -> float:
        """How far below the evidence the best diagonal normal stays, the same for every image."""
        return float(0.5 * (self.precision.diagonal().log().sum() - self.precision.logdet()))


def trained(task: Task, steps: int) -> Found:
    """Train one guide by plain SVI, and judge it."""
    train, test = digits()
    model = FactorModel(task.factors, train)
    with isolated():
        pyro.set_rng_seed(SEED)
        guide = AmortizedGuide(model, family=FAMILIES[task.family]).setup(train)
        adam = optim.Adam({"lr": RATE}, schedule=lambda step: min(1.0, 2.0 - 2.0 * step / steps))
        svi = SVI(model, guide, adam, Trace_ELBO())
        start = time.process_time()
        for _ in range(steps):
            svi.step(train[torch.randint(len(train), (BATCH,))])
        seconds = time.process_time() - start
        weights = guide.posterior(test, num_draws=DRAWS).log_weights
    evidence = float(model.log_evidence(test).mean())
    best = evidence if task.family in EXACT else None
    if task.family == "DiagonalNormal()":
        best = evidence - model.diagonal_gap()
    error = float(weights.mean(1).std()) / DRAWS**0.5
    return Found(task, evidence, float(weights.mean()), error, best, seconds)


def run(tier: Tier) -> Report:
    """All factor models and families."""
    found = each(functools.partial(trained, steps=STEPS), TASKS[tier])
    results = [
        Result(
            f"{one.task.family}: ELBO below the best possible, nats per image",
            f"factor model, K = {one.task.factors}",
            one.best - one.elbo,
            one.error,
            target=SHORT,
        )
        for one in found
        if one.best is not None
    ]
    columns = ("factors", "family", "log p(x), exact", "ELBO", "gap", "best possible gap", "seconds")
    note = f"Nats per held-out image. {STEPS} steps of batches of {BATCH}; seconds of CPU."
    return Report(results, [Table("Factor models of digits", columns, [_line(one) for one in found], note)])


def _line(one: Found) -> list[str | float]:
    best = "" if one.best is None else f"{one.evidence - one.best:.3f}"
    return [
        one.task.factors,
        one.task.family,
        f"{one.evidence:.3f}",
        f"{one.elbo:.3f}",
        f"{one.evidence - one.elbo:.3f}",
        best,
        f"{one.seconds:.0f}",
    ]
