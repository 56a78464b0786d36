"""Coupling layers: exact maps, exact gradients, and what they leave alone."""

import warnings

import pytest
import torch
from bent import both_ways, close, disturb, draw, every_kind, every_size
from pyro.ops.provenance import get_provenance, track_provenance
from torch.distributions import Distribution
from torch.func import jacrev, vmap

from pyro_guides.families import conditioners, passes
from pyro_guides.families.couplings import CouplingFlow
from pyro_guides.families.splines import RANGE, spline


def flow(size, kind, *, transforms=4, contexts=3, spread=0.4):
    """A flow far from its start, in double precision."""
    made = CouplingFlow(size, contexts, transforms, kind, hidden=(8, 7)).double()
    disturb(made, spread)
    return made


@pytest.fixture
def validation_kept():
    """Put back what PyTorch's compiler switches off when it starts."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)


@every_kind
@every_size
@pytest.mark.parametrize("transforms", [1, 2, 5])
def test_starts_as_the_identity(kind, size, transforms):
    f = CouplingFlow(size, 3, transforms, kind)
    x, context = 3 * torch.randn(50, size), 100 * torch.randn(50, 3)
    for way in (f, f.inverse):
        y, log_volume = way(x, context)
        torch.testing.assert_close(y, x, rtol=1e-6, atol=2e-6)
        assert log_volume.abs().max() < 1e-5
    slopes = vmap(jacrev(lambda x, h: f(x, h)[0]))(x[:5], context[:5])
    torch.testing.assert_close(slopes, torch.eye(size).expand(5, size, size), rtol=1e-5, atol=1e-5)


@every_kind
@every_size
@pytest.mark.parametrize("transforms", [1, 2, 5])
def test_inverse_and_log_volume(kind, size, transforms):
    f = flow(size, kind, transforms=transforms)
    x, context = 3 * draw(20, size), draw(20, 3)
    y, log_volume = f(x, context)
    back, again = f.inverse(y, context)
    close(back, x, 1e-7)
    close(again, log_volume, 1e-7)
    jacobians = vmap(jacrev(lambda x, h: f(x, h)[0]))(x, context)
    exact = jacobians.slogdet()[1]
    close(log_volume, exact, 1e-8)
    with pytest.raises(AssertionError):  # control: the wrong sign would be seen
        close(-log_volume, exact, 1e-2)


@both_ways
def test_spline_is_smooth_monotone_and_linear_outside(inverse):
    logits = 3 * draw(25, 1).expand(25, 40001)
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64).requires_grad_()
    y, log_slope, _ = spline(logits, x, 5.0, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    close(slope.log(), -log_slope if inverse else log_slope, 1e-8)
    assert (slope > 0).all()
    assert slope.max() / slope.min() > 10  # it does bend
    for side in (slope[x < -5.01], slope[x > 5.01]):
        assert side.std() < 1e-9
        assert 1 / RANGE < side[0] < RANGE
    assert slope.log().diff().abs().max() < 0.1  # no jumps


@pytest.mark.crossed
@every_kind
@both_ways
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("batch", "contexts"), [((4,), (4,)), ((3, 4), (4,)), ((3, 4), (3, 1)), ((4,), ()), ((), (4,))], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradient_written_out_is_that_of_autograd(kind, inverse, size, batch, contexts, masked, monkeypatch):
    f = flow(size, kind)
    x, context = (draw(*batch, size) * 3).requires_grad_(), draw(*contexts, 3).requires_grad_()
    scored = torch.rand(*batch, size) < 0.6 if masked else None
    wanted = [x, context, *f.parameters()]

    def gradients():
        y, log_volume = (f.inverse if inverse else f)(x, context, scored)
        total = y.sin().sum() + log_volume.square().sum()
        return torch.autograd.grad(total, wanted)

    fast = gradients()
    for module in (conditioners, passes):
        monkeypatch.setattr(module, "eager", lambda _: False)
    for mine, exact in zip(fast, gradients(), strict=True):
        close(mine, exact)


@every_kind
@both_ways
@pytest.mark.parametrize("size", [1, 3])
def test_second_derivatives(kind, inverse, size):
    f = flow(size, kind, transforms=2)
    x, context = draw(2, size).requires_grad_(), draw(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(f.inverse if inverse else f, (x, context))


@pytest.mark.slow
@every_kind
@both_ways
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_compiles_without_a_break(kind, inverse, masked, validation_kept):
    compare_compiled(kind, inverse, masked, "aot_eager")


@pytest.mark.slow
def test_compiles_to_machine_code(validation_kept):
    compare_compiled("spline", True, True, "inductor")


def compare_compiled(kind, inverse, masked, backend):
    f = flow(5, kind)
    x, context = draw(3, 7, 5).requires_grad_(), draw(7, 3).requires_grad_()
    scored = torch.rand(7, 5) < 0.6 if masked else None

    def total(x, context):
        y, log_volume = (f.inverse if inverse else f)(x, context, scored)
        return y.sin().sum() + log_volume.square().sum()

    wanted = [x, context, *f.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(total, fullgraph=True, backend=backend)
        got = torch.autograd.grad(compiled(x, context), wanted)
    for mine, exact in zip(got, torch.autograd.grad(total(x, context), wanted), strict=True):
        close(mine, exact, 1e-7)
    torch.compiler.reset()


def test_contexts_are_projected_once_for_all_draws(monkeypatch):
    f, rows = flow(3, "spline"), []
    original = conditioners.project
    monkeypatch.setattr(
        "pyro_guides.families.couplings.project", lambda x, layer: rows.append(len(x)) or original(x, layer)
    )
    context, x = draw(7, 3), draw(5, 7, 3)
    y, log_volume = f(x, context)
    assert rows == [7]
    each = [f(x[i], context) for i in range(5)]
    close(y, torch.stack([pair[0] for pair in each]))
    close(log_volume, torch.stack([pair[1] for pair in each]))


@every_size
def test_arrangement_belongs_to_the_state(size):
    f, other = flow(size, "spline", transforms=6), flow(size, "spline", transforms=6)
    assert "orders" in f.state_dict()
    x, context = draw(9, size), draw(9, 3)
    assert not torch.allclose(f(x, context)[0], other(x, context)[0])
    other.load_state_dict(f.state_dict())
    assert torch.equal(f(x, context)[0], other(x, context)[0])
    assert torch.equal(f.orders[:, 0].sort(-1)[0], torch.arange(size).expand(3, size))
    halves = [{*order[: size // 2].tolist()} for order in f.orders[:, 0]]
    assert size < 3 or halves[0] != halves[1] != halves[2]  # each pair of layers splits otherwise


@every_kind
def test_every_element_comes_to_depend_on_every_other(kind):
    f = flow(6, kind)
    jacobian = jacrev(lambda x: f(x, draw(3) * 0)[0])(draw(6))
    assert (jacobian.abs() > 1e-9).all()


@every_kind
def test_masked_elements_stay_and_influence_none(kind):
    f = flow(5, kind)
    x, context = draw(20, 5), draw(20, 3)
    scored = torch.rand(20, 5) < 0.5
    y, log_volume = f(x, context, scored)
    moved = torch.where(scored, x, torch.full_like(x, float("nan")))
    again, same = f(moved, context, scored)
    assert torch.equal(y[~scored], x[~scored])
    assert torch.equal(again[scored], y[scored])
    assert torch.equal(same, log_volume)
    close(f.inverse(y, context, scored)[0], x, 1e-7)
    everything = torch.ones_like(scored)
    close(f(x, context, everything)[0], f(x, context)[0])
    assert not torch.allclose(f(x, context)[1], log_volume)


def test_provenance_passes_through_with_the_gradient():
    f = flow(2, "spline")
    context, x = draw(3).requires_grad_(), draw(2)
    tracked = track_provenance(context * 1.0, frozenset({"z"}))
    y, log_volume = f(x, tracked)
    assert get_provenance(y) == get_provenance(log_volume) == frozenset({"z"})
    (gradient,) = torch.autograd.grad(y.sum() + log_volume, context)
    close(gradient, torch.autograd.grad(sum(part.sum() for part in f(x, context)), context)[0])


def test_mixed_precision():
    f = CouplingFlow(4, 3)
    disturb(f, 0.1)
    x, context = torch.randn(9, 4), torch.randn(9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_volume = f(x, context)
    torch.autograd.grad(y.sum() + log_volume.sum(), [*f.parameters()])
    assert y.dtype == log_volume.dtype == torch.float32
    torch.testing.assert_close(y, f(x, context)[0], rtol=0.05, atol=0.05)
