"""Rows that are impossible, starts that fail, batches of one: what must not spoil the rest."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import F64, around
from torch.utils.data import DataLoader, TensorDataset

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    Familiarity,
    FullRankNormal,
    check,
    fit,
    to_arviz,
)


@pytest.fixture(autouse=True)
def a_seed():
    pyro.set_rng_seed(0)


# --- rows that q cannot reach


def possible(x):
    """What a row says of z is impossible beyond one unit."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **F64), 1.0))
        pyro.sample("x", dist.Uniform(z - 1.0, z + 1.0, validate_args=False), obs=x)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_impossible_row_leaves_the_others_their_answers():
    x = torch.tensor([0.0, 0.3, 90.0], **F64)
    posterior = AmortizedGuide(possible, init_scale=0.05).posterior(x, num_draws=200)
    assert posterior.k_hat[2] == torch.inf
    assert posterior.effective_size[2] == 0.0
    assert posterior.bound()[0][2] == -torch.inf
    assert bool(posterior.k_hat[:2].isfinite().all())
    report = check(posterior, show=False)
    assert report.trusted[2].item() is False
    assert "In 1 of 3 rows q draws what the model rules out" in str(report)
    assert math.isinf(float(to_arviz(posterior).sample_stats["k_hat"][2]))
    with pytest.raises(ValueError, match=r"weight zero in 1 of 3 rows, the first at \[2\]"):
        posterior.resample()


def far_off(x):
    """Two latents, of which a factor rules out all that the last row could have."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **F64), 1.0))
        w = pyro.sample("w", dist.Normal(z, 0.5))
        never = torch.full((), -math.inf, **F64)
        pyro.factor("f", torch.where((x > 50.0) & (z < 30.0), never, -(((x - w) / 0.1) ** 2) / 2))


def test_an_impossible_row_does_not_stop_refinement():
    x = torch.linspace(-6.0, 6.0, 20, **F64)
    guide = AmortizedGuide(far_off, init_scale=0.01, inputs=lambda x: x.unsqueeze(-1)).setup(x)
    alone = guide.posterior(x, num_draws=200).refine().gain
    beside = guide.posterior(torch.cat([x, x.new_tensor([100.0])]), num_draws=200).refine().gain
    assert beside.steps > 500
    assert beside.value[20] == 0.0
    torch.testing.assert_close(beside.value[:20], alone.value, rtol=0.02, atol=0.5)


# --- the training loop


def line(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), **F64), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_validation_with_everything_counts_its_own_rows():
    x, held = torch.randn(1000, **F64), torch.randn(100, **F64)
    found = {}
    for size in (None, 128):
        guide = AmortizedGuide(line, amortize=())
        result = fit(line, guide, x, validation=held, batch_size=size, max_steps=60, seed=0, progress=False)
        found[size] = result.best.elbo
    exact = float(dist.Normal(x.mean(), 1.0).log_prob(held).mean())
    # What is shared counts for 100 rows in one and for 1,000 in the other: KL/100, at most 0.05 nats.
    assert found[128] == pytest.approx(exact, abs=0.02)
    assert found[None] == pytest.approx(exact, abs=0.06)


def rows(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_share_that_cannot_be_held_out_is_an_error():
    x = torch.randn(40, **F64)
    loader = DataLoader(TensorDataset(x), batch_size=10)
    with pytest.raises(ValueError, match=r"validation=0.5 of the rows cannot be held out with a DataLoader"):
        fit(rows, AmortizedGuide(rows), loader, validation=0.5, max_steps=5)
    with pytest.raises(ValueError, match=r"cannot be held out with batch_size=None"):
        fit(rows, AmortizedGuide(rows), x, batch_size=None, validation=0.5, max_steps=5)
    assert fit(rows, AmortizedGuide(rows), loader, max_steps=5, progress=False).looks == ()


def test_batches_of_one_row_and_epochs_of_one_step():
    x = torch.randn(8, **F64)
    assert fit(rows, AmortizedGuide(rows), x, batch_size=1, max_epochs=1, validation=None).steps == 8
    assert fit(rows, AmortizedGuide(rows), x, batch_size=None, max_epochs=3).steps == 3


def pit(x):
    """Not a number from 20 on, where some starts begin."""
    s = pyro.sample("s", dist.Normal(torch.zeros((), **F64), 30.0))
    v = torch.where(s > 20.0, torch.full_like(s, math.nan), s)
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(v, 1.0, validate_args=False), obs=x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_start_that_fails_is_given_up(caplog):
    x = torch.randn(50, **F64)
    guide = AmortizedGuide(pit, amortize=())
    with caplog.at_level("WARNING", logger="pyro_guides"):
        result = fit(pit, guide, x, max_steps=200, restarts=8, seed=0, progress=False)
    assert "is given up" in caplog.text
    assert math.isfinite(result.losses[-1])
    assert float(guide.median(x)["s"]) == pytest.approx(float(x.mean()), abs=0.3)


hierarchy = around(1.0)


def test_the_ladder_judges_what_rows_share_by_the_rows_of_training():
    x = 3.0 + 2.0**0.5 * torch.randn(300, **F64)
    guide = AmortizedGuide(hierarchy, family=DiagonalNormal())
    result = fit(hierarchy, guide, x, ladder=[FullRankNormal()], max_steps=400, seed=0, progress=False)
    assert "rich enough" in result.rungs[0].verdict  # independent normals are exact here
    assert set(guide.families) == {DiagonalNormal()}


def test_familiarity_is_that_of_the_guide_that_is_checked():
    x = torch.randn(60, 2, **F64)

    def two(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    one, other = AmortizedGuide(two).setup(x), AmortizedGuide(two).setup(x)
    known, options = Familiarity(other, x), {"gaps": False, "modes": False, "show": False}
    assert "familiarity" in check(other.posterior(x, num_draws=50), training=known, **options).columns
    with pytest.raises(ValueError, match="Familiarity of other encoders"):
        check(one.posterior(x, num_draws=50), training=known, **options)
