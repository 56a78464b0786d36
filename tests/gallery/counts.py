"""Counts: topics of documents, and cells of half-known types."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import TraceGraph_ELBO
from torch import nn

from pyro_guides import AmortizedGuide

from .example import Data, Example, mean_field
from .images import HELD_OUT, TRAINING, digits, network, vae_data

# --- topics: a document is an image, a word is a place, as often as it has ink


def topics_model(words, topics=8):
    shape = (topics, words.shape[1])
    start = partial(torch.rand, shape)
    weights = pyro.param("weights", lambda: start() / start().sum(-1, keepdim=True), constraints.positive)
    topic = weights / weights.sum(-1, keepdim=True)
    with pyro.plate("document", len(words)):
        share = pyro.sample("share", dist.Dirichlet(torch.full((topics,), 0.5)))
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
    batches = ((x[half:TRAINING],), (x[:half], y[:half]))
    return Data(batches, (x[-HELD_OUT:],), TRAINING, HELD_OUT)


EXAMPLES = (
    Example(
        "topics of documents",
        lambda: topics_model,
        topics_guide,
        vae_data,
        "document",
        steps=700,
        autoguide=mean_field,
        note="Words are summed over, topics are learned, shares of topics are on a simplex.",
    ),
    Example(
        "cells of half-known types",
        Cells,
        cells_guide,
        cells_data,
        "cell",
        steps=350,
        elbo=TraceGraph_ELBO,
        autoguide="batches of other rows, and a discrete latent",
        note=f"Four latents in a chain, drawn against the model's order; half of the {TRAINING} types known.",
    ),
)
