"""Weights on the KL term: gradients of the tempered objective against exact ones, under every ELBO."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, Discrete, FullRankNormal, NormalMixture, optim
from pyro_guides.objectives import IWELBO, CyclicalWarmup, FreeBits, LinearWarmup, kl_weight
from tests.models import F64, hierarchy, mixed, prepared, rows, two

S = 0.5


def absolute(x):
    """A posterior of two modes."""
    with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(two(0.2)[0], 1.0))
        pyro.sample("x", dist.Normal(z.abs(), S), obs=x)


def choice(x):
    with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def exact_gradient(guide, model, x, points, width, weight):
    """The gradient of E_q[weight * (log q - log p(z)) - log p(x | z)], summed over points ``(P,)``."""
    guide_trace = poutine.trace(guide).get_trace(x)
    name = next(name for name in ("k", "z") if name in guide_trace.nodes)
    total = 0.0
    for point in points:
        guide_trace.nodes[name]["value"] = point.expand(len(x))
        fn = poutine.trace(poutine.replay(guide, trace=guide_trace)).get_trace(x).nodes[name]["fn"]
        nodes = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x).nodes
        log_q = fn.log_prob(point.expand(len(x)))
        cost = weight * (log_q - nodes[name]["fn"].log_prob(point)) - nodes["x"]["fn"].log_prob(x)
        total = total + 3.0 * (width * log_q.exp() * cost).sum()
    found = torch.autograd.grad(total, list(guide.parameters()), allow_unused=True)
    return total.detach(), flat(guide, found)


def flat(guide, gradients):
    pairs = zip(guide.parameters(), gradients, strict=True)
    return torch.cat(
        [torch.full([p.numel()], math.nan, **F64) if g is None else g.reshape(-1) for p, g in pairs]
    )


def estimates(guide, model, x, elbo, messenger, repeats):
    """Losses and gradients of several evaluations."""
    losses, gradients = [], []
    for _ in range(repeats):
        guide.zero_grad()
        with messenger:
            losses.append(elbo.loss_and_grads(model, guide, x))
        gradients.append(flat(guide, [p.grad for p in guide.parameters()]))
    return torch.tensor(losses, **F64), torch.stack(gradients)


def off_by(found, exact):
    """How many standard errors the means are off; what q does not depend on has no exact gradient."""
    error = found.std(0) / math.sqrt(len(found))
    return ((found.mean(0) - exact) / error)[(error > 1e-10) & exact.isfinite()]


GRID = torch.linspace(-7.0, 7.0, 141, **F64)
STEP = 14.0 / 140
NORMAL = (absolute, FullRankNormal(), GRID, STEP)
MIXTURE = (absolute, NormalMixture(2), GRID, STEP)
DISCRETE = (choice, Discrete(), two(0.0, 1.0), 1.0)
CASES = {
    "normal, Trace": (*NORMAL, Trace_ELBO),
    "normal, TraceGraph": (*NORMAL, TraceGraph_ELBO),
    "normal, TraceMeanField": (*NORMAL, TraceMeanField_ELBO),
    "mixture, Trace": (*MIXTURE, Trace_ELBO),
    "mixture, TraceGraph": (*MIXTURE, TraceGraph_ELBO),
    "discrete, Trace": (*DISCRETE, Trace_ELBO),
    "discrete, TraceGraph": (*DISCRETE, TraceGraph_ELBO),
}


TEMPERED = [(case, 0.3) for case in CASES] + [("mixture, TraceGraph", 0.0), ("discrete, Trace", 0.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "weight"), TEMPERED)
def test_the_gradient_is_that_of_the_tempered_objective(case, weight):
    """Against quadrature; of about a hundred elements the largest is 3 standard errors off by chance."""
    model, family, points, width, elbo = CASES[case]
    x = two(0.5, 1.2)
    guide = prepared(model, x, family=family, encoder=MLP(width=2, depth=1), init_scale=0.8, spread=0.3)
    loss, exact = exact_gradient(guide, model, x, points, width, weight)
    elbo = elbo(num_particles=200, vectorize_particles=True)
    losses, found = estimates(guide, model, x, elbo, kl_weight(weight), 40)
    assert abs(off_by(losses.unsqueeze(-1), loss)) < 4.0
    off = off_by(found, exact)
    assert len(off) > 10
    assert off.abs().max() < 4.5
    _, untempered = exact_gradient(guide, model, x, points, width, 1.0)
    assert off_by(found, untempered).abs().max() > 5.5


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_enumeration_in_the_guide_is_exact(weight):
    x = two(0.5, 2.0)
    guide = Choice()
    loss, exact = exact_gradient(guide, choice, x, two(0.0, 1.0), 1.0, weight)
    losses, found = estimates(guide, choice, x, TraceEnum_ELBO(), kl_weight(weight), 1)
    assert losses[0] == pytest.approx(float(loss))
    assert torch.allclose(found[0], exact)


class Choice(nn.Module):
    """q(k | x), enumerated where that is asked for."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(two(0.7)[0])

    def forward(self, x):
        pyro.module("choice", self)
        with pyro.plate("data", 3 * len(x), subsample_size=len(x)):
            pyro.sample("k", dist.Bernoulli(logits=self.slope * x), infer={"enumerate": "parallel"})


def test_sequential_enumeration_is_exact():
    """A guide that is run once for each value, and given its own draws to do so."""
    logit = nn.Parameter(two(0.4)[0])

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(two(0.3)[0]))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Bernoulli(logits=logit), infer={"enumerate": "sequential"})

    x, q, exact = two(0.5)[0], logit.sigmoid(), 0.0
    for k, own, prior in ((0.0, 1 - q, 0.7), (1.0, q, 0.3)):
        likelihood = dist.Normal(2.0 * k, 1.0).log_prob(x)
        exact = exact + own * (0.3 * (own.log() - math.log(prior)) - likelihood)
    with kl_weight(0.3):
        assert TraceEnum_ELBO().loss(model, guide, x) == pytest.approx(float(exact.detach()))


def test_stratified_mixtures_are_tempered_with_their_components():
    """The mean of a stratified loss against quadrature."""
    x = two(0.5, 1.2)
    family = NormalMixture(2, stratified=True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    guide = AmortizedGuide(absolute, MLP(width=2, depth=1), family, init_scale=0.8)
    elbo.loss(absolute, guide, x)
    plain = prepared(absolute, x, family=NormalMixture(2), encoder=MLP(width=2, depth=1), init_scale=0.8)
    plain.load_state_dict(guide.state_dict(), strict=False)
    loss, _ = exact_gradient(plain, absolute, x, GRID, STEP, 0.3)
    losses, _ = estimates(guide, absolute, x, elbo, kl_weight(0.3), 20)
    assert abs(off_by(losses.unsqueeze(-1), loss)) < 4.0
    with pytest.raises(ValueError, match="drawn jointly with 'its component'"), kl_weight({"z": 0.3}):
        elbo.loss(absolute, guide, x)


def test_latents_that_the_model_enumerates_are_not_scaled():
    """Against a density by hand at the value that was drawn."""
    x = rows()
    guide = prepared(mixed, x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    pyro.set_rng_seed(4)
    with kl_weight(0.3):
        found = elbo.loss(mixed, guide, x)
    pyro.set_rng_seed(4)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    a, z = (trace.nodes[name]["value"] for name in ("a", "z"))
    log_q = trace.nodes["a"]["log_prob"] + trace.nodes["z"]["log_prob"].sum()
    log_p = dist.LogNormal(0.0, 1.0).log_prob(a) + dist.Normal(0.0, a).log_prob(z).sum()
    likelihood = torch.stack([dist.Normal(z + k, 0.5).log_prob(x).sum(-1) for k in (0.0, 1.0)])
    likelihood = (likelihood + math.log(0.5)).logsumexp(0).sum()
    assert found == pytest.approx(-float((likelihood - 0.3 * (log_q - log_p)).detach()))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_weights_by_name_of_site_and_plate(elbo):
    x = rows()
    guide = prepared(hierarchy, x, family=DiagonalNormal())

    def parts(weights):
        pyro.set_rng_seed(2)
        with kl_weight(weights):
            return elbo().loss(hierarchy, guide, x)

    whole = parts(1.0)
    by_site = {name: whole - parts({name: 0.0}) for name in ("center", "spread", "z", "s")}
    assert all(abs(part) > 0.1 for part in by_site.values())
    assert parts({"data": 0.3}) == pytest.approx(whole - 0.7 * (by_site["z"] + by_site["s"]))
    assert parts({"data": 0.3, "z": 1.0}) == pytest.approx(whole - 0.7 * by_site["s"])
    assert parts(0.0) == pytest.approx(whole - sum(by_site.values()))


def test_latents_that_are_drawn_jointly_have_one_weight():
    x = rows()
    guide = prepared(hierarchy, x)
    with pytest.raises(ValueError, match="'z' is drawn jointly with 's'"), kl_weight({"z": 0.3}):
        Trace_ELBO().loss(hierarchy, guide, x)
    with kl_weight({"z": 0.3, "s": 0.3}):
        Trace_ELBO().loss(hierarchy, guide, x)


def test_guides_with_auxiliary_sites_take_one_weight_only():
    x, guide = rows(), AutoNormal(hierarchy)
    loss = Trace_ELBO().loss
    loss(hierarchy, guide, x)
    values = []
    for weight in (0.0, 0.3, 1.0):
        pyro.set_rng_seed(2)
        with kl_weight(weight):
            values.append(loss(hierarchy, guide, x))
    assert values[1] == pytest.approx(0.7 * values[0] + 0.3 * values[2])
    with pytest.raises(ValueError, match="'z' through an auxiliary site"), kl_weight({"z": 0.3}):
        loss(hierarchy, guide, x)


def test_names_that_are_not_there_are_told_of():
    x = rows()
    guide = prepared(hierarchy, x)
    with (
        pytest.raises(ValueError, match=r"\['row'\] are neither latents nor plates"),
        LinearWarmup(5, only=["row"]),
    ):
        Trace_ELBO().loss(hierarchy, guide, x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_a_weight_of_zero_makes_no_nan_of_impossible_values(elbo):
    def model(x):
        z = pyro.sample("z", dist.Uniform(two(0.0)[0], 1.0, validate_args=False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", two(5.0)[0]), 0.1))

    x = two(4.0)[0]
    with kl_weight(0.0):
        loss = elbo().loss_and_grads(model, guide, x)
    assert math.isfinite(loss)
    slope = pyro.param("loc").grad
    assert abs(slope - 1.0) < 0.5  # of (z - x)² / 2
    with kl_weight(0.5):
        assert elbo().loss(model, guide, x) == math.inf


def test_guides_that_run_inside_of_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    x, guide = two(0.5, 1.0), AutoNormalMessenger(model)
    guide(x)

    def loss(weight):
        pyro.set_rng_seed(2)
        with kl_weight(weight):
            return Trace_ELBO().loss(model, guide, x)

    assert loss(0.3) == pytest.approx(0.3 * loss(1.0) + 0.7 * loss(0.0))
    assert loss(1.0) != pytest.approx(loss(0.0))


def test_importance_weights_are_tempered_and_their_double_reparameterization_refused():
    x = rows()
    guide = prepared(hierarchy, x)
    one = IWELBO(3, gradient="standard")
    one.loss(hierarchy, guide, x)

    def loss(elbo, weight):
        pyro.set_rng_seed(2)
        with kl_weight(weight):
            return elbo.loss(hierarchy, guide, x)

    assert loss(one, 0.0) < loss(one, 0.3) < loss(one, 1.0)
    with pytest.raises(ValueError, match="counts with a scale other than its row's"), kl_weight(0.3):
        IWELBO(3).loss_and_grads(hierarchy, guide, x)


# --- schedules


def weights_of(schedule, steps):
    found = []
    for _ in range(steps):
        with schedule:
            found.append(schedule.weight)
    return found


def test_schedules_count_how_often_they_were_open():
    assert weights_of(LinearWarmup(4, start=0.2), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    cyclical = CyclicalWarmup(5, ramp=0.4, start=0.1, cycles=2)
    expected = [0.1, 0.55, 1.0, 1.0, 1.0] * 2 + [1.0, 1.0]
    assert weights_of(cyclical, 12) == pytest.approx(expected)
    assert cyclical.step == 12
    assert weights_of(CyclicalWarmup(2), 6) == [0.0, 1.0] * 3


def test_schedules_go_on_from_their_state():
    schedule = LinearWarmup(10)
    weights_of(schedule, 3)
    state = schedule.state_dict()
    assert state == {"step": 3}
    other = LinearWarmup(10)
    other.load_state_dict(state)
    assert other.weight == 0.3
    with pytest.raises(ValueError, match="what state_dict"):
        other.load_state_dict({})


def test_a_schedule_weighs_what_svi_does_inside():
    x = rows()
    guide = prepared(hierarchy, x)
    svi = SVI(hierarchy, guide, optim.Adam({"lr": 0.0}), Trace_ELBO())
    schedule = LinearWarmup(2)
    losses = []
    for _ in range(3):
        pyro.set_rng_seed(2)
        with schedule:
            losses.append(svi.step(x))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2)
    pyro.set_rng_seed(2)
    assert svi.step(x) == losses[2]


WRONG = {
    "LinearWarmup(-1)": (lambda: LinearWarmup(-1), ValueError, "steps must be at least 1"),
    "LinearWarmup(2.5)": (lambda: LinearWarmup(2.5), TypeError, "steps must be an int"),
    "start": (lambda: LinearWarmup(3, start=1.5), ValueError, r"start must be in \[0.0, 1.0\]"),
    "only": (lambda: LinearWarmup(3, only="z"), TypeError, "only must be a list"),
    "period": (lambda: CyclicalWarmup(0), ValueError, "period must be at least 1"),
    "ramp": (lambda: CyclicalWarmup(3, ramp=0.0), ValueError, "ramp must be above 0"),
    "cycles": (lambda: CyclicalWarmup(3, cycles=0), ValueError, "cycles must be at least 1"),
    "weight": (lambda: kl_weight(-0.1), ValueError, "weight must be at least 0"),
    "nan": (lambda: kl_weight({"z": math.nan}), ValueError, "weight must be at least 0"),
    "string": (lambda: kl_weight("z"), TypeError, "weight must be a number"),
    "nats": (lambda: FreeBits(-1.0), ValueError, "nats must be at least 0"),
    "decay": (lambda: FreeBits(1.0, decay=1.0), ValueError, "decay must be below 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_are_checked(case):
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        make()


# --- free bits


def test_free_bits_measure_the_kl_of_each_group():
    """Of 4,000 rows, so that the mean is known to 0.02; with a mask, of those that count."""

    def model(x, mask):
        with pyro.plate("data", 8000, subsample_size=len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(two(0.0)[0], 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    def guide(x, mask):
        with pyro.plate("data", 8000, subsample_size=len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(torch.where(mask, 0.5, 100.0), 0.6))

    x, mask = rows(4000, 1).squeeze(-1), torch.arange(4000) % 3 > 0
    exact = math.log(1 / 0.6) + (0.36 + 0.25) / 2 - 0.5
    free = FreeBits(1.0)
    for particles in (1, 3):
        free.kl.clear()
        with free:
            Trace_ELBO(num_particles=particles).loss(model, guide, x, mask)
        assert free.kl["z"] == pytest.approx(exact, abs=0.05)


def test_free_bits_switch_the_kl_of_a_group_off_and_on():
    x = rows()
    guide = prepared(hierarchy, x)
    free = FreeBits(1e6)

    def loss(messenger):
        pyro.set_rng_seed(2)
        with messenger:
            return TraceGraph_ELBO().loss(hierarchy, guide, x)

    plain = loss(kl_weight(1.0))
    assert loss(free) == plain  # nothing is known yet
    assert list(free.kl) == ["center, spread", "z, s"]
    assert loss(free) == pytest.approx(loss(kl_weight(0.0)))
    free.nats = (free.kl["center, spread"] + free.kl["z, s"]) / 2
    low = min(free.kl, key=free.kl.get)
    expected = loss(kl_weight(dict.fromkeys(low.split(", "), 0.0)))
    assert loss(free) == pytest.approx(expected)
    free.nats = -math.inf
    assert loss(free) == plain


def test_free_bits_forget_at_their_pace_and_keep_their_state():
    x = rows()
    guide = prepared(hierarchy, x)
    free, means = FreeBits(0.5, decay=0.75), []
    for _ in range(2):
        own = FreeBits(0.5, decay=0.0)
        state = torch.get_rng_state()
        with own:
            Trace_ELBO().loss(hierarchy, guide, x)
        torch.set_rng_state(state)
        with free:
            Trace_ELBO().loss(hierarchy, guide, x)
        means.append(own.kl["z, s"])
    assert free.kl["z, s"] == pytest.approx(0.75 * means[0] + 0.25 * means[1])
    other = FreeBits(0.5)
    other.load_state_dict(free.state_dict())
    assert other.kl == free.kl
    assert other.step == 2


def test_free_bits_refuse_enumerated_latents():
    with pytest.raises(NotImplementedError, match="'k' is enumerated"), FreeBits(0.5):
        TraceEnum_ELBO(max_plate_nesting=1).loss(choice, Choice(), two(0.5, 2.0))
