"""Promotion: the same q in a richer family, with everything that was learned."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import F64, prepared, rows, two
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    Discrete,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    optim,
)

FLOW = NormalizingFlow(2, hidden=(8,), context_size=4)
# Steps that change q by no more than rounding, and those that split components apart.
EXACT = {
    "diagonal to low rank": (DiagonalNormal(), LowRankNormal(1)),
    "diagonal to full rank": (DiagonalNormal(), FullRankNormal()),
    "low rank to more ranks": (LowRankNormal(1), LowRankNormal(2)),
    "low rank to full rank": (LowRankNormal(2), FullRankNormal()),
    "diagonal to flow": (DiagonalNormal(), FLOW),
    "low rank to flow": (LowRankNormal(1), FLOW),
    "full rank to flow": (FullRankNormal(), FLOW),
    "full rank to one component": (FullRankNormal(), NormalMixture(1)),
    "diagonal to full mixture": (NormalMixture(3, "diagonal"), NormalMixture(3)),
    "fixed weights to learned ones": (NormalMixture(3, learn_weights=False), NormalMixture(3)),
    "another estimator": (FullRankNormal(), FullRankNormal(stick_the_landing=False)),
}
SPLIT = {
    "diagonal to mixture": (DiagonalNormal(), NormalMixture(2, "diagonal")),
    "low rank to mixture": (LowRankNormal(1), NormalMixture(3)),
    "full rank to mixture": (FullRankNormal(), NormalMixture(4)),
    "full rank to equal weights": (FullRankNormal(), NormalMixture(2, learn_weights=False)),
    "mixture to more components": (NormalMixture(2), NormalMixture(5)),
}
LOSSY = {
    "full rank to diagonal": (FullRankNormal(), DiagonalNormal()),
    "full rank to low rank": (FullRankNormal(), LowRankNormal(1)),
    "more ranks to fewer": (LowRankNormal(2), LowRankNormal(1)),
    "mixture to full rank": (NormalMixture(2), FullRankNormal()),
    "mixture to fewer components": (NormalMixture(3), NormalMixture(2)),
    "mixture to flow": (NormalMixture(2), FLOW),
    "full rank to diagonal mixture": (FullRankNormal(), NormalMixture(2, "diagonal")),
    "learned weights to fixed ones": (NormalMixture(3), NormalMixture(3, learn_weights=False)),
    # λ of these two happens to have the same length: 9 components of 9 + 1 values, or 10 of 9
    "a λ of the same length": (NormalMixture(9), NormalMixture(10, learn_weights=False)),
    "flow to full rank": (FLOW, FullRankNormal()),
    "flow to mixture": (FLOW, NormalMixture(2)),
    "flow to another flow": (FLOW, NormalizingFlow(3, hidden=(8,), context_size=4)),
    "full rank to a discrete table": (FullRankNormal(), Discrete()),
}


def correlated(x):
    """A learned site above; two sites of one group below, one of them positive, correlated by the data."""
    noise = pyro.sample("noise", dist.LogNormal(two(0.0)[0], 0.5))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(two(0.0)[0], 1.0))
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        loc = torch.stack([z[..., 0] + a.log(), z[..., 0] - z[..., 1]], dim=-1)
        pyro.sample("x", dist.Normal(loc, noise.unsqueeze(-1)).to_event(1), obs=x)


def log_ratio(guide, x, draws):
    """Log q of given draws, per draw."""
    return guide.posterior(x, num_draws=1).log_prob(draws)


def by(steps):
    return pytest.mark.parametrize(("before", "after"), steps.values(), ids=steps)


@by(EXACT)
@pytest.mark.parametrize("amortize", [None, ()], ids=["amortized", "learned"])
def test_q_stays_the_same(before, after, amortize):
    guide = prepared(correlated, rows(), family={"data": before}, amortize=amortize)
    draws = guide.posterior(rows(), num_draws=50).draws
    promoted = guide.promote({"data": after})
    old, new = log_ratio(guide, rows(), draws), log_ratio(promoted, rows(), draws)
    assert (old - new).abs().max() < 1e-7
    with torch.no_grad():  # control: a change of λ that is smaller than a step of training
        for parameter in promoted.network.heads[1].change.parameters():
            parameter.add_(1e-3)
    assert (old - log_ratio(promoted, rows(), draws)).abs().max() > 1e-5


# A Cholesky factor turns the noise; a mixture has a choice to make.
OTHER_NOISE = (
    "low rank to full rank",
    "low rank to flow",
    "diagonal to full mixture",
    "full rank to one component",
)


@by({name: step for name, step in EXACT.items() if name not in OTHER_NOISE})
def test_the_same_noise_gives_the_same_draws_and_elbo(before, after):
    guide = prepared(correlated, rows(), family={"data": before})
    if before == DiagonalNormal():  # whose sites are drawn one by one
        guide = prepared(lambda x: correlated_pair(x), rows(), family={"data": before})
    promoted = guide.promote({"data": after})
    found = []
    for each in (guide, promoted):
        pyro.set_rng_seed(1)
        found.append(each.posterior(rows(), num_draws=40))
        assert found[-1].draws
    for name, draws in found[0].draws.items():
        assert torch.allclose(draws, found[1].draws[name], rtol=1e-8, atol=1e-8)
    elbos = [(p.log_p - p.log_q).mean() for p in found]
    assert (elbos[0] - elbos[1]).abs() < 1e-5


def correlated_pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.cumsum(-1), 0.5).to_event(1), obs=x)


@by(SPLIT)
def test_splitting_components_costs_next_to_nothing(before, after):
    """KL(old || new) by 20,000 draws: it must be below two standard errors, or 1e-5."""
    guide = prepared(correlated, rows(), family={"data": before})
    promoted = guide.promote({"data": after})
    draws = guide.posterior(rows(), num_draws=20_000).draws
    difference = log_ratio(guide, rows(), draws) - log_ratio(promoted, rows(), draws)
    error = difference.std() / math.sqrt(len(difference))
    assert difference.mean() < max(2.0 * error, 1e-5)
    components = promoted.network.family(1).directions  # yet no two start at the same point
    assert torch.pdist(components).min() > 0.05


@by(LOSSY)
def test_steps_that_lose_something_are_refused(before, after):
    guide = prepared(correlated, rows(), family={"data": before})
    kept = {name: value.clone() for name, value in guide.state_dict().items()}
    with pytest.raises(ValueError, match=r"'a', 'z' cannot be promoted from|for discrete latents"):
        guide.promote({"data": after})
    for name, value in guide.state_dict().items():
        assert torch.equal(value, kept[name])


LADDER = [DiagonalNormal(), LowRankNormal(1), FullRankNormal(), NormalMixture(2)]


def fit(guide, x, steps, rate):
    optimizer = optim.Adam({"lr": rate}, schedule=lambda step: 1.0 - step / steps)
    svi = SVI(guide.model, guide, optimizer, TraceGraph_ELBO())
    for _ in range(steps):
        svi.step(x)


def elbo(guide, x, draws=2_000):
    posterior = guide.posterior(x, num_draws=draws)
    values = posterior.log_p - posterior.log_q
    values = values if values.dim() == 1 else values.sum(-1)
    return float(values.mean()), float(values.std()) / math.sqrt(draws)


@pytest.mark.slow
def test_a_ladder_only_goes_up():
    x = torch.randn(60, 2, **F64).cumsum(-1)
    guide = AmortizedGuide(correlated_pair, family=LADDER[0]).setup(x)
    fit(guide, x, 300, 1e-2)
    for _, family in pairwise(LADDER):
        before, error = elbo(guide, x)
        guide = guide.promote(family)
        after, other = elbo(guide, x)
        assert abs(after - before) < 3.0 * math.hypot(error, other) + 1e-5
        fit(guide, x, 200, 3e-3)
        trained, other = elbo(guide, x)
        assert trained > before - 3.0 * math.hypot(error, other)
    assert elbo(guide, x)[0] > before - 3.0 * error


def test_only_what_is_new_is_trained_where_the_caller_wishes():
    x = rows(8)
    guide = prepared(correlated, x, family=DiagonalNormal())
    promoted = guide.promote(FullRankNormal(), only_new=True)
    kept = {name: p.clone() for name, p in promoted.named_parameters() if not p.requires_grad}
    assert {name for name in kept if "encoders" in name}
    assert {name for name in kept if "heads.0" in name}
    svi = SVI(correlated, promoted, optim.Adam({"lr": 1e-2}), Trace_ELBO())
    fresh = [p.clone() for p in promoted.parameters() if p.requires_grad]
    for _ in range(5):
        svi.step(x)
    assert all(torch.equal(dict(promoted.named_parameters())[name], value) for name, value in kept.items())
    now = [p for p in promoted.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(fresh, now, strict=True))
    assert all(p.requires_grad for p in guide.promote(FullRankNormal()).parameters())


def test_the_old_guide_is_left_alone_and_both_train():
    x = rows(8)
    guide = prepared(correlated, x, family=FullRankNormal())
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    promoted = guide.promote({"data": NormalMixture(2)})
    svi = SVI(correlated, promoted, optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    assert all(torch.equal(guide.state_dict()[name], value) for name, value in before.items())
    svi = SVI(correlated, guide, optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x)
    assert any(not torch.equal(guide.state_dict()[name], value) for name, value in before.items())


def test_a_promoted_guide_can_be_saved_copied_and_promoted_again(tmp_path):
    guide = prepared(correlated, rows(), family=DiagonalNormal())
    for family in (LowRankNormal(1), FullRankNormal(), FLOW):
        guide = guide.promote({"data": family})
        assert guide.families[1] == family
    other = prepared(correlated, rows(), family=DiagonalNormal())
    for family in (LowRankNormal(1), FullRankNormal(), FLOW):
        other = other.promote({"data": family})
    other.load_state_dict(guide.state_dict())
    draws = guide.posterior(rows(), num_draws=5).draws
    assert torch.allclose(log_ratio(guide, rows(), draws), log_ratio(other, rows(), draws))


def test_discrete_groups_keep_their_tables():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2, **F64)))
            z = pyro.sample("z", dist.Normal(two(-1.0, 1.0)[k], 0.5))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = rows()[:, 0]
    guide = prepared(model, x).promote(NormalMixture(2))
    assert guide.families == (Discrete(), NormalMixture(2))
    assert guide.promote({"data": NormalMixture(3)}).families == (Discrete(), NormalMixture(3))
    assert guide.promote({"k": Discrete(enumerate="parallel")}).families[0].enumerate == "parallel"
    with pytest.raises(ValueError, match="is discrete"):
        guide.promote({"k": FullRankNormal()})


def test_bad_input():
    guide = AmortizedGuide(correlated)
    with pytest.raises(RuntimeError, match="no parameters yet"):
        guide.promote(FullRankNormal())
    guide = prepared(correlated, rows())
    other = prepared(correlated, rows())
    for wrong in (other, "full", FullRankNormal, {"data": other}):
        with pytest.raises(TypeError, match="takes a family such as"):
            guide.promote(wrong)
    with pytest.raises(ValueError, match=r"names \['y'\]"):
        guide.promote({"y": NormalMixture(2)})
    for nothing in ({}, FullRankNormal()):
        with pytest.raises(ValueError, match="changes nothing"):
            guide.promote(nothing, only_new=True)
    with pytest.raises(ValueError, match="drawn jointly: name all of them"):
        guide.promote({"a": NormalMixture(2)})
