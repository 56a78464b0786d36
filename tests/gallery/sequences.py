"""Sequences: a deep Markov model of chorales, and stochastic volatility."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from pyro_guides import AmortizedGuide
from tests.problems import chorales

from .example import Data, Example, mean_field
from .images import network

# --- a deep Markov model


class Chords(nn.Module):
    def __init__(self, latents=8, notes=chorales.NOTES):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latents))
        self.step, self.emitter = network(latents, 2 * latents), network(latents, notes)

    def forward(self, notes):
        pyro.module("chords", self)
        with pyro.plate("chorale", len(notes)):
            z = self.start.expand(len(notes), -1)
            for t in pyro.markov(range(notes.shape[1])):
                change, spread = self.step(z).chunk(2, dim=-1)
                z = pyro.sample(f"z_{t}", dist.Normal(z + change, softplus(spread)).to_event(1))
                chord = dist.Bernoulli(logits=self.emitter(z))
                pyro.sample(f"notes_{t}", chord.to_event(1), obs=notes[:, t])


def chords_guide(model):
    return AmortizedGuide(model)


def chords_data(steps=8):
    """The first two bars of chorales."""
    train, held_out = (
        chorales.load(split)[0][:count, :steps] for split, count in (("train", 150), ("test", 75))
    )
    return Data(((train,),), (held_out,), len(train), len(held_out))


# --- stochastic volatility


def volatility_model(returns):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    keeps = pyro.sample("keeps", dist.Beta(8.0, 2.0))
    shock = pyro.sample("shock", dist.HalfNormal(0.5))
    with pyro.plate("window", len(returns)):
        h, scale = level, shock / (1 - keeps**2).sqrt()
        for t in pyro.markov(range(returns.shape[1])):
            h = pyro.sample(f"h_{t}", dist.Normal(h, scale))
            pyro.sample(f"return_{t}", dist.Normal(0.0, (h / 2).exp()), obs=returns[:, t])
            h, scale = level + keeps * (h - level), shock


def volatility_guide(model):
    return AmortizedGuide(model)


def simulated(windows, steps=10, level=-0.5, keeps=0.95, shock=0.3, seed=0):
    """Draw returns, (windows, steps), of one long series."""
    noise = torch.randn(2, windows * steps, generator=torch.Generator().manual_seed(seed))
    h = [torch.tensor(level)]
    for e in noise[0]:
        h.append(level + keeps * (h[-1] - level) + shock * e)
    return ((torch.stack(h[1:]) / 2).exp() * noise[1]).reshape(windows, steps)


def volatility_data():
    returns = simulated(200)
    return Data(((returns[:100],),), (returns[100:],), 100, 100)


EXAMPLES = (
    Example(
        "deep Markov model",
        Chords,
        chords_guide,
        chords_data,
        "chorale of 8 steps",
        steps=250,
        autoguide=mean_field,
        note="Numbered latents are a chain: one encoder over time, one family for all steps.",
    ),
    Example(
        "stochastic volatility",
        lambda: volatility_model,
        volatility_guide,
        volatility_data,
        "window of 10 steps",
        steps=200,
        autoguide=mean_field,
        shared=("level", "keeps", "shock"),
        note="Simulated returns; the chain is drawn given the three global latents and the step before.",
    ),
)
