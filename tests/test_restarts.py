"""Several starts: where they lie, which of them goes on, and what the result tells."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule
from torch import nn

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    NormalizingFlow,
    NormalMixture,
    find_start,
    fit,
)
from pyro_guides.heads import WhitenedHead
from pyro_guides.structure import read
from pyro_guides.training import stages
from pyro_guides.training.data import arguments_of
from pyro_guides.training.restarts import scatter

F64 = {"dtype": torch.float64}
X = torch.tensor([0.9, 1.0, 1.1, 1.2], **F64)
PRIOR = dist.Normal(torch.tensor([3.0, -5.0], **F64), torch.tensor([2.0, 0.5], **F64))


def shared(x):
    """Two latents that the rows share; the data say more about the first than the prior does."""
    w = pyro.sample("w", PRIOR.to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(w[0], 0.5), obs=x)


def by_row(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(4.0, **F64), 3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_sided(x):
    """The square of m is known; a positive m is better by 2 nats."""
    m = pyro.sample("m", dist.Normal(torch.ones((), **F64), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(m**2, 0.5), obs=x)


def q_of(guide, site="w"):
    """Mean and sd of a normal q, exactly."""
    with torch.no_grad():
        q = pyro.poutine.trace(guide).get_trace(X).nodes[site]["fn"].joint.distribution
        return q.mean.clone(), q.variance.sqrt()


def scattered(guide, model, seed):
    torch.manual_seed(seed)
    scatter(model, guide, arguments_of(X))
    return guide


def prior_draw(model, seed):
    torch.manual_seed(seed)
    return read(model, (X,), {}, init=init_to_sample).values


# --- where starts lie


@pytest.mark.parametrize("family", [DiagonalNormal(), FullRankNormal()], ids=str)
@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_q_moves_to_the_prior_draw_and_keeps_its_spread(family, whitened):
    guide = AmortizedGuide(shared, family=family).setup(X)
    if whitened:
        find_start(guide, X)
    assert isinstance(guide.network.head(0), WhitenedHead) == whitened
    before, spread = q_of(guide)
    scattered(guide, shared, seed=5)
    mean, sd = q_of(guide)
    drawn = prior_draw(shared, seed=5)["w"]
    # The centre of q is that of 64 draws: an error of sd / 8.
    assert float(((mean - drawn) / spread).abs().max()) < 0.5
    assert float(((before - drawn) / spread).abs().max()) > 1.0
    assert torch.allclose(sd, spread, rtol=1e-9)


def test_starts_are_spread_as_the_prior_is():
    guide = AmortizedGuide(shared, family=DiagonalNormal(), init_scale=1e-3).setup(X)
    centres = torch.stack([q_of(scattered(guide, shared, seed))[0] for seed in range(100)])
    off = (centres.mean(0) - PRIOR.mean) / PRIOR.stddev
    assert float(off.abs().max()) < 4.0 / math.sqrt(100)
    ratio = centres.std(0) / PRIOR.stddev
    assert float((ratio - 1.0).abs().max()) < 4.0 / math.sqrt(200)


def test_what_is_amortized_starts_at_one_draw_for_all_rows():
    guide = AmortizedGuide(by_row, MLP(width=8, depth=1), init_scale=1e-3).setup(X)
    scattered(guide, by_row, seed=3)
    mean, _ = q_of(guide, "z")
    assert torch.allclose(mean, mean[0].expand_as(mean), atol=1e-9)
    other, _ = q_of(scattered(guide, by_row, seed=4), "z")
    assert float((mean - other).abs().min()) > 0.1


def test_layers_of_encoders_and_of_models_are_drawn_anew():
    class Decoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1, dtype=torch.float64)
            self.kept = nn.Parameter(torch.ones(2, **F64))

        def forward(self, x):
            with pyro.plate("row", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
                pyro.sample("x", dist.Normal(self.linear(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    model = Decoder()
    guide = AmortizedGuide(model, MLP(width=8, depth=1)).setup(X)
    weights = [model.linear.weight, *guide.network.encoders.parameters()]
    before = [weight.clone() for weight in weights]
    scattered(guide, model, seed=1)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
    assert moved[0]
    assert any(moved[1:])
    assert model.kept.tolist() == [1.0, 1.0]


# --- which of them goes on


def planted(places):
    """Instead of a draw, starts lie at given places, one after the other."""
    places = iter(places)

    def scatter_there(model, guide, batch):
        where = next(places)
        with torch.no_grad():
            guide.network.head(0).bias[0] = where

    return scatter_there


def of_starts(monkeypatch, places, restarts=3, **options):
    monkeypatch.setattr(stages, "scatter", planted(places))
    guide = AmortizedGuide(
        two_sided, family=DiagonalNormal(), init_loc_fn=lambda site: -torch.ones((), **F64)
    )
    options = {"max_steps": 40, "batch_size": None, "seed": 0, "whiten": False, **options}
    result = fit(two_sided, guide, X, restarts=restarts, **options)
    return result, float(guide.median(X)["m"])


@pytest.mark.parametrize(
    ("places", "best", "sign"), [((1.0, -1.1), 1, 1), ((-1.2, 1.0), 2, 1), ((-2.0, 3.0), 0, -1)]
)
def test_the_best_start_goes_on(monkeypatch, places, best, sign):
    result, median = of_starts(monkeypatch, places)
    assert len(result.restarts) == 3
    assert int(np.argmax(result.restarts)) == best
    assert math.copysign(1.0, median) == sign
    assert result.steps == 40  # the steps of the best start are the first of these


def test_it_goes_on_where_its_short_run_ended(monkeypatch):
    kept = []
    original = stages.Stages._choose_start

    def choose(self):
        original(self)
        kept.append(self._done.best_start)

    monkeypatch.setattr(stages.Stages, "_choose_start", choose)
    result, _ = of_starts(monkeypatch, (1.0, -1.1))
    assert kept[0]["at"][0] == 4
    assert kept[0]["losses"].tolist() == result.losses[:4].tolist()


def test_one_start_is_not_scored(monkeypatch):
    result, median = of_starts(monkeypatch, (), restarts=1)
    assert result.restarts == ()
    assert median < 0.0


def test_scores_are_the_elbo_per_row(monkeypatch):
    """All starts at one place: the scores are that place's ELBO, up to the noise of 16 evaluations."""
    result, _ = of_starts(monkeypatch, (1.0, 1.0, 1.0), restarts=4, learning_rate=1e-9, max_steps=2)
    sd = torch.tensor(0.1, **F64)
    m = 1.0 + sd * torch.randn(20_000, generator=torch.Generator().manual_seed(0), **F64)
    log_p = dist.Normal(1.0, 1.0).log_prob(m) + dist.Normal(m.unsqueeze(-1) ** 2, 0.5).log_prob(X).sum(-1)
    values = (log_p - dist.Normal(1.0, sd).log_prob(m)) / 4
    assert result.restarts[1:] == pytest.approx(
        [float(values.mean())] * 3, abs=4.0 * float(values.std()) / 4.0
    )
    assert result.restarts[0] < result.restarts[1] - 0.3  # at -1


def test_a_seed_gives_the_same_starts():
    def run(seed):
        guide = AmortizedGuide(two_sided)
        options = {"max_steps": 5, "batch_size": None, "seed": seed, "whiten": False}
        return fit(two_sided, guide, X, restarts=3, **options).restarts

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_guide_without_families_keeps_its_parameters():
    guide = AutoNormal(two_sided)
    result = fit(two_sided, guide, X, restarts=2, max_steps=5, batch_size=None, seed=0)
    assert len(result.restarts) == 2


@pytest.mark.parametrize(
    "family", [NormalMixture(2), NormalizingFlow(2, hidden=(8,), context_size=4)], ids=str
)
def test_mixtures_and_flows_move_as_well(family):
    guide = AmortizedGuide(shared, amortize=(), family=family, init_scale=0.01).setup(X)
    w = prior_draw(shared, 5)["w"]
    scattered(guide, shared, 5)
    lies = guide.posterior(X, num_draws=400).draws["w"].mean(0)
    assert torch.allclose(lies, w, atol=0.2)  # from 0.97 away; q is found from 64 draws
