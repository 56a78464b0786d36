"""Training on simulations: exact posteriors without data, and what cannot be simulated."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_guides import MLP, AmortizedGuide, Discrete, calibrate, optim
from pyro_guides.objectives import ForwardKL, WeightedSum, differentiable_loss
from pyro_guides.structure.dependencies import dependencies
from tests.models import F64, hierarchy, prepared, rows, two

S = 0.5
V = 1.0 / (1.0 + 1.0 / S**2)
C = V / S**2


def conjugate(x, full=None):
    with pyro.plate("data", full or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], pyro.param("spread", two(1.0)[0])))
        pyro.sample("x", dist.Normal(z, S), obs=x)


class Exact(nn.Module):
    """The posterior, as a guide with two parameters."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(two(C)[0])
        self.scale = nn.Parameter(two(math.sqrt(V))[0])

    def forward(self, x, full=None):
        pyro.module("exact", self)
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.scale))


def linear_guide():
    return AmortizedGuide(conjugate, nn.Linear(1, 4, **F64), inputs=lambda x, full=None: x.unsqueeze(-1))


# --- the loss


@pytest.mark.parametrize("full", [None, 1500])
def test_the_loss_is_the_expected_entropy_of_the_posterior(full):
    """E of -log q is the normal's entropy in each row; 500 rows and 40 draws give an error of 0.3 percent."""
    x, guide = torch.zeros(500, **F64), Exact()
    losses = torch.tensor([ForwardKL().loss(conjugate, guide, x, full) for _ in range(40)], **F64)
    entropy = (full or 500) * 0.5 * math.log(2 * math.pi * math.e * V)
    assert abs(losses.mean() - entropy) < 4.0 * losses.std() / math.sqrt(40)


def test_the_gradient_vanishes_at_the_posterior_and_nowhere_else():
    x, guide = torch.zeros(500, **F64), Exact()

    def slopes():
        found = []
        for _ in range(30):
            guide.zero_grad()
            ForwardKL(2).loss_and_grads(conjugate, guide, x)
            found.append(torch.stack([guide.slope.grad, guide.scale.grad]))
        found = torch.stack(found)
        return (found.mean(0) / (found.std(0) / math.sqrt(len(found)))).abs()

    assert (slopes() < 4.0).all()
    with torch.no_grad():
        guide.slope += 0.1
    assert slopes()[0] > 10.0


def test_a_step_simulates_once():
    runs = []

    def counted(x):
        runs.append(len(x))
        conjugate(x)

    elbo, x = ForwardKL(), torch.zeros(4, **F64)
    elbo.loss(counted, guide := AmortizedGuide(counted), x)
    runs.clear()
    elbo.loss(counted, guide, x)
    assert len(runs) == 1


def test_only_the_guide_learns():
    x, guide = torch.zeros(4, **F64), Exact()
    loss = differentiable_loss(ForwardKL(3), conjugate, guide, x)
    loss.backward()
    assert guide.slope.grad is not None
    assert pyro.param("spread").grad is None


def test_it_trains_an_amortized_guide_to_the_exact_posterior():
    """Data of zeros teach nothing: all comes from simulations. KL(p || q) per row, exactly."""
    guide = linear_guide()
    elbo, x = ForwardKL(), torch.zeros(400, **F64)
    for rate, steps in ((0.05, 100), (0.01, 60)):
        svi = SVI(conjugate, guide, optim.Adam({"lr": rate}), elbo)
        for _ in range(steps):
            svi.step(x)
    seen = torch.linspace(-2.0, 2.0, 9, **F64)
    q = guide.posterior(seen, num_draws=2).query.run(1).nodes["z"]["fn"].joint.distribution
    exact = dist.Normal(C * seen, math.sqrt(V))
    found = dist.Normal(q.mean.squeeze(), q.variance.squeeze().sqrt())
    assert torch.distributions.kl_divergence(exact, found).max() < 0.01
    assert pyro.param("spread") == 1.0


def test_discrete_latents_and_latents_left_to_the_model():
    """k is learned; what the guide leaves to the model is summed out by drawing it."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]))
            e = pyro.sample("e", dist.Bernoulli(two(0.5)[0]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * k + e, 1.0), obs=x)

    x = torch.zeros(300, **F64)
    guide = AmortizedGuide(model, MLP(width=16, depth=1), Discrete())
    guide.setup(torch.randn(300, **F64) * 1.5 + 1.0)
    svi = SVI(model, guide, optim.Adam({"lr": 0.02}), ForwardKL())
    for _ in range(200):
        svi.step(x)
    seen = two(-0.5, 1.0, 2.5)
    joint = [
        sum(0.5 * dist.Normal(2.0 * k + e, 1.0).log_prob(seen).exp() for e in (0, 1)) * p
        for k, p in ((0, 0.7), (1, 0.3))
    ]
    exact = joint[1] / (joint[0] + joint[1])
    found = guide.posterior(seen).query.run(1).nodes["k"]["fn"].base.probs.squeeze()
    assert (found - exact).abs().max() < 0.07


def test_learned_globals_are_drawn_from_the_guide_and_stay():
    x = rows()
    guide = prepared(hierarchy, x)
    learned = [name for name, _ in guide.network.named_parameters() if name.startswith("heads.0")]
    assert learned
    ForwardKL(2).loss_and_grads(hierarchy, guide, x)
    gradients = {name: p.grad for name, p in guide.network.named_parameters()}
    assert all(gradients[name] is None or (gradients[name] == 0).all() for name in learned)
    assert any(g is not None and g.abs().max() > 0 for n, g in gradients.items() if n.startswith("encoders"))


def test_a_new_guide_is_set_up_with_simulated_data():
    """The given data say nothing about the spread of those to come."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(1000.0 + 50.0 * z, 25.0), obs=x)

    guide = AmortizedGuide(model)
    ForwardKL().loss(model, guide, torch.zeros(4000, **F64))
    encoder = guide.network.encoders[0]
    seen = encoder.standardize(torch.tensor([[1000.0], [1000.0 + math.hypot(50.0, 25.0)]], **F64))
    assert torch.allclose(seen.reshape(-1)[:2], two(0.0, 1.0), atol=0.1)


class Simulator(dist.Normal):
    """Draws, and has no density."""

    def log_prob(self, value):
        raise NotImplementedError

    def expand(self, batch_shape, _instance=None):
        return Simulator(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def test_a_simulator_needs_no_density():
    """The latent that it never looks at is not taken for one of those that made the data."""

    def model(x):
        zero = x.new_tensor(0.0)
        far = pyro.sample("far", dist.Normal(zero, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("x", Simulator(z, S), obs=x)
        return far

    x = torch.zeros(50, **F64)
    graph = dependencies(model, (x,), {})
    assert graph.children == {"far": set(), "z": {"x"}}
    guide = AmortizedGuide(model, amortize=["data"])
    svi = SVI(model, guide, optim.Adam({"lr": 0.02}), ForwardKL())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 5


def test_it_joins_other_objectives():
    x = rows(5, 1).squeeze(-1)
    guide = linear_guide()
    elbo = WeightedSum((ForwardKL(), lambda step: max(0.0, 1.0 - step)), (Trace_ELBO(), 1.0))
    svi = SVI(conjugate, guide, optim.Adam({"lr": 0.01}), elbo)
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    assert elbo.weights == [0.0, 1.0]


# --- what cannot be simulated


def computed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=2.0 * x)


def factored(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.factor("likelihood", dist.Normal(z, S).log_prob(x))


def masked(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


IMPOSSIBLE = {
    "computed": (computed, ValueError, "'x' is computed from the model's arguments"),
    "factor": (factored, ValueError, "the factor 'likelihood' weighs latents but draws nothing"),
    "masked": (masked, NotImplementedError, r"masks the latents \['z'\]"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_models_that_cannot_simulate_their_arguments_are_refused(case):
    model, error, message = IMPOSSIBLE[case]
    x = rows(5, 1).squeeze(-1)
    guide = AmortizedGuide(model)
    with pytest.raises(error, match=message):
        ForwardKL().loss(model, guide, x)
    with pytest.raises(error):  # as calibrate says
        calibrate(guide.posterior(x, num_draws=10))


def test_a_posterior_of_one_data_set_is_refused():
    x = rows(5, 1).squeeze(-1)
    guide = AmortizedGuide(conjugate, amortize=())
    with pytest.raises(ValueError, match=r"λ of \['z'\] is learned for one data set"):
        ForwardKL().loss(conjugate, guide, x)


def test_encoders_that_do_not_see_what_is_simulated_are_told_of():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    x = rows(5, 1).squeeze(-1)
    guide = AmortizedGuide(model, inputs=lambda x, y: y.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"which simulated values of \['x'\] do not reach"):
        ForwardKL().loss(model, guide, x, x.clone())


def test_latents_of_the_guide_alone_are_refused():
    def guide(x, full=None):
        pyro.sample("own", dist.Normal(two(0.0)[0], 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="the guide draws 'own', which the model does not"):
        ForwardKL().loss(conjugate, guide, torch.zeros(4, **F64))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="num_simulations must be an int"):
        ForwardKL(1.5)
    with pytest.raises(ValueError, match="num_simulations must be at least 1"):
        ForwardKL(0)
