"""Rows unlike those of training: false alarms at the stated rate, and odd digits found."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gallery.images import VAE, digits
from pyro.infer import SVI, Trace_ELBO
from test_posterior import Column, by_itself, rows
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, optim
from pyro_guides.diagnostics import familiarity as familiarity_module
from pyro_guides.diagnostics.familiarity import Familiarity

LEVELS = (0.01, 0.05)


def plane(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


class Itself(nn.Module):
    def forward(self, x):
        return x


def shares(p):
    """The share of p-values at or below each level."""
    return [float((p <= level).double().mean()) for level in LEVELS]


# --- the numbers


def test_p_values_by_hand():
    x = torch.randn(101, 2) * torch.tensor([1.0, 30.0])
    guide = AmortizedGuide(plane, Itself()).setup(x)
    familiarity = Familiarity(guide, x)
    new = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [-2.0, 60.0]])
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    near, others = x[order[:51]].numpy(), x[order[51:]].numpy()  # an odd one is to compare with

    def distances(points):
        units = near.std(0, ddof=1)
        units = units + 1e-3 * units.mean()
        return np.sqrt((((points[:, None] - near) / units) ** 2).sum(-1)).min(1)

    known, found = distances(others), distances(new.numpy())
    expected = [(1 + (known >= d).sum()) / 51 for d in found]
    assert familiarity.p_values(new).tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] > 0.05
    assert expected[1] == 1 / 51
    assert repr(familiarity) == "Familiarity(101 rows of training)"


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_false_alarms_have_the_stated_rate(scale):
    """Over 150 training sets of 200 rows from a distribution with heavy tails."""
    guide = AmortizedGuide(plane, Itself()).setup(torch.randn(200, 2))
    x = torch.distributions.StudentT(4.0).sample((150, 400, 2))
    p = torch.stack([Familiarity(guide, own[:200]).p_values(scale * own[200:]) for own in x])
    found = shares(p)
    for share, level in zip(found, LEVELS, strict=True):
        exact = math.floor(level * 101) / 101  # p-values are multiples of 1/101
        error = math.sqrt(exact * (1 - exact) / 150 * (1 / 100 + 1 / 200))
        assert (share - exact < 4 * error) == (scale == 1.0)
        assert scale > 1.0 or share - exact > -4 * error


def test_rows_do_not_see_each_other_and_nothing_else_changes():
    x = torch.randn(300, 2)
    guide = AmortizedGuide(plane, MLP(8)).setup(x)
    before = torch.get_rng_state()
    one, two = (Familiarity(guide, x) for _ in range(2))
    new = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)) * 3
    together = one.p_values(new)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(together, two.p_values(new))
    assert torch.equal(together, torch.cat([one.p_values(new[i : i + 1]) for i in range(5)]))
    assert not together.requires_grad
    assert guide.training
    assert all(p.grad is None and p.requires_grad for p in guide.parameters())


def test_memory_is_bounded(monkeypatch):
    x = torch.randn(300, 2)
    guide = AmortizedGuide(plane, Itself()).setup(x)
    whole = Familiarity(guide, x).p_values(2 * x)
    monkeypatch.setattr(familiarity_module, "_ROWS_AT_ONCE", 7)
    assert torch.equal(Familiarity(guide, x).p_values(2 * x), whole)
    monkeypatch.setattr(familiarity_module, "_MOST", 100)
    part = Familiarity(guide, x)
    assert repr(part) == "Familiarity(100 rows of training)"
    assert float(part.p_values(2 * x).min()) == pytest.approx(1 / 51)


def test_rows_between_two_clusters_are_found():
    """As they would not be by their distance to the mean of all rows."""
    x = torch.randn(400, 2) * 0.3 + torch.tensor([3.0, 3.0]) * (torch.arange(400) % 2 * 2 - 1)[:, None]
    guide = AmortizedGuide(plane, Itself()).setup(x)
    assert float(Familiarity(guide, x).p_values(torch.zeros(1, 2))) < 0.01


def test_an_element_without_spread_is_no_matter_of_rounding():
    x = torch.randn(200, 2) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1e-3])
    familiarity = Familiarity(AmortizedGuide(plane, Itself()).setup(x), x)
    assert float(familiarity.p_values(torch.tensor([[0.1, 1e-3 + 1e-9]]))) > 0.1
    assert float(familiarity.p_values(torch.tensor([[0.1, 1.0]]))) < 0.01


# --- models of every shape


def nested(x):
    with pyro.plate("group", len(x), dim=-2):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("item", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def sequence(x):
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def pair(x, y):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def first(x, y):
    return x


def second(x, y):
    return y


def odd_row(shape, at):
    """Rows of ones, one of which is far off."""
    x = torch.ones(shape)
    x[at] = 30.0
    return x


TWO = {
    "encoder": {"a": MLP(8), "b": MLP(8)},
    "inputs": {"a": first, "b": second},
    "family": {"b": DiagonalNormal()},  # a group of its own
}
SAME = torch.Generator().manual_seed(0)
SHAPES = {  # model, options, arguments in training, new arguments, their p-values that are small
    "rows": (rows, {}, (torch.randn(250, generator=SAME),), (odd_row(6, 2),), [2]),
    "itself": (by_itself, {}, (torch.randn(250, generator=SAME),), (odd_row(250, 2),), [2]),
    "shared": (shared, {}, (torch.randn(250, generator=SAME),), (odd_row(6, 2),), [2]),
    "nested": (nested, {}, (torch.randn(250, 4, generator=SAME),), (odd_row((5, 4), 3),), [3]),
    "sequence": (sequence, {}, (torch.randn(250, 4, generator=SAME),), (odd_row((5, 4), 3),), [3]),
    "two encoders": (
        pair,
        TWO,
        (torch.randn(250, generator=SAME), torch.randn(250, generator=SAME)),
        (odd_row(6, 2), odd_row(6, 4)),
        [2, 4],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_models_of_every_shape(name):
    model, options, training, new, odd = SHAPES[name]
    pyro.set_rng_seed(0)  # the encoder's weights: far in one is not far in every other
    familiarity = Familiarity(AmortizedGuide(model, **options).setup(*training), *training)
    p = familiarity.p_values(*new)
    assert p.shape == (len(new[0]),)
    assert (p < 0.01).nonzero().flatten().tolist() == odd


# --- real images


@pytest.fixture(scope="module")
def autoencoder():
    """An autoencoder of 1,200 digits, trained for some seconds, and 597 others."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x, _ = digits()
    model = VAE()
    guide = AmortizedGuide(model).setup(x[:1200])
    svi = SVI(model, guide, optim.Adam({"lr": 0.005}), Trace_ELBO())
    for _ in range(120):
        svi.step(x[torch.randint(1200, (128,))])
    return Familiarity(guide, x[:1200]), x[1200:]


def test_digits_that_were_held_out_are_familiar(autoencoder):
    familiarity, x = autoencoder
    found = shares(familiarity.p_values(x))
    print("false alarms at", LEVELS, found)
    for share, level in zip(found, LEVELS, strict=True):
        assert abs(share - level) < 3.5 * math.sqrt(level * (1 - level) * (1 / 600 + 1 / len(x)))


ODD = {
    "noise": lambda x: torch.rand_like(x) * 16,
    "inverted": lambda x: 16 - x,
    "permuted pixels": lambda x: x[:, torch.randperm(64)],
    "three times as bright": lambda x: 3 * x,
    "turned": lambda x: x.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
    "with little noise": lambda x: x + 2 * torch.randn_like(x),
    "blank": torch.zeros_like,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_digits_are_found(autoencoder, name):
    familiarity, x = autoencoder
    found = shares(familiarity.p_values(ODD[name](x)))
    print(name, "found at", LEVELS, found)
    assert found[0] > 0.95


# --- errors


def test_a_guide_that_was_trained_on_needs_a_new_one():
    x = torch.randn(100)
    guide = AmortizedGuide(rows, MLP(8)).setup(x)
    familiarity = Familiarity(guide, x)
    with torch.no_grad():
        guide.network.heads[0].output.bias.add_(1.0)  # which contexts do not depend on
    familiarity.p_values(x)
    svi = SVI(rows, guide, optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):  # the head starts at zero, so the encoder learns from the second step on
        svi.step(x)
    with pytest.raises(ValueError, match=r"the encoder has been trained since, .* make a new Familiarity"):
        familiarity.p_values(x)


def whole(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: AmortizedGuide(rows, Column()).setup(x[:49]), ValueError, "at least 50 .* got 49"),
        (lambda x: AmortizedGuide(rows, amortize=()).setup(x), ValueError, "the guide has no encoder"),
        (lambda x: AmortizedGuide(whole, DeepSet()).setup(x), ValueError, "data set as a whole"),
        (lambda x: AmortizedGuide(rows), RuntimeError, "no parameters yet"),
    ],
    ids=["few rows", "learned", "whole", "not set up"],
)
def test_errors_say_what_to_do(make, error, message):
    x = torch.randn(49)
    with pytest.raises(error, match=message):
        Familiarity(make(x), x)
