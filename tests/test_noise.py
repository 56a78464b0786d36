"""gradient_noise(): against the analytic signal and noise, and where there is none."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, gradient_noise

F64 = {"dtype": torch.float64}


def model(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shifted():
    """q = N(loc, 1) for a posterior N(0, 1): the gradient in loc is loc + ε, its sd 1."""
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.0, **F64)), 1.0))


def test_signal_and_noise_of_a_known_gradient():
    def standard():
        pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))

    found = gradient_noise(Trace_ELBO(), standard, shifted, repeats=400)
    assert found.signal["store loc"] == pytest.approx(3.0, abs=0.2)  # 4 standard errors
    assert found.noise["store loc"] == pytest.approx(1.0, abs=0.15)
    particles = gradient_noise(Trace_ELBO(num_particles=16), standard, shifted, repeats=60)
    assert particles.noise["store loc"] == pytest.approx(0.25, abs=0.1)


def test_each_group_has_its_own_line():
    guide = AmortizedGuide(model, MLP(width=8, depth=1))
    found = gradient_noise(Trace_ELBO(), model, guide, torch.linspace(-2.0, 2.0, 20, **F64))
    assert list(found.noise) == ["encoder", "latents 'z'"]
    assert found.noise["encoder"] == 0.0  # the head starts at zero, so nothing reaches the encoder
    assert found.noise["latents 'z'"] > 0.0
    assert repr(found).splitlines()[0].split() == ["gradient", "of", "signal", "noise", "ratio"]


def test_sticking_the_landing_shows():
    x = torch.linspace(-2.0, 2.0, 20, **F64)
    noises = []
    for stick in (True, False):
        guide = AmortizedGuide(
            model, amortize=[], family=FullRankNormal(stick_the_landing=stick), init_scale=0.2**0.5
        )
        guide.setup(x)
        with torch.no_grad():
            guide.network.head(0).bias[:, 0] = 0.8 * x
        noises.append(gradient_noise(Trace_ELBO(), model, guide, x).noise["latents 'z'"])
    assert noises[0] < 1e-5 < 0.1 < noises[1]


def test_nothing_is_left_behind():
    guide = AmortizedGuide(model, MLP(width=8, depth=1), family=DiagonalNormal())
    before = torch.get_rng_state()
    gradient_noise(TraceMeanField_ELBO(), model, guide, torch.linspace(-2.0, 2.0, 20, **F64), repeats=2)
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"repeats": 1}, ValueError, "at least 2"),
        ({"repeats": 0.5}, TypeError, "must be an int"),
        ({"elbo": Trace_ELBO}, TypeError, r"write Trace_ELBO\(\)"),
        ({"guide": lambda x: None}, ValueError, "nothing to train"),
    ],
)
def test_bad_input(options, error, message):
    def fixed(x):
        pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0), obs=x.mean())

    options = {"elbo": Trace_ELBO(), "guide": AmortizedGuide(model), **options}
    chosen = fixed if "nothing" in message else model
    with pytest.raises(error, match=message):
        gradient_noise(options.pop("elbo"), chosen, options.pop("guide"), torch.zeros(3, **F64), **options)


def test_ratio_without_noise_is_infinite():
    found = gradient_noise(
        TraceMeanField_ELBO(), model, AmortizedGuide(model, amortize=[]), torch.zeros(3, **F64)
    )
    assert not math.isnan(sum(found.ratio.values()))
