"""The benchmark of rows and of new rows: its exact answers are exact, and its errors are seen."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_guides import AmortizedGuide, DiagonalNormal
from tests.benchmarks import clock
from tests.benchmarks.rows import images, linear, vae
from tests.benchmarks.speed import growth, rows


@pytest.fixture(autouse=True)
def isolated():
    with clock.isolated():
        yield


@pytest.fixture(scope="module")
def factors():
    train, test = linear.digits()
    return linear.FactorModel(3, train), test[:5]


def exact(model, x):
    mean, _ = model.posterior(x)
    return MultivariateNormal(mean, precision_matrix=model.precision)


def test_log_p_is_what_bayes_rule_says_at_any_value(factors):
    model, x = factors
    z = torch.randn(5, 3, dtype=torch.float64)
    likelihood = Normal(model.mean + z @ model.weights.T, model.noise.sqrt()).log_prob(x.double()).sum(-1)
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(likelihood + prior - exact(model, x).log_prob(z), model.log_evidence(x))


def test_the_gap_of_the_best_diagonal_normal(factors):
    model, x = factors
    mean, sd = model.posterior(x)

    def gap(scale):
        q = MultivariateNormal(mean, scale_tril=torch.diag(scale))
        return kl_divergence(q, exact(model, x)).mean()

    best = model.precision.diagonal().rsqrt()
    torch.testing.assert_close(gap(best), torch.tensor(model.diagonal_gap(), dtype=torch.float64))
    assert gap(sd) > gap(best)


def test_images_are_the_same_every_time_and_none_is_in_two_parts():
    parts, again = images.load(), images.load(100)
    assert [len(part) for part in parts] == [15_997, 2000, 2000]
    assert torch.equal(again.train, parts.train[:100])
    assert set(parts.train.unique().tolist()) == {0.0, 1.0}
    prints = torch.cat(parts).double() @ torch.rand(images.PIXELS, dtype=torch.float64)
    assert len(prints.unique()) == 19_997


def test_bounds_of_images_are_in_order():
    x = torch.rand(4, images.PIXELS).round()
    found = vae.bounds(AmortizedGuide(images.Decoder(), family=DiagonalNormal()).setup(x), x)
    assert (found.tight >= found.elbo).all()
    assert 0 <= found.active <= images.LATENTS


def test_the_error_of_a_way_to_new_rows(factors):
    model, x = factors

    def drawn(shift):
        return lambda x: exact(model, x).sample((4000,)) + shift

    right = rows.measured(drawn(0.0), x, model, one_by_one=True)
    wrong = rows.measured(drawn(model.posterior(x)[1]), x, model, one_by_one=False)
    assert right.draws == 4000
    assert right.error < 0.1
    assert wrong.error == pytest.approx(1.0, abs=0.1)


def test_what_grows_is_compared_with_its_smallest():
    def step(n):
        return lambda: [torch.ones(1000) for _ in range(n)]

    found = growth.table([growth.Axis("n", (1, 10), step)], clock.Effort(rounds=1, steps=1, warmup=0))
    assert [row[:2] for row in found.rows] == [["n", "1"], ["n", "10"]]
    assert [row[-1] for row in found.rows] == ["1", "10"]
