"""Hierarchies: schools, seeds, counties, rats, dogs, and a random walk whose scales are unknown."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.benchmarks.accuracy.targets import Draws, Target, known, stored
from tests.problems import radon, rats

__all__ = ["hierarchies"]


def hierarchies() -> list[Target]:
    """All of them."""
    schools, plants, dogs = stored("schools"), stored("seeds"), stored("dogs_data")["y"]
    school = (schools["y"], schools["sigma"])
    plant = tuple(plants[name] for name in ("x1", "x2", "N", "n"))
    houses = radon.load(torch.float64)
    no_uranium = (houses[0], *houses[2:])
    eight = known("eight_schools")
    return [
        Target("eight_schools_centered", "hierarchy", centered, school, eight, 1),
        Target("eight_schools_noncentered", "hierarchy", noncentered, school, eight, 1, derived=_effects),
        Target("seeds_stanified", "hierarchy", seeds, plant, known("seeds_stanified"), 1),
        Target("radon_intercept", "hierarchy", radon.intercept_model, houses, known("radon_intercept"), 1),
        Target("radon_slope", "hierarchy", radon.slope_model, no_uranium, known("radon_slope"), 1),
        Target("rats", "hierarchy", rats.model, rats.load(torch.float64), known("rats"), 2),
        Target("dogs", "hierarchy", shocked, (dogs,), known("dogs"), 2, derived=_chances),
    ]


def centered(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, drawn around a mean: a funnel."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(y: Tensor, sigma: Tensor) -> None:
    """The same in units of tau."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        t = pyro.sample("t", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * t, sigma), obs=y)


def _effects(draws: Draws) -> Draws:
    mu, tau, t = (draws[name].reshape(len(draws[name]), -1) for name in ("mu", "tau", "t"))
    return {"theta": mu + tau * t}


def seeds(x1: Tensor, x2: Tensor, sown: Tensor, sprouted: Tensor) -> None:
    """Seeds that sprouted on 21 plates, by seed and root extract; each plate has an effect of its own."""
    alpha0, alpha1, alpha12, alpha2 = (
        pyro.sample(name, dist.Normal(x1.new_tensor(0.0), 1.0))
        for name in ("alpha0", "alpha1", "alpha12", "alpha2")
    )
    sigma = pyro.sample("sigma", dist.HalfCauchy(x1.new_tensor(1.0)))
    with pyro.plate("dish", len(x1)):
        b = pyro.sample("b", dist.Normal(x1.new_tensor(0.0), sigma))
        odds = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        pyro.sample("n", dist.Binomial(sown, logits=odds), obs=sprouted)


def shocked(y: Tensor) -> None:
    """Dogs that learn to avoid a shock (1: shocked), each at its own two rates, which are correlated."""
    zeros = y.new_zeros(2)
    mu = pyro.sample("mu_logit_ab", _logistic(zeros).to_event(1))
    sigma = pyro.sample("sigma_logit_ab", dist.HalfNormal(torch.ones_like(zeros)).to_event(1))
    root = pyro.sample("L", dist.LKJCholesky(2, y.new_tensor(2.0)))
    with pyro.plate("dog", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
        log_a, log_b = _log_rates(mu, sigma, root, z)
        shocks = torch.nn.functional.pad(y.cumsum(-1), (1, -1))
        avoided = torch.arange(y.shape[-1], dtype=y.dtype) - shocks
        chance = (shocks * log_a + avoided * log_b).exp().clamp(max=1.0 - 1e-12)
        with pyro.plate("trial", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Bernoulli(chance), obs=y)


def _logistic(loc: Tensor) -> dist.TorchDistribution:
    base = dist.Uniform(torch.zeros_like(loc), 1.0)
    return dist.TransformedDistribution(base, [torch.distributions.transforms.SigmoidTransform().inv])


def _log_rates(mu: Tensor, sigma: Tensor, root: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log a and log b, row vectors times the Cholesky factor as in the source's program."""
    odds = mu + ((z * sigma).unsqueeze(-2) @ root).squeeze(-2)
    log_a, log_b = torch.nn.functional.logsigmoid(odds).unbind(-1)
    return log_a, log_b


def _chances(draws: Draws) -> Draws:
    count = len(draws["z"])
    mu, sigma = (draws[name].reshape(count, 1, 2) for name in ("mu_logit_ab", "sigma_logit_ab"))
    root, z = draws["L"].reshape(count, 1, 2, 2), draws["z"].reshape(count, -1, 2)
    log_a, log_b = _log_rates(mu, sigma, root, z)
    return {"a": log_a.exp(), "b": log_b.exp()}
