"""Linear regressions whose posteriors have one mode, and a mixture whose posterior has two.

Data: posteriordb, see tests/data/README.md. Coefficients have wide priors in the place of flat ones.

`designs` has ten on real data of ordinary scale; `scaled` has seven of all scales, as they come, with means
and sds of 10,000 draws of Stan's NUTS each: standard errors of at most 0.011 sd, and 0.8 % of the sds.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from . import Reference, stored

DATA = Path(__file__).parents[1] / "data"


def designs():
    """Predictors (with an intercept) and outcome of each regression, by name; float64."""
    stored = {
        name: torch.tensor(x, dtype=torch.float64) for name, x in np.load(DATA / "regressions.npz").items()
    }
    score, hs, iq = stored["kid_score"], stored["mom_hs"], stored["mom_iq"]
    work = torch.stack([stored["mom_work"] == level for level in (2, 3, 4)], dim=-1).double().unbind(-1)
    c_hs, c_iq = hs - hs.mean(), iq - iq.mean()
    m = {name.removeprefix("mesquite_"): x for name, x in stored.items() if name.startswith("mesquite_")}
    log = {name: x.log() for name, x in m.items() if name != "group"}
    volume = log["diam1"] + log["diam2"] + log["canopy_height"]
    area, shape = log["diam1"] + log["diam2"], log["diam1"] - log["diam2"]
    rest = [log["total_height"], log["density"], m["group"]]

    def design(*columns):
        return torch.stack([torch.ones_like(columns[0]), *columns], dim=-1)

    return {
        "kidscore_momhs": (design(hs), score),
        "kidscore_momiq": (design(iq), score),
        "kidscore_momhsiq": (design(hs, iq), score),
        "kidscore_interaction_c": (design(c_hs, c_iq, c_hs * c_iq), score),
        "kidscore_mom_work": (design(*work), score),
        "logmesquite": (
            design(log["diam1"], log["diam2"], log["canopy_height"], *rest),
            log["weight"],
        ),
        "logmesquite_logva": (design(volume, area, m["group"]), log["weight"]),
        "logmesquite_logvas": (design(volume, area, shape, *rest), log["weight"]),
        "logmesquite_logvolume": (design(volume), log["weight"]),
        "sblri": (stored["sblri_x"], stored["sblri_y"]),
    }


def regression(predictors, y):
    size = predictors.shape[-1]
    beta = pyro.sample("beta", dist.Normal(predictors.new_zeros(size), 100.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(predictors.new_tensor(2.5)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=y)


class Problem(NamedTuple):
    model: object
    data: tuple
    reference: Reference


def scaled():
    """Seven regressions by name: coefficients from 1e-3 to 1e5, strongly correlated predictors; float64."""
    known = stored("scaled", torch.float64)
    height, male, earn = known["height"], known["male"].double(), known["earn"].double()
    z = (height - height.mean()) / height.std()
    ones = torch.ones_like(z)
    x = known["diamonds_x"]
    data = {
        "sblrc": (narrow, known["sblrc_x"], known["sblrc_y"]),
        "earn_height": (wide, torch.stack([ones, height], -1), earn),
        "logearn_height": (wide, torch.stack([ones, height], -1), earn.log()),
        "logearn_height_male": (wide, torch.stack([ones, height, male], -1), earn.log()),
        "logearn_logheight_male": (wide, torch.stack([ones, height.log(), male], -1), earn.log()),
        "logearn_interaction_z": (wide, torch.stack([ones, z, male, z * male], -1), earn.log()),
        "diamonds": (diamonds, x - x.mean(0), known["diamonds_y"]),
    }
    problems = {}
    for name, (model, predictors, y) in data.items():
        names = [f"beta[{i + 1}]" for i in range(predictors.shape[-1])]
        names += ["intercept"] * (model is diamonds) + ["sigma"]
        reference = Reference(names, known[f"{name}_mean"], known[f"{name}_sd"])
        problems[name] = Problem(model, (predictors, y), reference)
    return problems


def narrow(predictors, y):
    """A regression with the priors of posteriordb's ``blr``."""
    beta = pyro.sample("beta", dist.Normal(predictors.new_zeros(predictors.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(predictors.new_tensor(10.0)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=y)


def wide(predictors, y):
    """A regression with priors that are as good as flat for coefficients of 1e5."""
    beta = pyro.sample("beta", dist.Normal(predictors.new_zeros(predictors.shape[-1]), 1e6).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(predictors.new_tensor(1e6)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=y)


def diamonds(predictors, y):
    """A regression on centred predictors with the priors of posteriordb's ``diamonds``."""
    free = predictors.new_tensor(3.0)
    beta = pyro.sample("beta", dist.Normal(predictors.new_zeros(predictors.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.StudentT(free, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(free, 0.0, 10.0)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(intercept + predictors @ beta, sigma), obs=y)


def mixture_data():
    """One thousand values from two normals."""
    return torch.tensor(np.load(DATA / "gaussian_mixture.npz")["y"], dtype=torch.float64)


def mixture(y):
    """Two components that may be swapped, so that the posterior has two equal modes."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * y.new_ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), y.new_tensor(5.0)))
    parts = dist.Normal(mu, sigma).log_prob(y.unsqueeze(-1))
    weights = torch.stack([theta.log(), (-theta).log1p()])
    pyro.factor("y", (parts + weights).logsumexp(-1).sum())
