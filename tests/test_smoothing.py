"""One guide for linear-Gaussian sequences of any length, against the Kalman smoother."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_guides import AmortizedGuide, GRUEncoder, optim
from tests.problems import state_space

STEPS, SERIES, RATE = 1000, 64, 6e-3


def train(given=None):
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(state_space.model, encoder=GRUEncoder(64), given=given)
    guide.setup(state_space.simulate(500, 60, seed=7))
    adam = optim.Adam({"lr": RATE}, schedule=lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    svi = SVI(state_space.model, guide, adam, Trace_ELBO())
    for step in range(STEPS):
        length = (30, int(torch.randint(20, 61, ())), 60, int(torch.randint(20, 61, ())))[step % 4]
        svi.step(state_space.simulate(SERIES, length, seed=1000 + step))
    return guide


def compare(guide, length):
    """Gap to the evidence per sequence, worst step's error of means in sds, worst step's ratio of sds."""
    x = state_space.simulate(100, length, seed=99 + length)
    evidence, means, sds = state_space.exact(x)
    posterior = guide.posterior(x, num_draws=1000)
    gap = evidence - (posterior.log_p - posterior.log_q).double().mean(0)
    draws = torch.stack([posterior.draws[f"z_{t}"] for t in range(1, length + 1)], dim=2).double()
    # Means given the means before: exact for a linear q, and free of Monte-Carlo error.
    path = torch.stack([guide.median(x)[f"z_{t}"] for t in range(1, length + 1)], dim=1)
    errors = ((path - means) / sds).square().mean((0, 2)).sqrt()
    ratios = (draws.std(0) / sds).mean((0, 2))
    worst = float(ratios[(ratios - 1.0).abs().argmax()])
    print(
        f"T={length}: ELBO {float(gap.mean()):.3f} ± {float(gap.std()) / 10:.3f} nats below the evidence; "
        f"means off by {float(errors.mean()):.3f} sd, worst step {float(errors.max()):.3f}; sds at worst "
        f"{worst:.3f} of the exact ones"
    )
    return float(gap.mean()), float(errors.mean()), float(errors.max()), worst


@pytest.mark.slow
def test_smoothing_is_nearly_exact_at_two_lengths():
    guide = train()
    for length in (30, 60):
        gap, mean_error, worst_error, ratio = compare(guide, length)
        assert gap < 0.1
        assert mean_error < 0.05
        assert worst_error < 0.1
        assert abs(ratio - 1.0) < 0.05
