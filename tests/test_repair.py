"""Importance resampling, leave-one-out and the hand-over to NUTS, against exact answers."""

import copy
import math
import warnings
from itertools import pairwise

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from torch.nn.functional import softplus

from pyro_guides import AmortizedGuide, DiagonalNormal, optim, to_arviz

NOISE = 0.6
SHRINK = 1 / (1 + NOISE**2)
SD = NOISE * math.sqrt(SHRINK)


def rows(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Affine(torch.nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1)


def guide_with(scale, shift=0.0, x=None):
    """A guide whose q is the exact posterior, its spread times ``scale`` and moved by ``shift`` of it."""
    guide = AmortizedGuide(rows, Affine()).setup(torch.zeros(2) if x is None else x)
    output = guide.network.heads[0].output
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[SHRINK], [0.0]]) / output.gain)
        output.bias.copy_(torch.tensor([shift * SD, math.log(math.expm1(scale * SD - 1e-6))]))
    return guide


X = torch.tensor([-1.0, 0.5, 2.0])


def test_resampled_draws_are_of_the_posterior():
    """q twice too wide and off by one sd; 20,000 draws are worth some 6,000."""
    pyro.set_rng_seed(0)
    posterior = guide_with(2.0, 1.0).posterior(X, num_draws=20_000)
    resampled = posterior.resample()
    mean, sd = resampled.mean()["z"], resampled.sd()["z"]
    error = 1 / posterior.effective_size.min().sqrt()
    assert ((mean - SHRINK * X) / SD).abs().max() < 4.5 * error
    assert (sd / SD - 1).abs().max() < 4.5 * error
    assert ((posterior.mean()["z"] - SHRINK * X) / SD).min() > 0.9  # control: before, it is off
    # What belongs to a draw came along with it, and rows are not in step.
    torch.testing.assert_close(resampled.log_prob(resampled.draws), resampled.log_q)
    z = (resampled.draws["z"] - mean) / sd
    assert (z.T @ z / len(z) - torch.eye(3)).abs().max() < 0.05
    assert resampled.resample is not posterior.resample
    assert posterior.resample(7).draws["z"].shape == (7, 3)
    with pytest.raises(ValueError, match="resampled already"):
        resampled.resample()
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        posterior.resample(0)


def test_shared_latents_are_resampled_with_their_rows():
    def shared(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = AmortizedGuide(shared, init_scale=1.0).posterior(X, num_draws=300)
    resampled = posterior.resample(40)
    assert {name: draws.shape for name, draws in resampled.draws.items()} == {"mean": (40,), "z": (40, 3)}
    at = [int((posterior.draws["mean"] == mean).nonzero()) for mean in resampled.draws["mean"]]
    assert torch.equal(resampled.draws["z"], posterior.draws["z"][at])
    for spent in ("elbo", "k_hat", "effective_size", "log_weights"):
        with pytest.raises(ValueError, match="their weights are spent"):
            getattr(resampled, spent)


def test_weights_of_an_exact_q_are_as_good_as_exact():
    pyro.set_rng_seed(0)
    posterior = guide_with(1.0).posterior(X, num_draws=500)
    assert posterior.k_hat.tolist() == [-math.inf] * 3
    assert (posterior.effective_size - 500).abs().max() < 0.1
    bound, error = posterior.bound()
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X)
    torch.testing.assert_close(bound, exact, rtol=0, atol=1e-4)
    assert error.max() < 1e-4
    assert guide_with(0.5).posterior(X, num_draws=5000).k_hat.min() > 0.4  # control: too narrow


def test_bound_at_fewer_draws_is_lower():
    """The bound at K = 1 is the ELBO; it grows with K towards log p(x)."""
    pyro.set_rng_seed(0)
    posterior = guide_with(1.8).posterior(X, num_draws=8000)
    at_one, error = posterior.bound(1)
    torch.testing.assert_close(at_one, posterior.elbo)
    torch.testing.assert_close(error, posterior.log_weights.std(0) / math.sqrt(8000))
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X)
    gaps = [exact - posterior.bound(count)[0] for count in (1, 4, 40, 8000)]
    assert all((a > b).all() for a, b in pairwise(gaps[:3]))
    assert gaps[-1].abs().max() < 0.05
    with pytest.raises(ValueError, match="a bound at 8001 draws needs as many"):
        posterior.bound(8001)


def broken(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("penalty", torch.where(x > 1.0, (z - 100.0).log(), torch.zeros(())))


def test_nan_weights_name_their_site_and_rows():
    posterior = AmortizedGuide(broken).posterior(torch.tensor([0.0, 2.0, 3.0]), num_draws=30)
    expected = r"log p of site 'penalty' is NaN .* in 2 rows \(first 1, 2\) of plate \['row'\]"
    with pytest.raises(ValueError, match=expected):
        posterior.k_hat  # noqa: B018

    exported = posterior.to_groups()["sample_stats"]  # what there is can be looked at
    assert exported.keys() == {"lp", "log_q", "log_weight"}


def test_draws_of_zero_density_have_no_weight():
    """A uniform observation that draws outside of it cannot have made."""

    def bounded(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1.0, z + 1.0, validate_args=False), obs=x)

    pyro.set_rng_seed(0)
    posterior = AmortizedGuide(bounded, init_scale=1.0).posterior(torch.zeros(2), num_draws=20_000)
    assert (posterior.log_weights == -torch.inf).any()
    # Half the normal's mass within one sd.
    exact = math.log(math.erf(1 / math.sqrt(2)) / 2)
    assert (posterior.bound()[0] - exact).abs().max() < 0.05
    assert (posterior.loo().pointwise["x"] + math.log(2.0)).abs().max() < 0.05
    assert posterior.refine(max_steps=10).gain.value.isfinite().all()


# --- leave one out

SCORES = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(y, sigma):
    """Eight schools (Rubin 1981), non-centred."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        effect = pyro.sample("effect", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def exact_loo():
    """By quadrature over mu and log tau, effects integrated out."""
    mu = torch.linspace(-30, 30, 601, dtype=torch.float64)[:, None, None]
    log_tau = torch.linspace(math.log(1e-4), math.log(2000.0), 2001, dtype=torch.float64)[None, :, None]
    tau = log_tau.exp()
    prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    pointwise = dist.Normal(mu, (tau.square() + ERRORS.square()).sqrt()).log_prob(SCORES)
    joint = (prior + pointwise.sum(-1, keepdim=True)).squeeze(-1)
    without = [(joint - pointwise[..., i]).flatten().logsumexp(0) for i in range(8)]
    return joint.flatten().logsumexp(0) - torch.stack(without)


def trained_on_schools(steps=1200):
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(schools, amortize=[]).setup(SCORES, ERRORS)
    optimizer = optim.Adam({"lr": 0.03}, schedule=lambda step: max(0.02, 1 - step / steps))
    svi = SVI(schools, guide, optimizer, Trace_ELBO())
    for _ in range(steps):
        svi.step(SCORES, ERRORS)
    return guide


def widened(guide, factor):
    """The same guide with all standard deviations times a factor: L = diag(s) times a unit triangle."""
    wide = copy.deepcopy(guide)
    for part, head in zip(wide.network.parts, wide.network.heads, strict=True):
        scale = head.bias[..., part.group.size : 2 * part.group.size]
        with torch.no_grad():
            scale.copy_((factor * softplus(scale)).expm1().log())
    return wide


@pytest.mark.slow
def test_leave_one_out_is_corrected_for_draws_from_q():
    """q 1.5 times too wide. The error of 20,000 draws is 0.02 nats over seeds."""
    posterior = widened(trained_on_schools(), 1.5).posterior(SCORES, ERRORS, num_draws=20_000)
    exact = exact_loo()
    loo = posterior.loo()
    print(f"exact {float(exact.sum()):.3f}, corrected {loo.elpd:.3f}")
    assert loo.elpd == pytest.approx(float(exact.sum()), abs=0.05)
    assert (loo.pointwise["y"] - exact).abs().max() < 0.05
    assert loo.k_hat["y"].max() < 0.7
    assert repr(loo).startswith(f"Loo(elpd={loo.elpd:.2f}, error=")
    with warnings.catch_warnings():  # control: plain LOO takes the draws for the posterior's
        warnings.simplefilter("ignore")
        plain = float(az.loo(to_arviz(posterior)).elpd_loo)
    assert abs(plain - float(exact.sum())) > 0.5


def test_leave_one_out_of_rows_uses_each_rows_weights():
    """A row's own z is all that its x depends on: the elpd is the prior predictive density."""
    pyro.set_rng_seed(0)
    loo = guide_with(2.2).posterior(X, num_draws=20_000).loo()
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).double()
    assert (loo.pointwise["x"] - exact).abs().max() < 0.05
    with pytest.raises(ValueError, match="resampled already"):
        guide_with(1.3).posterior(X, num_draws=30).resample().loo()


def half_masked(x, there):
    """Two observed sites, one of them outside of the rows; a mask, and a factor that is no observation."""
    pyro.sample("outside", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("pull", -0.01 * z.square())
        with pyro.poutine.mask(mask=there):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_leave_one_out_leaves_masked_values_and_factors_out():
    there = torch.tensor([True, False, True])
    posterior = AmortizedGuide(half_masked, inputs=lambda x, there: x).posterior(X, there, num_draws=200)
    loo = posterior.loo()
    assert loo.pointwise.keys() == {"x"}
    assert loo.pointwise["x"].isnan().tolist() == [False, True, False]
    assert loo.elpd == pytest.approx(float(loo.pointwise["x"][[0, 2]].sum()))
    assert math.isfinite(loo.error)
    assert posterior.log_likelihood.keys() == {"x", "outside"}
    assert posterior.observed.keys() == {"x", "outside"}


# --- NUTS


def correlated(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.5))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(z.sum(), scale), obs=x)


@pytest.mark.parametrize("full_mass", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nuts_starts_where_q_is(full_mass):
    pyro.set_rng_seed(0)
    x = 1.0 + torch.randn(40, dtype=torch.float64)
    posterior = AmortizedGuide(correlated).posterior(x, num_draws=1000).refine(max_steps=200)
    start = posterior.nuts(full_mass=full_mass, adapt_step_size=True, adapt_mass_matrix=False)
    mcmc = MCMC(start.kernel, 100, 30, initial_params=start.initial_params, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()
    (found,) = [m for sites, m in start.kernel.inverse_mass_matrix.items() if "z" in sites]
    # Sites in alphabetical order.
    u = torch.cat([posterior.draws["scale"].log().unsqueeze(-1), posterior.draws["z"]], dim=-1)
    if full_mass:
        torch.testing.assert_close(found, torch.cov(u.T), rtol=0.05, atol=0.01)
        assert found[1, 2] < -0.3  # control: it knows of the correlation
    else:
        torch.testing.assert_close(found, u.var(0))
    # 100 correlated draws: error some 0.15 sd.
    assert ((draws["z"].mean(0) - posterior.mean()["z"]) / posterior.sd()["z"]).abs().max() < 0.7
    assert (draws["scale"].mean() - posterior.mean()["scale"]).abs() / posterior.sd()["scale"] < 0.7


def test_nuts_chains_start_apart_and_held_values_stay():
    pyro.set_rng_seed(0)
    x = torch.randn(5)

    def shared(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    local = AmortizedGuide(shared).posterior(x, num_draws=100).local({"mean": torch.tensor(2.0)})
    start = local.nuts(num_chains=3)
    assert start.initial_params["z"].shape == (3, 5)
    assert len({tuple(row.tolist()) for row in start.initial_params["z"]}) == 3
    start = local.nuts()
    mcmc = MCMC(start.kernel, 200, 30, initial_params=start.initial_params, disable_progbar=True)
    mcmc.run(x)
    assert mcmc.get_samples().keys() == {"z"}
    assert (mcmc.get_samples()["z"].mean(0) - (x + 2.0) / 2).abs().max() < 0.35


def test_nuts_refuses():
    def discrete(x):
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def subsampled(x):
        with pyro.plate("row", 60, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"\['k'\] are discrete"):
        AmortizedGuide(discrete).posterior(X, num_draws=30).nuts()
    with pytest.raises(ValueError, match=r"needs all rows, but the model subsamples \['row'\]"):
        AmortizedGuide(subsampled).posterior(X, num_draws=30).nuts()
    with pytest.raises(ValueError, match="num_chains must be at least 1, got 0"):
        AmortizedGuide(rows, family=DiagonalNormal()).posterior(X, num_draws=30).nuts(num_chains=0)
    with pytest.raises(ValueError, match="needs at least 2 draws"):
        AmortizedGuide(rows).posterior(X, num_draws=1).nuts()


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_a_scale_around_rows_changes_nothing_about_them(factor):
    """``poutine.scale`` in the place of a subsampled plate: the posterior of a row is the same."""

    def scaled(x):
        with pyro.poutine.scale(scale=factor), pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    pyro.set_rng_seed(0)
    posterior = AmortizedGuide(scaled).posterior(X, num_draws=50)
    z = posterior.draws["z"]
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(X)
    q = posterior.median()["z"]
    torch.testing.assert_close(posterior.log_p, log_p)
    torch.testing.assert_close(posterior.log_q, dist.Normal(q, 0.1).log_prob(z), rtol=1e-3, atol=1e-3)
