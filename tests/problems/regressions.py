"""Ten linear regressions on real data whose posteriors have one mode, and a mixture whose posterior has two.

Data: posteriordb, see tests/data/README.md. Coefficients have wide priors in the place of flat ones.
"""

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

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
