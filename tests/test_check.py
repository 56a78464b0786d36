"""The verdict on guides whose faults are known: each is told by name, and a right q is left in peace."""

import importlib.util
import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, Modes, check, optim
from pyro_guides.diagnostics.evidence import tight_bound
from pyro_guides.diagnostics.shared import shared_log_weights

NOISE = 0.5
WEIGHTS = torch.tensor([[1.0, -0.5, 0.8, 0.3], [0.9, -0.2, 0.7, 0.5]])
PRECISION = torch.eye(2) + WEIGHTS @ WEIGHTS.T / NOISE**2


def linear(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS, NOISE).to_event(1), obs=x)


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(count, n, generator=generator) for n in (2, 4))
    return z @ WEIGHTS + NOISE * noise


X = data(12, 1)
EVIDENCE = torch.distributions.MultivariateNormal(
    torch.zeros(4), WEIGHTS.T @ WEIGHTS + NOISE**2 * torch.eye(4)
).log_prob(X)
DIAGONAL_GAP = float(0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet()))


def trained(family, encoder=None, steps=400):
    pyro.set_rng_seed(0)
    x = data(500, 2)
    guide = AmortizedGuide(linear, encoder, family).setup(x)
    optimizer = optim.Adam({"lr": 0.02}, schedule=lambda step: max(0.02, 1 - step / steps))
    svi = SVI(linear, guide, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step(x[torch.randint(500, (64,))])
    return guide


@pytest.fixture(scope="module")
def diagonal():
    return trained(DiagonalNormal())


def test_a_family_that_is_too_simple_is_told_by_its_gap(diagonal, capsys):
    report = check(diagonal.posterior(X, num_draws=1000))
    assert capsys.readouterr().out == f"{report}\n"
    columns = report.columns
    # 12 rows x 1,000 draws: standard error of the mean ELBO 0.01.
    assert float(columns["family_gap"].mean()) == pytest.approx(DIAGONAL_GAP, abs=0.05)
    assert float(columns["amortization_gap"].mean()) < 0.05
    assert (columns["bound"] - EVIDENCE).abs().max() < 0.1
    torch.testing.assert_close(
        columns["gap"], columns["amortization_gap"] + columns["family_gap"], rtol=0, atol=1e-5
    )
    assert "Next: a richer family, guide.promote(FullRankNormal() or LowRankNormal(r))" in str(report)
    assert report.settled
    assert report.trained


def test_an_encoder_that_is_too_small_is_told_by_its_gap():
    class Blind(nn.Module):
        def forward(self, x):
            return x[:, :1] * 0.01

    report = check(trained(FullRankNormal(), Blind(), 100).posterior(X, num_draws=500), show=False)
    amortization, family = report.columns["amortization_gap"], report.columns["family_gap"]
    assert float(amortization.mean()) > 1.0
    assert float(family.abs().mean()) < 0.05
    assert "Next: train longer or with a larger encoder" in str(report)
    assert not report.trusted.all()


class Exact(nn.Module):
    def forward(self, x):
        return x @ (WEIGHTS.T / NOISE**2 @ torch.linalg.inv(PRECISION))


def test_an_exact_q_is_as_good_as_exact():
    guide = AmortizedGuide(linear, Exact()).setup(X)
    factor = torch.linalg.cholesky(torch.linalg.inv(PRECISION.double())).float()
    head = guide.network.heads[0].output
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:2] = torch.eye(2) / head.gain
        head.bias[:2] = 0.0
        head.bias[2:4] = torch.log(torch.expm1(factor.diagonal() - 1e-6))
        head.bias[4] = factor[1, 0] / factor[1, 1] * math.sqrt(2)
    report = check(guide.posterior(X, num_draws=500), show=False)
    assert report.columns["k_hat"].tolist() == [-math.inf] * 12
    assert report.trusted.all()
    assert str(report).startswith("12 of 12 rows can be trusted")
    assert "12 as good as exact" in str(report)
    assert "Next" not in str(report)
    assert report.columns["gap"].abs().max() < 1e-3


def test_an_untrained_guide_is_called_so():
    guide = AmortizedGuide(linear).setup(X)
    assert not guide.is_trained
    report = check(guide.posterior(X, num_draws=100), gaps=False, modes=False, show=False)
    assert "The guide was never trained" in str(report)
    assert report.columns.keys() == {
        "k_hat",
        "effective_size",
        "elbo",
        "bound",
        "bound_error",
        "gap",
        "elbo_error",
    }
    SVI(linear, guide, optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(X)
    assert guide.is_trained


def test_table_has_a_line_per_row(diagonal, monkeypatch):
    report = check(diagonal.posterior(X, num_draws=100), gaps=False, show=False)
    table = report.table
    assert list(table.index.names) == ["row"]
    assert table.shape == (12, 8)
    assert table["k_hat"].to_list() == report.columns["k_hat"].tolist()
    monkeypatch.setitem(sys.modules, "pandas", None)
    plain = report.table
    assert plain["row"].tolist() == list(range(12))
    assert plain["elbo"].shape == (12,)


def shared(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_rows_that_share_latents_are_judged_given_these():
    pyro.set_rng_seed(0)
    x = torch.randn(6)
    report = check(AmortizedGuide(shared).posterior(x, num_draws=200), gaps=False, modes=False, show=False)
    assert report.held == ("mean",)
    assert report.columns["k_hat"].shape == (6,)
    assert "rows given mean can be trusted" in str(report)
    assert "Shared latents (mean): k_hat" in str(report)


def test_shared_latents_weigh_what_they_do_with_rows_integrated_out():
    """p(mean | x) is normal; with q(z | x, mean) half trained, weights are still those of the mean alone."""
    pyro.set_rng_seed(0)
    x = torch.randn(40)
    guide = AmortizedGuide(shared).setup(x)
    svi = SVI(shared, guide, optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(150):
        svi.step(x)
    posterior = guide.posterior(x, num_draws=150)
    found = shared_log_weights(posterior)
    mean = posterior.draws["mean"]
    joint = dist.Normal(0.0, 1.0).log_prob(mean) + dist.Normal(mean[:, None], 2**0.5).log_prob(x).sum(-1)
    head = guide.network.family(0).frame(guide.network.head(0).bias)
    exact = joint - dist.Normal(*(part.squeeze(-1) for part in head)).log_prob(mean)
    # 32 inner draws of 40 rows: standard deviation of log w some 0.1.
    assert (found - exact).std() < 0.4
    assert (found - exact).mean().abs() < 0.3
    assert posterior.log_weights.std() > 3 * found.std()  # control: the joint weights are much wider


def test_a_refined_posterior_is_checked_again(diagonal):
    report = check(diagonal.posterior(X + 2.0, num_draws=500).refine(), show=False)
    assert torch.equal(report.columns["amortization_gap"], torch.zeros(12))
    assert float(report.columns["family_gap"].mean()) == pytest.approx(DIAGONAL_GAP, abs=0.06)


def test_discrete_and_masked_rows_are_judged_by_weights():
    def discrete(x):
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    report = check(AmortizedGuide(discrete).posterior(X[:, 0], num_draws=100), show=False)
    assert "missing" not in report.columns
    assert "modes that q has lost are not looked for" in str(report)


def test_modes_hold_shares():
    modes = Modes(torch.zeros(2, 1, 1), torch.tensor([[0.6], [0.4]]), torch.tensor([[1.0], [0.0]]))
    assert modes.missing.tolist() == pytest.approx([0.4])
    assert modes.count.tolist() == [2]
    kept = Modes(torch.zeros(2, 1, 1), torch.tensor([[0.96], [0.04]]), torch.tensor([[1.0], [0.0]]))
    assert kept.missing.tolist() == [0.0]  # too small to matter


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        (lambda guide: guide.posterior(X, num_draws=20), "at least 25 draws, better 1,000; .* has 20"),
        (
            lambda guide: guide.posterior(X, num_draws=50).resample(),
            "resampled, so that their weights are spent",
        ),
    ],
    ids=["few draws", "resampled"],
)
def test_check_refuses(diagonal, posterior, message):
    with pytest.raises(ValueError, match=message):
        check(posterior(diagonal), show=False)


@pytest.mark.parametrize("total", [pytest.param(5, marks=pytest.mark.slow), 50_000])
def test_rows_of_a_large_data_set_are_judged_as_if_alone(total):
    """A constrained latent in a subsampled plate: neither gaps nor refinement know of the other rows."""
    x = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.2])

    def half_line(x):
        with pyro.plate("row", total, subsample_size=len(x)):
            y = pyro.sample("y", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y.log(), NOISE), obs=x)

    pyro.set_rng_seed(0)
    report = check(AmortizedGuide(half_line).posterior(x, num_draws=500), show=False)
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x)
    assert (report.columns["bound"] - exact).abs().max() < 0.02
    assert report.columns["family_gap"].abs().max() < 0.02
    assert report.columns["amortization_gap"].min() > 0.1
    assert torch.equal(report.columns["missing"], torch.zeros(5))


def test_check_names_what_it_takes(diagonal):
    with pytest.raises(TypeError, match=r"takes what guide.posterior\(...\) returns, got a AmortizedGuide"):
        check(diagonal)
    with pytest.raises(TypeError, match=r"training must be a Familiarity\(guide, \*args\), got a Tensor"):
        check(diagonal.posterior(X), training=X)


# --- real images


@pytest.fixture(scope="module")
def digits():
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    train, test, inked = module.load_images()
    images = [torch.tensor(pixels[:, inked], dtype=torch.float32) for pixels in (train, test)]
    yield module, *images
    del sys.modules["quickstart"]


@pytest.mark.slow
def test_gaps_on_digits_are_the_exact_ones(digits):
    """The best diagonal normal is 2.133 nats below log p(x), for every image."""
    module, train, test = digits
    pyro.set_rng_seed(0)
    model = module.FactorModel.fit(train.numpy())
    guide = module.train(model, DiagonalNormal(), train, 3000)
    report = check(guide.posterior(test, num_draws=1000))
    assert float(report.columns["family_gap"].mean()) == pytest.approx(2.133, abs=0.05)
    assert float(report.columns["amortization_gap"].mean()) < 0.05
    assert float(report.columns["bound"].mean()) == pytest.approx(-129.268, abs=0.05)


@pytest.mark.slow
def test_refinement_removes_the_gap_of_a_small_encoder(digits):
    """Judged by the best ELBO that a long refinement from another encoder finds for the same rows."""
    module, train, test = digits
    pyro.set_rng_seed(0)
    model = module.DecoderModel(train.shape[1])
    large = module.train(model, FullRankNormal(), train, 1000)
    model.requires_grad_(False).train(False)
    small = AmortizedGuide(model, MLP(width=8, depth=1), FullRankNormal()).setup(train)
    svi = SVI(model, small, optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(500):
        svi.step(train[torch.randint(len(train), (128,))])
    rows = test[:50]
    posterior = small.posterior(rows, num_draws=1000)
    report = check(posterior, modes=False)
    amortization, family = (float(report.columns[name].mean()) for name in ("amortization_gap", "family_gap"))
    best = float(large.posterior(rows).refine(particles=64, max_steps=4000).elbo.mean())
    removed = amortization / (best - float(posterior.elbo.mean()))
    print(f"refinement removes {removed:.1%} of {amortization:.2f} nats")
    assert amortization > 10 * family
    assert removed > 0.9
    assert float(report.columns["amortization_gap"].min()) > 0


def test_tight_bound_needs_no_tight_q():
    """q a third as wide as it should be, and diagonal: plain importance sampling is off, this is not."""
    pyro.set_rng_seed(0)
    posterior = AmortizedGuide(linear, family=DiagonalNormal(), init_scale=0.15).posterior(X, num_draws=1000)
    posterior = posterior.refine(max_steps=20)
    bound, error = tight_bound(posterior)
    assert ((bound - EVIDENCE) / error).abs().max() < 4.5
    assert error.max() < 0.3
    plain, _ = posterior.bound()
    assert (EVIDENCE - plain).abs().max() > 1.5 * (EVIDENCE - bound).abs().max()
