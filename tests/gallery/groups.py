"""Groups: counties of houses, signals with an unknown number of bumps, and clusters of flowers."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import init_to_sample
from pyro.ops.indexing import Vindex
from sklearn.datasets import load_iris

from pyro_guides import AmortizedGuide, Discrete
from tests.problems import radon

from .example import Data, Example, mean_field, mean_field_given_sums_over

enumerated = partial(TraceEnum_ELBO, max_plate_nesting=1)

# --- a hierarchical regression


def houses_model(house, log_radon, county, counties):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    within = pyro.sample("within", dist.HalfNormal(1.0))
    with pyro.plate("county", counties):
        level = pyro.sample("level", dist.Normal(mean, between))
    with pyro.plate("house", len(house)):
        pyro.sample("log_radon", dist.Normal(level[county] + house @ slopes, within), obs=log_radon)


def houses_guide(model):
    def by_county(house, log_radon, county, counties):
        return {"house": house, "log_radon": log_radon}, county

    return AmortizedGuide(model, inputs=by_county)


def houses_data(training=65):
    """Houses of 65 counties, and those of the other 20."""
    floor, log_uppm, log_radon, county = radon.load()
    house = torch.stack([floor, log_uppm], dim=-1)
    order = torch.randperm(radon.COUNTIES, generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(order).index_put((order,), torch.arange(radon.COUNTIES))[county]
    train, rest = place < training, place >= training
    held_out = house[rest], log_radon[rest], place[rest] - training, radon.COUNTIES - training
    batch = house[train], log_radon[train], place[train], training
    return Data((batch,), held_out, int(train.sum()), int(rest.sum()))


# --- signals with up to three bumps

AXIS, MOST = torch.linspace(0.0, 1.0, 24), 3


def bumps_model(x):
    with pyro.plate("signal", len(x)):
        count = pyro.sample("count", dist.Categorical(torch.full((MOST + 1,), 0.25)))
        there = torch.arange(MOST) < count.unsqueeze(-1)
        gap = pyro.sample("gap", dist.LogNormal(-1.3, 0.4).expand([MOST]).mask(there).to_event(1))
        height = pyro.sample("height", dist.LogNormal(0.0, 0.3).expand([MOST]).mask(there).to_event(1))
        distance = AXIS - gap.cumsum(-1).unsqueeze(-1)
        bump = there.unsqueeze(-1) * height.unsqueeze(-1) * (-0.5 * (distance / 0.06) ** 2).exp()
        pyro.sample("x", dist.Normal(bump.sum(-2), 0.2).to_event(1), obs=x)


def bumps_guide(model):
    return AmortizedGuide(model, family={"count": Discrete(enumerate="parallel")})


def bumps_data():
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        x = pyro.poutine.trace(pyro.poutine.uncondition(bumps_model)).get_trace(torch.zeros(700, 24))
        x = x.nodes["x"]["value"]
    return Data(((x[:500],),), (x[500:],), 500, 200)


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
    return AmortizedGuide(model, family=summed, init_loc_fn=init_to_sample)


def clusters_data():
    x = torch.tensor(load_iris().data, dtype=torch.float32)
    x = ((x - x.mean(0)) / x.std(0))[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    return Data(((x[:120],),), (x[120:],), 120, 30)


EXAMPLES = (
    Example(
        "hierarchical regression",
        lambda: houses_model,
        houses_guide,
        houses_data,
        "house",
        steps=2000,
        autoguide=mean_field,
        shared=("mean", "slopes", "between", "within"),
        note="Counties have one to 116 houses: an index says which house lies where, and a set encoder pools.",
    ),
    Example(
        "unknown number of objects",
        lambda: bumps_model,
        bumps_guide,
        bumps_data,
        "signal",
        steps=700,
        elbo=enumerated,
        autoguide=mean_field_given_sums_over("count"),
        note="A discrete count masks places and heights, and q of these depends on it; it is summed out.",
    ),
    Example(
        "clusters",
        lambda: clusters_model,
        clusters_guide,
        clusters_data,
        "flower",
        steps=1500,
        elbo=enumerated,
        autoguide=mean_field_given_sums_over("k", init_loc_fn=init_to_sample),
        shared=("weights", "loc", "scale"),
        note="Clusters are learned and have a posterior; each flower's cluster is amortized, given where they are.",
    ),
)
