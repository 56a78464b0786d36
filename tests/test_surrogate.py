"""One differentiable number for any ELBO: its value, and its gradient bit by bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn

from pyro_guides import Discrete, NormalMixture
from pyro_guides.objectives import IWELBO, WeightedSum, differentiable_loss
from tests.models import hierarchy, prepared, rows, two

ELBOS = {
    "Trace": lambda: Trace_ELBO(num_particles=2),
    "TraceMeanField": lambda: TraceMeanField_ELBO(),
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "TraceGraph, looped": lambda: TraceGraph_ELBO(num_particles=3),
    "TraceGraph, vectorized": lambda: TraceGraph_ELBO(num_particles=3, vectorize_particles=True),
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "wake-sleep": lambda: ReweightedWakeSleep(num_particles=3, insomnia=0.5),
    "importance": lambda: IWELBO(3),
}


def parameters_of(guide):
    return [parameter for parameter in guide.parameters() if parameter.requires_grad]


def gradients(run, guide):
    pyro.set_rng_seed(7)
    guide.zero_grad()
    value = run()
    return value, [None if p.grad is None else p.grad.clone() for p in parameters_of(guide)]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def choices(x):
    """A discrete latent that carries a score function, and a mixture's."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(two(0.4)[0]))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("name", ELBOS)
def test_value_and_gradient_are_those_of_loss_and_grads(name):
    x, elbo = rows(), ELBOS[name]()
    guide = prepared(hierarchy, x)
    elbo.loss_and_grads(hierarchy, guide, x)  # finds out max_plate_nesting

    def ours():
        loss = differentiable_loss(elbo, hierarchy, guide, x)
        assert loss.shape == ()
        loss.backward()
        return float(loss.detach())

    value, found = gradients(ours, guide)
    expected_value, expected = gradients(lambda: elbo.loss_and_grads(hierarchy, guide, x), guide)
    total = sum(expected_value) if isinstance(expected_value, tuple) else expected_value  # wake-sleep has two
    assert value == pytest.approx(float(total), abs=1e-12)
    if name == "Trace":  # which adds up gradients of particles, and we particles' losses
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))
    else:
        assert same(found, expected)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("particles", [1, 4])
def test_score_functions_under_tracegraph(particles):
    x = rows(6, 1).squeeze(-1)
    guide = prepared(choices, x, family={"k": Discrete(baseline=None), "z": NormalMixture(2, baseline=None)})
    elbo = TraceGraph_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    elbo.loss_and_grads(choices, guide, x)

    def ours():
        loss = differentiable_loss(elbo, choices, guide, x)
        loss.backward()
        return float(loss.detach())

    value, found = gradients(ours, guide)
    expected_value, expected = gradients(lambda: elbo.loss_and_grads(choices, guide, x), guide)
    assert value == pytest.approx(expected_value, abs=1e-12)
    assert same(found, expected)


class Baseline(nn.Module):
    """A hand-written guide with a baseline that learns."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(two(0.3)[0])
        self.level = nn.Parameter(two(-1.0)[0])

    def forward(self, x):
        pyro.module("baseline", self)
        with pyro.plate("data", len(x)):
            infer = {"baseline": {"baseline_value": self.level.expand(len(x))}}
            k = pyro.sample("k", dist.Bernoulli(logits=self.logit), infer=infer)
            pyro.sample("z", dist.Normal(k, 1.0))


def test_baselines_learn_too():
    x, guide, elbo = rows(6, 1).squeeze(-1), Baseline(), TraceGraph_ELBO()
    _, found = gradients(lambda: differentiable_loss(elbo, choices, guide, x).backward(), guide)
    _, expected = gradients(lambda: elbo.loss_and_grads(choices, guide, x), guide)
    assert same(found, expected)
    assert found[1] != 0.0


def test_gradients_that_are_handed_on_scale_with_the_loss_and_leave_no_trace():
    x, elbo = rows(), ELBOS["Renyi"]()
    guide = prepared(hierarchy, x)
    elbo.loss_and_grads(hierarchy, guide, x)
    _, expected = gradients(lambda: elbo.loss_and_grads(hierarchy, guide, x), guide)
    kept = [torch.full_like(p, 0.25) for p in parameters_of(guide)]
    for parameter, gradient in zip(parameters_of(guide), kept, strict=True):
        parameter.grad = gradient
    pyro.set_rng_seed(7)
    loss = differentiable_loss(elbo, hierarchy, guide, x)
    for parameter, gradient in zip(parameters_of(guide), kept, strict=True):
        assert parameter.grad is gradient
        assert (gradient == 0.25).all()
    (3.0 * loss).backward()
    for parameter, gradient in zip(parameters_of(guide), expected, strict=True):
        added = 0.0 if gradient is None else 3.0 * gradient
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.25) + added)


def test_gradients_come_back_when_the_elbo_fails():
    class Failing(ELBO):
        def _get_trace(self, *args):
            raise NotImplementedError

        def loss_and_grads(self, model, guide, *args):
            raise RuntimeError("no")

    guide = Baseline()
    guide.logit.grad = two(0.5)[0]
    with pytest.raises(RuntimeError, match="no"):
        differentiable_loss(Failing(), choices, guide, rows(2, 1))
    assert guide.logit.grad == 0.5


def test_a_guide_without_parameters_yet_and_a_constrained_parameter():
    def guide(x):
        scale = pyro.param("scale", two(0.5)[0], constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, scale))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x, elbo = rows(5, 1).squeeze(-1), ELBOS["Renyi"]()
    differentiable_loss(elbo, model, guide, x).backward()
    parameter = pyro.param("scale").unconstrained()
    pyro.set_rng_seed(3)
    parameter.grad = None
    differentiable_loss(elbo, model, guide, x).backward()
    found, parameter.grad = parameter.grad, None
    pyro.set_rng_seed(3)
    elbo.loss_and_grads(model, guide, x)
    assert found == parameter.grad


def test_without_gradients_it_is_a_number():
    x = rows()
    guide = prepared(hierarchy, x)
    for elbo in (ELBOS["Renyi"](), TraceGraph_ELBO()):
        with torch.no_grad():
            assert not differentiable_loss(elbo, hierarchy, guide, x).requires_grad


def test_what_is_no_elbo_is_refused():
    for elbo, message in ((Trace_ELBO, r"write Trace_ELBO\(\)"), (3, "must be an ELBO"), (print, "function")):
        with pytest.raises(TypeError, match=message):
            differentiable_loss(elbo, hierarchy, hierarchy)


# --- sums


def test_a_weighted_sum_has_the_sum_of_the_gradients():
    x = rows()
    guide = prepared(hierarchy, x)
    parts = (ELBOS["Trace"](), TraceGraph_ELBO())
    elbo = WeightedSum((parts[0], 0.3), (parts[1], lambda step: 2.0 + step))

    _, first = gradients(lambda: parts[0].loss_and_grads(hierarchy, guide, x), guide)
    guide.zero_grad()
    parts[1].loss_and_grads(hierarchy, guide, x)
    second = [p.grad.clone() for p in parameters_of(guide)]
    _, found = gradients(lambda: elbo.loss_and_grads(hierarchy, guide, x), guide)
    for a, b, c in zip(first, second, found, strict=True):
        assert torch.allclose(0.3 * a + 2.0 * b, c, atol=1e-10)
    assert elbo.weights == [0.3, 3.0]
    elbo.loss(hierarchy, guide, x)
    assert elbo.step == 1


def test_terms_are_checked():
    for terms, error, message in (
        ((), ValueError, "at least one"),
        ((Trace_ELBO(),), TypeError, r"a pair \(elbo, weight\)"),
        (((Trace_ELBO, 1.0),), TypeError, "begin with an ELBO"),
        (((Trace_ELBO(), -1.0),), ValueError, "at least 0"),
        (((Trace_ELBO(), "1"),), TypeError, "a number or a function"),
    ):
        with pytest.raises(error, match=message):
            WeightedSum(*terms)
    with pytest.raises(ValueError, match="at least 0"):
        _ = WeightedSum((Trace_ELBO(), lambda step: float("nan"))).weights
