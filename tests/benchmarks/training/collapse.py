"""Posterior collapse: how many latents does a variational autoencoder use, with and without warm-up?

scikit-learn's digits, ten latents, a diagonal normal, normal pixels with one learned noise scale.

What makes it collapse is that the noise starts at 4, ten times the pixels' spread, and the learning rate is
1.5 times the default. While the noise is large, telling images apart is worth less than the KL that it
costs: q falls onto the prior, and the decoder learns to do without the latents before the noise has come
down. A weight of the KL that starts at zero lets the decoder use them first. Depth, noise and rate were
chosen for this contrast, at seed 0: it shows that warm-up can help, and other seeds how often. All runs go to
the last step. Seeds: 0, 1, 2.

A latent is active if its KL to the prior, a mean over 397 images that ``fit`` has not seen, is above 0.05
nats.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import pyro
from torch import Tensor

from pyro_guides import AmortizedGuide, DiagonalNormal, fit
from pyro_guides.objectives import CyclicalWarmup, FreeBits, LinearWarmup
from tests.benchmarks.report import Result
from tests.benchmarks.training.digits import Autoencoder, images

__all__ = ["run"]

TRAIN = 1400
STEPS = 1200
RATE = 0.015
SEEDS = (0, 1, 2)
NOISE = 4.0
ACTIVE = 0.05
DRAWS = 200

WARMUPS = {
    "linear warm-up": lambda: LinearWarmup(600),
    "cyclical warm-up": lambda: CyclicalWarmup(400, ramp=1.0, cycles=2),
    "free bits": lambda: FreeBits(15.0),
}


def trained(tempering: AbstractContextManager[Any] | None, seed: int) -> tuple[int, Tensor]:
    """How many latents are active, and the ELBO of each test image."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    train, test = images().tensor_split([TRAIN])
    model = Autoencoder(256, 2, noise=NOISE)
    guide = AmortizedGuide(model, family=DiagonalNormal())
    fit(
        model,
        guide,
        train,
        max_steps=STEPS,
        learning_rate=RATE,
        patience=None,
        tempering=tempering,
        seed=seed,
    )
    posterior = guide.posterior(test, num_draws=DRAWS)
    z = posterior.draws["z"]
    mean, variance = z.mean(0), z.var(0)
    kl = 0.5 * (variance + mean.square() - 1.0 - variance.log()).mean(0)  # 0.003 too much, of 200 draws
    return int((kl > ACTIVE).sum()), posterior.elbo


def run() -> list[Result]:
    """Active latents, and what the test ELBO loses in units of its paired standard error."""
    return [result for seed in SEEDS for result in of_seed(seed)]


def of_seed(seed: int) -> list[Result]:
    """The same for one seed."""
    where = f"digits, {Autoencoder.latents} latents, seed {seed}"
    active, plain = trained(None, seed)
    results = [
        Result("plain: active latents", where, active, target=3),
        Result("plain: test ELBO, nats", where, float(plain.mean())),
    ]
    for name, make in WARMUPS.items():
        active, elbo = trained(make(), seed)
        loss = plain - elbo
        error = float(loss.std()) / math.sqrt(len(loss))
        results += [
            Result(f"{name}: latents not active", where, Autoencoder.latents - active, target=2),
            Result(f"{name}: test ELBO, nats", where, float(elbo.mean())),
            Result(f"{name}: ELBO lost, standard errors", where, float(loss.mean()) / error, target=2.0),
        ]
    return results
