"""Learned groups start where the posterior lies, and are learned in its units."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import EVERY_FAMILY, F64, by_every_family, prepared
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalMixture,
)
from pyro_guides.heads import WhitenedHead
from pyro_guides.starting import climb, find_start, start, target
from pyro_guides.starting.density import Density
from tests.problems import nested, regressions

FLOW = EVERY_FAMILY["flow"]
TRIANGULAR = {"full_rank": FullRankNormal(), "mixture": NormalMixture(3), "flow": FLOW}

# A regression with known noise, whose posterior is normal: coefficients of 1e-3 to 1e3, correlated.
UNITS = torch.tensor([1e-3, 1.0, 1e3], **F64)
PRIOR, NOISE = torch.tensor([2e-3, 3.0, 1e3], **F64), 0.5


def straight(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, **F64), PRIOR).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, NOISE), obs=y)


def lines():
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(20, 3, generator=generator, **F64)
    own[:, 1] += 2.0 * own[:, 0]
    y = own.sum(-1) + NOISE * torch.randn(20, generator=generator, **F64)
    return own / UNITS, y


def posterior_of_lines():
    """Its mean and precision, and log p(y)."""
    x, y = lines()
    precision = torch.diag(PRIOR**-2) + x.mT @ x / NOISE**2
    covariance = (x * PRIOR) @ (x * PRIOR).mT + NOISE**2 * torch.eye(len(y), **F64)
    evidence = dist.MultivariateNormal(torch.zeros(len(y), **F64), covariance).log_prob(y)
    return torch.linalg.solve(precision, x.mT @ y / NOISE**2), precision, float(evidence)


def schools():
    """Rubin (1981): the eight schools, whose centred posterior has a funnel."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], **F64)
    return y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], **F64)


def centred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def log_weights(guide, *args, draws=200):
    """Log p - log q of draws of all latents; constant where q is exact."""
    posterior = guide.posterior(*args, num_draws=draws)
    weights = posterior.log_p - posterior.log_q
    return weights.reshape(draws, -1).sum(-1)


def whitened(family, triangular=False, size=3):
    """A guide of `straight` whose learned head is in other coordinates, with λ moved from where it starts."""
    guide = prepared(straight, *lines(), family=family, amortize=())
    inner, bound = guide.network.heads[0], guide.network.family(0)
    scale = 0.3 + torch.rand(size, **F64)
    if triangular:
        scale = torch.randn(size, size, **F64).tril(-1) + scale.diag()
    guide.network.heads[0] = WhitenedHead(inner, bound.moving, torch.randn(size, **F64), scale, {})
    return guide


# --- families under affine maps


@by_every_family
@pytest.mark.parametrize("batch", [(), (5,)], ids=["one", "batch"])
@pytest.mark.parametrize("triangular", [False, True], ids=["diagonal", "triangular"])
def test_the_density_after_a_move(family, batch, triangular):
    bound = family.bind(3).double()
    if triangular and bound.closed_under != "triangular":
        assert family in (DiagonalNormal(), LowRankNormal(2))
        return
    for weight in bound.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    parameters = bound.initial(torch.zeros(*batch, 3, **F64), 0.7) + 0.3 * torch.randn(
        *batch, bound.width, **F64
    )
    loc, scale = torch.randn(*batch, 3, **F64), 0.2 + torch.rand(*batch, 3, **F64)
    full = scale.diag_embed() + triangular * torch.randn(*batch, 3, 3, **F64).tril(-1)
    moved = bound.moving(parameters, loc, full if triangular else scale)
    v = torch.randn(*batch, 3, **F64)
    u = loc + (full @ v.unsqueeze(-1)).squeeze(-1)
    expected = bound(parameters).log_prob(v) - scale.log().sum(-1)
    assert torch.allclose(bound(moved).log_prob(u), expected, rtol=0, atol=1e-9)
    elsewhere = bound.moving(parameters, loc + 0.01, full if triangular else scale)  # control
    assert not torch.allclose(bound(elsewhere).log_prob(u), expected, rtol=0, atol=1e-5)


def test_steps_are_in_units_of_the_scale():
    """The chain rule: d/dm = Lᵀ d/dμ where μ = a + L m."""
    guide = whitened(FullRankNormal(), triangular=True)
    head, value = guide.network.heads[0], torch.randn(3, **F64)
    family = guide.network.family(0)
    (inside,) = torch.autograd.grad(family(head(None, {})).log_prob(value), head.inner.bias)
    outer = head(None, {}).detach().requires_grad_()
    (outside,) = torch.autograd.grad(family(outer).log_prob(value), outer)
    assert torch.allclose(inside[:3], head.scale.mT @ outside[:3], atol=1e-10)
    assert not torch.allclose(inside[:3], head.scale @ outside[:3], atol=1e-3)  # control


# --- promotion

STEPS = {
    "diagonal to low rank": (DiagonalNormal(), LowRankNormal(1), False),
    "diagonal to full rank": (DiagonalNormal(), FullRankNormal(), False),
    "low rank to full rank": (LowRankNormal(2), FullRankNormal(), False),
    "full rank to flow": (FullRankNormal(), FLOW, True),
    "full rank to one component": (FullRankNormal(), NormalMixture(1), True),
    "fixed weights to learned ones": (NormalMixture(3, learn_weights=False), NormalMixture(3), True),
}


@pytest.mark.parametrize(("before", "after", "triangular"), STEPS.values(), ids=STEPS)
def test_promotion_goes_on_in_the_same_coordinates(before, after, triangular):
    guide = whitened(before, triangular)
    draws = guide.posterior(*lines(), num_draws=30).draws
    promoted = guide.promote(after)
    old, new = (each.posterior(*lines(), num_draws=1).log_prob(draws) for each in (guide, promoted))
    assert (old - new).abs().max() < 1e-7
    head = promoted.network.heads[0]
    assert isinstance(head, WhitenedHead)
    assert torch.equal(head.scale, guide.network.heads[0].scale)
    with torch.no_grad():  # what is new moves q in these coordinates
        before_step = head(None, {})[..., -1].clone()
        head.inner.change.bias.add_(1e-3)
    assert not torch.equal(head(None, {})[..., -1], before_step)
    assert (old - promoted.posterior(*lines(), num_draws=1).log_prob(draws)).abs().max() > 1e-5  # control


# --- where q starts: exact answers


def test_a_normal_posterior_is_met_exactly():
    mean, precision, evidence = posterior_of_lines()
    guide = AmortizedGuide(straight)
    report = find_start(guide, *lines())
    assert repr(report) == "Start('beta': posterior)"
    loc, spread = guide.network.frame(0, {})
    sd = precision.inverse().diagonal().sqrt()
    assert ((loc - mean) / sd).abs().max() < 1e-6
    assert (spread / sd - 1.0).abs().max() < 1e-6
    weights = log_weights(guide, *lines())
    assert (weights - evidence).abs().max() < 1e-6
    assert not guide.is_trained
    head = guide.network.heads[0]
    q = guide.network.family(0)(head.inner(None, {}))
    assert torch.allclose(q.mean, torch.zeros(3, **F64))
    assert torch.allclose(q.variance, torch.ones(3, **F64), atol=1e-5)


def test_without_correlations_it_takes_the_conditional_spread():
    """At which the ELBO of independent normals is highest: 1/√P_dd."""
    mean, precision, _ = posterior_of_lines()
    guide = AmortizedGuide(straight, family=DiagonalNormal())
    find_start(guide, *lines())
    loc, spread = guide.network.frame(0, {})
    conditional, marginal = precision.diagonal() ** -0.5, precision.inverse().diagonal().sqrt()
    assert ((loc - mean) / marginal).abs().max() < 1e-6
    assert (spread / conditional - 1.0).abs().max() < 1e-5
    assert (marginal / conditional).max() > 1.5  # control: they differ
    highest = log_weights(guide, *lines(), draws=4000).mean()
    guide.network.heads[0].scale *= marginal / conditional
    assert log_weights(guide, *lines(), draws=4000).mean() < highest - 0.1


@pytest.mark.parametrize("subsampled", [False, True], ids=["whole", "subsampled"])
def test_a_normal_hierarchy_is_met_exactly(subsampled):
    """Groups follow those above: of three levels, and of a plate that the model subsamples by itself."""
    y = nested.simulate(6, 3, 2, dtype=torch.float64)
    args = (y, 2) if subsampled else (y,)
    guide = AmortizedGuide(nested.model_of_mean, amortize=())
    report = find_start(guide, *args)
    assert set(report.found.values()) == {"posterior"}
    _, evidence = nested.exact(y, latent_mean=True)
    weights = log_weights(guide, *args)
    assert (weights - evidence).abs().max() < 1e-4  # the model's own mean is in single precision


def test_groups_that_see_nothing_take_what_is_best_for_them():
    """q of two correlated groups that are drawn independently: the spread of each given the other."""
    x, y = lines()

    def apart(x, y):
        a = pyro.sample("a", dist.Normal(0.0 * PRIOR[:1], PRIOR[:1]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0 * PRIOR[1:], PRIOR[1:]).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ torch.cat([a, b]), NOISE), obs=y)

    family = {"a": FullRankNormal(), "b": FullRankNormal()}
    guide = AmortizedGuide(apart, family=family, condition_on_upstream=False)
    find_start(guide, x, y)
    _, precision, _ = posterior_of_lines()
    for index, part in enumerate((slice(0, 1), slice(1, 3))):
        best = precision[part, part].inverse().diagonal().sqrt()
        assert torch.allclose(guide.network.frame(index, {})[1] / best, torch.ones_like(best), atol=1e-5)


def test_many_latents_leave_out_what_correlates_groups(monkeypatch):
    monkeypatch.setattr(target, "MOST_CORRELATED", 1)
    y = nested.simulate(6, 3, 2, dtype=torch.float64)
    guide = AmortizedGuide(nested.model_of_mean, amortize=())
    find_start(guide, y)
    exact, evidence = nested.exact(y, latent_mean=True)
    middle = {site: value.reshape(exact[site][0].shape) for site, value in guide.median(y).items()}
    for site, (mean, sd) in exact.items():
        assert ((middle[site] - mean) / sd).abs().max() < 0.1
    conditional = (nested.GROUP**-2 + y.shape[-1] * nested.NOISE**-2) ** -0.5
    assert torch.allclose(guide.network.heads[2].scale.double(), torch.tensor(conditional, **F64), atol=1e-6)
    assert log_weights(guide, y).mean() < evidence - 0.5  # control: what it costs


def test_a_funnel_is_not_entered(monkeypatch):
    """The mode of the eight schools is a spike at tau = 0; the normals before it have the higher ELBO."""
    monkeypatch.setattr(climb, "_ROUNDS", 15)
    guide = AmortizedGuide(centred, amortize=())
    find_start(guide, *schools())
    assert guide.median(*schools())["tau"] > 1.0
    query = start._query(guide, schools(), {})
    density = Density(query)
    noise, wide = torch.randn(64, density.size, **F64), torch.ones(density.size, **F64)
    blocks = [torch.arange(density.size).unsqueeze(0)]
    with torch.no_grad():
        way = list(climb._climb(density, torch.zeros(density.size, **F64), blocks, wide))
        elbos = [max(normal.elbos(density, noise)) for normal in way]
    assert elbos[-1] < max(elbos) - 2.0  # control: the end of the climb
    assert density.log_prob(way[-1].loc.unsqueeze(0)) > density.log_prob(
        way[elbos.index(max(elbos))].loc[None]
    )


def test_curvature_is_that_of_the_model():
    x, y = lines()
    density = Density(start._query(AmortizedGuide(straight).setup(x, y), (x, y), {}))
    mean, precision, _ = posterior_of_lines()
    height, slope, (found,) = density.expand(mean + PRIOR, [torch.arange(3).unsqueeze(0)])
    assert torch.allclose(found[0], precision)
    assert torch.allclose(slope, -precision @ PRIOR)
    single = density.expand(mean, [torch.arange(3).reshape(3, 1)])[2][0]  # rows of one column: sums over rows
    assert torch.allclose(single.flatten(), precision.sum(-1))
    assert height < density.log_prob(mean.unsqueeze(0))[0]


def test_a_prior_that_is_as_good_as_flat_does_not_hide_the_posterior():
    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2, **F64), 1e6).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=beta[..., :1] + beta[..., 1:] * x), obs=y)

    x = torch.linspace(-2.0, 2.0, 40, **F64)
    y = (x + 1.5 * torch.sin(9.0 * x) > 0).double()
    guide = AmortizedGuide(model)
    assert "posterior" in str(find_start(guide, x, y))
    assert guide.median(x, y)["beta"].abs().max() < 10.0  # draws of the prior lie at 1e6, where log p is flat


# --- where only the prior tells


def test_mixtures_and_what_is_discrete_keep_their_breadth():
    def model(y):
        on = pyro.sample("on", dist.Bernoulli(y.new_tensor(0.5)))
        mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean + on, 1.0), obs=y)

    guide = AmortizedGuide(model)
    assert find_start(guide, torch.randn(5, **F64)).found == {"'on'": "left, discrete", "'mean'": "prior"}
    guide = AmortizedGuide(straight, family=NormalMixture(3))
    assert find_start(guide, *lines()).found == {"'beta'": "prior"}
    assert (guide.network.heads[0].scale / PRIOR - 1.0).abs().max() < 0.35


# --- what is left as it is


def test_what_cannot_be_climbed_is_left(caplog):
    def nowhere(y):
        a = pyro.sample("a", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.factor("never", a.sum() * math.nan)

    guide = AmortizedGuide(nowhere).setup(torch.zeros(1, **F64))
    assert find_start(guide, torch.zeros(1, **F64)).found["'a'"].startswith("left, since Expected parameter")

    def leading(y):  # b lies above a: its unconstrained scale is another in every draw
        a = pyro.sample("a", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("b", dist.Pareto(a.exp(), 3.0))

    guide = AmortizedGuide(leading).setup(torch.zeros(1, **F64))
    values = {name: value.clone() for name, value in guide.network.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="pyro_guides"):
        report = find_start(guide, torch.zeros(1, **F64))
    assert "depend" in "".join(report.found.values())
    assert "find_start(): " in caplog.text
    assert all(
        torch.equal(values[n], value) for n, value in guide.network.state_dict().items() if n in values
    )


def test_a_worse_start_is_taken_back(monkeypatch):
    guide = AmortizedGuide(straight).setup(*lines())
    before = guide.network.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    far = climb.Normal.moved
    monkeypatch.setattr(target, "best_normal", lambda *a: far(climb.best_normal(*a), 1e9 * PRIOR))
    assert "higher where it is" in find_start(guide, *lines()).found["'beta'"]
    after = guide.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- its place in the life of a guide


def test_it_comes_before_training():
    with pytest.raises(TypeError, match="takes an AmortizedGuide, got a function"):
        find_start(straight, *lines())
    guide = AmortizedGuide(straight)
    guide(*lines())  # parameters are in Pyro's store
    find_start(guide, *lines())
    svi = SVI(straight, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(*lines())
    assert guide.is_trained
    trained = guide.network.heads[0].inner.bias.clone()
    with pytest.raises(RuntimeError, match="call it before training, or with again=True"):
        find_start(guide, *lines())
    assert torch.equal(guide.network.heads[0].inner.bias, trained)
    find_start(guide, *lines(), again=True)
    _, _, evidence = posterior_of_lines()
    assert (log_weights(guide, *lines()) - evidence).abs().max() < 1e-6
    assert not guide.is_trained
    svi.step(*lines())
    assert guide.is_trained


def test_the_model_is_not_touched_and_the_answer_is_the_seeds():
    noise = torch.nn.Parameter(torch.tensor(0.5, **F64))

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3, **F64), PRIOR).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(0.0), 0.2))
        own = pyro.param("own", torch.tensor(1.0, **F64))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ (beta * tau) * own, noise), obs=y)

    found = []
    for seed in (0, 0, 1):
        pyro.set_rng_seed(seed)
        guide = AmortizedGuide(model)
        find_start(guide, *lines())
        found.append(guide.network.heads[0].loc)
        assert all(parameter.grad is None for parameter in guide.parameters())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert noise.grad is None
    assert pyro.param("own").grad is None
    assert pyro.param("own").item() == 1.0


def test_single_precision():
    x, y = (value.float() for value in lines())

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), PRIOR.float()).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, NOISE), obs=y)

    guide = AmortizedGuide(model)
    find_start(guide, x, y)
    assert guide.network.heads[0].loc.dtype == torch.float32
    assert log_weights(guide, x, y).mean() == pytest.approx(posterior_of_lines()[2], abs=1e-2)


def test_a_subsample_of_its_plates_takes_its_own_coordinates():
    """Learned per row, the model subsampling: λ of the rows drawn is moved by what belongs to these rows."""
    y = 10.0 * torch.arange(7, **F64)

    def model(y):
        with pyro.plate("row", len(y), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(y.new_tensor(0.0), 100.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y[index])

    guide = AmortizedGuide(model, amortize=())
    assert find_start(guide, y).found == {"'z'": "posterior"}
    assert torch.allclose(guide.median(y)["z"], y, atol=1e-3)
    trace = pyro.poutine.trace(guide).get_trace(y)
    assert (trace.nodes["z"]["value"] - y[trace.nodes["row"]["value"]]).abs().max() < 1.0


# --- accuracy

STEPS_OF_TRAINING = 800


def train(model, guide, data, steps=STEPS_OF_TRAINING, peak=0.03):
    """Adam with one particle: a linear warm-up over 5 % of the steps, then a cosine down to zero."""
    optimizer = torch.optim.Adam(guide.parameters(), lr=peak)

    def share(step):
        return min(1.0, 20.0 * (step + 1) / steps) * 0.5 * (1.0 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    loss = Trace_ELBO().differentiable_loss
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, guide, *data).backward()
        optimizer.step()
        schedule.step()


def compared(draws, reference):
    """Errors of means in sds, and ratios of sds, over all scalars."""
    found = [
        ((draws[site].double().mean(0) - mean) / sd, draws[site].double().std(0) / sd)
        for site, (mean, sd) in reference.sites().items()
    ]
    return (torch.cat([part.detach().reshape(-1) for part in parts]) for parts in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sblrc", "diamonds"])
def test_one_setting_serves_all_scales(name):
    """Against NUTS, whose means are off by up to 0.011 sd and sds by 0.8 %; 50,000 draws, seed 0."""
    model, data, reference = regressions.scaled()[name]
    guide = AmortizedGuide(model)
    find_start(guide, *data)
    train(model, guide, data)
    errors, ratios = compared(guide.posterior(*data, num_draws=50_000).draws, reference)
    print(f"{name}: means within {errors.abs().max():.3f} sd, sds {ratios.min():.3f} to {ratios.max():.3f}")
    assert errors.abs().max() < 0.05
    assert 0.95 < ratios.min() < ratios.max() < 1.05


@pytest.mark.slow
def test_without_it_one_setting_is_far_off():
    """The control: Pyro's own full-rank normal at Adam's default step size."""
    model, data, reference = regressions.scaled()["sblrc"]
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(500):
        svi.step(*data)
    with torch.no_grad():
        draws = [guide(*data) for _ in range(1000)]
    errors, _ = compared({n: torch.stack([d[n] for d in draws]) for n in draws[0]}, reference)
    assert errors.abs().max() > 1.0
