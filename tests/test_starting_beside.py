"""Learned groups start where the posterior lies when others are amortized."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import F64

from pyro_guides import AmortizedGuide
from pyro_guides.heads import WhitenedHead
from pyro_guides.starting import Repeats, climb, find_start, start, start_from
from pyro_guides.starting.density import Density
from tests.problems import rats
from tests.test_starting import centred, schools

MEAN_SD = 50.0


def beside(x):
    """A mean that is learned beside z, which is amortized; given the mean, x ~ N(mean, 2)."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), MEAN_SD))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("times", [1.0, 25.0])
def test_beside_amortized_groups_it_takes_the_marginal(times):
    """Of as many rows as those at hand stand for; units are wider, as those lie elsewhere than all."""
    x = 70.0 + torch.randn(20, **F64)
    guide = AmortizedGuide(beside, init_scale=0.2).setup(x)
    report = start_from(guide, (x,), {}, Repeats(frozenset({"row"}), times))
    assert report.found == {"'mean'": "posterior", "'z'": "amortized, centred"}
    precision = MEAN_SD**-2 + times * len(x) / 2.0
    mean = times * float(x.sum()) / 2.0 / precision
    loc, spread = (float(value.detach()) for value in guide.network.frame(0, {}))
    assert loc == pytest.approx(mean, rel=1e-8)
    assert spread == pytest.approx(precision**-0.5, rel=1e-6)
    assert float(guide.network.heads[0].scale) == pytest.approx(math.sqrt(times / precision), rel=1e-6)
    assert torch.allclose(guide.network.head(1).example()[0], (x.mean() + mean) / 2.0)


def test_the_elbo_of_a_normal_is_that_of_the_rows_that_others_stand_for():
    """Log ∫ p(g) ∏ p(x_i | g)^k dg, at the exact normal; noise of exact moments, so there is no error."""
    x, times = 3.0 + torch.randn(4, **F64), 7.0
    query = start._query(AmortizedGuide(beside).setup(x), (x,), {})
    density = Density(query, Repeats(frozenset({"row"}), times), {"mean"})
    zero, block = torch.zeros(5, **F64), [torch.arange(5).unsqueeze(0)]
    with torch.no_grad():
        *_, normal = climb._climb(density, zero, block, 50.0 + zero)
        noise = math.sqrt(5.0) * torch.cat([torch.eye(5, **F64), -torch.eye(5, **F64)])
        elbo = normal.elbos(density, noise)[0]
    entropy = float(density.counts.sum()) * 0.5 * (1.0 + math.log(2.0 * math.pi))
    precision, slope = MEAN_SD**-2 + times * 2.0, times * float(x.sum()) / 2.0
    rows = times * float(dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
    expected = rows + 0.5 * slope**2 / precision - 0.5 * math.log(precision * MEAN_SD**2)
    assert elbo + entropy == pytest.approx(expected, abs=1e-5)


def test_no_funnel_is_entered_beside_amortized_groups():
    """Rows that count 30 times make a spike 30 times as high; all normals on the way are too narrow."""
    guide = AmortizedGuide(centred, inputs=lambda y, sigma: y, amortize=["school"]).setup(*schools())
    found = start_from(guide, schools(), {}, Repeats(frozenset({"school"}), 30.0)).found
    assert found["'mu', 'tau'"] == "prior, since log p is far from that of any normal"
    assert guide.median(*schools())["tau"] > 1.0


def test_beside_amortized_groups_the_prior_tells_the_units_of_the_rest():
    """Median and spread of 256 draws of N(0, 50²): within 5 standard errors of 50 · 1.17/√256, 7 %."""
    own = torch.nn.Parameter(torch.tensor(0.0, **F64))
    for model, rows, why in (
        (beside, 300, "prior, since too many rows: 301 values, of at most 256"),
        (lambda x: beside(x + own), 20, "prior, since the model has parameters of its own"),
    ):
        x = torch.randn(rows, **F64)
        guide = AmortizedGuide(model, inputs=lambda x: x, init_scale=0.2).setup(x)
        before, median = guide.network.head(1).example().clone(), guide.network.frame(0, {})[0].clone()
        report = find_start(guide, x)
        assert report.found["'mean'"].startswith(why)
        assert report.found["'z'"] == "left, amortized"
        head = guide.network.heads[0]
        assert 50.0 * 0.65 < float(head.scale.detach()) < 50.0 * 1.35
        loc, spread = (value.detach() for value in guide.network.frame(0, {}))
        assert torch.allclose(loc, median)  # where init_to_median has put it
        assert float(spread / head.scale) == pytest.approx(0.2)
        assert torch.equal(guide.network.head(1).example(), before)


def test_where_nothing_is_learned_nothing_is_done(monkeypatch):
    def rows(x):
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    guide = AmortizedGuide(rows).setup(torch.randn(5))
    monkeypatch.setattr(AmortizedGuide, "_structure", None)  # the model is not looked at
    assert find_start(guide, torch.randn(5)).found == {"'z'": "left, amortized"}


def test_scales_that_rows_share_are_found():
    """Of the rats; posterior means are 6.1, 14.6 and 0.5, the mode's scales somewhat smaller."""
    pyro.set_rng_seed(1)  # from which climbs fail that begin at rows as the prior draws them
    guide = AmortizedGuide(rats.model, inputs=lambda age, weight: weight, amortize=["rat"])
    assert "posterior" in find_start(guide, *rats.load()).found.values()
    median = guide.median(*rats.load())
    for name, expected in (("sigma_y", 6.1), ("sigma_alpha", 14.6), ("sigma_beta", 0.5)):
        assert 0.7 * expected < float(median[name]) < 1.1 * expected


def test_coordinates_are_saved_refined_and_used_in_posteriors(tmp_path):
    x = 70.0 + torch.randn(6, **F64)
    guide = AmortizedGuide(beside)
    find_start(guide, x)
    guide.save(tmp_path / "guide.safetensors")
    loaded = AmortizedGuide.load(tmp_path / "guide.safetensors", beside)
    assert isinstance(loaded.network.heads[0], WhitenedHead)
    assert not loaded.is_trained
    posterior = guide.posterior(x, num_draws=50)
    same = loaded.posterior(x, num_draws=1).log_prob(posterior.draws)
    assert torch.equal(same, guide.posterior(x, num_draws=1).log_prob(posterior.draws))
    before = float((posterior.log_p - posterior.log_q).mean())
    refined = posterior.refine(max_steps=50)
    assert float((refined.log_p - refined.log_q).mean()) > before + 1.0
