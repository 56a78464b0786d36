"""Bijections against autograd, joint draws against densities written by hand, KL against Monte Carlo."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import MultivariateNormal, biject_to
from torch.distributions.kl import kl_divergence
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
)

from pyro_guides import DiagonalNormal, FullRankNormal
from pyro_guides.distributions import Joint, bijection
from pyro_guides.distributions.sites import Piece
from pyro_guides.distributions.transforms import is_fixed, is_identity, strip_independent

F64 = torch.float64
HIGH = torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def flat(y):
    return y.reshape(-1)


def lower(y, offset=0):
    return y[tuple(torch.tril_indices(*y.shape[-2:], offset))]


def strictly_lower(y):
    return lower(y, -1)


def all_but_last(y):
    return y[:-1]


# name -> constraint, unconstrained shape, event shape, free coordinates of a value
CONSTRAINTS = {
    "real": (constraints.real, (), (), flat),
    "real_vector": (constraints.real_vector, (3,), (3,), flat),
    "positive": (constraints.positive, (), (), flat),
    "nonnegative": (constraints.nonnegative, (), (), flat),
    "softplus_positive": (constraints.softplus_positive, (), (), flat),
    "greater_than": (constraints.greater_than(-1.5), (), (), flat),
    "greater_than_eq": (constraints.greater_than_eq(2.0), (), (), flat),
    "less_than": (constraints.less_than(0.5), (), (), flat),
    "unit_interval": (constraints.unit_interval, (), (), flat),
    "interval": (constraints.interval(-1.0, HIGH), (3,), (3,), flat),
    "half_open": (constraints.half_open_interval(-2.0, 5.0), (), (), flat),
    "matrix_of_positive": (constraints.independent(constraints.positive, 2), (2, 3), (2, 3), flat),
    "simplex": (constraints.simplex, (3,), (4,), all_but_last),
    "vector_of_simplex": (
        constraints.independent(constraints.simplex, 1),
        (2, 3),
        (2, 4),
        lambda y: flat(y[..., :-1]),
    ),
    "ordered": (constraints.ordered_vector, (4,), (4,), flat),
    "positive_ordered": (constraints.positive_ordered_vector, (4,), (4,), flat),
    "corr_cholesky": (constraints.corr_cholesky, (3,), (3, 3), strictly_lower),
    "corr_matrix": (constraints.corr_matrix, (6,), (4, 4), strictly_lower),
    "lower_cholesky": (constraints.lower_cholesky, (6,), (3, 3), lower),
    "softplus_lower_cholesky": (constraints.softplus_lower_cholesky, (6,), (3, 3), lower),
    "unit_lower_cholesky": (constraints.unit_lower_cholesky, (3,), (3, 3), strictly_lower),
    "positive_definite": (constraints.positive_definite, (6,), (3, 3), lower),
    "positive_definite_1": (constraints.positive_definite, (1,), (1, 1), lower),
    "cat": (constraints.cat([constraints.real, constraints.positive], 0, [1, 2]), (3,), (3,), flat),
    "stack": (constraints.stack([constraints.real, constraints.positive], 0), (2,), (2,), flat),
}
BATCHED = [name for name in CONSTRAINTS if name not in ("cat", "stack")]  # these fix a dimension
every_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


def unconstrained(name, *batch):
    return torch.randn((*batch, *CONSTRAINTS[name][1]), dtype=F64)


def log_jacobian(name, x):
    """Log|det dy/dx| in the free coordinates of y, by autograd."""
    constraint, _, _, free = CONSTRAINTS[name]
    transform = bijection(constraint)
    jacobian = torch.autograd.functional.jacobian(
        lambda u: free(transform(u.reshape(x.shape))), x.reshape(-1)
    )
    return jacobian.slogdet().logabsdet


def test_every_known_constraint_is_covered():
    tested = {type(case[0]) for case in CONSTRAINTS.values()}
    assert set(biject_to._registry) <= tested


@every_constraint
def test_round_trip_shapes_and_support(name):
    constraint, u_shape, event_shape, _ = CONSTRAINTS[name]
    transform, x = bijection(constraint), unconstrained(name)
    y = transform(x)
    assert tuple(transform.forward_shape(torch.Size(u_shape))) == y.shape == event_shape
    assert tuple(transform.inverse_shape(torch.Size(event_shape))) == u_shape
    assert constraint.check(y).all()
    torch.testing.assert_close(transform.inv(y), x)
    torch.testing.assert_close(transform(transform.inv(y)), y)
    assert transform.bijective


@pytest.mark.crossed
@every_constraint
@pytest.mark.parametrize("seed", range(3))
def test_log_determinant_equals_autograd(name, seed):
    torch.manual_seed(seed)
    x = unconstrained(name)
    piece = make_piece(name)
    u = x.reshape(-1)
    ours = piece.log_jacobian(u, piece.constrain(u))
    torch.testing.assert_close(ours, log_jacobian(name, x))


@pytest.mark.parametrize("name", [name for name in BATCHED if "corr" not in name and "ordered" not in name])
def test_log_determinants_stay_finite(name):
    """A far draw must not make every gradient NaN."""
    u = (60.0 * torch.randn(500, *CONSTRAINTS[name][1])).requires_grad_()
    transform = bijection(CONSTRAINTS[name][0])
    jacobian = transform.log_abs_det_jacobian(u, transform(u))
    (gradient,) = torch.autograd.grad(jacobian.sum() + 0.0 * u.sum(), u)
    assert jacobian.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_batches_are_rows_of_their_own(name, dtype):
    x = unconstrained(name, 2, 5)
    piece = make_piece(name)
    u = x.flatten(2).to(dtype) if x.dim() > 2 else x.unsqueeze(-1).to(dtype)
    y = piece.constrain(u)
    assert y.shape == (2, 5, *CONSTRAINTS[name][2])
    assert y.dtype == dtype or name == "interval"  # its bounds are in double precision
    jacobian = piece.log_jacobian(u, y)
    assert jacobian.shape == (2, 5)
    torch.testing.assert_close(piece.unconstrain(y), u.to(y.dtype), rtol=1e-3, atol=1e-4)
    for i, j in ((0, 0), (1, 4)):
        torch.testing.assert_close(piece.constrain(u[i, j]), y[i, j])
        torch.testing.assert_close(piece.log_jacobian(u[i, j], y[i, j]), jacobian[i, j])


@pytest.mark.parametrize(
    "constraint",
    [constraints.boolean, constraints.integer_interval(0, 3), constraints.sphere, constraints.one_hot],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_supports_without_bijection(constraint, wrapped):
    with pytest.raises(NotImplementedError):
        bijection(constraints.independent(constraint, 1) if wrapped else constraint)


def test_triangular_transforms_compare_by_type():
    def same(a, b):
        return bijection(a) == bijection(b)

    assert same(constraints.lower_cholesky, constraints.lower_cholesky)
    assert not same(constraints.lower_cholesky, constraints.positive_definite)


def test_identity_and_fixed_supports():
    assert is_identity(bijection(constraints.independent(constraints.real, 2)))
    assert is_identity(bijection(constraints.real_vector))
    assert not is_identity(bijection(constraints.positive))
    positive = bijection(constraints.positive)
    assert strip_independent(bijection(constraints.independent(constraints.positive, 2))) == positive
    held = constraints.interval(0.0, torch.tensor(1.0))
    assert is_fixed(constraints.interval(0.0, 1.0))
    assert is_fixed(constraints.cat([constraints.real, constraints.positive]))
    for support in (held, constraints.independent(held, 1), constraints.cat([constraints.real, held])):
        assert not is_fixed(support)


# --- pieces and joints


def make_piece(name, **options):
    constraint, u_shape, event_shape, _ = CONSTRAINTS[name]
    return Piece(bijection(constraint), torch.Size(u_shape), constraint, torch.Size(event_shape), **options)


@pytest.mark.parametrize(
    ("name", "mask", "event_dim"),
    [
        ("positive", [True, False], 0),
        ("matrix_of_positive", [True, False], 0),
        ("matrix_of_positive", [[True, False], [False, False]], 1),
        ("matrix_of_positive", [[[True, False, True]] * 2, [[False, True, True]] * 2], 2),
        ("vector_of_simplex", [[True, False], [True, True]], 1),
        ("lower_cholesky", [False, True], 0),
    ],
)
def test_masked_jacobian(name, mask, event_dim):
    """Only scored elements count, at the resolution of the mask."""
    mask = torch.tensor(mask)
    u = unconstrained(name, 2).reshape(2, -1)
    whole, masked = make_piece(name), make_piece(name, mask=mask, mask_event_dim=event_dim)
    y = whole.constrain(u)
    base = strip_independent(whole.transform)
    terms = base.log_abs_det_jacobian(u.reshape(2, *CONSTRAINTS[name][1]), y)
    weights = mask.reshape(mask.shape + (1,) * (terms.dim() - mask.dim())).to(F64)
    expected = (terms * weights).reshape(2, -1).sum(-1)
    torch.testing.assert_close(masked.log_jacobian(u, y), expected)
    assert not torch.allclose(expected, whole.log_jacobian(u, y))


SITES = ("real_vector", "positive", "simplex")  # 3 + 1 + 3 values of u


def make_joint(*batch):
    bound = FullRankNormal().bind(7)
    parameters = bound.initial(torch.randn(*batch, 7, dtype=F64), 0.5)
    parameters = (parameters + 0.2 * torch.randn_like(parameters)).requires_grad_()
    q = bound(parameters)
    joint = Joint(q, {"real_vector": (0, 3), "positive": (3, 4), "simplex": (4, 7)})
    exact = MultivariateNormal(q.mean.detach(), covariance(q))
    return joint, {name: joint.site(name, make_piece(name)) for name in SITES}, exact, parameters


def covariance(q):
    columns = [q.push(e.expand(q.mean.shape))[0] - q.mean for e in torch.eye(q.event_shape[0], dtype=F64)]
    matrix = torch.stack(columns, -1).detach()
    return matrix @ matrix.mT


def by_hand(exact, values):
    """Log density of the joint at given values, from their formulas alone."""
    u = [values["real_vector"], values["positive"].log()[..., None]]
    u.append(StickBreakingTransform().inv(values["simplex"]))
    jacobian = values["positive"].log()
    jacobian = jacobian + StickBreakingTransform().log_abs_det_jacobian(u[2], values["simplex"])
    return exact.log_prob(torch.cat(u, -1)) - jacobian


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("given", [(), ("positive",), ("real_vector", "simplex"), SITES], ids=str)
def test_joint_scores_the_values_its_sites_took(batch, given):
    """Own, replayed and conditioned values together are scored as what they are."""
    joint, sites, exact, parameters = make_joint(*batch)
    values = {name: site.rsample() for name, site in sites.items()}
    for name in given:
        values[name] = make_piece(name).constrain(unconstrained(name, *batch).reshape(*batch, -1))
    for name in SITES:
        torch.testing.assert_close(joint.take(name, values[name]).shape[:-1], torch.Size(batch))
    total = sum(site.log_prob(values[name]) for name, site in sites.items())
    expected = by_hand(exact, values)
    assert total.shape == expected.shape == torch.Size(batch)
    torch.testing.assert_close(total, expected)
    parts = [site.score_parts(values[name]) for name, site in sites.items()]
    for index in (0, 2):  # log_prob and entropy_term
        torch.testing.assert_close(sum(part[index] for part in parts), expected)
    assert all(part.score_function == 0.0 for part in parts)
    values["positive"] = values["positive"] * 1.1
    assert not torch.allclose(by_hand(exact, values), expected)
    if set(given) < set(SITES):
        (gradient,) = torch.autograd.grad(total.sum(), parameters)
        assert gradient.isfinite().all()


def test_sites_of_a_joint(monkeypatch):
    joint, sites, _, _ = make_joint(4)
    values = {name: site.rsample() for name, site in sites.items()}
    inverted = {name: make_piece(name).unconstrain(values[name]) for name in SITES}
    monkeypatch.setattr(Piece, "unconstrain", lambda *_: pytest.fail("inverted"))
    for name, site in sites.items():
        constraint, _, event_shape, _ = CONSTRAINTS[name]
        assert (site.batch_shape, site.event_shape) == ((4,), event_shape)
        assert site.support is constraint
        assert site.has_rsample
        assert constraint.check(values[name]).all()
        torch.testing.assert_close(joint.take(name, values[name]), inverted[name])
    torch.testing.assert_close(joint.unconstrained(), torch.cat(list(inverted.values()), -1))
    with pytest.raises(pytest.fail.Exception, match="inverted"):  # control
        joint.take("simplex", values["simplex"].clone())
    with pytest.raises(NotImplementedError, match=r"'positive' is drawn jointly.*sample_shape=\(2,\)"):
        sites["positive"].rsample((2,))


def test_expanding_the_first_site_expands_the_joint():
    joint, sites, _, _ = make_joint(3)
    grown = sites["real_vector"].expand((5, 3))
    assert grown.batch_shape == (5, 3)
    assert sites["real_vector"].expand((3,)) is sites["real_vector"]
    rest = {name: joint.site(name, make_piece(name)) for name in SITES[1:]}
    for name, site in {"real_vector": grown, **rest}.items():
        assert site.batch_shape == (5, 3)
        joint.take(name, site.rsample())
    assert joint.unconstrained().shape == (5, 3, 7)
    assert len(joint.unconstrained().flatten().unique()) == 5 * 3 * 7


# --- KL


def site_of(q, constraint, u_shape, event_shape, **options):
    piece = Piece(bijection(constraint), torch.Size(u_shape), constraint, torch.Size(event_shape), **options)
    return Joint(q, {"z": (0, q.event_shape[0])}).site("z", piece)


def normal_parts(*shape):
    return torch.randn(shape, dtype=F64), torch.rand(shape, dtype=F64) + 0.5


ABOVE_ONE = constraints.independent(constraints.greater_than(1.0), 1)
KL_SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 2)}


@pytest.mark.parametrize("batch", [(), (4,)], ids=str)
@pytest.mark.parametrize("shape", KL_SHAPES)
@pytest.mark.parametrize("prior_class", [dist.Normal, dist.LogNormal])
@pytest.mark.parametrize("family", [DiagonalNormal(), FullRankNormal()], ids=["diagonal", "full"])
def test_kl_equals_monte_carlo(batch, shape, prior_class, family):
    event = KL_SHAPES[shape]
    size = math.prod(event)
    bound = family.bind(size)
    parameters = bound.initial(torch.randn(*batch, size, dtype=F64), 0.6)
    q = bound(parameters + 0.2 * torch.randn_like(parameters))
    prior = prior_class(*normal_parts(*batch, *event)).to_event(len(event))
    site = site_of(q, prior.support, event, event)
    exact = kl_divergence(site, prior)
    assert exact.shape == torch.Size(batch)
    u = q.expand((40_000, *batch)).sample()
    value = site.piece.constrain(u)
    log_q = q.log_prob(u.clone()) - (u.sum(-1) if prior_class is dist.LogNormal else 0.0)
    terms = log_q - prior.log_prob(value)
    error = (terms.mean(0) - exact) / (terms.std(0) / 200.0)
    assert error.abs().max() < 4.5
    wrong = (terms.mean(0) - exact * 1.1 - 0.05) / (terms.std(0) / 200.0)
    assert wrong.abs().min() > 4.5


def test_kl_broadcasts_and_is_zero_for_equal():
    bound = DiagonalNormal().bind(2)
    q = bound(bound.initial(torch.zeros(5, 2, dtype=F64), 0.7))
    prior = dist.Normal(torch.zeros(2, dtype=F64), 0.7).to_event(1)
    divergence = kl_divergence(site_of(q, constraints.real_vector, (2,), (2,)), prior)
    torch.testing.assert_close(divergence, torch.zeros(5, dtype=F64))


def test_kl_leaves_everything_else_to_the_draw():
    bound = DiagonalNormal().bind(3)
    parameters = bound.initial(torch.zeros(3, dtype=F64), 0.7)
    q, standard = bound(parameters), dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    scored = torch.tensor([True, False, True])
    vector = (constraints.real_vector, (3,), (3,))
    joint = Joint(q, {"a": (0, 1), "b": (1, 3)})
    log_normal = dist.LogNormal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    cases = {
        "masked q": (site_of(bound(parameters, scored), *vector), standard),
        "masked piece": (site_of(q, *vector, mask=scored, mask_event_dim=1), standard),
        "several sites": (joint.site("a", make_piece("real")), dist.Normal(0.0, 1.0)),
        "another shape": (site_of(q, *vector), dist.Normal(0.0, 1.0)),
        "another prior": (site_of(q, *vector), dist.Laplace(torch.zeros(3), 1.0).to_event(1)),
        "support of another": (
            site_of(q, constraints.independent(constraints.positive, 1), (3,), (3,)),
            standard,
        ),
        "greater than one": (site_of(q, ABOVE_ONE, (3,), (3,)), log_normal),
        "softplus": (
            site_of(q, constraints.independent(constraints.softplus_positive, 1), (3,), (3,)),
            log_normal,
        ),
        "another bijection": (site_of(q, *vector), dist.LogNormal(torch.zeros(3), 1.0).to_event(1)),
    }
    assert kl_divergence(site_of(q, *vector), standard) > 0.0  # control: this one is known
    for label, (site, prior) in cases.items():
        with pytest.raises(NotImplementedError):
            pytest.fail(f"{label}: {kl_divergence(site, prior)}")


def test_transforms_agree_with_torch_by_name():
    """Control: the elementwise bijections are the ones a reader expects."""
    x = torch.randn(3, dtype=F64)
    pairs = [
        (constraints.positive, ExpTransform()),
        (constraints.softplus_positive, SoftplusTransform()),
        (constraints.unit_interval, SigmoidTransform()),
        (constraints.greater_than(-1.0), ComposeTransform([ExpTransform(), AffineTransform(-1.0, 1.0)])),
        (constraints.corr_cholesky, CorrCholeskyTransform()),
        (constraints.simplex, StickBreakingTransform()),
    ]
    for constraint, expected in pairs:
        torch.testing.assert_close(bijection(constraint)(x), expected(x))
