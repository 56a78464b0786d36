"""Refined λ against the best q of its family, which conjugate models tell exactly."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, NormalizingFlow, NormalMixture, optim

NOISE = 0.5
WEIGHTS = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
PRECISION = torch.eye(3, dtype=torch.float64) + WEIGHTS @ WEIGHTS.T / NOISE**2


def linear(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS.to(x), NOISE).to_event(1), obs=x)


def rows(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (3, 5))
    return z @ WEIGHTS + NOISE * noise


def evidence(x):
    covariance = WEIGHTS.T @ WEIGHTS + NOISE**2 * torch.eye(5, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(x.new_zeros(5), covariance).log_prob(x)


def diagonal_gap():
    return 0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet())


@pytest.mark.parametrize(
    ("family", "gap", "tolerance"),
    [
        (FullRankNormal(), 0.0, 2e-3),
        (DiagonalNormal(), float(diagonal_gap()), 0.02),
        pytest.param(NormalMixture(2), 0.0, 0.03, marks=pytest.mark.slow),
        pytest.param(NormalizingFlow(1), 0.0, 0.03, marks=pytest.mark.slow),
    ],
    ids=["full rank", "diagonal", "mixture", "flow"],
)
def test_refinement_reaches_the_best_q_of_the_family(family, gap, tolerance):
    """From an untrained encoder; 1,000 draws leave an error of 0.02 nats on each row of the diagonal."""
    pyro.set_rng_seed(0)
    x = rows()
    posterior = AmortizedGuide(linear, family=family).posterior(x, num_draws=1000)
    refined = posterior.refine()
    found = (evidence(x) - refined.elbo).mean()
    assert float(found) == pytest.approx(gap, abs=tolerance)
    assert refined.gain.settled
    error = (refined.elbo - posterior.elbo - refined.gain.value).abs()
    assert (error < 5 * posterior.log_weights.std(0) / math.sqrt(1000)).all()
    if isinstance(family, DiagonalNormal):  # the best diagonal normal has the exact means and precisions
        mean = x @ WEIGHTS.T / NOISE**2 @ torch.linalg.inv(PRECISION)
        sd = PRECISION.diagonal().rsqrt()
        assert ((refined.mean()["z"] - mean).abs() / sd).max() < 0.25
        assert (refined.sd()["z"] / sd - 1).abs().max() < 0.12
    assert (evidence(x) - posterior.elbo).min() > 1.0  # control: it was far off before


def test_refinement_touches_neither_guide_nor_posterior():
    pyro.set_rng_seed(0)
    x = rows()
    guide = AmortizedGuide(linear, family=NormalMixture(2)).setup(x)
    posterior = guide.posterior(x, num_draws=50)
    draws, elbo = posterior.draws["z"].clone(), posterior.elbo.clone()
    state = copy.deepcopy(guide.state_dict())
    refined = posterior.refine(max_steps=60)
    assert all(torch.equal(state[name], value) for name, value in guide.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in guide.parameters())
    assert torch.equal(posterior.draws["z"], draws)
    assert torch.equal(posterior.elbo, elbo)
    assert posterior.gain is None
    assert refined.gain.steps == 60
    assert not refined.gain.settled
    assert not torch.equal(guide.posterior(x).median()["z"], refined.median()["z"])


def test_refinement_of_an_optimal_q_lowers_no_row():
    """A trained guide at its optimum: noise alone could move it, and must not lower any row's ELBO."""
    pyro.set_rng_seed(0)
    x = rows(50)
    guide = AmortizedGuide(linear, Exact(), FullRankNormal()).setup(x)
    make_exact(guide)
    assert (evidence(x) - guide.posterior(x, num_draws=20).elbo).abs().max() < 1e-3
    gain = guide.posterior(x, num_draws=200).refine().gain
    assert gain.value.min() > -1e-3
    assert gain.value.max() < 1e-3
    wrong = guide.posterior(rows(50, seed=2) + 3.0, num_draws=200)
    assert wrong.refine(max_steps=100).gain.value.min() > -1e-3


class Exact(nn.Module):
    """The posterior mean of ``linear``."""

    def forward(self, x):
        return x @ (WEIGHTS.T / NOISE**2 @ torch.linalg.inv(PRECISION)).to(x)


def make_exact(guide):
    """Set the head so that q is the posterior: mean from the encoder, covariance fixed."""
    factor = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    scale = factor.diagonal()
    unit = factor / scale.unsqueeze(-1)
    lower = torch.tril_indices(3, 3, -1)
    head = guide.network.heads[0].output
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:3] = torch.eye(3, dtype=head.weight.dtype) / head.gain
        head.bias[:3] = 0.0
        head.bias[3:6] = torch.log(torch.expm1(scale - 1e-6))
        head.bias[6:] = unit[lower[0], lower[1]] * math.sqrt(3)


def shared(x):
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


@pytest.mark.slow
def test_rows_that_share_a_latent_are_refined_given_it():
    """E[z | x, mean] is linear in mean, which a change of λ per row must be able to follow."""
    pyro.set_rng_seed(0)
    x = torch.linspace(-2.0, 3.0, 7, dtype=torch.float64)
    guide = AmortizedGuide(shared).setup(x)
    with torch.no_grad():  # a wide q of the mean, so that it varies
        guide.network.heads[0].bias[..., 1] = 1.0
    whole = guide.posterior(x, num_draws=2000)
    refined = whole.refine()
    assert refined.row_plates == ()
    assert refined.gain.value.shape == (7,)
    shrink = 1 / (1 + NOISE**2)
    mean, z = refined.draws["mean"], refined.draws["z"]
    expected = mean[:, None] + shrink * (x - mean[:, None])
    sd = NOISE * math.sqrt(shrink)
    assert ((z - expected).mean(0).abs() / sd).max() < 0.15
    assert ((z - expected).std(0) / sd - 1).abs().max() < 0.1
    slope = ((z - z.mean(0)) * (mean - mean.mean())[:, None]).mean(0) / mean.var(correction=0)
    assert (slope - (1 - shrink)).abs().max() < 0.05
    held = whole.local({"mean": torch.tensor(1.5, dtype=torch.float64)}).refine()
    assert held.draws.keys() == {"z"}
    local_evidence = dist.Normal(1.5, math.sqrt(1 + NOISE**2)).log_prob(x)
    assert (local_evidence - held.elbo).abs().max() < 0.01


def choice(x):
    with pyro.plate("row", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def test_discrete_latents_are_refined():
    pyro.set_rng_seed(0)
    x = torch.tensor([-1.0, 0.7, 1.0, 3.0])
    refined = AmortizedGuide(choice).posterior(x, num_draws=4000).refine(particles=64)
    joint = torch.stack([math.log(w) + dist.Normal(m, 1.0).log_prob(x) for w, m in ((0.3, 0.0), (0.7, 2.0))])
    exact = (joint[1] - joint.logsumexp(0)).exp()
    assert (refined.draws["k"].double().mean(0) - exact).abs().max() < 0.04
    assert (joint.logsumexp(0) - refined.elbo).abs().max() < 0.01


def walk(x):
    with pyro.plate("row", len(x)):
        z = x.new_tensor(0.0)
        for step in range(x.shape[1]):
            z = pyro.sample(f"z_{step + 1}", dist.Normal(0.8 * z, 1.0))
            pyro.sample(f"x_{step + 1}", dist.Normal(z, 1.0), obs=x[:, step])


@pytest.mark.slow
def test_sequences_are_refined_step_by_step():
    """Exact log p(x) of a chain of normals: x has covariance A + I."""
    pyro.set_rng_seed(0)
    steps = 4
    mix = torch.linalg.inv(
        torch.eye(steps, dtype=torch.float64) - 0.8 * torch.diag(torch.ones(steps - 1).double(), -1)
    )
    covariance = mix @ mix.T + torch.eye(steps, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(steps).double(), covariance)
    x = exact.sample((3,))
    guide = AmortizedGuide(walk, inputs=lambda x: x.unsqueeze(-1))
    refined = guide.posterior(x, num_draws=1000).refine()
    assert (exact.log_prob(x) - refined.elbo).abs().max() < 0.03


def test_learned_groups_are_refined_where_nothing_is_amortized():
    pyro.set_rng_seed(0)
    x = rows(1)[0]

    def alone(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS.to(x), NOISE).to_event(1), obs=x)

    refined = AmortizedGuide(alone, amortize=[]).posterior(x, num_draws=500).refine()
    assert refined.elbo.shape == ()
    assert float(evidence(x) - refined.elbo) == pytest.approx(0.0, abs=5e-3)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"particles": 0}, ValueError), ({"max_steps": 0}, ValueError), ({"particles": 1.5}, TypeError)],
)
def test_refinement_refuses(options, error):
    posterior = AmortizedGuide(linear).posterior(rows(), num_draws=10)
    with pytest.raises(error, match=rf"{next(iter(options))} must be (an int|at least 1), got"):
        posterior.refine(**options)


def test_refined_q_may_be_trained_no_further_but_its_guide_may():
    x = rows()
    guide = AmortizedGuide(linear).setup(x)
    guide.posterior(x, num_draws=10).refine(max_steps=50)
    svi = SVI(linear, guide, optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(x))


def test_refining_twice_goes_on_where_the_first_one_stopped():
    pyro.set_rng_seed(0)
    x = rows()
    once = AmortizedGuide(linear).posterior(x, num_draws=300).refine(max_steps=60)
    with torch.no_grad():  # gradients are its own business
        twice = once.refine()
    assert twice.gain.value.min() > 0.0
    assert (evidence(x) - twice.elbo).abs().max() < 0.02
    assert (evidence(x) - once.elbo).min() > 0.1  # control: the first one was not done


class Noisy(nn.Module):
    """An encoder that is another one in training: dropout, and a normalization that keeps statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 8)).double()

    def forward(self, x):
        return self.layers(x)


def test_posteriors_are_of_the_guide_in_evaluation_mode():
    pyro.set_rng_seed(0)
    x = rows(20)
    guide = AmortizedGuide(linear, Noisy()).setup(x)
    with torch.no_grad():
        guide.network.heads[0].output.weight.normal_(std=0.1)
    before = copy.deepcopy(guide.state_dict())
    posterior = guide.posterior(x, num_draws=50)
    torch.testing.assert_close(posterior.log_prob(posterior.draws), posterior.log_q)
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(module.training for module in guide.network.encoders.modules())
