"""Models with unusual parts: moving supports, unseen sites, masks, broadcasting, odd arguments."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from matplotlib.figure import Figure
from models import F64
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_guides import AmortizedGuide, check, optim, plots, to_arviz, to_netcdf


@pytest.fixture(autouse=True)
def a_seed():
    pyro.set_rng_seed(0)


# --- supports that depend on other latents


def bounded(y):
    a = pyro.sample("a", dist.LogNormal(torch.tensor(2.0, **F64), 0.1))
    u = pyro.sample("u", dist.Uniform(torch.zeros((), **F64), a))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(u, 0.3))
        pyro.sample("y", dist.Normal(z, 0.3), obs=y)


def bounded_alone(y):
    a = pyro.sample("a", dist.LogNormal(torch.zeros((), **F64), 1.0))
    u = pyro.sample("u", dist.Uniform(torch.zeros((), **F64), a))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(u, 3.0), obs=y)


def moving(model=bounded, **options):
    y = 5.0 + 0.3 * torch.randn(20, **F64)
    guide = AmortizedGuide(model, **options).setup(y)
    # λ that differs from the start, so that the support read first is not that of the draws.
    with torch.no_grad():
        for parameter in guide.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return y, guide


def test_rows_given_a_value_on_a_moving_support():
    y, guide = moving()
    held = {"a": torch.tensor(7.5, **F64), "u": torch.tensor(5.2, **F64)}
    local = guide.posterior(y, num_draws=4000).local(held)
    torch.testing.assert_close(local.median()["z"], local.draws["z"].median(0).values, rtol=0.0, atol=0.1)


def test_quantiles_on_a_moving_support_are_those_of_draws():
    y, guide = moving(bounded_alone, init_scale=1.0)
    posterior = guide.posterior(y, num_draws=4000)
    levels = torch.tensor([0.05, 0.95], **F64)
    exact = posterior.draws["u"].quantile(levels, 0)
    torch.testing.assert_close(posterior.quantiles(levels)["u"], exact, rtol=1e-3, atol=1e-3)


def test_what_has_no_fixed_scale_is_not_exported_as_if_it_had_one():
    y, guide = moving()
    posterior = guide.posterior(y, num_draws=50)
    unconstrained = to_arviz(posterior)["unconstrained_posterior"]
    assert "a" in unconstrained
    assert "u" not in unconstrained
    with pytest.raises(ValueError, match=r"those of \['u'\] depend on other latents"):
        posterior.nuts()


@pytest.mark.parametrize("high", [[2.0, 5.0], [[2.0, 5.0], [3.0, 1.0], [1.0, 1.0]]])
def test_quantiles_with_bounds_that_are_tensors(high):
    high = torch.tensor(high, **F64)

    def model(x):
        with pyro.plate("row", 3):
            z = pyro.sample("z", dist.Uniform(torch.zeros(2, **F64), high).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    posterior = AmortizedGuide(model).posterior(torch.ones(3, 2, **F64), num_draws=4000)
    levels = torch.tensor([0.1, 0.9], **F64)
    drawn = posterior.draws["z"].quantile(levels, 0)
    torch.testing.assert_close(posterior.quantiles(levels)["z"], drawn, rtol=0.0, atol=0.1)


# --- sites that a call has no value of


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros((), **F64), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)


def test_new_rows_without_what_was_observed_in_training():
    x = torch.linspace(-1.0, 1.0, 20, **F64)
    y = 0.7 * x + 0.1 * torch.randn(20, **F64)
    guide = AmortizedGuide(line)
    svi = SVI(line, guide, optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(200):
        svi.step(x, y)
    new = torch.tensor([2.0, 3.0, 4.0], **F64)
    posterior = guide.posterior(new, num_draws=2000)
    assert set(posterior.draws) == {"w"}
    # Nobody knows y, so that it says nothing: log p is that of w alone.
    prior = dist.Normal(0.0, 1.0).log_prob(posterior.draws["w"])
    torch.testing.assert_close(posterior.log_p, prior)
    predicted = posterior.predict()
    w = posterior.draws["w"]
    torch.testing.assert_close(predicted["y"].mean(0), w.mean() * new, rtol=0.0, atol=0.02)
    spread = (0.01 + w.var() * new**2).sqrt()
    torch.testing.assert_close(predicted["y"].std(0), spread, rtol=0.1, atol=0.0)
    exported = to_arviz(posterior, predicted)
    assert exported["posterior_predictive"]["y"].dims == ("chain", "draw", "row")
    assert math.isfinite(float(guide.median(new)["w"]))
    check(posterior, gaps=False, modes=False, show=False)


def chained(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros((), **F64), 1.0))
    with pyro.plate("row", len(x)):
        y = pyro.sample("y", dist.Normal(w, 1.0), obs=y)
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def test_what_others_depend_on_cannot_be_left_out():
    x = torch.randn(4, **F64)
    guide = AmortizedGuide(chained).setup(x, x)
    posterior = guide.posterior(x, num_draws=10)
    assert set(posterior.draws) == {"w"}
    with pytest.raises(NotImplementedError, match=r"the model itself draws \['y'\]"):
        _ = posterior.elbo


# --- masks


THERE = torch.tensor([True, True, True, False, False, False])
SEEN = torch.tensor([0.0, 0.1, 0.2, 99.0, 99.0, 99.0], **F64)


def outside(y, there):
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        with poutine.mask(mask=there):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def inside(y, there):
    with pyro.plate("one", 1):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        fn = dist.Normal(z.unsqueeze(-1).expand(1, 6), 0.5).mask(there)
        pyro.sample("y", fn.to_event(1), obs=y.unsqueeze(0))


@pytest.mark.parametrize("options", [{}, {"inputs": lambda y, there: {"y": y, "there": there}}])
def test_coverage_leaves_out_what_is_masked(options):
    posterior = AmortizedGuide(outside, **options).posterior(SEEN, THERE, num_draws=200)
    assert " of 3 values" in plots.predictive(posterior, ax=Figure().subplots()).get_title()


def test_coverage_leaves_out_what_is_masked_below_an_event():
    options = {"inputs": lambda y, there: y.clamp(max=1.0).unsqueeze(0)}
    posterior = AmortizedGuide(inside, **options).posterior(SEEN, THERE, num_draws=200)
    assert " of 3 values" in plots.predictive(posterior, ax=Figure().subplots()).get_title()


def test_an_observation_that_is_certain_is_not_masked():
    n, k = torch.tensor([0.0, 5.0, 5.0], **F64), torch.tensor([0.0, 2.0, 3.0], **F64)

    def model(n, k):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        with pyro.plate("row", 3):
            pyro.sample("k", dist.Binomial(n, logits=z.expand(3)), obs=k)

    loo = AmortizedGuide(model).posterior(n, k, num_draws=200).loo()
    assert loo.pointwise["k"][0] == pytest.approx(0.0, abs=1e-9)
    assert bool(loo.pointwise["k"].isfinite().all())
    masked = AmortizedGuide(outside).posterior(SEEN, THERE, num_draws=200).loo().pointwise["y"]
    assert masked.isnan().tolist() == (~THERE).tolist()


def test_a_hopeless_leave_one_out_can_be_read():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    posterior = AmortizedGuide(model, init_scale=1.0).posterior(torch.randn(5, **F64), num_draws=30)
    assert len(repr(posterior.loo())) < 100


# --- what is exported


def test_observed_values_that_broadcast_over_a_plate():
    def model(y, c):
        with pyro.plate("a", 4, dim=-2):
            u = pyro.sample("u", dist.Normal(torch.zeros((), **F64), 1.0))
            with pyro.plate("b", 3, dim=-1):
                pyro.sample("y", dist.Normal(u, 0.5), obs=y)
                pyro.sample("c", dist.Normal(u, 5.0), obs=c)

    y, c = torch.randn(4, 3, **F64), torch.randn(1, 3, **F64)
    guide = AmortizedGuide(model, amortize=())
    observed = to_arviz(guide.posterior(y, c, num_draws=30))["observed_data"]
    assert observed["c"].shape == (4, 3)
    assert bool((observed["c"].values == c.expand(4, 3).numpy()).all())


def test_arguments_that_numpy_cannot_hold():
    def model(x, graph, half):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
            mean = z + torch.sparse.mm(graph, x.unsqueeze(-1)).squeeze(-1) + half.double().sum()
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.randn(4, **F64)
    graph, half = torch.eye(4, **F64).to_sparse(), torch.ones(4, dtype=torch.bfloat16)
    guide = AmortizedGuide(model, inputs=lambda x, graph, half: x.unsqueeze(-1))
    found = to_arviz(guide.posterior(x, graph, half, num_draws=30))["constant_data"]
    assert found["graph"].values.tolist() == torch.eye(4).tolist()
    assert found["half"].values.tolist() == [1.0] * 4


def test_a_last_batch_of_one_row(tmp_path):
    def model(x, y):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    x, y = torch.arange(5, **F64), torch.randn(5, **F64)
    guide = AmortizedGuide(model, inputs=lambda x, y: torch.stack([x, y], -1)).setup(x, y)
    batches = zip(x.split(2), y.split(2), strict=True)
    path = to_netcdf(guide.posteriors(batches, num_draws=30), tmp_path / "all.nc", along="row")
    with xarray.open_dataset(path, group="constant_data", engine="h5netcdf") as found:
        assert found["x"].dims == ("row",)
        assert found["x"].values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


# --- guides that move


def wide_model(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_a_guide_that_became_double_reads_doubles():
    x = torch.randn(5, 2)
    guide = AmortizedGuide(wide_model).setup(x)
    single = guide.median(x)["z"]
    assert guide.double() is guide
    double = guide.median(x.double())["z"]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    with pytest.raises(TypeError, match=r"float32 on cpu, but the guide was set up with torch.float64"):
        guide.median(x)
    assert math.isfinite(float(guide.posterior(x.double(), num_draws=30).elbo.sum()))
