"""Posteriors with several modes: mixtures and flows against exact answers, with a normal as the control."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch.nn.functional import logsigmoid

from pyro_guides import AmortizedGuide, FullRankNormal, NormalizingFlow, NormalMixture, optim
from tests.problems import path_of

ROOT_TWO = math.sqrt(2.0)


def train(model, guide, batches, rate, steps):
    """Adam at a constant rate for half of the steps, and down to a fiftieth of it in the other half."""
    optimizer = optim.Adam(
        {"lr": rate}, {"clip_norm": 10.0}, schedule=lambda step: min(1.0, max(0.02, 2.0 - 2.0 * step / steps))
    )
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for step in range(steps):
        svi.step(*batches(step / steps))


# --- four modes


def four_modes(x):
    """x = |z| + 0.3 ε: the signs of both elements of z are lost."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.abs(), 0.3).to_event(1), obs=x)


def four_modes_evidence(x):
    """Log p(x) per row: twice the integral over positive z, a normal's mass above zero."""
    total = math.sqrt(1.09)
    inside = dist.Normal(0.0, 1.0).cdf(x / total / 0.3)
    return (dist.Normal(0.0, total).log_prob(x) + math.log(2.0) + inside.log()).sum(-1)


def test_four_modes_evidence_is_right():
    x = torch.tensor([[-0.2, 0.7], [1.5, 0.1]], dtype=torch.float64)
    z = torch.linspace(-9.0, 9.0, 20_001, dtype=torch.float64)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.abs(), 0.3).log_prob(x.unsqueeze(-1))
    assert torch.allclose(torch.trapezoid(joint.exp(), z).log().sum(-1), four_modes_evidence(x))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("family", "rate", "least", "most"),
    [
        (NormalMixture(4), 3e-3, 0.0, 0.03),
        (NormalizingFlow(stick_the_landing=True), 1e-3, 0.0, 0.25),
        (FullRankNormal(), 3e-3, 0.7, 1.0),
    ],
    ids=["mixture", "flow", "full rank"],
)
def test_four_modes(family, rate, least, most, seed):
    """Mean gap to the exact log evidence on 1,000 held-out rows; 200 draws each, standard error 0.003."""
    pyro.set_rng_seed(seed)
    x = torch.randn(2000, 2).abs() + 0.3 * torch.randn(2000, 2)
    guide = AmortizedGuide(four_modes, family=family).setup(x[:1000])
    train(four_modes, guide, lambda _: (x[torch.randint(1000, (128,))],), rate, 1500)
    posterior = guide.posterior(x[1000:], num_draws=200)
    gap = four_modes_evidence(x[1000:]) - (posterior.log_p - posterior.log_q).mean(0)
    print(f"gap {float(gap.mean()):.4f} nats")
    assert least < float(gap.mean()) < most


# --- two moons


class Moon(dist.TorchDistribution):
    """x given θ: a noisy half circle of radius 0.1 around a point that θ says, up to a reflection.

    Its density is zero on half the plane and steep in the rest, so that an ELBO at first finds no way in:
    ``softness`` from one to zero leads from a wide density to the exact one.
    """

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, theta, softness):
        self.theta = theta
        self.softness = softness
        super().__init__(theta.shape[:-1], torch.Size([2]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Moon(self.theta.expand(*batch_shape, 2), self.softness)

    def log_prob(self, x):
        u = x[..., 0] + self.theta.sum(-1).abs() / ROOT_TWO - 0.25
        v = x[..., 1] - self.theta.diff(dim=-1).squeeze(-1) / ROOT_TWO
        radius = (u.square() + v.square() + 1e-12).sqrt()
        ring = dist.Normal(0.1, 0.01 + 0.3 * self.softness).log_prob(radius)
        spread = (math.pi * (radius + 0.3 * self.softness)).log()
        return ring - spread + logsigmoid(u / (0.001 + 0.1 * self.softness))


def two_moons(x, softness):
    with pyro.plate("data_sets", len(x)):
        theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", Moon(theta, softness), obs=x)


def simulate(count):
    theta = 2.0 * torch.rand(count, 2) - 1.0
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    point = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], dim=-1)
    shift = torch.stack([-theta.sum(-1).abs(), theta.diff(dim=-1).squeeze(-1)], dim=-1)
    return point + shift / ROOT_TWO


def c2st(reference, draws):
    """How well a classifier tells draws from reference draws, as sbibm measures it: 0.5 is best, 1 worst."""
    mean, sd = reference.mean(0), reference.std(0)
    features = np.concatenate([(reference - mean) / sd, (draws - mean) / sd])
    labels = np.concatenate([np.zeros(len(reference)), np.ones(len(draws))])
    classifier = MLPClassifier((20, 20), activation="relu", solver="adam", max_iter=10_000, random_state=1)
    folds = KFold(n_splits=5, shuffle=True, random_state=1)
    return float(cross_val_score(classifier, features, labels, cv=folds, scoring="accuracy").mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "steps", "least", "most"),
    [(NormalMixture(12), 4000, 0.45, 0.60), (FullRankNormal(), 1000, 0.75, 1.0)],
    ids=["mixture", "full rank"],
)
def test_two_moons(family, steps, least, most):
    """One guide, trained on simulations from the prior, on observations that it has not seen."""

    def batches(progress):
        return simulate(512), torch.tensor(max(0.0, 1.0 - 2.0 * progress) ** 2)

    guide = AmortizedGuide(two_moons, family=family, inputs=lambda x, _: x)
    guide.setup(simulate(10_000), torch.tensor(1.0))
    train(two_moons, guide, batches, 3e-3, steps)
    stored = np.load(path_of("two_moons"))
    observations = torch.tensor(stored["observations"])
    draws = guide.posterior(observations, torch.tensor(0.0), num_draws=5000).draws["theta"].numpy()
    scores = [c2st(r, draws[:, i]) for i, r in enumerate(stored["reference_samples"])]
    print("c2st", np.round(scores, 3), f"mean {np.mean(scores):.3f}")
    assert least < float(np.mean(scores)) < most
