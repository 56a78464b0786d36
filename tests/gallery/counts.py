"""Counts: topics of documents, cells of half-known types, and items answered by people or played in bars."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import TraceGraph_ELBO
from torch import nn

from pyro_guides import AmortizedGuide
from tests.problems import chorales, lsat

from .example import Data, Example, mean_field
from .images import TRAINING, digits, network, vae_data

# --- topics: a document is an image, a word is a place, as often as it has ink


def topics_model(words, topics=8):
    shape = (topics, words.shape[1])
    concentration = pyro.param("concentration", torch.full((topics,), 0.5), constraints.positive)
    start = partial(torch.rand, shape)
    weights = pyro.param("weights", lambda: start() / start().sum(-1, keepdim=True), constraints.positive)
    topic = weights / weights.sum(-1, keepdim=True)
    with pyro.plate("document", len(words)):
        share = pyro.sample("share", dist.Dirichlet(concentration))
        most = int(words.sum(-1).max())
        pyro.sample("words", dist.Multinomial(most, share @ topic), obs=words)


def topics_guide(model):
    return AmortizedGuide(model)


# --- single cells: library size, type (known for some), and two levels of expression


class Cells(nn.Module):
    def __init__(self, genes=64, types=10, states=4, expressions=8):
        super().__init__()
        self.types, self.states, self.library = types, states, (5.7, 0.2)
        self.of_state = nn.Linear(states, 64)
        self.of_type = nn.Linear(types, 64)
        self.expression = nn.Sequential(nn.SiLU(), nn.Linear(64, 2 * expressions))
        self.decoder = network(expressions, genes)
        self.log_dispersion = nn.Parameter(torch.ones(genes))

    def forward(self, x, y=None):
        pyro.module("cells", self)
        with pyro.plate("cell", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(self.states), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.full((self.types,), 1 / self.types)), obs=y)
            loc, log_scale = self.expression(self.of_state(z1) + self.of_type(y)).chunk(2, dim=-1)
            z2 = pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))
            size = pyro.sample("l", dist.LogNormal(*self.library))
            log_mean = size.log().unsqueeze(-1) + self.decoder(z2).log_softmax(-1)
            counts = dist.NegativeBinomial(self.log_dispersion.exp(), logits=log_mean - self.log_dispersion)
            pyro.sample("x", counts.to_event(1), obs=x)


def cells_guide(model):
    return AmortizedGuide(model, order=["l", "z2", "y", "z1"])


def cells_data():
    x, labels = digits()
    y = nn.functional.one_hot(labels, 10).float()
    half = TRAINING // 2
    batches = ((x[:half], y[:half]), (x[half:TRAINING],))
    return Data(batches, (x[TRAINING:],), TRAINING, len(x) - TRAINING)


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


def new_notes(split, windows=6, beats=5):
    """Return how many notes begin within each window, (chorales, windows)."""
    notes, lengths = chorales.load(split)
    notes = notes[lengths > windows * beats, : windows * beats + 1]
    begins = (notes[:, 1:] > notes[:, :-1]).float().sum(-1)
    return begins.unflatten(1, (windows, beats)).sum(-1)


def new_notes_data():
    train, held_out = new_notes("train"), new_notes("test")
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
    train, held_out = answers[order[:800]], answers[order[800:]]
    return Data(((train,),), (held_out,), len(train), len(held_out))


EXAMPLES = (
    Example(
        "topics of documents",
        lambda: topics_model,
        topics_guide,
        vae_data,
        "document",
        steps=1000,
        autoguide=mean_field,
        note="Words are summed over, topics are learned, shares of topics are on a simplex.",
    ),
    Example(
        "cells of half-known types",
        Cells,
        cells_guide,
        cells_data,
        "cell",
        steps=700,
        elbo=TraceGraph_ELBO,
        autoguide="batches of other rows, and a discrete latent",
        note=f"Four latents in a chain, drawn against the model's order; half of the {TRAINING} types known.",
    ),
    Example(
        "mixed model of counts",
        lambda: new_notes_model,
        new_notes_guide,
        new_notes_data,
        "chorale",
        steps=2000,
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
        steps=2000,
        autoguide=mean_field,
        shared=("difficulty", "slope"),
        note="Students are amortized, items are learned, and each student's ability is drawn given the items.",
    ),
)
