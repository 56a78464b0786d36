"""Groups: counties of houses, quarters of images, and students who answer the same questions."""

import pyro
import pyro.distributions as dist
import torch

from pyro_guides import AmortizedGuide
from tests.problems import lsat, radon

from .example import Data, Example, mean_field
from .images import digits

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


# --- a mixed model: ink in the four quarters of images


def ink_model(ink):
    mean = pyro.sample("mean", dist.Normal(4.0, 1.0))
    lower = pyro.sample("lower", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    within = pyro.sample("within", dist.HalfNormal(1.0))
    with pyro.plate("image", ink.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mean, between))
        with pyro.plate("quarter", 4, dim=-1) as quarter:
            log_rate = pyro.sample("log_rate", dist.Normal(level + lower * (quarter > 1), within))
            pyro.sample("ink", dist.Poisson(log_rate.exp()), obs=ink)


def ink_guide(model):
    return AmortizedGuide(model)


def ink_data():
    """Sums over quarters: upper left and right, lower left and right."""
    ink = digits()[0].reshape(-1, 2, 4, 2, 4).sum((2, 4)).flatten(1)
    return Data(((ink[:100],),), (ink[-100:],), 100, 100)


# --- item response: abilities of students, difficulties and slopes of questions


def items_model(answers):
    students = pyro.plate("student", answers.shape[0], dim=-2)
    items = pyro.plate("item", answers.shape[1], dim=-1)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    with students:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with students, items:
        pyro.sample("answers", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)


def items_guide(model):
    return AmortizedGuide(model)


def items_data():
    answers = lsat.load()[0]
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0))
    train, held_out = answers[order[:400]], answers[order[400:600]]
    return Data(((train,),), (held_out,), len(train), len(held_out))


EXAMPLES = (
    Example(
        "hierarchical regression",
        lambda: houses_model,
        houses_guide,
        houses_data,
        "house",
        steps=700,
        autoguide=mean_field,
        shared=("mean", "slopes", "between", "within"),
        note="Counties have one to 116 houses: an index says which lies where, a set encoder pools.",
    ),
    Example(
        "mixed model of counts",
        lambda: ink_model,
        ink_guide,
        ink_data,
        "image",
        steps=500,
        autoguide=mean_field,
        shared=("mean", "lower", "between", "within"),
        note="Quarters within images: one encoder pools over quarters, another reads each.",
    ),
    Example(
        "item response",
        lambda: items_model,
        items_guide,
        items_data,
        "student",
        steps=600,
        autoguide=mean_field,
        shared=("difficulty", "slope"),
        note="Students are amortized, items learned; an ability is drawn given the items.",
    ),
)
