"""The task "gaussian linear" of the simulation-based inference benchmark (Lueckmann et al. 2021).

θ ~ N(0, 0.1 I), x ~ N(θ, 0.1 I) in ten dimensions; 0.1 is a variance. Ten observations are given; their
posteriors are N(x / 2, 0.05 I) exactly.
"""

import math

import pyro
import pyro.distributions as dist
import torch

from . import stored

VARIANCE = 0.1
SD = math.sqrt(VARIANCE)


def load(dtype=torch.float32):
    """Return the observations (10, 10), and means and sds of the benchmark's own 10,000 draws for each."""
    data = stored("gaussian_linear", dtype)
    return data["observations"], data["reference_mean"], data["reference_sd"]


def model(x):
    """A row of x is a data set."""
    with pyro.plate("data_set", len(x)):
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(x.shape[1]), SD).to_event(1))
        pyro.sample("x", dist.Normal(theta, SD).to_event(1), obs=x)


def simulate(count, seed=0, dtype=torch.float32):
    """Draw x, (count, 10), from the model."""
    noise = torch.randn(2, count, 10, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return SD * noise.sum(0)


def exact(x):
    """Return log p(x) (B,), the posterior means (B, 10) and the covariance (10, 10) that all rows share."""
    x = x.double()
    evidence = dist.Normal(torch.zeros_like(x), math.sqrt(2.0 * VARIANCE)).log_prob(x).sum(-1)
    return evidence, 0.5 * x, 0.5 * VARIANCE * torch.eye(x.shape[1], dtype=torch.float64)
