"""Objectives, optimizers and densities where they are easily wrong: parts of rows, far draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import F64
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints
from torch.distributions.transforms import CorrCholeskyTransform

from pyro_guides import AmortizedGuide, DiagonalNormal, Discrete, FullRankNormal, LowRankNormal, optim
from pyro_guides.distributions.transforms import bijection
from pyro_guides.objectives import IWELBO, ForwardKL, FreeBits, kl_weight

GRADIENTS = ["doubly_reparameterized", "standard", "wake"]


@pytest.fixture(autouse=True)
def a_seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


# --- importance weights


def groups(x, batch):
    with pyro.plate("group", 4, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        with pyro.plate("obs", 100, subsample_size=batch, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_row_that_sees_a_part_of_its_data_has_no_weights(gradient):
    x = 1.0 + torch.randn(4, 100, **F64)
    guide = AmortizedGuide(groups, amortize=(), init_scale=1.0).setup(x, 100)
    assert math.isfinite(float(IWELBO(8, gradient=gradient).loss(groups, guide, x, 100)))
    with pytest.raises(ValueError, match=r"rows are the elements of \['group'\], but 'x' sees 5 of the 100"):
        IWELBO(8, gradient=gradient).loss(groups, guide, x, 5)


def one_impossible(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("f", torch.where(x > 50.0, -math.inf, 0.0) + 0.0 * z)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_an_impossible_row_has_no_gradient_and_leaves_the_others_theirs(gradient):
    x = torch.tensor([0.1, 0.5, -1.0, 2.0, 100.0], **F64)
    guide = AmortizedGuide(one_impossible, family=DiagonalNormal()).setup(x)
    found = []
    for rows in (x, x[:4]):
        with torch.no_grad():  # λ must not be the same for all rows
            guide.network.head(0).output.weight.copy_(
                0.1 * torch.randn_like(guide.network.head(0).output.weight)
            )
        pyro.set_rng_seed(1)
        loss = IWELBO(16, gradient=gradient).differentiable_loss(one_impossible, guide, rows)
        parameters = [p for p in guide.network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append((loss, gradients))
    (loss, gradients), (fewer, _) = found
    assert loss == math.inf
    assert bool(fewer.isfinite())
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    assert any(float(g.abs().max()) > 0.0 for g in gradients if g is not None)


def normal(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), **F64), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def gradient_of(elbo, guide, x, weight):
    pyro.set_rng_seed(3)
    with kl_weight(weight):
        loss = elbo.differentiable_loss(normal, guide, x)
    parameters = [p for p in guide.network.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([p.reshape(-1) for p in parts if p is not None])


def test_a_kl_weight_does_not_weigh_what_simulations_teach():
    x = torch.randn(20, **F64)
    guide = AmortizedGuide(normal).setup(x)
    plain = gradient_of(ForwardKL(), guide, x, 1.0)
    assert plain.norm() > 0.1
    for weight in (0.0, 0.3):
        torch.testing.assert_close(gradient_of(ForwardKL(), guide, x, weight), plain)


def test_wake_under_a_kl_weight_ends_where_theory_says():
    few = torch.randn(20, **F64)
    wake = IWELBO(8, gradient="wake")
    assert gradient_of(wake, AmortizedGuide(normal).setup(few), few, 0.0).norm() > 0.1  # log q learns still
    x = torch.full((400,), 2.0, **F64)
    guide = AmortizedGuide(normal, amortize=())
    svi = SVI(normal, guide, optim.Adam({"lr": 0.03}), IWELBO(32, gradient="wake"))
    for _ in range(400):
        with kl_weight(0.3):
            svi.step(x)
    # Draws weigh p(x | z) (p(z) / q(z))^0.3; q repeats itself where it is p(x | z)^(1/0.3) p(z).
    precision = 1.0 + 4.0 / 0.3
    assert float(guide.median(x)["z"].mean()) == pytest.approx(2.0 * (4.0 / 0.3) / precision, abs=0.05)


def test_free_bits_measure_the_same_kl_under_every_objective():
    x = torch.randn(50, **F64)
    guide = AmortizedGuide(normal, init_scale=0.1).setup(x)
    found = {}
    for name, elbo in {"elbo": Trace_ELBO(), "wake": IWELBO(64, gradient="wake")}.items():
        bits = FreeBits(0.0)
        with bits:
            SVI(normal, guide, optim.Adam({"lr": 0.0}), elbo).step(x)
        (found[name],) = bits.kl.values()
    with torch.no_grad():
        q = dist.Normal(guide.median(x)["z"], 0.1)
        exact = float(torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(50, **F64), 1.0)).mean())
    assert found["elbo"] == pytest.approx(exact, abs=0.3)
    assert found["wake"] == pytest.approx(exact, abs=0.05)


def test_one_particle_knows_its_plates():
    x = torch.randn(5, **F64)
    guide = AmortizedGuide(normal).setup(x)
    with pytest.raises(ValueError, match="nowhere"):
        IWELBO(1, plates=["nowhere"]).loss(normal, guide, x)


# --- optimizers


def test_a_schedule_goes_on_where_its_state_was_saved():
    def made():
        return optim.Adam({"lr": 0.1}, schedule=lambda step: 0.9**step)

    def step(optimizer, parameters):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer(parameters)
        (group,) = optimizer.optimizer.param_groups  # one fused step, before and after
        return group["lr"], group["steps"]

    names = ("a", "b", "c")
    parameters = [pyro.param(name, torch.zeros(3)).unconstrained() for name in names]
    first = made()
    for _ in range(20):
        step(first, parameters)
    state = first.get_state()
    other = made()
    other.set_state(state)
    expected = step(first, parameters)
    assert expected == (pytest.approx(0.1 * 0.9**20), 21)
    assert step(other, parameters) == expected
    for _ in range(5):
        step(first, parameters)
    first.set_state(state)  # back again, in place
    assert step(first, parameters) == expected


# --- densities


@pytest.mark.parametrize("size", [2, 3, 10, 20])
def test_correlations_have_the_density_of_torch_at_single_precision(size):
    transform = bijection(constraints.corr_cholesky)
    u = 0.3 * torch.randn(50, size * (size - 1) // 2, **F64)
    y = transform(u)
    exact = CorrCholeskyTransform().log_abs_det_jacobian(u, y)
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, y), exact)
    far = (10.0 * u).float()
    single = transform.log_abs_det_jacobian(far, transform(far))
    double = transform.log_abs_det_jacobian(far.double(), transform(far.double()))
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-3)
    if size == 20:  # the control: torch's own loses its digits there
        lost = CorrCholeskyTransform().log_abs_det_jacobian(far, CorrCholeskyTransform()(far))
        assert not bool((lost.double() - double).abs().le(1.0).all())


@pytest.mark.parametrize("ratio", [300.0, 10_000.0])
def test_a_narrow_low_rank_normal_is_promoted_at_single_precision(ratio):
    low, full = LowRankNormal(1).bind(10), FullRankNormal().bind(10)
    parameters = low.initial(torch.zeros(10), 1.0)
    parameters[20:] = math.sqrt(ratio / 10.0) * torch.ones(10) * 1.0
    old, new = low(parameters), full(full.adopt(low, parameters))
    value = old.rsample((100,))
    error = (new.log_prob(value) - old.log_prob(value)).abs().mean()
    assert float(error) < 0.1


# --- score functions


def switched(x):
    """One value of z costs exactly nothing while q is the prior."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5, **F64)))
        with pyro.poutine.mask(mask=z.bool()):
            pyro.sample("x", dist.Normal(torch.zeros((), **F64), 0.1), obs=x)


@pytest.mark.parametrize("baseline", ["auto", "leave_one_out", "running_mean", None])
def test_a_cost_of_zero_is_a_cost(baseline):
    x = torch.zeros(50, **F64)
    guide = AmortizedGuide(switched, family=Discrete(baseline=baseline), amortize=()).setup(x)
    parameter = guide.network.head(0).bias
    found = []
    for _ in range(200):
        loss = Trace_ELBO().differentiable_loss(switched, guide, x)
        (gradient,) = torch.autograd.grad(loss, [parameter])
        found.append(gradient.sum(0))
    found = torch.stack(found)
    # d/dlogit of -E_q[z log N(0 | 0, 0.1)], at q = 1/2, for each of 50 rows.
    exact = -50.0 * 0.25 * float(dist.Normal(0.0, 0.1).log_prob(torch.zeros(())))
    error = float(found[:, -1].std()) / 200**0.5
    assert abs(float(found[:, -1].mean())) == pytest.approx(
        abs(exact), abs=max(4.0 * error, 0.02 * abs(exact))
    )
