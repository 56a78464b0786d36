"""Predictions, prior draws and local posteriors: hand-written formulas, and arguments kept apart."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch.utils.data import DataLoader, TensorDataset

from pyro_guides import AmortizedGuide, to_netcdf

NOISE = 0.5
X = torch.linspace(-2.0, 2.0, 9)


def regression(x, y=None, noise=NOISE):
    """Global weights, a latent per row, a computed site, and an outcome that may be absent."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", slope * x + shift)
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def fitted(num_draws=2000, **options):
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(regression, inputs=lambda x, y=None, noise=None: x, **options)
    return guide.posterior(X, X.sin(), num_draws=num_draws)


def test_predictions_are_draws_of_the_likelihood():
    posterior = fitted()
    prediction = posterior.predict()
    assert prediction.draws.keys() == {"mean", "y"}
    mean = posterior.draws["slope"][:, None] * X + posterior.draws["shift"]
    torch.testing.assert_close(prediction["mean"], mean)
    residual = (prediction["y"] - mean) / NOISE
    count = residual.numel()
    assert abs(residual.mean()) < 4.5 / math.sqrt(count)
    assert abs(residual.std() - 1) < 4.5 / math.sqrt(2 * count)
    assert abs(residual[:, 0].dot(residual[:, 1])) / len(residual) < 4.5 / math.sqrt(len(residual))
    assert (prediction["y"].mean(0) - X.sin()).abs().max() > 0.1  # control: they are not the data
    groups = prediction.to_groups()
    assert groups.keys() == {"posterior_predictive"}
    assert groups["posterior_predictive"]["y"].dims == ("chain", "draw", "row")
    assert repr(prediction) == "Prediction(2000 draws of mean: (9,), y: (9,))"
    with pytest.raises(KeyError, match="no site 'z'; there are"):
        prediction["z"]


def test_arguments_of_the_model_are_its_own():
    """Other covariates and another noise for the model, while q stays that of the guide's arguments."""
    posterior = fitted()
    prediction = posterior.predict(X + 10.0, noise=1e-6)
    mean = posterior.draws["slope"][:, None] * (X + 10.0) + posterior.draws["shift"]
    assert (prediction["y"] - mean).abs().max() < 1e-4
    assert prediction.to_groups().keys() == {"predictions"}
    # By name alone: the guide's arguments with these changed.
    hidden = posterior.predict(y=None, noise=1e-6)
    mean = posterior.draws["slope"][:, None] * X + posterior.draws["shift"]
    assert (hidden["y"] - mean).abs().max() < 1e-4
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        posterior.prior(0)
    with pytest.raises(ValueError, match=r"draws of 'shift' have shape \(9,\).*expects \(4,\)"):
        posterior.predict(X[:4])


def test_prior_draws_latents_and_data():
    posterior = fitted()
    prior = posterior.prior(4000)
    assert prior.draws.keys() == {"slope", "shift", "mean", "y"}
    assert abs(prior["shift"].std() - 1) < 4.5 / math.sqrt(2 * 36_000)
    expected = (X.square() + 1 + NOISE**2).sqrt()
    assert (prior["y"].std(0) / expected - 1).abs().max() < 4.5 / math.sqrt(8000)
    assert prior.to_groups().keys() == {"prior", "prior_predictive"}


def looped(x):
    """Python control flow on values, which vmap cannot follow."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 2.0 if float(z[0]) > 0 else 1.0
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_a_model_that_reads_values_is_run_in_a_loop():
    pyro.set_rng_seed(0)
    posterior = AmortizedGuide(looped).posterior(X, num_draws=40)
    draws = posterior.draws["z"]
    scale = torch.where(draws[:, :1] > 0, 2.0, 1.0)
    exact = dist.Normal(0.0, 1.0).log_prob(draws) + dist.Normal(draws, scale).log_prob(X)
    torch.testing.assert_close(posterior.log_p, exact)
    assert posterior.predict()["x"].shape == (40, 9)


def test_local_posterior_holds_what_rows_share():
    posterior = fitted(num_draws=500)
    local = posterior.local()
    assert repr(local) == "Posterior(500 draws of shift: (9,), given slope)"
    slope = local.query.held["slope"]
    draws = posterior.draws["slope"]
    assert bool((draws == slope).any())
    assert float((draws < slope).double().mean()) == pytest.approx(0.5, abs=0.02)  # central
    shift = local.draws["shift"]
    exact = dist.Normal(0.0, 1.0).log_prob(shift) + dist.Normal(slope * X + shift, NOISE).log_prob(X.sin())
    torch.testing.assert_close(local.log_p, exact)
    assert local.log_q.shape == (500, 9)
    torch.testing.assert_close(local.log_prob({"shift": shift}), local.log_q)
    given = posterior.local({"slope": torch.tensor(3.0)})
    mean = given.predict()["mean"]
    torch.testing.assert_close(mean, 3.0 * X + given.draws["shift"])
    assert local.local() is local
    assert given.median().keys() == {"shift"}


def ragged(x, group):
    """Rows outside of the groups' plate: no plate keeps groups apart."""
    with pyro.plate("group", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(level[group], 1.0), obs=x)


def test_local_posteriors_that_cannot_be_had():
    group = torch.arange(9) % 3
    posterior = AmortizedGuide(ragged).posterior(X, group, num_draws=30)
    assert posterior.log_p.shape == (30,)
    with pytest.raises(ValueError, match="no plate keeps the rows of this model apart"):
        posterior.local()
    with pytest.raises(ValueError, match=r"'slope' is missing"):
        fitted(num_draws=30).local({})
    with pytest.raises(ValueError, match="there are 3 draws of 'slope'; give one value"):
        fitted(num_draws=30).local({"slope": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"given names \['shift'\]"):
        fitted(num_draws=30).local({"slope": torch.tensor(0.0), "shift": torch.zeros(9)})


def test_batches_give_the_posteriors_of_their_rows():
    def rows(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(rows).setup(X)
    for batches in (DataLoader(TensorDataset(X), batch_size=4), DataLoader(X, batch_size=4)):
        medians = [posterior.median()["z"] for posterior in guide.posteriors(batches, num_draws=10)]
        assert [len(median) for median in medians] == [4, 4, 1]
        torch.testing.assert_close(torch.cat(medians), guide.median(X)["z"])
    named = AmortizedGuide(rows).setup(x=X)
    (only,) = named.posteriors([{"x": X[:4]}], num_draws=10)
    assert only.draws["z"].shape == (10, 4)


def shared(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_batches_share_the_draws_of_what_is_learned(tmp_path):
    """So that rows of all batches fit together in one file, each with weights given what they share."""
    guide = AmortizedGuide(shared).setup(X)
    batches = list(guide.posteriors([X[:4], X[4:]], num_draws=30))
    assert torch.equal(batches[0].draws["mean"], batches[1].draws["mean"])
    path = to_netcdf(batches, tmp_path / "draws.nc", along="row")
    with warnings.catch_warnings(), xarray.open_datatree(path, engine="h5netcdf") as found:  # it adds filters
        assert found["posterior"]["z"].shape == (1, 30, 9)
        weights = found["sample_stats"]["log_weight"].values[0]
    z, mean = (torch.cat([b.draws["z"] for b in batches], -1), batches[0].draws["mean"][:, None])
    log_p = dist.Normal(mean, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    log_q = torch.cat([batch.densities_of_rows()[1] for batch in batches], -1)
    torch.testing.assert_close(torch.as_tensor(weights), log_p - log_q)


def test_blocks_of_a_model_that_subsamples_share_its_other_latents():
    def by_itself(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(mean, 1e-3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    prior = AmortizedGuide(by_itself).posterior(X, num_draws=30).prior(50)
    assert prior["z"].shape == (50, 9)
    assert (prior["z"] - prior["mean"][:, None]).abs().max() < 0.01


def test_deterministic_sites_are_not_observed():
    posterior = fitted(num_draws=30)
    assert posterior.observed.keys() == {"y"}
    assert posterior.log_likelihood.keys() == {"y"}
    groups = posterior.to_groups()
    assert groups["observed_data"].keys() == {"y"}
    assert groups["constant_data"].keys() == {"x"}
    assert groups["constant_data"]["x"].dims == ("row",)
    assert groups["sample_stats"].keys() == {"lp", "log_q", "log_weight", "k_hat"}
    assert groups["unconstrained_posterior"]["shift"].dims == ("chain", "draw", "row")


def test_a_batch_is_predicted_as_it_is_where_all_latents_are_shared():
    """No row's λ is needed, and still the batch holds eight rows of forty, not all of them five times."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 40, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.arange(8.0)
    posterior = AmortizedGuide(model).posterior(x, num_draws=30)
    assert posterior.predict()["x"].shape == (30, 8)
    assert posterior.log_likelihood["x"].shape == (30, 8)
    mean = posterior.draws["mean"]
    likelihood = dist.Normal(mean.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    expected = dist.Normal(0.0, 1.0).log_prob(mean) + 5.0 * likelihood
    torch.testing.assert_close(posterior.log_p, expected)
