"""Variational autoencoders of handwritten digits: plain, half labelled, and conditional."""

from functools import cache, partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from sklearn.datasets import load_digits
from torch import nn

from pyro_guides import AmortizedGuide, Discrete

from .example import Data, Example, mean_field

TRAINING, LABELLED, HELD_OUT = 600, 100, 300


@cache
def digits():
    """Return 1,797 images of 64 pixels from 0 to 16, shuffled, and their labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]


def pixels(logits):
    return dist.Binomial(16, logits=logits).to_event(1)


def network(inputs, outputs, hidden=64):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


# --- a variational autoencoder


class VAE(nn.Module):
    def __init__(self, latents=8):
        super().__init__()
        self.latents = latents
        self.decoder = network(latents, 64)

    def forward(self, x):
        pyro.module("vae", self)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
            pyro.sample("x", pixels(self.decoder(z)), obs=x)


def vae_guide(model):
    return AmortizedGuide(model)


def vae_data():
    x, _ = digits()
    return Data(((x[:TRAINING],),), (x[-HELD_OUT:],), TRAINING, HELD_OUT)


# --- a semi-supervised one


class SemiSupervised(nn.Module):
    def __init__(self, latents=8, hidden=64):
        super().__init__()
        self.latents = latents
        self.of_style, self.of_digit = nn.Linear(latents, hidden), nn.Linear(10, hidden)
        self.decoder = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 64))

    def forward(self, x, y=None):
        pyro.module("semi_supervised", self)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.full((10,), 0.1)), obs=y)
            pyro.sample("x", pixels(self.decoder(self.of_style(z) + self.of_digit(y))), obs=x)


def semi_supervised_guide(model):
    summed = {"y": Discrete(enumerate="parallel")}
    return AmortizedGuide(model, order=["y", "z"], family=summed)


def semi_supervised_data():
    """Batches without labels, and one with the only 100 labels."""
    x, labels = digits()
    y = nn.functional.one_hot(labels, 10).float()
    unlabelled = [(rows,) for rows in x[LABELLED:TRAINING].split(250)]
    batches = (*unlabelled, (x[:LABELLED], y[:LABELLED]))
    return Data(batches, (x[-HELD_OUT:],), TRAINING, HELD_OUT)


# --- a conditional one: the lower half of an image from its upper half
class Conditional(nn.Module):
    def __init__(self, latents=8):
        super().__init__()
        self.prior, self.decoder = network(32, 2 * latents), network(32 + latents, 32)

    def forward(self, upper, lower=None):
        pyro.module("conditional", self)
        with pyro.plate("image", len(upper)):
            loc, log_scale = self.prior(upper / 16).chunk(2, dim=-1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = self.decoder(torch.cat([upper / 16, z], dim=-1))
            pyro.sample("lower", pixels(logits), obs=lower)


def conditional_guide(model):
    return AmortizedGuide(model, inputs=lambda upper, lower: torch.cat([upper, lower], -1))


def conditional_data():
    x, _ = digits()
    train, held_out = ((rows[:, :32], rows[:, 32:]) for rows in (x[:TRAINING], x[-HELD_OUT:]))
    return Data((train,), held_out, TRAINING, HELD_OUT)


EXAMPLES = (
    Example(
        "variational autoencoder",
        VAE,
        vae_guide,
        vae_data,
        "image",
        steps=800,
        autoguide=mean_field,
        note="A decoder network; the guide brings the encoder.",
    ),
    Example(
        "semi-supervised autoencoder",
        SemiSupervised,
        semi_supervised_guide,
        semi_supervised_data,
        "image",
        steps=400,
        # Pyro warns of batches in which nothing is left to sum over: here, those with labels.
        elbo=partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
        autoguide="batches of other rows: its parameters belong to the rows of one batch",
        note="100 labels among 600 images: observed in their batch, latent and summed out in all others.",
    ),
    Example(
        "conditional autoencoder",
        Conditional,
        conditional_guide,
        conditional_data,
        "image",
        steps=800,
        autoguide=mean_field,
        note="The lower half of an image given its upper half; the encoder reads both.",
    ),
)
