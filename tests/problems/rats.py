"""Weights of 30 young rats in five weeks (Gelfand et al. 1990): a line per rat, pairs (alpha, beta) of each.

The model ``rats_model`` of posteriordb, whose reference is a long NUTS run of Stan. Its flat priors of the
three scales are HalfNormal(100) here, which moves no mean or sd by a hundredth of an sd. ``exact`` integrates
by quadrature, to 1e-5 sd. ``alpha`` is the weight at day 22, the middle of the ages; Stan's
``alpha0``, the weight at birth, is left out.
"""

from functools import cache

import pyro
import pyro.distributions as dist
import torch

from . import Reference, stored
from .linear import Scale, integrate

MIDDLE = 22.0
RATS = 30


def load(dtype=torch.float32):
    """Return the ages in days (5,) and the weights (30, 5)."""
    data = stored("rats", dtype)
    return data["age"].to(dtype), data["weight"].to(dtype)


def model(age, weight):
    """A line per rat."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 100.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 100.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(100.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(100.0))
    sigma_beta = pyro.sample("sigma_beta", dist.HalfNormal(100.0))
    weeks = pyro.plate("week", weight.shape[1], dim=-1)
    with pyro.plate("rat", len(weight), dim=-2):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
        with weeks:
            mean = alpha + beta * (age - MIDDLE)
            pyro.sample("weight", dist.Normal(mean, sigma_y), obs=weight)


def reference():
    """Return Stan's means and sds of every scalar of the model."""
    data = stored("rats", torch.float64)
    return Reference(data["names"][:-1], data["mean"][:-1], data["sd"][:-1])  # the last one is alpha0


def design(prior=100.0):
    """Return the arguments of `integrate`, and the names of the scales and scalars that it answers."""
    age, weight = load(torch.float64)
    ones, day = torch.ones(RATS * len(age), dtype=torch.float64), (age - MIDDLE).repeat(RATS)
    rats = torch.eye(RATS, dtype=torch.float64).repeat_interleave(len(age), dim=0)
    columns = torch.cat([torch.stack([ones, day], 1), rats, day[:, None] * rats], 1)
    group = torch.arange(2).repeat_interleave(RATS)
    readout = torch.eye(2 + 2 * RATS, dtype=torch.float64)
    readout[2:, :2] = torch.eye(2, dtype=torch.float64)[group]  # plus mu_alpha, or mu_beta
    scales = [Scale(prior, 7.0, 35.0, 14), Scale(prior, 0.1, 1.5, 20), Scale(prior, 4.2, 9.0, 12)]
    fixed = torch.full((2,), 100.0, dtype=torch.float64)
    each = [f"{site}[{i + 1}]" for site in ("alpha", "beta") for i in range(RATS)]
    names = ["sigma_alpha", "sigma_beta", "sigma_y", "mu_alpha", "mu_beta", *each]
    return (columns, fixed, group, scales, weight.flatten(), readout), names


@cache
def exact(prior=100.0):
    """Return the `Reference` in the order of Stan's names, and log p(weight), both by quadrature."""
    parts, names = design(prior)
    return integrate(*parts).ordered(names, reference().names)
