"""A deep Markov model of J. S. Bach's chorales with a guide that nobody wrote: its learning curve and bound.

The model is small (32 latents) and trains for a fixed number of epochs; the epoch with the best validation
bound is the one that is tested. Published models of this shape, far larger and trained for a day, report 6.8
to 6.9 nats per time step.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_guides import AmortizedGuide, DiagonalNormal, optim
from tests.benchmarks.clock import SEED, isolated
from tests.benchmarks.report import Report, Result, Tier
from tests.problems import chorales

__all__ = ["run"]

EPOCHS = 120
BATCH = 20
RATE = 8e-3
RISE = 50  # steps in which the learning rate rises
COLD, WARM_AFTER = 0.1, 0.2  # how much the latents' densities count at first, and when they count in full
PUBLISHED = 6.87

Data = tuple[Tensor, Tensor]


def batches(data: Data, *, shuffle: bool) -> Iterator[Data]:
    """Batches of chorales of about equal lengths, each as long as its longest."""
    notes, lengths = data
    jitter = torch.rand(len(lengths)) * 8.0 if shuffle else torch.zeros(len(lengths))
    order = (lengths + jitter).argsort()
    chunks = order.split(BATCH)
    for i in torch.randperm(len(chunks)) if shuffle else range(len(chunks)):
        own = lengths[chunks[i]]
        yield notes[chunks[i], : int(own.max())], own


def rate(step: int, steps: int) -> float:
    """A factor on the learning rate that rises, and falls to zero like a cosine."""
    return min(1.0, step / RISE) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


def bound(svi: SVI, data: Data, draws: int = 1) -> float:
    """Minus the evidence lower bound, in nats per time step."""
    losses = [svi.evaluate_loss(*batch) for _ in range(draws) for batch in batches(data, shuffle=False)]
    return sum(losses) / draws / int(data[1].sum())


def run(tier: Tier) -> Report:
    """The test bound next to the learning curve; nothing if it is to be quick."""
    return Report(trained() if tier == "full" else ())


def trained(epochs: int = EPOCHS) -> list[Result]:
    """Train, and return what it has come to."""
    with isolated():
        pyro.set_rng_seed(SEED)
        train, valid, test = (chorales.load(split) for split in ("train", "valid", "test"))
        dmm = chorales.DeepMarkovModel(latents=32, transition=64, emission=100)
        guide = AmortizedGuide(dmm.model, family=DiagonalNormal())
        guide.setup(train[0][:BATCH], train[1][:BATCH])
        steps = epochs * -(-len(train[1]) // BATCH)
        options = {"lr": RATE, "betas": (0.95, 0.999)}
        adam = optim.Adam(options, {"clip_norm": 10.0}, schedule=partial(rate, steps=steps))
        svi = SVI(dmm.model, guide, adam, Trace_ELBO())
        start, curve, best = time.monotonic(), [], None
        for epoch in range(1, epochs + 1):
            warmth = min(1.0, COLD + (1.0 - COLD) * epoch / (WARM_AFTER * epochs))
            losses = [svi.step(*batch, warmth) for batch in batches(train, shuffle=True)]
            if epoch % max(1, epochs // 30) == 0:
                curve.append(bound(svi, valid))
                print(
                    f"epoch {epoch}: {time.monotonic() - start:.0f} s, "
                    f"training {sum(losses) / int(train[1].sum()):.3f}, "
                    f"validation {curve[-1]:.3f}",
                    flush=True,
                )
                if curve[-1] == min(curve):
                    best = copy.deepcopy((dmm.state_dict(), guide.state_dict()))
        dmm.load_state_dict(best[0])
        guide.load_state_dict(best[1])
        minutes = (time.monotonic() - start) / 60
        last = [earlier - later for earlier, later in pairwise(curve)][-1]
        return [
            Result(
                "test bound, nats per time step", f"{epochs} epochs", bound(svi, test, 20), target=PUBLISHED
            ),
            Result("validation bound, best", f"{epochs} epochs", min(curve)),
            Result("gain of the last tenth of the curve", "validation", last),
            Result("minutes of training", "one thread", minutes),
        ]
