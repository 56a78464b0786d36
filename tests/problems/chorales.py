"""J. S. Bach's four-part chorales as piano rolls in quarter notes, and a small deep Markov model of them.

The splits of Boulanger-Lewandowski et al. (2012): 229, 76 and 77 chorales of 88 notes. No exact answer is
known. Published deep Markov models of this shape, far larger, report 6.8 to 6.9 nats per time step on the
test split (Krishnan et al. 2017; Pyro's example).
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import softplus

from . import path_of

NOTES = 88
SMALLEST_SCALE = 1e-3


def load(split, dtype=torch.float32):
    """Return the notes (B, T, 88), zero after the end, and the lengths (B,), of train, valid or test."""
    with np.load(path_of("chorales"), allow_pickle=False) as file:
        steps = np.unpackbits(file[split], axis=1, count=NOTES)
        lengths = torch.as_tensor(file[f"{split}_lengths"].astype(np.int64))
    rows = torch.as_tensor(steps, dtype=dtype).split(lengths.tolist())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


class Transition(nn.Module):
    """p(z_t | z_{t-1}): per element, a learned gate between a linear step and a network's proposal."""

    def __init__(self, latents, hidden):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, latents), nn.Sigmoid()
        )
        self.proposal = nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, latents))
        self.linear = nn.Linear(latents, latents)
        self.spread = nn.Linear(latents, latents)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z):
        gate, proposal = self.gate(z), self.proposal(z)
        loc = torch.lerp(self.linear(z), proposal, gate)
        return dist.Normal(loc, softplus(self.spread(proposal.relu())) + SMALLEST_SCALE).to_event(1)


class DeepMarkovModel(nn.Module):
    """A chain of latents that no one sees, and a network from each of them to the notes of its step."""

    def __init__(self, notes=NOTES, latents=16, transition=32, emission=32):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latents))
        self.transition = Transition(latents, transition)
        self.emitter = nn.Sequential(
            nn.Linear(latents, emission), nn.ReLU(), nn.Linear(emission, emission), nn.ReLU()
        )
        self.logits = nn.Linear(emission, notes)

    def model(self, x, lengths, warmth=1.0):
        """The Pyro model: x is (B, T, notes), and chorale b ends after ``lengths[b]`` steps.

        A ``warmth`` below one counts the latents' densities less, as is done early in training.
        """
        pyro.module("chorales", self)
        with pyro.plate("series", len(x)):
            z = self.start
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                with poutine.mask(mask=lengths >= t):
                    with poutine.scale(scale=warmth):
                        z = pyro.sample(f"z_{t}", self.transition(z))
                    notes = dist.Bernoulli(logits=self.logits(self.emitter(z)))
                    pyro.sample(f"obs_x_{t}", notes.to_event(1), obs=x[:, t - 1])
