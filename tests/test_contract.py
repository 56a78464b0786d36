"""What holds for every family, whatever it is made of: one contract, parametrized over all of them."""

import copy
import math
import sys

import pytest
import torch
from torch.distributions import Distribution

from pyro_guides import (
    DiagonalNormal,
    Discrete,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    ZukoFlow,
)

SMALL = {"hidden": (8,), "context_size": 3}


def zuko_spline(features, context):
    import zuko

    return zuko.flows.NSF(features, context, bins=4, transforms=1, hidden_features=(8,), passes=2)


FAMILIES = {
    "diagonal": DiagonalNormal(),
    "full rank": FullRankNormal(),
    "low rank": LowRankNormal(1),
    "mixture": NormalMixture(3),
    "diagonal mixture": NormalMixture(2, "diagonal"),
    "mixture of equal weights": NormalMixture(3, learn_weights=False),
    "mixture, full gradient": NormalMixture(3, stick_the_landing=False),
    "spline flow": NormalizingFlow(2, **SMALL),
    "affine flow": NormalizingFlow(2, kind="affine", **SMALL),
    "flow on a diagonal": NormalizingFlow(3, base=DiagonalNormal(), stick_the_landing=False, **SMALL),
    "zuko": ZukoFlow(zuko_spline, context_size=3),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
COSTS = {
    "z0^2": lambda u: u[..., 0].square(),
    "z0 z1": lambda u: u[..., 0] * u[..., -1],
    "cubic": lambda u: (u[..., 0] - 0.5 * u[..., -1].square()) * u[..., -1],
}


def make(family, size=2, batch=(), dtype=torch.float64):
    """A bound family with weights, and λ, at which nothing is special; scales are near 0.6."""
    bound = family.bind(size).to(dtype)
    with torch.no_grad():
        for weight in bound.parameters():
            weight += 0.1 * torch.randn_like(weight)
    parameters = bound.initial(0.3 * torch.randn(*batch, size, dtype=dtype), 0.6)
    return bound, parameters + 0.2 * torch.randn_like(parameters)


def grid(size, reach=7.5):
    """Points of a cube and the volume of a cell."""
    t = torch.linspace(-reach, reach, 20_001 if size == 1 else 401, dtype=torch.float64)
    return torch.cartesian_prod(*[t] * size).reshape(-1, size), float(t[1] - t[0]) ** size


@every_family
@pytest.mark.parametrize("size", [1, 2])
def test_density_integrates_to_one(family, size):
    bound, parameters = make(family, size)
    points, volume = grid(size)
    density = bound(parameters).log_prob(points).exp().detach()
    assert abs(float(density.sum()) * volume - 1.0) < 2e-3
    assert abs(float((density * 1.01).sum()) * volume - 1.0) > 5e-3  # the control


@pytest.mark.crossed
@every_family
@pytest.mark.parametrize("size", [1, 2, 5])
@every_dtype
def test_own_log_q_is_the_rescored_one(family, size, dtype):
    bound, parameters = make(family, size, (3,), dtype)
    q = bound(parameters)
    u = q.rsample((4,))
    assert u.shape == (4, 3, size)
    assert u.dtype == q.log_prob(u).dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert torch.allclose(q.log_prob(u), q.log_prob(u.clone()), atol=tolerance)
    assert not torch.allclose(q.log_prob(u), q.log_prob(u + 0.01), atol=tolerance)


@every_family
def test_draws_have_the_moments_of_the_density(family):
    """Quadrature against 100,000 draws, within 4.5 standard errors."""
    bound, parameters = make(family)
    points, volume = grid(2)
    with torch.no_grad():
        q = bound(parameters)
        weights = q.log_prob(points).exp() * volume
        draws = q.rsample((100_000,))
    for cost in COSTS.values():
        expected, found = (weights * cost(points)).sum(), cost(draws)
        assert abs(found.mean() - expected) < 4.5 * found.std() / math.sqrt(len(found)) + 1e-3


def estimates(bound, parameters, cost, count):
    """One gradient in λ per draw, as an ELBO puts it together; the entropy's if there is no cost."""
    parameters = parameters.expand(count, -1).clone().requires_grad_()
    q = bound(parameters)
    u = q.rsample()
    parts = q.score_parts(u)
    value = -parts.log_prob.detach() if cost is None else cost(u)
    surrogate = -parts.entropy_term if cost is None else value
    if isinstance(parts.score_function, torch.Tensor):
        surrogate = surrogate + parts.score_function * value.detach()
    return torch.autograd.grad(surrogate.sum(), parameters)[0]


def exact(bound, parameters, cost):
    """The gradient of the exact expectation, by quadrature."""
    points, volume = grid(2)
    parameters = parameters.clone().requires_grad_()
    log_q = bound(parameters).log_prob(points)
    value = -log_q if cost is None else cost(points)
    return torch.autograd.grad((log_q.exp() * value).sum() * volume, parameters)[0]


@pytest.mark.crossed
@every_family
@pytest.mark.parametrize("cost", [*COSTS.values(), None], ids=[*COSTS, "entropy"])
def test_gradients_are_those_of_the_exact_expectation(family, cost):
    """20,000 draws, every element of λ within 4.5 standard errors."""
    bound, parameters = make(family)
    expected = exact(bound, parameters, cost)
    found = estimates(bound, parameters, cost, 20_000)
    error = found.std(0) / math.sqrt(len(found)) + 2e-3
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()
    wrong = exact(
        bound, parameters, lambda u: 1.3 * (cost(u) if cost else -bound(parameters).log_prob(u)) - u[..., 0]
    )
    assert ((found.mean(0) - wrong).abs() > 4.5 * error).any()


@every_family
@every_dtype
@pytest.mark.parametrize("size", [1, 3])
def test_gradient_reaches_every_parameter(family, dtype, size):
    bound, parameters = make(family, size, (64,), dtype)
    parameters.requires_grad_()
    q = bound(parameters)
    u = q.rsample()
    parts = q.score_parts(u)
    loss = (u.square().sum(-1) + parts.entropy_term + parts.score_function * u[..., 0].detach()).sum()
    gradients = torch.autograd.grad(loss, [parameters, *bound.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0].abs().sum(0) > 0.0).all()
    assert all(gradient.abs().sum() > 0.0 for gradient in gradients[1:])


@every_family
@pytest.mark.parametrize(("batch", "larger"), [((), (6,)), ((3,), (4, 3)), ((4, 1), (4, 3))], ids=str)
def test_expanding_draws_anew_along_what_is_added(family, batch, larger):
    bound, parameters = make(family, 2, batch)
    q = bound(parameters)
    assert q.expand(list(batch)) is q
    wide = q.expand(list(larger))
    u = wide.rsample((5,))
    assert u.shape == (5, *larger, 2)
    assert len(u.unique()) == u.numel()
    each = bound(parameters.expand(*larger, -1))
    assert torch.allclose(wide.log_prob(u), each.log_prob(u))
    assert torch.allclose(wide.log_prob(u.clone()), each.log_prob(u))


@every_family
def test_contexts_broadcast_against_draws(family):
    bound, parameters = make(family, 2, (3, 1))
    u = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    each = bound(parameters.expand(3, 5, -1)).log_prob(u)
    assert torch.allclose(bound(parameters).log_prob(u), each)


@every_family
def test_copies_and_saved_weights_are_the_same_q(family, tmp_path):
    bound, parameters = make(family)
    u = torch.randn(7, 2, dtype=torch.float64)
    expected = bound(parameters).log_prob(u)
    torch.save(bound.state_dict(), tmp_path / "weights.pt")
    loaded, _ = make(family)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for other in (copy.deepcopy(bound), loaded):
        assert torch.equal(other(parameters).log_prob(u), expected)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(0.1)
    assert torch.equal(bound(parameters).log_prob(u), expected)


@pytest.mark.slow
@every_family
def test_no_graph_break_under_compile(family, monkeypatch):
    if isinstance(family, ZukoFlow):
        pytest.skip("zuko's own transforms break the graph")
    bound, parameters = make(family, 3, (4,))
    u = torch.randn(4, 3, dtype=torch.float64)

    def draw(parameters):
        q = bound(parameters)
        u = q.rsample()
        return u, q.log_prob(u)

    torch.compiler.reset()
    monkeypatch.setattr(Distribution, "_validate_args", True)  # which the compiler switches off, for good
    score = torch.compile(lambda λ, u: bound(λ).log_prob(u), fullgraph=True, backend="aot_eager")
    assert torch.allclose(score(parameters, u), bound(parameters).log_prob(u))
    drawn, log_q = torch.compile(draw, fullgraph=True, backend="aot_eager")(parameters)
    assert torch.allclose(bound(parameters).log_prob(drawn), log_q)


def test_zuko_leaves_validation_on():
    before = Distribution._validate_args
    ZukoFlow(zuko_spline).bind(2)
    assert "zuko" in sys.modules
    assert Distribution._validate_args is before
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(0.0, -1.0)


BAD = {
    "no components": (lambda: NormalMixture(0), ValueError, "components must be at least 1"),
    "half a component": (lambda: NormalMixture(2.5), TypeError, "components must be an int"),
    "unknown covariance": (
        lambda: NormalMixture(2, "tied"),
        ValueError,
        r"must be one of \['full', 'diagonal'\]",
    ),
    "unknown baseline": (lambda: NormalMixture(2, baseline="best"), ValueError, "baseline must be one of"),
    "no spread": (lambda: NormalMixture(2, spread=0.0), ValueError, "spread must be a positive number"),
    "wide spread": (lambda: NormalMixture(2, spread="wide"), TypeError, "spread must be a number"),
    "weights": (
        lambda: NormalMixture(2, learn_weights="no"),
        TypeError,
        "learn_weights must be True or False",
    ),
    "nothing to stratify": (
        lambda: NormalMixture(2, stratified=True, learn_weights=False),
        ValueError,
        "nothing to stratify",
    ),
    "stratified": (lambda: NormalMixture(2, stratified=1), TypeError, "stratified must be True or False"),
    "enumerate": (lambda: Discrete(enumerate=True), ValueError, "enumerate must be one of"),
    "table": (lambda: Discrete().bind(2), ValueError, "is for discrete latents"),
} | {
    f"landing of {family.__name__}": (
        lambda family=family, args=args: family(*args, stick_the_landing="no"),
        TypeError,
        "stick_the_landing must be True or False",
    )
    for family, args in [
        (DiagonalNormal, ()),
        (FullRankNormal, ()),
        (LowRankNormal, (1,)),
        (NormalMixture, (2,)),
        (NormalizingFlow, ()),
        (ZukoFlow, (zuko_spline,)),
    ]
}


@pytest.mark.parametrize(("make_it", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_told(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
