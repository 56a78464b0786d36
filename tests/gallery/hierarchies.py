"""Groups: counties of houses, windows of chorales, and students who answer the same questions."""

import pyro
import pyro.distributions as dist
import torch

from pyro_guides import AmortizedGuide
from tests.problems import chorales, lsat, radon

from .example import Data, Example, mean_field

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


# --- a mixed model: new notes in the bars of chorales


def new_notes_model(count):
    mean = pyro.sample("mean", dist.Normal(2.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    within = pyro.sample("within", dist.HalfNormal(1.0))
    time = torch.linspace(-1.0, 1.0, count.shape[1])
    with pyro.plate("chorale", count.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mean, between))
        with pyro.plate("window", count.shape[1], dim=-1):
            log_rate = pyro.sample("log_rate", dist.Normal(level + slope * time, within))
            pyro.sample("count", dist.Poisson(log_rate.exp()), obs=count)


def new_notes_guide(model):
    return AmortizedGuide(model)


def new_notes(split, windows=4, beats=8):
    """Return how many notes begin within each window, (chorales, windows)."""
    notes, lengths = chorales.load(split)
    notes = notes[lengths > windows * beats, : windows * beats + 1]
    begins = (notes[:, 1:] > notes[:, :-1]).float().sum(-1)
    return begins.unflatten(1, (windows, beats)).sum(-1)


def new_notes_data():
    train, held_out = new_notes("train")[:100], new_notes("test")[:50]
    return Data(((train,),), (held_out,), len(train), len(held_out))


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
        lambda: new_notes_model,
        new_notes_guide,
        new_notes_data,
        "chorale",
        steps=500,
        autoguide=mean_field,
        shared=("mean", "slope", "between", "within"),
        note="Windows within chorales: an encoder pools over the windows, another one reads each.",
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
