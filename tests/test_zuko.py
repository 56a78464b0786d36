"""Flows that others wrote."""

import copy
import sys

import pytest
import torch
from bent import (
    disturb,
    draw,
    integral,
    parameters_of,
)
from torch import nn
from torch.distributions import Distribution, Independent, Normal

from pyro_guides.families.zuko import ZukoFlow
from pyro_guides.heads import held_fixed


def zuko_flow(name, **options):
    def build(features, context):
        import zuko

        return getattr(zuko.flows, name)(features, context, **options)

    return build


@pytest.fixture
def zuko():
    """The package, with the validation flags that importing it changes put back."""
    before = Distribution._validate_args, Distribution.arg_constraints
    try:
        return pytest.importorskip("zuko")
    finally:
        Distribution._validate_args, Distribution.arg_constraints = before


def test_importing_zuko_leaves_validation_on(zuko):
    for name in [name for name in sys.modules if name.partition(".")[0] == "zuko"]:
        del sys.modules[name]
    before = Distribution._validate_args, Distribution.arg_constraints
    family = ZukoFlow(zuko_flow("NICE"), context_size=3).bind(2)
    assert "zuko" in sys.modules
    q = family(family.initial(torch.zeros(2), 1.0))
    q.log_prob(q.rsample())
    assert (Distribution._validate_args, Distribution.arg_constraints) == before
    with pytest.raises(ValueError, match="GreaterThan"):
        Normal(0.0, -1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("NICE", {}), ("NSF", {"passes": 2}), ("NSF", {}), ("MAF", {}), ("SOSPF", {})],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_zuko(zuko, name, options, size):
    family = ZukoFlow(zuko_flow(name, **options), context_size=3).bind(size)
    start = family.initial(torch.randn(7, size), 0.5)
    if name != "SOSPF":  # starts as its base
        q, u = family(start), torch.randn(7, size)
        expected = family.base(start[:, : family.base.width]).log_prob(u)
        torch.testing.assert_close(q.log_prob(u), expected, rtol=1e-4, atol=1e-4)
    disturb(family, 0.1)
    parameters = start.clone().requires_grad_()
    q = family(parameters).expand([4, 7])
    u = q.rsample((2,))
    assert u.shape == (2, 4, 7, size)
    torch.testing.assert_close(q.log_prob(u), q.log_prob(u.clone()), rtol=1e-3, atol=1e-3)
    total = (q.log_prob(u) + u.sin().sum(-1)).sum()
    for gradient in torch.autograd.grad(total, [parameters, *family.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["NICE", "NSF"])
def test_zuko_sticks_the_landing(zuko, name):
    family = ZukoFlow(zuko_flow(name), context_size=3, stick_the_landing=True).bind(2).double()
    disturb(family, 0.1)
    target = copy.deepcopy(family).requires_grad_(False)
    point = parameters_of(family)
    parameters = point.clone().requires_grad_()
    q = family(parameters)
    u = q.rsample((10,))
    loss = (target(point).log_prob(u) - q.score_parts(u).entropy_term).sum()
    for gradient in torch.autograd.grad(loss, [parameters, *family.parameters()], allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6
    twin = held_fixed(family, parameters)
    gradients = torch.autograd.grad(twin.log_prob(draw(2)), [*family.parameters()], allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_zuko_density_integrates_to_one(zuko):
    family = ZukoFlow(zuko_flow("NSF", passes=2), context_size=3).bind(2).double()
    disturb(family, 0.1)
    q = family(family.initial(torch.zeros(2, dtype=torch.float64), 1.0))
    assert abs(integral(q.log_prob, 2, points=121, reach=8.0) - 1.0) < 1e-3


class Shifted(nn.Linear):
    """A flow without zuko."""

    def forward(self, context):
        loc = super().forward(context)
        return Independent(Normal(loc, torch.ones_like(loc)), 1)


def test_any_module_that_returns_a_distribution():
    family = ZukoFlow(lambda features, context: Shifted(context, features), context_size=3).bind(2)
    parameters = family.initial(torch.zeros(7, 2), 0.5)
    parameters[:, -3:] = torch.randn(7, 3)
    q = family(parameters)
    u = q.rsample()
    loc = 0.5 * family.scorer.flow(parameters[:, -3:]).mean
    expected = Normal(loc, 0.5).log_prob(u).sum(-1)
    for value in (q.log_prob(u), q.log_prob(u.clone())):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_zuko_bad_input(monkeypatch):
    with pytest.raises(TypeError, match="build must be a function"):
        ZukoFlow(3)
    with pytest.raises(ValueError, match="context_size must be at least 1"):
        ZukoFlow(Shifted, context_size=0)
    with pytest.raises(TypeError, match=r"returned int, expected a module"):
        ZukoFlow(lambda *sizes: sum(sizes)).bind(2)
    family = ZukoFlow(lambda features, context: Shifted(context, features)).bind(2)
    with pytest.raises(NotImplementedError, match="NormalizingFlow"):
        family(family.initial(torch.zeros(2), 1.0), torch.tensor([True, False]))
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-guides\[flows\]"'):
        ZukoFlow(zuko_flow("NSF")).bind(2)


def test_draws_without_a_path_are_refused(zuko):
    with pytest.raises(NotImplementedError, match="NormalMixture"):
        ZukoFlow(zuko_flow("GMM")).bind(2)
