"""A mixture of two normals, with its components in order, and free to be swapped: two equal modes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.benchmarks.accuracy.targets import Draws, Ordered, Target, known
from tests.problems.regressions import mixture_data

__all__ = ["mixtures"]


def mixtures() -> list[Target]:
    """Both."""
    y = (mixture_data(),)
    return [
        Target("low_dim_gauss_mix", "series", ordered, y, known("low_dim_gauss_mix")),
        Target(
            "low_dim_gauss_mix_collapse",
            "bimodal",
            free,
            y,
            known("low_dim_gauss_mix_collapse"),
            flipped=_flipped,
        ),
    ]


def ordered(y: Tensor) -> None:
    """Components in order of their means."""
    mu = pyro.sample("mu", Ordered(dist.Normal(y.new_zeros(2), 2.0)))
    _observed(y, mu)


def free(y: Tensor) -> None:
    """Components that may be swapped."""
    _observed(y, pyro.sample("mu", dist.Normal(y.new_zeros(2), 2.0).to_event(1)))


def _observed(y: Tensor, mu: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * y.new_ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), y.new_tensor(5.0)))
    parts = dist.Normal(mu.unsqueeze(-2), sigma.unsqueeze(-2)).log_prob(y.unsqueeze(-1))
    weights = torch.stack([theta.log(), (-theta).log1p()], -1).unsqueeze(-2)
    pyro.factor("y", (parts + weights).logsumexp(-1).sum(-1))


def _flipped(draws: Draws) -> Tensor:
    mu = draws["mu"].reshape(len(draws["mu"]), 2)
    return mu[:, 0] > mu[:, 1]
