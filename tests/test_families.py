"""One contract for every family: a new one passes all of this by joining FAMILIES."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

from pyro_guides import DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_guides.families.base import BoundFamily, Family

SMALLEST = 1e-6  # what families add to every scale


def diagonal_map(size, scales, couplings):
    return torch.diag_embed(scales)


def full_rank_map(size, scales, couplings):
    matrix = torch.eye(size, dtype=scales.dtype).expand(*scales.shape, size).clone()
    entries = iter((couplings / size**0.5).unbind(-1))
    for row in range(size):
        for column in range(row):
            matrix[..., row, column] = next(entries)
    return scales.unsqueeze(-1) * matrix


def low_rank_map(size, scales, couplings):
    directions = couplings.reshape(*scales.shape, -1)
    eye = torch.eye(size, dtype=scales.dtype)
    return scales.unsqueeze(-1) * (eye + directions @ directions.mT)


# name -> the family, and the linear map S of u = μ + S ε written out from its docstring
FAMILIES = {
    "diagonal": (DiagonalNormal, diagonal_map),
    "full_rank": (FullRankNormal, full_rank_map),
    "low_rank_1": (functools.partial(LowRankNormal, 1), low_rank_map),
    "low_rank_3": (functools.partial(LowRankNormal, 3), low_rank_map),
}
SIZES = (1, 2, 5)
BATCHES = ((), (3,), (4, 3))
every_family = pytest.mark.parametrize("name", FAMILIES)
every_size = pytest.mark.parametrize("size", SIZES)
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def make(name, size, batch=(), dtype=torch.float64, **options):
    """A bound family and λ at which nothing is special."""
    bound = FAMILIES[name][0](**options).bind(size)
    parameters = bound.initial(torch.randn(*batch, size, dtype=dtype), 0.7)
    return bound, parameters + 0.4 * torch.randn_like(parameters)


def reference(name, size, parameters):
    """The same q by PyTorch, in double precision."""
    loc, raw, couplings = parameters.double().tensor_split([size, 2 * size], dim=-1)
    matrix = FAMILIES[name][1](size, softplus(raw) + SMALLEST, couplings)
    return MultivariateNormal(loc, matrix @ matrix.mT)


def close(actual, expected, dtype=torch.float64, scale=1.0):
    tolerance = scale * (3e-4 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def integral(q, log_density, points=121, reach=9.0):
    """∫ exp(log_density(u)) du on a grid around the mean of ``q``; trapezoids are exact for a bell."""
    t = torch.linspace(-reach, reach, points, dtype=torch.float64)
    size = q.event_shape[0]
    grid = torch.cartesian_prod(*[t] * size).reshape(-1, *[1] * len(q.batch_shape), size)
    u = q.mean + grid * q.variance.sqrt()
    volume = (q.variance.sqrt() * (t[1] - t[0])).prod(-1)
    return log_density(u).exp().sum(0) * volume


@every_family
@every_batch
@pytest.mark.parametrize("size", [1, 2])
def test_density_integrates_to_one(name, size, batch):
    bound, parameters = make(name, size, batch)
    q = bound(parameters)
    one = torch.ones(batch, dtype=torch.float64)
    close(integral(q, q.log_prob), one, scale=1e4)
    assert (integral(q, lambda u: q.log_prob(u) + 0.01) - one).abs().min() > 1e-3


@pytest.mark.crossed
@every_family
@every_size
@every_batch
@every_dtype
def test_equals_torch_multivariate_normal(name, size, batch, dtype):
    bound, parameters = make(name, size, batch, dtype)
    assert parameters.shape == (*batch, bound.width)
    q, expected = bound(parameters), reference(name, size, parameters)
    assert (q.batch_shape, q.event_shape) == (expected.batch_shape, expected.event_shape)
    u = q.sample((7,))
    assert u.dtype == q.log_prob(u).dtype == dtype
    close(q.log_prob(u.clone()), expected.log_prob(u.double()), dtype)
    close(q.mean, expected.mean, dtype)
    close(q.variance, expected.variance, dtype)
    wrong = MultivariateNormal(expected.mean + 0.05, expected.covariance_matrix)
    with pytest.raises(AssertionError):
        close(q.log_prob(u.clone()), wrong.log_prob(u.double()), dtype)


@pytest.mark.crossed
@every_family
@every_size
@every_batch
@every_dtype
def test_push_and_pull_are_inverse_and_linear(name, size, batch, dtype):
    bound, parameters = make(name, size, batch, dtype)
    q, expected = bound(parameters), reference(name, size, parameters)
    noise = torch.randn(5, *batch, size, dtype=dtype)
    close(q.pull(q.push(noise)[0])[0], noise, dtype)
    units = torch.eye(size, dtype=dtype)
    columns = torch.stack([q.push(e.expand(*batch, size))[0] - q.loc for e in units], -1)
    close(columns @ columns.mT, expected.covariance_matrix, dtype)


@every_family
@every_size
@every_dtype
def test_own_draw_is_scored_without_inversion_and_exactly(name, size, dtype, monkeypatch):
    bound, parameters = make(name, size, (3,), dtype)
    q = bound(parameters)
    u = q.rsample((4,))
    inverted = q.log_prob(u.clone())
    monkeypatch.setattr(type(q), "pull", lambda *_: pytest.fail("inverted"))
    close(q.log_prob(u), inverted, dtype)
    with pytest.raises(pytest.fail.Exception, match="inverted"):
        q.log_prob(u.clone())


@every_family
@every_size
@every_dtype
@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
def test_gradient_reaches_every_parameter(name, size, dtype, own):
    bound, parameters = make(name, size, (3,), dtype)
    parameters.requires_grad_()
    q = bound(parameters)
    u = q.rsample() if own else torch.randn(3, size, dtype=dtype)
    # The path of an own draw leaves log q of its noise: the location drops out, so ask u as well.
    (gradient,) = torch.autograd.grad((q.log_prob(u) + u.square().sum(-1)).sum(), parameters)
    assert gradient.isfinite().all()
    assert (gradient.abs() > 1e-7).all()


@every_family
@every_size
def test_density_gradient_equals_reference(name, size):
    bound, parameters = make(name, size, (3,))
    parameters.requires_grad_()
    u = torch.randn(3, size, dtype=torch.float64)
    (ours,) = torch.autograd.grad(bound(parameters).log_prob(u).sum(), parameters)
    (theirs,) = torch.autograd.grad(reference(name, size, parameters).log_prob(u).sum(), parameters)
    close(ours, theirs, scale=100)


@every_family
@pytest.mark.parametrize(
    ("batch", "larger"), [((), (6,)), ((1,), (6,)), ((3,), (4, 3)), ((4, 1), (4, 3))], ids=str
)
def test_expand_draws_independent_noise(name, batch, larger):
    bound, parameters = make(name, 2, batch)
    q = bound(parameters).expand(larger)
    expected = reference(name, 2, parameters).expand(torch.Size(larger))
    assert q.batch_shape == torch.Size(larger)
    u = q.rsample((5,))
    assert u.shape == (5, *larger, 2)
    noise = q.pull(u)[0].flatten()
    assert len(noise.unique()) == noise.numel()
    close(q.log_prob(u), expected.log_prob(u))
    close(q.mean, expected.mean)
    close(q.variance, expected.variance)


@every_family
@every_batch
def test_expand_to_own_shape_and_redraw(name, batch):
    bound, parameters = make(name, 2, batch)
    q = bound(parameters)
    assert q.expand(batch) is q
    first, second = q.rsample(), q.rsample()
    close(q.log_prob(first), reference(name, 2, parameters).log_prob(first))  # not the noise of the second
    assert not torch.equal(first, second)
    second += 0.5  # in place: no longer the draw it was
    close(q.log_prob(second), q.log_prob(second.clone()))


@pytest.mark.crossed
@every_family
@every_size
@every_batch
@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
def test_sticking_the_landing(name, size, batch, own):
    """The entropy term has log q's value, and the gradient of log q(u; λ̄) along u's path only."""
    bound, parameters = make(name, size, batch)
    parameters.requires_grad_()
    q = bound(parameters)
    u = q.rsample()
    u = u if own else u * 1.0  # a path, but no identity
    parts = q.score_parts(u)
    close(parts.log_prob, q.log_prob(u))
    close(parts.entropy_term, parts.log_prob)
    assert parts.score_function == 0.0

    def slope(terms):
        return torch.autograd.grad(terms.sum(), parameters, retain_graph=True)[0]

    expected = slope(bound(parameters.detach()).log_prob(u))
    close(slope(parts.entropy_term), expected, scale=100)
    assert not torch.allclose(slope(q.log_prob(u)), expected)  # control: the full gradient differs


@every_family
def test_sticking_the_landing_off_and_without_gradients(name):
    bound, parameters = make(name, 2, (3,), stick_the_landing=False)
    q = bound(parameters.requires_grad_())
    parts = q.score_parts(q.rsample())
    assert parts.entropy_term is parts.log_prob
    with torch.no_grad():
        q = make(name, 2, (3,))[0](parameters)
        parts = q.score_parts(q.sample())
    assert parts.entropy_term is parts.log_prob


@every_family
def test_path_twin_takes_the_place_of_the_entropy(name):
    bound, parameters = make(name, 2, (3,))
    q = bound(parameters.requires_grad_())
    q.path_twin = bound(parameters.detach() + 1.0)
    u = q.expand((4, 3)).rsample()
    for instance in (q, q.expand((4, 3))):  # expanding keeps it
        close(instance.score_parts(u).entropy_term, q.path_twin.log_prob(u))


@every_family
@every_size
@every_batch
def test_slope_is_the_negative_score(name, size, batch):
    bound, parameters = make(name, size, batch)
    q = bound(parameters)
    u = q.sample().clone().requires_grad_()  # a draw itself would be known by its noise
    (gradient,) = torch.autograd.grad(q.log_prob(u).sum(), u)
    close(q.slope(q.pull(u.detach())[0]), -gradient, scale=10)


@every_family
@pytest.mark.parametrize("size", [2, 5])
@every_batch
def test_scored_gives_the_exact_marginal(name, size, batch):
    """Log q of what is scored is a marginal density of the q that draws; the rest is independent."""
    bound, parameters = make(name, size, batch)
    scored = torch.rand(*batch, size) < 0.6
    scored[..., 0], scored[..., 1] = True, False
    q = bound(parameters, scored)
    u = q.rsample()
    slope = q.slope(q.pull(u.detach())[0])
    units = torch.eye(size, dtype=torch.float64)
    matrix = torch.stack([q.push(e.expand(*batch, size))[0] - q.loc for e in units], -1)
    covariance = matrix @ matrix.mT
    close(q.variance, covariance.diagonal(dim1=-2, dim2=-1))
    for at in itertools.product(*map(range, batch)):
        keep = scored[at]
        assert covariance[at][keep][:, ~keep].abs().max() == 0.0
        marginal = MultivariateNormal(q.mean[at][keep], covariance[at][keep][:, keep])
        for value in (q.log_prob(u), q.log_prob(u.clone()), q.score_parts(u).entropy_term):
            close(value[at], marginal.log_prob(u[at][keep]))
        score = u[at][keep].detach().requires_grad_()
        close(slope[at][keep], -torch.autograd.grad(marginal.log_prob(score), score)[0], scale=10)
        assert slope[at][~keep].abs().max() == 0.0
    everything = bound(parameters, torch.ones_like(scored))
    close(everything.log_prob(u), bound(parameters).log_prob(u))
    assert not torch.allclose(q.log_prob(u), everything.log_prob(u))


@pytest.mark.crossed
@every_family
@every_size
@every_batch
@every_dtype
@pytest.mark.parametrize("scale", [1e-5, 0.1, 1.0, 200.0])
def test_initial_is_loc_and_scale(name, size, batch, dtype, scale):
    bound = FAMILIES[name][0]().bind(size)
    loc = torch.randn(*batch, size, dtype=dtype)
    parameters = bound.initial(loc, scale)
    assert parameters.shape == (*batch, bound.width)
    assert parameters.dtype == dtype
    q = bound(parameters)
    assert torch.equal(q.mean, loc)
    # Low-rank directions start at 0.01, as zero is a saddle point: the scale is off by that squared.
    tolerance = 1e-2 if "low_rank" in name else 1e-4
    torch.testing.assert_close(q.variance.sqrt(), torch.full_like(loc, scale), rtol=tolerance, atol=0.0)


@every_family
@every_dtype
@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_overshooting_scales_stay_finite(name, dtype, raw):
    bound, parameters = make(name, 2, (3,), dtype)
    parameters[..., 2:4] = raw
    q = bound(parameters.requires_grad_())
    u = q.rsample()
    (gradient,) = torch.autograd.grad(q.log_prob(u).sum() + q.score_parts(u).entropy_term.sum(), parameters)
    assert u.isfinite().all()
    assert q.log_prob(u).isfinite().all()
    assert gradient.isfinite().all()


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_select_is_the_marginal(name, masked):
    bound, parameters = make(name, 5, (3,))
    scored = torch.tensor([True, False, True]) if masked else None
    if not bound.factorized:
        with pytest.raises(NotImplementedError, match="does not factorize"):
            bound.select(parameters, 1, 4, scored)
        return
    q, whole = bound.select(parameters, 1, 4, scored), reference(name, 5, parameters)
    keep = [0, 2] if masked else [0, 1, 2]
    picked = [1 + k for k in keep]
    marginal = MultivariateNormal(whole.mean[:, picked], whole.covariance_matrix[:, picked][..., picked])
    u = q.sample((4,))
    close(q.log_prob(u), marginal.log_prob(u[..., keep]))
    close(bound.select(parameters, 0, 5).log_prob(u.new_ones(5)), whole.log_prob(u.new_ones(5)))


@pytest.mark.crossed
@every_family
@every_size
@every_batch
@every_dtype
def test_quantiles_equal_scipy(name, size, batch, dtype):
    bound, parameters = make(name, size, batch, dtype)
    assert bound.has_quantiles
    q, expected = bound(parameters), reference(name, size, parameters)
    for level in (0.0, 1e-4, 0.3, 0.5, 0.975, 1.0):
        exact = stats.norm.ppf(level, expected.mean.numpy(), expected.stddev.numpy())
        close(q.quantile(torch.tensor(level, dtype=dtype)), torch.as_tensor(exact), dtype, scale=100)


@every_family
def test_contract_of_the_class(name):
    constructor = FAMILIES[name][0]
    family = constructor()
    assert isinstance(family, Family)
    assert family == constructor()
    assert hash(family) == hash(constructor())
    assert family != constructor(stick_the_landing=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.stick_the_landing = False
    bound = family.bind(3)
    assert isinstance(bound, BoundFamily)
    assert bound.size == 3
    copied, parameters = copy.deepcopy(bound), bound.initial(torch.zeros(3), 0.5)
    u = torch.randn(3)
    assert torch.equal(copied(parameters).log_prob(u), bound(parameters).log_prob(u))


def test_families_differ():
    """The control of the whole contract: no two families describe the same q."""
    kinds = [FullRankNormal(), LowRankNormal(1), DiagonalNormal()]
    widths = [family.bind(5).width for family in kinds]
    assert widths == [2 * 5 + 10, 3 * 5, 2 * 5]
    assert LowRankNormal(3).bind(1).width == 3  # the rank is at most D
    correlated = [family.bind(2)(torch.ones(1, family.bind(2).width)).scale for family in kinds]
    products = [(s.multiply(torch.eye(2)) @ s.multiply(torch.eye(2)).T)[0, 1].item() for s in correlated]
    assert not math.isclose(products[0], products[1])
    assert products[2] == 0.0


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "rank must be at least 1, got 0; for no correlation use DiagonalNormal"),
        (-2, ValueError, "rank must be at least 1, got -2"),
        (1.5, TypeError, "rank must be an int, got 1.5"),
        (True, TypeError, "rank must be an int, got True"),
        ("2", TypeError, "rank must be an int, got '2'"),
    ],
)
def test_bad_rank(rank, error, message):
    with pytest.raises(error, match=message):
        LowRankNormal(rank)
