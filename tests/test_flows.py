"""Families of flows: their densities, their gradients, and what users write."""

import copy
import dataclasses

import pytest
import torch
from bent import (
    bound,
    close,
    draw,
    every_kind,
    every_size,
    integral,
    parameters_of,
)
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import jacrev

from pyro_guides.distributions.flow import VectorFlow
from pyro_guides.families import DiagonalNormal, LowRankNormal
from pyro_guides.families.flow import NormalizingFlow
from pyro_guides.heads import held_fixed

# --- the distribution


@every_kind
@pytest.mark.parametrize("size", [1, 2])
def test_density_integrates_to_one(kind, size):
    family = bound(size, kind, spread=0.2)
    parameters = family.initial(torch.zeros(size, dtype=torch.float64), 1.0)
    parameters = parameters + 0.2 * torch.randn_like(parameters)
    q = family(parameters)
    assert abs(integral(q.log_prob, size) - 1.0) < 1e-3
    assert abs(integral(lambda u: q.log_prob(u) + 0.01, size) - 1.0) > 5e-3  # control
    normal = MultivariateNormal(q.loc, torch.eye(size, dtype=torch.float64))
    some = q.sample((100,))
    assert (q.log_prob(some) - normal.log_prob(some)).std() > 0.05  # it is no normal


@every_kind
def test_masked_density_is_the_exact_marginal(kind):
    family = bound(3, kind, spread=0.2)
    parameters = parameters_of(family) * 0.5
    scored = torch.tensor([True, False, True])
    q = family(parameters, scored)
    u = q.rsample((4,))

    # The same family, masked by hand: what is scored integrates to one whatever the rest is.
    def density(grid):
        return q.log_prob(torch.stack([grid[:, 0], 7.0 + 0 * grid[:, 0], grid[:, 1]], -1))

    assert abs(integral(density, 2) - 1.0) < 1e-3
    for value in (q.log_prob(u), q.log_prob(u.clone()), q.score_parts(u).entropy_term):
        close(value, q.log_prob(torch.where(scored, u, u + 5.0)), 1e-7)
    jacobian = jacrev(lambda e: q.push(e)[0])(draw(3))
    assert jacobian[1, [0, 2]].abs().max() == jacobian[[0, 2], 1].abs().max() == 0.0
    # Control: with everything scored the first two are not independent of the third.
    full = jacrev(lambda e: family(parameters).push(e)[0])(draw(3))
    assert full[[0, 2], 1].abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 10.0, 100.0, 1000.0])
def test_single_precision_holds_for_contexts_of_any_size(kind, size, magnitude):
    family = NormalizingFlow(kind=kind, context_size=16).bind(size)
    for parameter in family.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
    parameters = family.initial(torch.randn(64, size), 0.3)
    parameters[:, -16:] = magnitude * torch.randn(64, 16)
    parameters.requires_grad_()
    q = family(parameters)
    u = q.rsample((4,))
    again = q.log_prob(u.clone())
    assert (q.log_prob(u) - again).abs().max() < 1e-3
    assert torch.autograd.grad(again.sum(), parameters)[0].isfinite().all()


@every_kind
@every_size
@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
def test_gradient_reaches_every_parameter(kind, size, own):
    family = bound(size, kind)
    parameters = parameters_of(family, 6).requires_grad_()
    q = family(parameters)
    u = q.rsample() if own else draw(6, size)
    total = (q.log_prob(u) + u.sin().sum(-1)).sum()
    for gradient in torch.autograd.grad(total, [parameters, *family.parameters()]):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-9


def test_gradient_at_the_start_reaches_the_last_layers():
    family = NormalizingFlow(context_size=3).bind(4)
    parameters = family.initial(torch.zeros(9, 4), 0.1).requires_grad_()
    q = family(parameters)
    total = (q.rsample() ** 3).sum()
    gradients = torch.autograd.grad(total, [layer.layers[-1].weight for layer in family.flow.conditioners])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert torch.autograd.grad(family(parameters).rsample().sum(), parameters)[0].isfinite().all()


@every_kind
@every_size
@pytest.mark.parametrize("base", [DiagonalNormal(), LowRankNormal(1)], ids=["diagonal", "low rank"])
def test_starts_as_its_base(kind, size, base):
    family = NormalizingFlow(kind=kind, base=base).bind(size)
    loc = torch.randn(5, size)
    parameters = family.initial(loc, 0.3)
    assert parameters.shape == (5, family.width)
    q, u = family(parameters), torch.randn(5, size)
    expected = family.base(parameters[:, : family.base.width])
    torch.testing.assert_close(q.log_prob(u), expected.log_prob(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [(), (3,), (4, 3)], ids=str)
def test_own_draw_is_scored_without_inversion(batch, monkeypatch):
    family = bound(2)
    q = family(parameters_of(family, *batch))
    u = q.rsample((5,))
    assert u.shape == (5, *batch, 2)
    inverted = q.log_prob(u.clone())
    monkeypatch.setattr(VectorFlow, "pull", lambda *_: pytest.fail("inverted"))
    close(q.log_prob(u), inverted, 1e-7)


@pytest.mark.parametrize(("batch", "larger"), [((), [6]), ((3,), [4, 3]), ((4, 1), [4, 3])], ids=str)
def test_expand(batch, larger):
    family = bound(2)
    q = family(parameters_of(family, *batch))
    q.path_twin = family(parameters_of(family, *batch))
    wide = q.expand(larger)
    assert q.expand([*batch]) is q
    assert wide.batch_shape == torch.Size(larger)
    assert wide.path_twin is q.path_twin
    u = wide.rsample((5,))
    assert u.shape == (5, *larger, 2)
    noise = wide.pull(u)[0].flatten()
    assert len(noise.unique()) == noise.numel()
    close(wide.log_prob(u), wide.log_prob(u.clone()), 1e-7)


# --- sticking the landing


@every_kind
@every_size
@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
def test_sticking_the_landing(kind, size, own):
    """The gradient of log q(u; λ̄) with all weights held fixed, along u's path only."""
    family = bound(size, kind)
    frozen = copy.deepcopy(family).requires_grad_(False)
    parameters = parameters_of(family, 3).requires_grad_()
    q = family(parameters)
    u = q.rsample()
    u = u if own else u * 1.0
    parts = q.score_parts(u)
    close(parts.entropy_term, parts.log_prob, 1e-7)
    wanted = [parameters, *family.parameters()]

    def slopes(terms):
        return torch.autograd.grad(terms.sum(), wanted, retain_graph=True)

    expected = slopes(frozen(parameters.detach()).log_prob(u))
    for mine, exact in zip(slopes(parts.entropy_term), expected, strict=True):
        close(mine, exact, 1e-6)
    full = slopes(q.log_prob(u))  # control: the full gradient differs
    assert not torch.allclose(full[0], expected[0])


def test_sticking_the_landing_is_a_choice():
    family = NormalizingFlow(context_size=3).bind(2)
    q = family(family.initial(torch.zeros(2), 0.5))
    parts = q.score_parts(q.rsample())
    assert parts.entropy_term is parts.log_prob


@every_kind
def test_no_noise_is_left_once_q_is_the_posterior(kind):
    target = bound(2, kind)
    point = parameters_of(target).detach()
    family = copy.deepcopy(target)
    target.requires_grad_(False)

    def gradient(stick_the_landing):
        parameters = point.clone().requires_grad_()
        q = family(parameters)
        q.stick_the_landing = stick_the_landing
        u = q.rsample((10,))
        loss = target(point).log_prob(u) - q.score_parts(u).entropy_term
        found = torch.autograd.grad(loss.sum(), [parameters, *family.parameters()])
        return torch.cat([part.flatten() for part in found])

    assert gradient(True).abs().max() < 1e-6
    assert gradient(False).abs().max() > 0.1  # control


def test_weights_held_fixed_by_a_functional_call_stay_so():
    """A guide's twin: upstream values move λ, nothing else does."""
    family = bound(2)
    parameters = parameters_of(family, 3).requires_grad_()
    twin = held_fixed(family, parameters)
    total = twin.log_prob(draw(3, 2)).sum()
    gradients = torch.autograd.grad(total, [parameters, *family.parameters()], allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert all(gradient is None for gradient in gradients[1:])


# --- what users write


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"transforms": 0}, ValueError, "transforms must be at least 1, got 0"),
        ({"transforms": 2.0}, TypeError, "transforms must be an int"),
        ({"transforms": True}, TypeError, "transforms must be an int"),
        ({"kind": "quadratic"}, ValueError, "affine.*spline.*got 'quadratic'"),
        ({"kind": 3}, (TypeError, ValueError), "kind must be"),
        ({"bins": 1}, ValueError, "bins must be at least 2"),
        ({"hidden": ()}, ValueError, "at least one layer"),
        ({"hidden": 64}, TypeError, "sequence"),
        ({"hidden": (64, 0)}, ValueError, "each width"),
        ({"hidden": (64, "64")}, TypeError, "each width"),
        ({"context_size": 0}, ValueError, "context_size must be at least 1"),
        ({"base": "full"}, TypeError, r"FullRankNormal\(\).*got 'full'"),
        ({"base": NormalizingFlow()}, TypeError, "base must be a normal family"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        NormalizingFlow(**options)


def test_families_are_values():
    assert NormalizingFlow(hidden=[8, 7]) == NormalizingFlow(hidden=(8, 7))
    assert len({NormalizingFlow(), NormalizingFlow(), NormalizingFlow(2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        NormalizingFlow().transforms = 3
