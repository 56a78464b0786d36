"""Priors and likelihoods of every kind, around a location that their parents decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from models import Pushed
from pyro.distributions import constraints
from torch import Tensor

__all__ = ["DISCRETE", "ENDS_AT_TENSORS", "LIKELIHOODS", "LINEAR", "PRIORS", "signal"]

Prior = Callable[[Tensor], Any]
F64 = {"dtype": torch.float64}


def around(loc: Tensor, size: int) -> Tensor:
    """Locations of a vector of some size."""
    return loc.unsqueeze(-1) + torch.linspace(-0.4, 0.6, size, **F64)


def normals(loc: Tensor, *shape: int) -> Any:
    return dist.Normal(around(loc, torch.Size(shape).numel()).unflatten(-1, shape), 0.9).to_event(len(shape))


def pushed(support: Any, size: int) -> Prior:
    """A normal pushed onto a support from so many unconstrained values."""

    def prior(loc: Tensor) -> Any:
        locs = around(loc, size)
        return Pushed(support, locs, torch.full_like(locs, 0.6))

    return prior


def correlated(loc: Tensor) -> Any:
    scale = torch.tensor([[1.0, 0.0], [0.5, 0.8]], **F64)
    return dist.MultivariateNormal(around(loc, 2), scale_tril=scale)


# Kinds whose dependence on their location is linear and normal.
LINEAR: dict[str, Prior] = {
    "normal": lambda loc: dist.Normal(loc, 0.9),
    "vector": lambda loc: normals(loc, 2),
    "matrix": lambda loc: normals(loc, 2, 2),
    "multivariate": correlated,
}
DISCRETE: dict[str, Prior] = {
    "bernoulli": lambda loc: dist.Bernoulli(logits=loc),
    "bernoullis": lambda loc: dist.Bernoulli(logits=around(loc, 2)).to_event(1),
    "categorical": lambda loc: dist.Categorical(logits=around(loc, 3)),
    "one-hot": lambda loc: dist.OneHotCategorical(logits=around(loc, 3)),
    "binomial": lambda loc: dist.Binomial(3, logits=loc),
}
PRIORS: dict[str, Prior] = {
    **LINEAR,
    **DISCRETE,
    "student": lambda loc: dist.StudentT(5.0, loc, 1.0),
    "log-normal": lambda loc: dist.LogNormal(loc, 0.5),
    "gammas": lambda loc: dist.Gamma(around(loc, 2).exp() + 1.0, 1.5).to_event(1),
    "half-normal": lambda loc: dist.HalfNormal(loc.exp()),
    "beta": lambda loc: dist.Beta(loc.exp() + 1.0, 2.0),
    "interval": lambda loc: Pushed(constraints.interval(-1.0, 2.0), loc, torch.full_like(loc, 0.6)),
    "uniform": lambda loc: dist.Uniform(-loc.exp(), 1.0 + loc.exp()),
    "pareto": lambda loc: dist.Pareto(loc.exp(), 4.0),
    "dirichlet": lambda loc: dist.Dirichlet(around(loc, 3).exp() + 0.5),
    "ordered": pushed(constraints.ordered_vector, 3),
    "positive ordered": pushed(constraints.positive_ordered_vector, 2),
    "lower Cholesky": pushed(constraints.lower_cholesky, 3),
    "correlation": pushed(constraints.corr_matrix, 3),
    "LKJ": lambda loc: dist.LKJCholesky(3, loc.exp() + 0.5),
    "Wishart": lambda loc: dist.Wishart(loc.exp() + 3.0, torch.eye(2, **F64)),
}
ENDS_AT_TENSORS = ("binomial", "uniform", "pareto")  # whose supports the model computes
LIKELIHOODS: dict[str, Prior] = {
    "normal": lambda loc: dist.Normal(loc, 0.7),
    "normals": lambda loc: normals(loc, 2),
    "student": lambda loc: dist.StudentT(4.0, loc, 0.7),
    "gamma": lambda loc: dist.Gamma(2.0, (0.3 * loc).exp()),
    "poisson": lambda loc: dist.Poisson((0.3 * loc).exp()),
    "bernoulli": lambda loc: dist.Bernoulli(logits=loc),
    "categorical": lambda loc: dist.Categorical(
        logits=around(loc, 3) * torch.tensor([1.0, -1.0, 0.5], **F64)
    ),
    "multivariate": correlated,
}


def signal(value: Tensor, event_dim: int, *, linear: bool) -> Tensor:
    """What a child sees of a parent's value: one number per element, bounded unless it is to be linear."""
    flat = value.to(torch.float64)
    flat = flat.reshape(*flat.shape[: flat.dim() - event_dim], -1)
    weights = torch.cos(torch.arange(1, flat.shape[-1] + 1, **F64))
    total = flat @ weights
    return total if linear else 1.5 * torch.tanh(total)
