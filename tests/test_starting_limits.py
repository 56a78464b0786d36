"""Starts where something is in the way: masks, live supports, encoders without rows, size, errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import F64, around
from pyro import poutine

from pyro_guides import AmortizedGuide, DeepSet, DiagonalNormal, FullRankNormal, fit
from pyro_guides.diagnostics.landscape import Landscape
from pyro_guides.posterior import Query
from pyro_guides.starting import find_start, start, target
from pyro_guides.starting.density import Density


@pytest.fixture(autouse=True)
def a_seed():
    pyro.set_rng_seed(0)


def pooled(x):
    """What rows share lies without plates, and is in two groups."""
    a = pyro.sample("a", dist.Normal(torch.zeros((), **F64), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros((), **F64), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(a + 2.0 * b, 1.0), obs=x)


def test_an_encoder_without_rows_stands_beside():
    x = 3.0 + torch.randn(30, **F64)
    guide = AmortizedGuide(
        pooled,
        family={"a": FullRankNormal(), "b": FullRankNormal()},
        encoder={"b": DeepSet()},
        inputs={"b": lambda x: x},
    )
    assert find_start(guide, x).found == {"'a'": "posterior", "'b'": "amortized, centred"}
    # The mode of both, from two equations: what is found is the normal's.
    precision = torch.eye(2, **F64) + len(x) * torch.tensor([[1.0, 2.0], [2.0, 4.0]], **F64)
    mean = torch.linalg.solve(precision, torch.stack([x.sum(), 2.0 * x.sum()]))
    assert float(guide.median(x)["b"]) == pytest.approx(float(mean[1]), abs=1e-6)


KEPT = torch.tensor([True, True, True, False])


def masked(x):
    with pyro.plate("k", 4), poutine.mask(mask=KEPT):
        s = pyro.sample("s", dist.LogNormal(torch.zeros(4, **F64), 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(4, **F64), s), obs=x)


def test_what_is_masked_has_no_say():
    x = torch.tensor([1.0, 2.0, 3.0, 1.0], **F64)
    guide = AmortizedGuide(masked, amortize=()).setup(x)
    query = Query.of(guide, (x,), {})
    u = torch.zeros(2, 4, **F64)
    u[1, 3] = 30.0  # an element that is masked, far out
    for heights in (Density(query).log_prob(u), Landscape(query).log_prob(u.unsqueeze(-1))):
        assert float(heights[0].sum()) == pytest.approx(float(heights[1].sum()), abs=1e-9)
    find_start(guide, x)
    assert guide.median(x)["s"][3] < 20.0
    assert guide.median(x)["s"][:3].tolist() == pytest.approx([1.0, 1.64, 2.23], rel=0.15)


def bounded(x):
    """The support of each row's latent is another latent's."""
    top = pyro.sample("top", dist.LogNormal(torch.zeros((), **F64), 3.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Uniform(torch.zeros((), **F64), top))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def test_a_support_that_moves_is_told_as_the_reason():
    found = find_start(AmortizedGuide(bounded), 5.0 * torch.rand(40, **F64)).found
    assert found == {"'top'": "prior", "'z'": "left, support, mask or scale depend on other latents"}


hierarchy = around(0.5)


def test_to_start_again_forgets_what_amortized_groups_have_learned():
    x = 3.0 + 1.1 * torch.randn(200, **F64)
    guide = AmortizedGuide(hierarchy)
    fit(hierarchy, guide, x, max_steps=50, seed=0, progress=False)
    assert guide.median(x)["z"].std() > 0.5
    assert find_start(guide, x[:20], again=True).found["'z'"] == "amortized, centred"
    assert guide.median(x)["z"].std() < 1e-6  # every row starts in the middle, whatever was learned
    assert not guide.is_trained


def test_a_group_that_is_left_stays_trained(monkeypatch):
    x = 3.0 + 1.1 * torch.randn(200, **F64)
    guide = AmortizedGuide(hierarchy)
    fit(hierarchy, guide, x, max_steps=50, seed=0, progress=False)
    monkeypatch.setattr(target, "MOST_CORRELATED", 5)  # too many rows for a normal over all of them
    assert find_start(guide, x[:20], again=True).found["'z'"] == "left, amortized"
    assert guide.is_trained


def wide(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1], **F64), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_many_correlated_values_take_the_prior_at_once(monkeypatch):
    monkeypatch.setattr(target, "MOST_CORRELATED", 8)
    monkeypatch.setattr(target, "_LARGEST_ELEMENT", 12)
    monkeypatch.setattr(Density, "expand", lambda *_: pytest.fail("a Hessian was taken"))
    x = torch.randn(30, 13, **F64)
    found = find_start(AmortizedGuide(wide, family=DiagonalNormal()), x, x.sum(-1)).found
    assert found == {"'w'": "prior, since 13 values are correlated, of at most 12"}


def test_an_error_half_way_leaves_q_as_it_was(monkeypatch):
    x = 3.0 + torch.randn(30, **F64)
    guide = AmortizedGuide(pooled, amortize=()).setup(x)
    before = {name: value.clone() for name, value in guide.network.state_dict().items()}
    heads = [type(head) for head in guide.network.heads]
    elbos = iter([0.0])

    def once(_):
        try:
            return next(elbos)
        except StopIteration:
            raise ValueError("the model cannot be scored there") from None

    monkeypatch.setattr(start, "_elbo", once)
    assert find_start(guide, x).found["'a', 'b'"] == "left, since the model cannot be scored there"
    assert [type(head) for head in guide.network.heads] == heads
    after = guide.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
