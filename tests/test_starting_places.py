"""Starts where a normal over all values sees too little: funnels, and posteriors with several modes."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_guides import AmortizedGuide, FullRankNormal, NormalMixture, find_start
from pyro_guides.starting import profile, target
from pyro_guides.starting.climb import Normal, relaxed

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- funnels: effects of coaching in eight schools (Donald Rubin, 1981), as drawn around their mean


def schools(effects, errors):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("seen", dist.Normal(effect, errors), obs=effects)


def exact_log_spread(effects=EFFECTS, errors=ERRORS):
    """Mean and sd of the posterior's log spread: effects are integrated out exactly, the rest on a grid."""
    mean, log_spread = torch.linspace(-20.0, 30.0, 501), torch.linspace(-6.0, 5.0, 1101)
    mean, spread = mean.unsqueeze(-1), log_spread.exp()
    total = (errors**2 + spread.unsqueeze(-1) ** 2).sqrt()  # (1101, 8)
    log_p = dist.Normal(mean.unsqueeze(-1), total).log_prob(effects).sum(-1)
    log_p = log_p + dist.Normal(0.0, 5.0).log_prob(mean) + dist.HalfCauchy(5.0).log_prob(spread) + log_spread
    weights = log_p.flatten().softmax(0).reshape(log_p.shape).sum(0)
    centre = weights @ log_spread
    return centre, (weights @ (log_spread - centre) ** 2).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_scale_of_a_hierarchy_starts_where_its_marginal_lies(seed):
    pyro.set_rng_seed(seed)
    guide = AmortizedGuide(schools, family=FullRankNormal(), amortize=())
    find_start(guide, EFFECTS, ERRORS)
    drawn = guide.posterior(EFFECTS, ERRORS, num_draws=2000).draws["spread"].log()
    centre, sd = exact_log_spread()
    assert abs(drawn.mean() - centre) < sd  # the normal of all values has its mean 3 sd or 1.3 sd away,
    assert 0.5 * sd < drawn.std() < 1.5 * sd  # and an eighth of the width


def in_the_spike(density, starts, blocks, wide):
    """A normal where all effects are their mean, and their spread is next to nothing."""
    u = starts[0].clone()
    u[1] = -8.0
    u = relaxed(density, u, 2, wide)
    return Normal.around(u, blocks, density.expand(u, blocks)[2], wide)


@pytest.mark.parametrize("jumps", [True, False])
def test_a_climb_that_ended_in_a_spike_is_led_out_of_it(monkeypatch, jumps):
    """Control: without a jump, as many sweeps of steps as wide as the spike do not lead out."""
    pyro.set_rng_seed(0)
    effects, errors = 3.0 + 2.0 * torch.randn(12), torch.ones(12)
    monkeypatch.setattr(target, "best_normal", in_the_spike)
    monkeypatch.setattr(profile, "_SWEEPS", 2)
    if not jumps:
        monkeypatch.setattr(profile, "_FAR_OFF", float("inf"))
    guide = AmortizedGuide(schools, family=FullRankNormal(), amortize=())
    find_start(guide, effects, errors)
    drawn = guide.posterior(effects, errors, num_draws=2000).draws["spread"].log()
    centre, sd = exact_log_spread(effects, errors)
    near = abs(drawn.mean() - centre) < 0.5 * sd and 0.7 * sd < drawn.std() < 1.4 * sd
    assert near == jumps


# --- several modes


def folded(y):
    z = pyro.sample("z", dist.Normal(0.1, 1.0))
    pyro.sample("y", dist.Normal(z.abs(), 0.2), obs=y)


def exact_share_above(y):
    z = torch.linspace(-5.0, 5.0, 20_001)
    weights = (dist.Normal(0.1, 1.0).log_prob(z) + dist.Normal(z.abs(), 0.2).log_prob(y)).softmax(0)
    return weights[z > 0].sum()


@pytest.mark.parametrize("components", [2, 3])
def test_a_mixture_starts_on_all_modes_with_their_shares(components):
    y = torch.tensor(1.5)
    guide = AmortizedGuide(folded, family=NormalMixture(components))
    assert "2 modes" in str(find_start(guide, y))
    above = (guide.posterior(y, num_draws=4000).draws["z"] > 0).double().mean()
    assert abs(above - exact_share_above(y)) < 0.03  # four standard errors


def test_control_one_mode_is_none_of_several():
    guide = AmortizedGuide(folded, family=NormalMixture(2))
    assert "modes" not in str(find_start(guide, torch.tensor(-3.0)))
