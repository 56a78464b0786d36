"""Probabilistic matrix factorization of a real table with holes: 569 biopsies, 30 measurements of each.

Scikit-learn's ``breast_cancer`` in logarithms, standardized. A random fifth of the entries is held out; row
and column factors must predict them. There is no exact posterior: the reference is a Gibbs sampler, whose
conditionals are exact.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from sklearn.datasets import load_breast_cancer

FACTORS = 5
SHAPE, RATE = 2.0, 0.5  # of the precision's prior


def load(seed=0, dtype=torch.float32):
    """Return y (569, 30) with zeros in its holes, where it is observed, and the table without holes."""
    table = torch.tensor(load_breast_cancer().data + 0.01, dtype=torch.float64).log()
    chance = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    observed = chance > 0.2
    count = observed.sum(0)
    table = table - (table * observed).sum(0) / count
    truth = (table / ((table * observed).square().sum(0) / count).sqrt()).to(dtype)
    return truth * observed, observed, truth


def model(y, observed):
    """An entry is the product of its row's and its column's factors, and noise."""
    rows = pyro.plate("row", y.shape[0], dim=-2)
    columns = pyro.plate("column", y.shape[1], dim=-1)
    precision = pyro.sample("precision", dist.Gamma(SHAPE, RATE))
    with rows:
        u = pyro.sample("u", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
    with columns:
        v = pyro.sample("v", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
    with rows, columns, poutine.mask(mask=observed):
        pyro.sample("y", dist.Normal((u * v).sum(-1), precision.rsqrt()), obs=y)


def held_out_log_density(draws, truth, held_out):
    """Return log p(entry | y) per entry held out, the density averaged over draws of u, v and precision.

    ``u`` is (S, rows, F), ``v`` (S, columns, F); dimensions of size one between them are allowed.
    """
    count = len(draws["u"])
    u, v = (draws[name].reshape(count, -1, draws[name].shape[-1]) for name in "uv")
    noise = draws["precision"].reshape(count, 1, 1).rsqrt()
    log_p = dist.Normal(u @ v.mT, noise).log_prob(truth)[:, held_out]
    return (log_p.logsumexp(0) - torch.tensor(float(count)).log()).mean()


def column_mean_log_density(y, observed, truth):
    """Return what the best normal per column, fitted to its observed entries, gives: no factors at all."""
    count = observed.sum(0)
    mean = (y * observed).sum(0) / count
    sd = (((y - mean) * observed).square().sum(0) / count).sqrt()
    return dist.Normal(mean, sd).log_prob(truth)[~observed].mean()


def factors_given_others(y, observed, others, precision):
    """Return the exact p(u | v, precision, y); transposed arguments give that of v."""
    seen = observed.to(y.dtype)
    products = torch.einsum("nm,mi,mj->nij", seen, others, others)
    tight = torch.eye(others.shape[1], dtype=y.dtype) + precision * products
    mean = torch.linalg.solve(tight, precision * ((y * seen) @ others).unsqueeze(-1)).squeeze(-1)
    return dist.MultivariateNormal(mean, precision_matrix=tight)


def precision_given_factors(y, observed, u, v):
    """Return the exact p(precision | u, v, y)."""
    error = (y - u @ v.T)[observed]
    return dist.Gamma(SHAPE + 0.5 * len(error), RATE + 0.5 * error.square().sum())


def gibbs(y, observed, draws=200, warmup=100):
    """Draw u, v and precision from the posterior, from torch's global generator."""
    v, precision = torch.randn(y.shape[1], FACTORS, dtype=y.dtype), y.new_tensor(4.0)
    kept = {"u": [], "v": [], "precision": []}
    for step in range(warmup + draws):
        u = factors_given_others(y, observed, v, precision).sample()
        v = factors_given_others(y.T, observed.T, u, precision).sample()
        precision = precision_given_factors(y, observed, u, v).sample()
        if step >= warmup:
            for name, value in zip(kept, (u, v, precision), strict=True):
                kept[name].append(value)
    return {name: torch.stack(values) for name, values in kept.items()}
