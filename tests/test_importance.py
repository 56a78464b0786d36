"""Importance-weighted bounds against exact answers, row by row and under subsampling."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import nn

from pyro_guides import (
    MLP,
    AmortizedGuide,
    Discrete,
    FullRankNormal,
    NormalizingFlow,
    NormalMixture,
    calls,
    optim,
)
from pyro_guides.objectives import IWELBO
from pyro_guides.objectives.rows import read_rows
from pyro_guides.objectives.terms import evaluate, rescored
from tests.models import (
    F64,
    dependent,
    forest,
    hierarchy,
    prepared,
    rows,
    small_encoder,
    subsampled_hierarchy,
    two,
)

GRADIENTS = ["doubly_reparameterized", "standard", "wake"]
by_gradient = pytest.mark.parametrize("gradient", GRADIENTS)

# z ~ N(0, 1), x | z ~ N(z, S): z | x ~ N(C x, V)
S = 0.5
V = 1.0 / (1.0 + 1.0 / S**2)
C = V / S**2


def conjugate(x, full=None):
    with pyro.plate("data", full or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def log_evidence(x):
    return dist.Normal(0.0, math.sqrt(1.0 + S**2)).log_prob(x)


class Near(nn.Module):
    """q(z | x) = N(slope x + shift, scale): the posterior, or close to it."""

    def __init__(self, shift=0.0, scale=1.0):
        super().__init__()
        self.slope = nn.Parameter(two(C)[0])
        self.shift = nn.Parameter(two(shift * math.sqrt(V))[0])
        self.scale = nn.Parameter(two(scale * math.sqrt(V))[0])

    def q(self, x):
        return dist.Normal(self.slope * x + self.shift, self.scale)

    def forward(self, x, full=None):
        pyro.module("near", self)
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            pyro.sample("z", self.q(x))


def gradients(elbo, model, guide, *args, seed):
    """The loss and all gradients of the guide, in one vector."""
    pyro.set_rng_seed(seed)
    guide.zero_grad()
    loss = elbo.loss_and_grads(model, guide, *args)
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in guide.parameters()]
    return loss, torch.cat([gradient.reshape(-1) for gradient in found])


def mean_of(elbo, model, guide, *args, repeats):
    """The mean of the losses, and its standard error."""
    losses = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)], **F64)
    return losses.mean(), losses.std() / math.sqrt(repeats)


# --- the bound


def gap(count, shift, scale, draws=4_000_000):
    """How far a row's bound is below log p(x), by many draws: in standardized terms, all rows are alike."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(draws // count, count, generator=generator, **F64)
    z = shift + scale * noise
    log_weights = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(shift, scale).log_prob(z)
    bounds = log_weights.logsumexp(-1) - math.log(count)
    return -bounds.mean(), bounds.std() / math.sqrt(len(bounds))


@pytest.mark.slow
def test_the_bound_of_a_subsample_is_right():
    """N = 1,000, B = 100, K = 50; E of a row's bound by 80,000 sets of K draws, the same for all rows."""
    x, shift, scale = torch.randn(100, **F64) * math.sqrt(1.0 + S**2), 0.03, 1.02
    row_gap, row_error = gap(50, shift, scale)
    exact = 10.0 * (log_evidence(x) - row_gap).sum()
    bound, error = mean_of(IWELBO(50), conjugate, Near(shift, scale), x, 1000, repeats=400)
    error = math.hypot(error, 1000 * row_error)
    print(f"IWELBO is off by {float(-bound - exact):.3f} ± {error:.3f} nats of {float(exact):.0f}")
    assert error < 0.06
    assert abs(-bound - exact) < min(0.2, 3.0 * error), (float(-bound - exact), error)


def test_the_bound_of_pyro_is_hundreds_of_nats_above_the_evidence_of_a_subsample():
    """The control: with q 0.3 standard deviations off, ours stays within a few nats, on average below."""
    x = torch.randn(100, **F64) * math.sqrt(1.0 + S**2)
    guide, evidence = Near(0.3, 1.1), float(10.0 * log_evidence(x).sum())
    renyi = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True)
    above = -renyi.loss(conjugate, guide, x, 1000) - evidence
    print(f"RenyiELBO lies {above:.0f} nats above the evidence")
    assert above > 100.0
    assert -20.0 < -IWELBO(50).loss(conjugate, guide, x, 1000) - evidence < 20.0


def test_the_bound_grows_with_particles_towards_the_evidence():
    """Three standard errors of a few hundredths of a nat per step between 0.3 nats and more."""
    x = rows(20, 1).squeeze(-1)
    guide = Near(0.5, 1.4)
    exact = log_evidence(x).sum()
    found = [
        mean_of(IWELBO(k, gradient="standard"), conjugate, guide, x, repeats=40) for k in (1, 4, 32, 500)
    ]
    bounds = [-float(bound) for bound, _ in found]
    assert bounds == sorted(bounds)
    assert bounds[1] - bounds[0] > 1.0
    assert abs(bounds[-1] - exact) < 0.05 + 3.0 * found[-1][1]


@pytest.mark.parametrize("gradient", GRADIENTS[:2])
def test_one_particle_is_the_elbo(gradient):
    guide = prepared(hierarchy, rows())
    ours = gradients(IWELBO(1, gradient=gradient), hierarchy, guide, rows(), seed=1)
    pyros = gradients(Trace_ELBO(), hierarchy, guide, rows(), seed=1)
    assert ours[0] == pyros[0]
    assert torch.equal(ours[1], pyros[1])


def chosen(x, full=None):
    """A model that subsamples by itself."""
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x[index])


def explicit(x, full=None):
    index = torch.tensor([4, 1, 3])
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x[index])


def sizeless(x, full=None):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, S), obs=x)


IDIOMS = {
    "batch in": (conjugate, 20, 4.0),
    "short batch": (conjugate, 7, 1.4),
    "whole": (conjugate, None, 1.0),
    "chosen by the model": (chosen, None, 5 / 3),
    "explicit": (explicit, None, 5 / 3),
    "without a size": (sizeless, None, 1.0),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_log_weights_are_those_of_a_row_in_every_plate_idiom(idiom):
    """Against densities written by hand at the values that were drawn."""
    model, full, scale = IDIOMS[idiom]
    x = rows(5, 1).squeeze(-1)
    guide = prepared(model, x, full)
    found = read_rows(model, guide, (x, full), {}, None, math.inf)
    terms = evaluate(model, guide, (x, full), {}, found, 6)
    z, site = (terms.guide_trace.nodes["z"][key] for key in ("value", "fn"))
    seen = terms.model_trace.nodes["x"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, S).log_prob(seen) - site.log_prob(z)
    assert terms.log_weights.shape == (6, len(seen))
    assert torch.allclose(terms.log_weights, expected, atol=1e-12)
    assert terms.scale == pytest.approx(scale)
    assert terms.shared == 0.0


def test_latents_outside_are_drawn_once_and_those_inside_for_each_particle():
    x = rows()
    guide = prepared(subsampled_hierarchy, x)
    found = read_rows(subsampled_hierarchy, guide, (x,), {}, None, math.inf)
    terms = evaluate(subsampled_hierarchy, guide, (x,), {}, found, 7)
    shapes = {site["name"]: tuple(site["value"].shape) for site in terms.guide}
    assert shapes == {"center": (2,), "z": (7, 4, 2), "s": (7, 4)}
    center = terms.guide_trace.nodes["center"]
    prior = dist.Normal(two(0.0, 0.0), 2.0).to_event(1).log_prob(center["value"])
    assert torch.allclose(terms.shared, prior - center["fn"].log_prob(center["value"]))
    assert terms.scale == 4.0


def test_masks_and_scales_of_rows_and_sites():
    """With q the posterior, each row's weights are all p(x) of what counts: no noise is left."""
    x, mask = rows(5, 1).squeeze(-1), torch.tensor([True, False, True, True, False])
    weights = two(1.0, 3.0, 0.5, 0.1, 2.0)

    def weighted(function):
        def run(x):
            with poutine.scale(scale=2.0), poutine.mask(mask=mask):
                function(x)

        return run

    def by_row(function):
        def run(x):
            with poutine.scale(scale=weights):
                function(x)

        return run

    guide = Near()
    exact = 2.0 * log_evidence(x)[mask].sum()
    found = IWELBO(3, gradient="standard").loss(weighted(conjugate), weighted(guide), x)
    assert found == pytest.approx(-float(exact))
    exact = (weights * log_evidence(x)).sum()
    found = IWELBO(3, gradient="standard").loss(by_row(conjugate), by_row(guide), x)
    assert found == pytest.approx(-float(exact))


def test_a_scale_of_one_site_weighs_it():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            with poutine.scale(scale=3.0):
                pyro.sample("x", dist.Normal(z, S), obs=x)

    x, guide = rows(4, 1).squeeze(-1), Near(0.3, 1.2)
    found = read_rows(model, guide, (x,), {}, None, math.inf)
    terms = evaluate(model, guide, (x,), {}, found, 5)
    z = terms.guide_trace.nodes["z"]["value"]
    likelihood = 3.0 * dist.Normal(z, S).log_prob(x)
    expected = dist.Normal(0.0, 1.0).log_prob(z) + likelihood - guide.q(x).log_prob(z)
    assert terms.scale == 1.0
    assert torch.allclose(terms.log_weights, expected)


def test_nested_plates_and_upper_rows():
    """The rows of a forest, whose cells are summed within; the root is shared."""
    x = rows(3, 4)
    guide = prepared(forest, x)
    found = read_rows(forest, guide, (x,), {}, ["rows"], math.inf)
    terms = evaluate(forest, guide, (x,), {}, found, 6)
    assert terms.log_weights.shape == (6, 3, 1)
    terms.guide_trace.compute_log_prob()
    nodes, model = terms.guide_trace.nodes, terms.model_trace.nodes
    expected = model["row"]["fn"].log_prob(nodes["row"]["value"])
    for name in ("cell", "x"):
        expected = expected + model[name]["fn"].log_prob(model[name]["value"]).sum(-1, keepdim=True)
    log_q = nodes["row"]["log_prob"] + nodes["cell"]["log_prob"].sum(-1, keepdim=True)
    assert torch.allclose(terms.log_weights, expected - log_q)


def test_one_joint_posterior():
    def model(x):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, S), obs=x)

    x = rows(5, 1).squeeze(-1)
    guide = prepared(model, x, amortize=())
    exact = dist.MultivariateNormal(
        torch.zeros(5, **F64), torch.ones(5, 5, **F64) + S**2 * torch.eye(5, **F64)
    )
    bound, error = mean_of(IWELBO(2000), model, guide, x, repeats=20)
    assert abs(float(-bound - exact.log_prob(x))) < 3.0 * float(error) + 0.02


# --- gradients


def test_the_standard_gradient_is_that_of_the_bound():
    """Against autograd through the bound written by hand, with the same noise."""
    x, guide = rows(4, 1).squeeze(-1), Near(0.4, 1.3)
    elbo = IWELBO(5, gradient="standard")
    elbo.loss(conjugate, guide, x, 12)
    loss, found = gradients(elbo, conjugate, guide, x, 12, seed=5)
    pyro.set_rng_seed(5)
    torch.randperm(12)  # the guide's subsample
    z = guide.q(x).expand([5, 4]).rsample()
    log_weights = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, S).log_prob(x) - guide.q(x).log_prob(z)
    bound = 3.0 * (log_weights.logsumexp(0) - math.log(5)).sum()
    expected = torch.autograd.grad(-bound, list(guide.parameters()))
    assert loss == pytest.approx(-float(bound.detach()))
    assert torch.allclose(found, torch.stack(expected))


def test_the_wake_gradient_is_that_of_weighted_draws():
    x, guide = rows(4, 1).squeeze(-1), Near(0.4, 1.3)
    elbo = IWELBO(5, gradient="wake")
    elbo.loss(conjugate, guide, x, 12)
    _, found = gradients(elbo, conjugate, guide, x, 12, seed=5)
    pyro.set_rng_seed(5)
    torch.randperm(12)  # the guide's subsample
    z = guide.q(x).expand([5, 4]).rsample().detach()
    log_q = guide.q(x).log_prob(z)
    log_weights = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, S).log_prob(x) - log_q
    weights = log_weights.softmax(0).detach()
    expected = torch.autograd.grad(-3.0 * (weights * log_q).sum(), list(guide.parameters()))
    assert torch.allclose(found, torch.stack(expected))


def test_the_wake_gradient_leaves_globals_to_the_bound():
    """With draws held, log q of rows must not move q of the globals, not even by its units."""
    x = rows()
    guide = prepared(hierarchy, x)
    found = read_rows(hierarchy, guide, (x,), {}, None, math.inf)
    terms = evaluate(hierarchy, guide, (x,), {}, found, 4, torch.Tensor.detach)
    log_q = rescored(guide, (x,), {}, terms).log_q.sum()
    own = list(guide.network.head(0).parameters())
    assert all(g is None for g in torch.autograd.grad(log_q, own, allow_unused=True, retain_graph=True))
    rest = torch.autograd.grad(log_q, list(guide.network.head(1).parameters()))
    assert all(gradient.abs().max() > 0 for gradient in rest)
    assert all(parameter.requires_grad for parameter in own)


def deep(x):
    """A global above two levels of row latents, and a parameter."""
    weight = pyro.param("weight", two(0.7)[0])
    g = pyro.sample("g", dist.Normal(two(0.0)[0], 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(g, 1.0))
        b = pyro.sample("b", dist.Normal(a + 0.3 * g, 0.7))
        pyro.sample("x", dist.Normal(weight * b, 0.5), obs=x)


def difference(guide, x, repeats, *, count=3, model=deep):
    """How many standard errors the doubly reparameterized gradient is off the standard one, by element."""
    found = []
    for seed in range(repeats):
        pair = []
        for gradient in GRADIENTS[:2]:
            weight = pyro.get_param_store()["weight"].unconstrained()
            weight.grad = None
            _, own = gradients(IWELBO(count, gradient=gradient), model, guide, x, seed=seed)
            pair.append(torch.cat([own, weight.grad.reshape(1)]))
        found.append(pair[0] - pair[1])
    differences = torch.stack(found)
    error = differences.std(0) / math.sqrt(repeats)
    return (differences.mean(0) / error)[error > 1e-10]


def deep_guide(family=None):
    """q of the model above, in which rows see the global; encoder, global and decoder have gradients."""
    x = two(0.4, -1.2).repeat(300)
    pyro.param("weight", two(0.7)[0])
    return prepared(deep, x, family=family or {"b": FullRankNormal()}, encoder=MLP(width=2, depth=1)), x


@pytest.mark.slow
def test_doubly_reparameterized_gradients_have_the_mean_of_the_standard_ones():
    """Of hundreds of elements the largest is about 3.5 standard errors off by chance alone."""
    guide, x = deep_guide()
    off = difference(guide, x, 80)
    assert len(off) > 300
    assert off.abs().max() < 4.5


@pytest.mark.slow
def test_without_the_cut_of_shared_paths_gradients_of_globals_would_be_biased(monkeypatch):
    guide, x = deep_guide()
    monkeypatch.setattr(calls, "are_drawn_once", lambda plates: False)
    assert difference(guide, x, 60).abs().max() > 5.0


@pytest.mark.slow
def test_the_gradient_of_an_encoder_keeps_its_signal_with_many_particles():
    """Mean over standard deviation of 120 gradients at K = 64, with q 0.1 standard deviations off."""

    def signal(elbo, guide):
        found = torch.stack([gradients(elbo, conjugate, guide, x, seed=seed)[1] for seed in range(120)])
        return (found.mean(0).abs() / found.std(0)).mean()

    x = rows(4, 1).squeeze(-1)
    guide = AmortizedGuide(conjugate, nn.Linear(1, 4, **F64), inputs=lambda x: x.unsqueeze(-1)).setup(x)
    svi = SVI(conjugate, guide, optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(400):
        svi.step(x)
    pyros = signal(RenyiELBO(alpha=0, num_particles=64, vectorize_particles=True), guide)
    ours = signal(IWELBO(64), guide)
    print(f"signal to noise {ours:.3g} against {pyros:.3g}, {ours / pyros:.0f} times")
    assert ours > 20.0 * pyros


def choice(x):
    with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def exact_gradient(guide, x, points, log_measure, log_p):
    """The gradient of a two-particle bound, summed over all pairs of points.

    Args:
        guide: the guide, whose log q has gradients.
        x: the data.
        points: values of one row's latent, ``(P,)``.
        log_measure: log of the width of each point.
        log_p: log p(x, z) of points and rows, ``(P, B)``.
    """
    given = poutine.trace(guide).get_trace(x)
    name = next(name for name in ("k", "z") if name in given.nodes)
    log_q = []
    for point in points:
        given.nodes[name]["value"] = point.expand(len(x))
        trace = poutine.trace(poutine.replay(guide, trace=given)).get_trace(x)
        log_q.append(trace.nodes[name]["fn"].log_prob(point.expand(len(x))))
    log_q = torch.stack(log_q)
    log_w = log_p - log_q
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    bounds = pairs.logsumexp(0) - math.log(2)
    mass = (log_q + log_measure).exp()
    return torch.autograd.grad(
        -3.0 * (mass.unsqueeze(0) * mass.unsqueeze(1) * bounds).sum(),
        list(guide.parameters()),
        allow_unused=True,
    )


def off_by(guide, model, x, expected, repeats):
    """How many standard errors the mean gradient is off the exact one; data are repeated 100 times."""
    elbo, many = IWELBO(2, gradient="standard"), x.repeat(100)
    found = torch.stack([gradients(elbo, model, guide, many, seed=seed)[1] / 100 for seed in range(repeats)])
    exact = [
        torch.zeros_like(p) if e is None else e for p, e in zip(guide.parameters(), expected, strict=True)
    ]
    exact = torch.cat([e.reshape(-1) for e in exact])
    error = found.std(0) / math.sqrt(repeats)
    return ((found.mean(0) - exact) / error)[error > 1e-12]


@pytest.mark.slow
def test_the_gradient_of_discrete_latents_is_exact():
    """Against all pairs of values."""
    x = two(0.5, 2.0)
    guide = prepared(choice, x, family=Discrete(), encoder=MLP(width=2, depth=1), spread=0.5)
    points = two(0.0, 1.0)
    log_p = torch.stack(
        [dist.Bernoulli(two(0.3)[0]).log_prob(p) + dist.Normal(2 * p, 1.0).log_prob(x) for p in points]
    )
    expected = exact_gradient(guide, x, points, two(0.0, 0.0).unsqueeze(-1), log_p)
    off = off_by(guide, choice, x, expected, 60)
    assert len(off) > 10
    assert off.abs().max() < 4.5


@pytest.mark.slow
def test_the_gradient_of_mixtures_is_exact():
    """Against two-dimensional quadrature on a grid."""

    def model(x):
        with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z.abs(), S), obs=x)

    x = two(0.5, 1.0)
    family = NormalMixture(2)
    guide = prepared(model, x, family=family, encoder=MLP(width=2, depth=1), init_scale=0.8, spread=0.3)
    points = torch.linspace(-7.0, 7.0, 281, **F64)
    log_p = dist.Normal(0.0, 1.0).log_prob(points).unsqueeze(-1) + dist.Normal(
        points.abs().unsqueeze(-1), S
    ).log_prob(x)
    width = torch.full_like(points, math.log(14.0 / 280)).unsqueeze(-1)
    expected = exact_gradient(guide, x, points, width, log_p)
    off = off_by(guide, model, x, expected, 100)
    assert len(off) > 10
    assert off.abs().max() < 4.5


@by_gradient
def test_training_finds_the_posterior(gradient):
    """A few hundred short steps under SVI; log q is 0.02 nats off at most."""
    x = rows(40, 1).squeeze(-1)
    guide = AmortizedGuide(conjugate, nn.Linear(1, 4, **F64), inputs=lambda x, full: x.unsqueeze(-1))
    svi = SVI(conjugate, guide, optim.Adam({"lr": 0.03}), IWELBO(4, gradient=gradient))
    for _ in range(200):
        svi.step(x, 80)
    exact = dist.Normal(C * x, math.sqrt(V))
    z = exact.sample([200])
    log_q = guide.posterior(x, 40).log_prob({"z": z})
    assert (exact.log_prob(z) - log_q).mean() < 0.03


@by_gradient
def test_one_encoder_pass_serves_all_particles(gradient):
    class Counting(nn.Linear):
        passes = 0

        def forward(self, x):
            self.passes += 1
            assert x.shape == (4, 1)
            return super().forward(x)

    x = rows(4, 1).squeeze(-1)
    encoder = Counting(1, 4, **F64)
    guide = AmortizedGuide(conjugate, encoder, inputs=lambda x: x.unsqueeze(-1)).setup(x)
    elbo = IWELBO(64, gradient=gradient)
    elbo.loss_and_grads(conjugate, guide, x)
    encoder.passes = 0
    elbo.loss_and_grads(conjugate, guide, x)
    assert encoder.passes == (2 if gradient == "wake" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
def test_guides_of_pyro_learn(kind):
    """Parameters per row, made by the first call."""
    x = rows(6, 1).squeeze(-1)
    guide, elbo = kind(conjugate), IWELBO(8, gradient="standard")
    svi = SVI(conjugate, guide, optim.Adam({"lr": 0.03}), elbo)
    for _ in range(250):
        svi.step(x)
    bound, error = mean_of(elbo, conjugate, guide, x, repeats=10)
    assert abs(-bound - log_evidence(x).sum()) < 0.15 + 3.0 * error


def test_globals_with_a_score_function_learn_from_all_rows():
    """Two values of a global, exactly summed, with q of the rows exact given it."""

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    logit = nn.Parameter(two(0.4)[0])

    def guide(x):
        k = pyro.sample("k", dist.Bernoulli(logits=logit))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(k + C * (x - k), math.sqrt(V)))

    x = two(1.0, 0.2)
    values = [log_evidence(x - k).sum() + dist.Bernoulli(two(0.3)[0]).log_prob(two(k)[0]) for k in (0.0, 1.0)]
    q = logit.sigmoid()
    exact = (1 - q) * (values[0] - (1 - q).log()) + q * (values[1] - q.log())
    (expected,) = torch.autograd.grad(-exact, logit)
    found = []
    elbo = IWELBO(3, gradient="standard")
    for _ in range(200):
        logit.grad = None
        elbo.loss_and_grads(model, guide, x)
        found.append(logit.grad.clone())
    found = torch.stack(found)
    assert abs(found.mean() - expected) < 4.0 * found.std() / math.sqrt(len(found))


def test_rows_that_are_masked_out_teach_nothing():
    x, mask = rows(5, 1).squeeze(-1), torch.tensor([True, False, True, True, False])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    guide = prepared(model, x)
    for gradient in GRADIENTS:
        elbo = IWELBO(4, gradient=gradient)
        elbo.loss(model, guide, x)
        loss, found = gradients(elbo, model, guide, x, seed=3)
        changed, _ = gradients(elbo, model, guide, torch.where(mask, x, 0.5), seed=3)
        assert found.isfinite().all()
        assert loss == pytest.approx(changed)


def test_a_support_that_a_global_decides_takes_the_standard_gradient():
    x = rows(4, 1)
    guide = prepared(dependent, x)
    with pytest.raises(ValueError, match="latent 'z' has a support that other latents decide"):
        IWELBO(3).loss_and_grads(dependent, guide, x)
    assert math.isfinite(IWELBO(3, gradient="standard").loss_and_grads(dependent, guide, x))


def test_one_objective_serves_several_guides():
    elbo, x = IWELBO(3), rows()
    for model in (hierarchy, forest, hierarchy):
        guide = prepared(model, x)
        assert math.isfinite(elbo.loss_and_grads(model, guide, x))


# --- what is refused


def test_a_site_outside_that_depends_on_rows_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1), 1.0), obs=x.sum())

    with pytest.raises(ValueError, match=r"site 'total' lies outside of the plates \['data'\]"):
        IWELBO(3, gradient="standard").loss(model, Near(), rows(4, 1).squeeze(-1))


def test_a_joint_posterior_of_a_subsample_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
        with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, S), obs=x)

    x = rows(4, 1).squeeze(-1)
    guide = prepared(model, x, amortize=())
    with pytest.raises(ValueError, match="'x' sees 4 of the 12 elements of plate 'data'"):
        IWELBO(3).loss(model, guide, x)


def test_sequential_plates_are_refused():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, S), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(C * x[i], 0.5))

    with pytest.raises(ValueError, match="latent 'z_0' lies in the sequential plate 'data'"):
        IWELBO(3).loss(model, guide, rows(4, 1).squeeze(-1))


def test_guides_that_draw_all_rows_jointly_are_told_of():
    x = rows(4, 1).squeeze(-1)
    guide = AutoDiagonalNormal(conjugate)
    with pytest.raises(ValueError, match="draws nothing inside of the plates"):
        IWELBO(3, gradient="standard").loss(conjugate, guide, x)
    assert math.isfinite(IWELBO(3, gradient="standard", plates=()).loss(conjugate, guide, x))
    assert math.isfinite(IWELBO(3, gradient="standard").loss(conjugate, AutoNormal(conjugate), x))


def test_latents_of_the_model_alone_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, S), obs=x)

    with pytest.raises(ValueError, match=r"the model draws \['k'\], which the guide does not"):
        IWELBO(3, gradient="standard").loss(model, Near(), rows(4, 1).squeeze(-1))


REFUSED = {
    "a density of the user's": (lambda x: Near(), "does not follow the path"),
    "a flow": (
        lambda x: AmortizedGuide(conjugate, small_encoder(), NormalizingFlow(1)),
        "does not follow the path",
    ),
    "the ordinary entropy": (
        lambda x: AmortizedGuide(conjugate, small_encoder(), FullRankNormal(stick_the_landing=False)),
        "does not follow the path",
    ),
    "a mixture": (
        lambda x: AmortizedGuide(conjugate, small_encoder(), NormalMixture(2)),
        "is not fully reparameterized",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_doubly_reparameterized_gradients_need_a_landing_to_stick(case):
    make, message = REFUSED[case]
    x = rows(4, 1).squeeze(-1)
    with pytest.raises(ValueError, match=f"latent 'z' .*{message}.*gradient='standard'"):
        IWELBO(3).loss_and_grads(conjugate, make(x), x)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="num_particles must be an int"):
        IWELBO(2.0)
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        IWELBO(0)
    with pytest.raises(ValueError, match="at least 2 with gradient='wake'"):
        IWELBO(1, gradient="wake")
    with pytest.raises(ValueError, match="gradient must be one of"):
        IWELBO(3, gradient="dreg")
    with pytest.raises(TypeError, match=r"write \['data'\]"):
        IWELBO(3, plates="data")
    with pytest.raises(ValueError, match=r"names \['rows'\], but the plates are \['data'\]"):
        IWELBO(3, plates=["rows"]).loss(conjugate, Near(), rows(4, 1).squeeze(-1))
