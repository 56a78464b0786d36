"""Gradients of the ELBO are those of its value, and sticking the landing only takes their noise away.

Finite differences of the loss at the same draws, analytic gradients of quadratic costs under a cubature rule
that makes averages over draws exact, and 4 standard errors where neither is to be had. Seed 0 everywhere.
"""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Recorder, forest_by_hand, normal
from models import ELBOS, F64, MASKS, ZOO, forest, masked, normal_rows, prepared, rows, two
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pyro_guides.network as network_module
from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_guides.distributions import VectorNormal
from pyro_guides.heads import AmortizedHead

VECTORIZED = {"num_particles": 3, "vectorize_particles": True}


def family_of(name, stick_the_landing):
    options = {"stick_the_landing": stick_the_landing}
    return LowRankNormal(2, **options) if name is LowRankNormal else name(**options)


KINDS = [DiagonalNormal, FullRankNormal, LowRankNormal]
by_kind = pytest.mark.parametrize("kind", KINDS)
by_bound = pytest.mark.parametrize("elbo", ["Trace", "TraceGraph"])
by_landing = pytest.mark.parametrize("landing", [True, False], ids=["stl", "plain"])
# Trace and TraceGraph with every family, the other bounds with one.
CASES = sorted({*product(["Trace", "TraceGraph"], KINDS), *product(ELBOS, [FullRankNormal])}, key=str)
MODELS = ZOO | {f"mask {kind}": (masked(kind)[0], (rows(),), 1, 1.0) for kind in MASKS}


def gradient_of(elbo, model, guide, *args):
    """The gradient of one loss, as one vector."""
    guide.zero_grad()
    elbo.loss_and_grads(model, guide, *args)
    return joined(guide, [p.grad for p in guide.parameters()])


def joined(guide, gradients):
    pairs = zip(guide.parameters(), gradients, strict=True)
    return parameters_to_vector([torch.zeros_like(p) if g is None else g for p, g in pairs])


def twins(model, *args, kind, **options):
    """Two guides with the same λ: plain, and sticking the landing."""
    plain = prepared(model, *args, family=family_of(kind, False), **options)
    landing = prepared(model, *args, family=family_of(kind, True), **options)
    landing.load_state_dict(plain.state_dict())
    return plain, landing


# --- at the same draws


@pytest.mark.crossed
@pytest.mark.parametrize(("elbo", "kind"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_loss(name, kind, elbo):
    model, args, depth, _ = MODELS[name]
    guide = prepared(model, *args, family=family_of(kind, False))
    check_finite_differences(ELBOS[elbo](max_plate_nesting=depth, **VECTORIZED), model, guide, *args)


def check_finite_differences(elbo, model, guide, *args, step=1e-5):
    start = parameters_to_vector(guide.parameters()).detach().clone()

    def loss(point):
        vector_to_parameters(point, guide.parameters())
        pyro.set_rng_seed(1)
        return elbo.loss(model, guide, *args)

    loss(start)  # the first call of its kind reads the model, which may take random numbers
    pyro.set_rng_seed(1)
    gradient = gradient_of(elbo, model, guide, *args)
    for direction in torch.randn(2, len(start), generator=torch.Generator().manual_seed(2), **F64):
        slope = (loss(start + step * direction) - loss(start - step * direction)) / (2.0 * step)
        assert float(gradient @ direction) == pytest.approx(slope, rel=1e-5, abs=1e-5), "finite differences"


@pytest.mark.crossed
@by_bound
@by_kind
@pytest.mark.parametrize("name", MODELS)
def test_landing_drops_the_score_and_nothing_else(name, kind, elbo):
    check_landing(*MODELS[name][:3], kind, elbo)


def check_landing(model, args, depth, kind, elbo):
    bound = ELBOS[elbo](max_plate_nesting=depth, **VECTORIZED)
    gradients = []
    for guide in twins(model, *args, kind=kind):
        recorder = Recorder(guide)
        pyro.set_rng_seed(1)
        guide.zero_grad()
        bound.loss_and_grads(model, recorder, *args)
        gradients.append(parameters_to_vector([p.grad for p in guide.parameters()]))
    trace = recorder.calls[-1][0]
    trace.detach_()
    with pyro.plate("num_particles_vectorized", 3, dim=-1 - depth):
        scored = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args)
    score = torch.autograd.grad(scored.log_prob_sum() / 3.0, list(guide.parameters()), allow_unused=True)
    assert torch.allclose(gradients[0] - gradients[1], joined(guide, score), rtol=1e-6, atol=1e-8)


@by_kind
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_reaches_every_parameter(name, kind):
    model, args, depth, _ = MODELS[name]
    guide = prepared(model, *args, family=family_of(kind, True))
    check_reach(Trace_ELBO(max_plate_nesting=depth, **VECTORIZED), model, guide, *args)


def check_reach(elbo, model, guide, *args):
    gradient_of(elbo, model, guide, *args)
    missed = [n for n, p in guide.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0.0]
    assert not missed, f"no gradient for {missed}"


# --- averages: asymmetric costs


def quadratic(x):
    """Costs that have neither symmetry nor independence."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.5, -0.5), two(1.0, 2.0)).to_event(1))
        pyro.factor("cost", -(z[..., 0] ** 2) + z[..., 0] * z[..., 1] + (x * z).sum(-1))


def analytic_quadratic(q, x):
    p = MultivariateNormal(two(0.5, -0.5), two(1.0, 4.0).diag_embed())
    second = q.covariance_matrix + q.mean.unsqueeze(-1) * q.mean.unsqueeze(-2)
    cost = -second[..., 0, 0] + second[..., 0, 1] + (x * q.mean).sum(-1)
    return (kl_divergence(q, p) - cost).sum()


def cubature(self, shape):
    """2D points with the mean and covariance of standard normal noise, one per particle."""
    size = shape[-1]
    points = math.sqrt(size) * torch.cat([torch.eye(size, **F64), -torch.eye(size, **F64)])
    return points.reshape(2 * size, *[1] * (len(shape) - 2), size).expand(shape)


@by_bound
@by_landing
@pytest.mark.parametrize("amortize", [None, ()], ids=["amortized", "learned"])
@by_kind
def test_quadratic_costs_have_the_analytic_gradient(kind, amortize, landing, elbo, monkeypatch):
    monkeypatch.setattr(VectorNormal, "sample_noise", cubature)
    guide = prepared(quadratic, rows(), family=family_of(kind, landing), amortize=amortize)
    recorder = Recorder(guide)
    bound = ELBOS[elbo](num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss = bound.loss_and_grads(quadratic, recorder, rows())
    gradient = parameters_to_vector([p.grad for p in guide.parameters()])
    recorder(rows())
    expected = analytic_quadratic(normal(guide.network.family(0), recorder.calls[-1][1][0]), rows())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    exact = parameters_to_vector(torch.autograd.grad(expected, list(guide.parameters())))
    assert torch.allclose(gradient, exact, rtol=1e-8, atol=1e-8)


def exponential():
    """Two sites in one group, one of them positive, with costs that couple them."""
    a = pyro.sample("a", dist.LogNormal(two(0.0)[0], 1.0))
    b = pyro.sample("b", dist.Normal(two(0.0)[0], 1.0))
    pyro.factor("cost", -(a**2) + a * b)


def analytic_exponential(q):
    p = MultivariateNormal(two(0.0, 0.0), torch.eye(2, **F64))
    (m, n), covariance = q.mean, q.covariance_matrix
    variance = covariance[0, 0]
    cost = -(2.0 * m + 2.0 * variance).exp() + (n + covariance[0, 1]) * (m + variance / 2.0).exp()
    return kl_divergence(q, p) - cost


@by_landing
@by_kind
def test_constrained_costs_have_the_analytic_gradient(kind, landing):
    guide = prepared(exponential, family=family_of(kind, landing), amortize=(), init_scale=0.4)
    recorder = Recorder(guide)
    recorder()
    expected = analytic_exponential(normal(guide.network.family(0), recorder.calls[0][1][0]))
    exact = parameters_to_vector(torch.autograd.grad(expected, list(guide.parameters())))
    bound = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
    gradients = torch.stack([gradient_of(bound, exponential, guide) for _ in range(50)])
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - exact).abs() < 4.0 * error + 1e-12).all()
    assert (error < 0.1).all()  # otherwise the line above says nothing


# --- at the optimum


def fitted(bound, target):
    """λ at which q is a given normal, by Newton's method without derivatives of ours: L-BFGS on the KL."""
    parameters = bound.initial(target.mean, 1.0).requires_grad_()
    tolerances = {"tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([parameters], max_iter=1000, line_search_fn="strong_wolfe", **tolerances)

    def closure():
        optimizer.zero_grad()
        loss = kl_divergence(normal(bound, parameters), target).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert kl_divergence(normal(bound, parameters), target).sum() < 1e-10
    return parameters.detach()


def conjugate(weight):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    return model


def exact_rows(kind, landing, amortized):
    """A guide at the exact posterior of a conjugate model."""
    weight = torch.eye(2, **F64) if kind is DiagonalNormal else two(1.0, 0.5, -0.3, 0.8).reshape(2, 2)
    model, x = conjugate(weight), rows()
    options = {"encoder": nn.Identity()} if amortized else {"amortize": ()}
    guide = AmortizedGuide(model, family=family_of(kind, landing), **options).setup(x)
    precision = torch.eye(2, **F64) + weight @ weight.T / 0.25
    covariance = precision.inverse()
    target = MultivariateNormal(torch.zeros_like(x), covariance.expand(len(x), 2, 2))
    head = guide.network.heads[0]
    parameters = fitted(guide.network.family(0), target)
    matrix = weight.T @ covariance / 0.25  # the posterior mean is x times this
    with torch.no_grad():
        if amortized:
            head.output.bias.copy_(parameters[0])
            head.output.weight[:2] = matrix.T / head.output.gain
        else:
            parameters[:, :2] = x @ matrix
            head.bias.copy_(parameters)
    return model, guide, x


def normal_tree(x):
    """A mean over all rows, and one for each."""
    center = pyro.sample("center", dist.Normal(two(0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(center, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def exact_tree(kind, landing, amortized):
    """q(center) q(z | center), both exact."""
    x = rows()
    options = {"encoder": nn.Identity()} if amortized else {"amortize": ()}
    guide = AmortizedGuide(normal_tree, family=family_of(kind, landing), **options).setup(x)
    precision = 1.0 + len(x) / 1.25
    eye = torch.eye(2, **F64)
    top, rest = guide.network.heads
    above = MultivariateNormal(x.sum(0) / 1.25 / precision, eye / precision)
    above = fitted(guide.network.family(0), above)
    below = fitted(guide.network.family(1), MultivariateNormal(torch.zeros_like(x), eye / 5.0))
    with torch.no_grad():
        top.bias.copy_(above)
        location, spread = guide.network.frame(0, {})  # the units in which z sees the center
        if amortized:
            for parameter in rest.outer.parameters():
                parameter.zero_()
            rest.output.bias.copy_(below[0])
            rest.output.bias[:2] = location / 5.0
            weight = torch.cat([0.8 * eye, 0.2 * spread.diag()], dim=1)
            rest.output.weight[:2] = weight / rest.output.gain
        else:
            below[:, :2] = 0.8 * x + location / 5.0
            rest.bias.copy_(below)
            rest.weight[:, :2] = 0.2 * spread.diag()
    return normal_tree, guide, x


def gradient_variance(model, guide, x):
    gradients = [gradient_of(Trace_ELBO(), model, guide, x) for _ in range(20)]
    return float(torch.stack(gradients).var(0).max())


@pytest.mark.crossed
@by_kind
@pytest.mark.parametrize("amortized", [True, False], ids=["amortized", "learned"])
@pytest.mark.parametrize("exact", [exact_rows, exact_tree])
def test_the_gradient_has_no_noise_where_q_is_exact(exact, amortized, kind):
    assert gradient_variance(*exact(kind, True, amortized)) < 1e-10
    assert gradient_variance(*exact(kind, False, amortized)) > 1e-3


# --- exact evidence


def evidence_bound(guide, x, particles):
    """The ELBO and its standard error."""
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=2)
    losses = torch.tensor([elbo.loss(forest, guide, x) for _ in range(20)])
    return -float(losses.mean()), float(losses.std()) / math.sqrt(len(losses))


@pytest.mark.slow
def test_a_full_rank_hierarchy_reaches_the_exact_evidence():
    x = rows(2, 3)
    _, _, evidence = forest_by_hand(x)
    guide = AmortizedGuide(forest, family=FullRankNormal(), amortize=()).setup(x)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    for _ in range(700):
        optimizer.zero_grad()
        elbo.loss_and_grads(forest, guide, x)
        optimizer.step()
        schedule.step()
    bound, error = evidence_bound(guide, x, 5)
    assert abs(bound - evidence) < 1e-3
    assert error < 1e-3


def test_control_independent_normals_fall_short_by_the_theoretical_gap():
    x = rows(2, 3)
    precision, mean, evidence = forest_by_hand(x)
    options = {"amortize": (), "condition_on_upstream": False}
    guide = AmortizedGuide(forest, family=DiagonalNormal(), **options).setup(x)
    best = MultivariateNormal(mean.unsqueeze(-1), precision.diagonal().reciprocal().reshape(-1, 1, 1))
    parameters = fitted(guide.network.family(0), best).split([1, 2, 6])
    with torch.no_grad():
        for head, best in zip(guide.network.heads, parameters, strict=True):
            head.bias.copy_(best.reshape(head.bias.shape))
    gap = float(precision.diagonal().log().sum() - precision.logdet()) / 2.0
    bound, error = evidence_bound(guide, x, 5000)
    assert gap > 0.5
    assert abs(evidence - bound - gap) < 4.0 * error
    assert error < 0.05


# --- controls: the checks above see faults that are planted into the package


def blind(self, context, upstream, indices, forward=AmortizedHead.forward):
    return forward(self, context.detach(), upstream, indices)


def cut(*_):
    return None


def half(self, noise, push=VectorNormal.push):
    value, log_volume = push(self, noise)
    return value.detach() + 0.5 * (value - value.detach()), log_volume


def test_control_a_wrong_path_is_seen(monkeypatch):
    guide = prepared(normal_rows, rows(), family=FullRankNormal(stick_the_landing=False))
    monkeypatch.setattr(VectorNormal, "push", half)
    with pytest.raises(AssertionError, match="finite differences"):
        check_finite_differences(Trace_ELBO(), normal_rows, guide, rows())


def test_control_an_encoder_without_gradient_is_seen(monkeypatch):
    guide = prepared(normal_rows, rows())
    monkeypatch.setattr(AmortizedHead, "forward", blind)
    with pytest.raises(AssertionError, match=r"encoders\.0\.linear\.weight"):
        check_reach(Trace_ELBO(), normal_rows, guide, rows())


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (VectorNormal, "slope", lambda self, noise: torch.zeros_like(noise)),
        (network_module, "_twin", cut),
    ],
    ids=["no slope", "no path through upstream values"],
)
def test_control_a_wrong_landing_is_seen(owner, name, wrong, monkeypatch):
    monkeypatch.setattr(owner, name, wrong)
    assert gradient_variance(*exact_tree(FullRankNormal, True, False)) > 1e-3
    with pytest.raises(AssertionError):
        check_landing(*MODELS["hierarchy"][:3], FullRankNormal, "Trace")
