"""Linear and generalized linear regressions; flat priors are normals a million wide."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.benchmarks.accuracy.targets import FLAT, Target, known, stored
from tests.problems.regressions import designs, scaled

__all__ = ["generalized", "linear"]

KIDSCORE_PRIOR = ("kidscore_momhsiq",)  # the one whose program gives sigma a prior


def linear() -> list[Target]:
    """Plain regressions, of all scales."""
    data = {name: problem.data for name, problem in scaled().items()} | designs()
    data["sblrc"] = scaled()["sblrc"].data
    flat = [
        *("earn_height", "logearn_height", "logearn_logheight_male", "logearn_interaction_z"),
        *("kidscore_momhsiq", "kidscore_interaction_c", "kidscore_mom_work"),
        *("logmesquite", "logmesquite_logvas"),
    ]
    models = {name: partial(normal, halfcauchy=name in KIDSCORE_PRIOR) for name in flat}
    models |= {"sblrc": conjugate, "sblri": conjugate, "diamonds": diamonds}
    found = [_target(name, model, data[name]) for name, model in models.items()]
    return [*found, _target("nes2000", normal, _party())]


def _target(name: str, model: object, data: tuple[Tensor, ...]) -> Target:
    return Target(name, "regression", model, tuple(data), known(name), nesting=1)  # type: ignore[arg-type]


def generalized() -> list[Target]:
    """Logistic and Poisson regressions."""
    wells, votes, birds = stored("wells"), stored("votes"), stored("peregrines")
    far, bad, school = (
        (wells["dist"] - wells["dist"].mean()) / 100.0,
        wells["arsenic"] - wells["arsenic"].mean(),
        (wells["educ"] - wells["educ"].mean()) / 4.0,
    )
    x = torch.stack([far, bad, school, far * bad, far * school, bad * school], -1)
    return [
        Target(
            "nes_logit", "GLM", logistic, (votes["income"][:, None], votes["vote"]), known("nes_logit"), 1
        ),
        Target("wells_dae_inter", "GLM", logistic, (x, wells["switched"]), known("wells_dae_inter"), 1),
        Target("GLM_Poisson", "GLM", poisson, (birds["year"], birds["C"]), known("GLM_Poisson"), 1),
    ]


def normal(x: Tensor, y: Tensor, *, halfcauchy: bool = False) -> None:
    """Flat coefficients, and a noise scale that is flat or half-Cauchy."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), FLAT).to_event(1))
    prior = dist.HalfCauchy(x.new_tensor(2.5)) if halfcauchy else dist.HalfNormal(x.new_tensor(FLAT))
    sigma = pyro.sample("sigma", prior)
    _observed(x, y, beta, sigma)


def conjugate(x: Tensor, y: Tensor) -> None:
    """Coefficients N(0, 10), noise scale half-normal."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    _observed(x, y, beta, sigma)


def diamonds(x: Tensor, y: Tensor) -> None:
    """24 strongly correlated predictors, centred."""
    three = x.new_tensor(3.0)
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(three, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(three, 0.0, 10.0)))
    _observed(x, y, b, sigma, intercept)


def _observed(x: Tensor, y: Tensor, beta: Tensor, sigma: Tensor, intercept: Tensor | float = 0.0) -> None:
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(intercept + (x * beta).sum(-1), sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    """Flat coefficients."""
    alpha = pyro.sample("alpha", dist.Normal(x.new_tensor(0.0), FLAT))
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), FLAT).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=alpha + (x * beta).sum(-1)), obs=y)


def poisson(year: Tensor, count: Tensor) -> None:
    """Counts along a cubic; coefficients within bounds."""
    alpha = pyro.sample("alpha", dist.Uniform(year.new_tensor(-20.0), 20.0))
    beta = [pyro.sample(f"beta{k}", dist.Uniform(year.new_tensor(-10.0), 10.0)) for k in (1, 2, 3)]
    log_rate = alpha + sum(b * year**k for k, b in enumerate(beta, start=1))
    with pyro.plate("year", len(year)):
        pyro.sample("count", dist.Poisson(log_rate.exp()), obs=count)


def _party() -> tuple[Tensor, Tensor]:
    """Party identification in 2000, on ideology, race, age in four classes, education, gender and income."""
    data = stored("nes")
    ages = [(data["age_discrete"] == level).double() for level in (2, 3, 4)]
    columns = [data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"]]
    return torch.stack([torch.ones_like(columns[0]), *columns], -1), data["partyid7"]
