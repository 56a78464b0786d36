"""Radon in 919 houses of 85 counties of Minnesota (Gelman and Hill 2006): houses are ragged over counties.

Two models of posteriordb, ``radon_hierarchical_intercept`` and ``radon_variable_intercept_slope``, with their
priors. The references are long NUTS runs of Stan on the non-centered programs; ``alpha`` and ``beta`` are the
counties' own values there, as they are here, not the standardized ones. ``exact`` integrates by quadrature,
to a hundredth of an sd and of a nat.
"""

from functools import cache

import pyro
import pyro.distributions as dist
import torch

from . import Reference, stored
from .linear import Scale, integrate

COUNTIES = 85


def load(dtype=torch.float32):
    """Return floor (0 or 1), log_uppm, log_radon and county (from 0), each (919,)."""
    data = stored("radon", dtype)
    return data["floor"].to(dtype), data["log_uppm"], data["log_radon"], data["county"]


def intercept_model(floor, log_uppm, log_radon, county, num_counties=COUNTIES):
    """Each county has its own intercept; uranium and floor act alike in all of them."""
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("county", num_counties):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    with pyro.plate("house", len(county)):
        mean = alpha[..., county] + beta[..., 0] * log_uppm + beta[..., 1] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def slope_model(floor, log_radon, county, num_counties=COUNTIES):
    """Each county has its own intercept and its own effect of the floor."""
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_beta = pyro.sample("sigma_beta", dist.HalfNormal(1.0))
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    with pyro.plate("county", num_counties):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with pyro.plate("house", len(county)):
        mean = alpha[..., county] + beta[..., county] * floor
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def reference(kind):
    """Return Stan's means and sds of every scalar of the model ``intercept`` or ``slope``."""
    data = stored("radon", torch.float64)
    return Reference(data[f"{kind}_names"], data[f"{kind}_mean"], data[f"{kind}_sd"])


def design(kind):
    """Return the arguments of `integrate`, and the names of the scales and scalars that it answers."""
    floor, log_uppm, log_radon, county = load(torch.float64)
    each, one = torch.eye(COUNTIES, dtype=torch.float64), torch.ones_like(floor)
    if kind == "intercept":
        shared, sites = [log_uppm, floor, one], ["alpha"]
        effects, means = each[county], torch.tensor([2])  # alpha is mu_alpha plus the county's deviation
        scales = [Scale(1.0, 0.005, 0.6, 40), Scale(1.0, 0.62, 0.84, 12)]
        names = ["sigma_alpha", "sigma_y", "beta[1]", "beta[2]", "mu_alpha"]
    else:
        shared, sites = [one, floor], ["alpha", "beta"]
        effects, means = torch.cat([each[county], floor[:, None] * each[county]], 1), torch.arange(2)
        scales = [Scale(1.0, 0.18, 0.58, 9), Scale(1.0, 0.006, 1.1, 16), Scale(1.0, 0.65, 0.80, 7)]
        names = ["sigma_alpha", "sigma_beta", "sigma_y", "mu_alpha", "mu_beta"]
    group = torch.arange(len(sites)).repeat_interleave(COUNTIES)
    columns, fixed = (
        torch.cat([torch.stack(shared, 1), effects], 1),
        torch.full((len(shared),), 10.0).double(),
    )
    readout = torch.eye(columns.shape[1], dtype=torch.float64)
    readout[torch.arange(len(shared), len(readout)), means[group]] = 1.0
    names += [f"{site}[{j + 1}]" for site in sites for j in range(COUNTIES)]
    return (columns, fixed, group, scales, log_radon, readout), names


@cache
def exact(kind):
    """Return the `Reference` in the order of Stan's names, and log p(log_radon), both by quadrature."""
    parts, names = design(kind)
    return integrate(*parts).ordered(names, reference(kind).names)
