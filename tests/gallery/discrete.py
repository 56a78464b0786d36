"""Discrete latents: signals with an unknown number of bumps, and clusters of flowers."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import init_to_median, init_to_value
from pyro.ops.indexing import Vindex
from sklearn.datasets import load_iris

from pyro_guides import AmortizedGuide, Discrete

from .example import Data, Example, mean_field_given_sums_over

# --- signals with up to three bumps

AXIS, MOST = torch.linspace(0.0, 1.0, 24), 3


def bumps_model(x):
    with pyro.plate("signal", len(x), dim=-2):
        count = pyro.sample("count", dist.Categorical(torch.full((MOST + 1,), 0.25)))
        there = torch.arange(MOST) < count
        with pyro.plate("bump", MOST, dim=-1), poutine.mask(mask=there):
            gap = pyro.sample("gap", dist.LogNormal(-1.3, 0.4))
            height = pyro.sample("height", dist.LogNormal(0.0, 0.3))
        distance = AXIS - gap.cumsum(-1).unsqueeze(-1)
        bumps = (there * height).unsqueeze(-1) * (-0.5 * (distance / 0.06) ** 2).exp()
        signal = bumps.sum(-2, keepdim=True)
        pyro.sample("x", dist.Normal(signal, 0.2).to_event(1), obs=x.unsqueeze(-2))


def bumps_guide(model):
    return AmortizedGuide(model, family={"count": Discrete(enumerate="parallel")})


def bumps_data():
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        trace = poutine.trace(poutine.uncondition(bumps_model)).get_trace(torch.zeros(2200, 24))
        x = trace.nodes["x"]["value"].squeeze(-2)
    return Data(tuple(zip(x[:2000].split(200), strict=True)), (x[2000:],), 2000, 200)


# --- a mixture


def clusters_model(x, clusters=3):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((clusters,), 2.0)))
    with pyro.plate("cluster", clusters):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(x.shape[1]), 1.5).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-torch.ones(x.shape[1]), 0.5).to_event(1))
    with pyro.plate("flower", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        each = dist.Normal(Vindex(loc)[..., k, :], Vindex(scale)[..., k, :])
        pyro.sample("x", each.to_event(1), obs=x)


def clusters_guide(model):
    summed = {"k": Discrete(enumerate="parallel")}
    return AmortizedGuide(model, family=summed, init_loc_fn=clusters_start())


def clusters_start():
    """Clusters begin at a small, a middling and a large flower, since equal ones would stay equal."""
    x = clusters_data().batches[0][0]
    values = {"loc": x[x.sum(-1).argsort()[[20, 60, 100]]]}
    return partial(init_to_value, values=values, fallback=init_to_median)


def clusters_data():
    x = torch.tensor(load_iris().data, dtype=torch.float32)
    x = ((x - x.mean(0)) / x.std(0))[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    return Data(((x[:120],),), (x[120:],), 120, 30)


EXAMPLES = (
    Example(
        "unknown number of objects",
        lambda: bumps_model,
        bumps_guide,
        bumps_data,
        "signal",
        steps=600,
        elbo=partial(TraceEnum_ELBO, max_plate_nesting=2),
        autoguide="its densities ignore masks that depend on a latent, so that its loss is no bound",
        note="A discrete count masks places and heights, and q of these depends on it; it is summed out.",
    ),
    Example(
        "clusters",
        lambda: clusters_model,
        clusters_guide,
        clusters_data,
        "flower",
        steps=600,
        elbo=partial(TraceEnum_ELBO, max_plate_nesting=1),
        autoguide=mean_field_given_sums_over("k", start=clusters_start),
        shared=("weights", "loc", "scale"),
        note="Clusters have a posterior; each flower's own is amortized, given where clusters are.",
    ),
)
