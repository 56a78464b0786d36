"""The ten tasks as Pyro models: each row of x is a data set, with parameters of its own.

Likelihoods are exact, so the same model simulates, trains, and weighs draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.benchmarks.sbibm import equations, stored
from tests.benchmarks.sbibm.densities import Distracted, FourPoints, Moon, SpikeTrain, TwoScales

__all__ = ["TASKS", "Task"]

Distribution = dist.TorchDistribution


@dataclass(frozen=True)
class Task:
    """A prior, and what is observed given θ.

    Attributes:
        name: as the benchmark calls it.
        size: how many numbers a data set has.
        prior: makes the distribution of θ.
        observation: from θ to the distribution of x.
        features: what an encoder is to read of x.
    """

    name: str
    size: int
    prior: Callable[[], Distribution]
    observation: Callable[[Tensor], Distribution]
    features: Callable[[Tensor], Tensor] = lambda x: x

    def __call__(self, x: Tensor) -> None:
        """The model."""
        with pyro.plate("data_sets", len(x)):
            theta = pyro.sample("theta", self.prior())
            pyro.sample("x", self.observation(theta), obs=x)

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        """Parameters and data sets from the model."""
        nodes = poutine.trace(poutine.uncondition(self)).get_trace(torch.zeros(count, self.size)).nodes
        return nodes["theta"]["value"], nodes["x"]["value"]


def box(size: int, reach: float) -> Distribution:
    """Uniform between −reach and reach."""
    return dist.Uniform(torch.full((size,), -reach), reach).to_event(1)


def normal(size: int, sd: float) -> Distribution:
    """Independent normals."""
    return dist.Normal(torch.zeros(size), sd).to_event(1)


def around(theta: Tensor, sd: float) -> Distribution:
    """One independent normal around each parameter."""
    return dist.Normal(theta, sd).to_event(1)


def log_normal(loc: tuple[float, ...], scale: tuple[float, ...]) -> Distribution:
    """Independent positive parameters."""
    return dist.LogNormal(torch.tensor(loc), torch.tensor(scale)).to_event(1)


def smooth_filter() -> Distribution:
    """An offset and a filter of nine weights that differ little from their neighbours."""
    precision = stored.table("precision")
    return dist.MultivariateNormal(torch.zeros(len(precision)), precision_matrix=precision)


def draw_distractors(shape: torch.Size) -> Tensor:
    """What tells nothing: ``(*shape, 92)``; one cloud is drawn for each, not all of them."""
    loc, tril = stored.noise()
    cloud = torch.randint(len(loc), shape)
    normal, chi2 = torch.randn(*shape, loc.shape[1]), torch.distributions.Chi2(2.0).sample(shape)
    drawn = torch.empty(*shape, loc.shape[1])
    for i in range(len(loc)):
        mine = cloud == i
        drawn[mine] = loc[i] + normal[mine] @ tril[i].T / (chi2[mine] / 2.0).sqrt().unsqueeze(-1)
    return drawn


def distracted(theta: Tensor) -> Distribution:
    """Four points among 92 numbers that tell nothing."""
    return Distracted(FourPoints(theta), draw_distractors, stored.table("permutation").long())


def spikes(theta: Tensor, *, summed: bool) -> Distribution:
    """A hundred bins with or without a spike."""
    return SpikeTrain(theta, stored.table("design"), summed=summed)


def tested(theta: Tensor) -> Distribution:
    """How many of a thousand people are infected, at ten times."""
    share = equations.epidemic(theta).clamp(1e-12, 1.0 - 1e-7)
    return dist.Binomial(1000, share, validate_args=False).to_event(1)


def counted(theta: Tensor) -> Distribution:
    """Prey and predators, counted with errors of a tenth."""
    states = equations.predators(theta).clamp(math.log(1e-10), math.log(1e4))
    return dist.LogNormal(states, 0.1).to_event(1)


def with_moments(x: Tensor) -> Tensor:
    """Four points, and what a normal is told by: their means, log sds and correlation."""
    points = x.reshape(*x.shape[:-1], 4, 2)
    mean = points.mean(-2)
    away = points - mean.unsqueeze(-2)
    sd = away.square().mean(-2).sqrt() + 1e-6
    correlation = away.prod(-1).mean(-1, keepdim=True) / sd.prod(-1, keepdim=True)
    return torch.cat([x, mean, sd.log(), correlation.clamp(-0.999, 0.999).atanh()], dim=-1)


def without_distractors(x: Tensor) -> Tensor:
    """The four points: the model knows where they are among the rest."""
    return with_moments(x[..., stored.table("permutation").long().argsort()[:8]])


def logs_of_counts(x: Tensor) -> Tensor:
    """Log odds of the infected share, which say when and how fast an epidemic grows and dies out."""
    return ((x + 0.5) / (1000.5 - x)).log()


_SD = math.sqrt(0.1)
_RATES = ((math.log(0.4), math.log(0.125)), (0.5, 0.2))
_SPECIES = ((-0.125, -3.0, -0.125, -3.0), (0.5,) * 4)

TASKS = {
    task.name: task
    for task in (
        Task("two_moons", 2, partial(box, 2, 1.0), Moon),
        Task("gaussian_linear", 10, partial(normal, 10, _SD), partial(around, sd=_SD)),
        Task("gaussian_linear_uniform", 10, partial(box, 10, 1.0), partial(around, sd=_SD)),
        Task("gaussian_mixture", 2, partial(box, 2, 10.0), TwoScales),
        Task("slcp", 8, partial(box, 5, 3.0), FourPoints, with_moments),
        Task("slcp_distractors", 100, partial(box, 5, 3.0), distracted, without_distractors),
        Task("bernoulli_glm", 10, smooth_filter, partial(spikes, summed=True)),
        Task("bernoulli_glm_raw", 100, smooth_filter, partial(spikes, summed=False)),
        Task("sir", 10, partial(log_normal, *_RATES), tested, logs_of_counts),
        Task("lotka_volterra", 20, partial(log_normal, *_SPECIES), counted, torch.log),
    )
}
