"""Every ELBO of Pyro, with the guide in it, has the value that the same draws give by hand.

Comparisons are at the same draws, so they carry no Monte-Carlo error and hold to 1e-7. Where expectations are
compared instead, 4 standard errors are allowed. Seed 0 everywhere.
"""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Recorder, check_loss, hand_written_loss, log_q_by_hand, normal, unconstrain
from models import (
    ELBOS,
    FAMILIES,
    PARTICLES,
    PRIORS,
    SUMS,
    SUPPORTS,
    ZOO,
    Local,
    by_every_family,
    by_family,
    by_particles,
    by_sum,
    chosen,
    normal_rows,
    prepared,
    pushed,
    rows,
    two,
)
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import MultivariateNormal, biject_to, kl_divergence

from pyro_guides import AmortizedGuide, FullRankNormal
from pyro_guides.distributions import VectorNormal

# Wishart tests its own draws for singularity, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample:UserWarning")


# --- every support, family, bound, plate and kind of particles: 504 combinations


@pytest.mark.crossed
@pytest.mark.parametrize("size", [None, 20], ids=["full", "subsampled"])
@by_particles
@by_sum
@by_every_family
@pytest.mark.parametrize("prior", PRIORS)
def test_the_loss_is_the_hand_written_one(prior, family, elbo, particles, size):
    model, x = Local(PRIORS[prior](), size), rows()
    guide = prepared(model, x, family=family)
    scale = 1.0 if size is None else size / len(x)
    check_loss(model, guide, x, elbo=elbo, particles=particles, scale=scale)


@pytest.mark.crossed
@pytest.mark.parametrize("size", [None, 20], ids=["full", "subsampled"])
@by_particles
@by_family
@pytest.mark.parametrize("prior", PRIORS)
def test_the_mean_field_bound_takes_the_exact_divergence_where_there_is_one(prior, family, particles, size):
    model, x = Local(PRIORS[prior](), size), rows()
    recorder = Recorder(prepared(model, x, family=family))
    loss = TraceMeanField_ELBO(max_plate_nesting=1, **PARTICLES[particles]).loss(model, recorder, x)
    scale = 1.0 if size is None else size / len(x)
    expected = hand_written_loss(model, recorder, x, scale=scale)
    if prior == "real_vector":
        base = model.prior.base_dist
        p = MultivariateNormal(base.loc, base.scale.square().diag_embed())
        for trace, parameters in recorder.calls:
            q = normal(recorder.guide.network.family(0), parameters[0].detach())
            drawn = q.log_prob(trace.nodes["z"]["value"]) - p.log_prob(trace.nodes["z"]["value"])
            drawn = drawn.reshape(-1, len(x)).mean(0)
            expected += float((kl_divergence(q, p) - drawn.detach()).sum()) * scale / len(recorder.calls)
    assert loss == pytest.approx(expected, rel=1e-8)


@pytest.mark.crossed
@by_particles
@by_family
@pytest.mark.parametrize("prior", PRIORS)
def test_renyi_is_the_importance_weighted_bound_of_each_row(prior, family, particles):
    model, x = Local(PRIORS[prior]()), rows()
    recorder = Recorder(prepared(model, x, family=family))
    loss = RenyiELBO(max_plate_nesting=1, **PARTICLES[particles]).loss(model, recorder, x)
    weights = torch.cat([log_weights(model, *call, recorder.guide, x) for call in recorder.calls])
    bound = weights.logsumexp(0) - math.log(len(weights))
    assert loss == pytest.approx(-float(bound.sum()), rel=1e-8)


def log_weights(model, trace, parameters, guide, x):
    """Log p - log q, ``(particles, rows)``."""
    z = trace.nodes["z"]["value"]
    mean = z.reshape(*z.shape[: z.dim() - model.prior.event_dim], -1) @ model.weight
    log_p = (model.prior.log_prob(z) + dist.Normal(mean, 0.7).log_prob(x).sum(-1)).detach()
    return (log_p - log_q_by_hand(guide, trace, parameters)[("z",)]).reshape(-1, len(x))


def test_the_hand_written_densities_integrate_to_one():
    """The mean of p(z) / q(z) under q is 1 for any density p, here a sharper one."""
    model, x = Local(PRIORS["simplex"]()), rows(1)
    recorder = Recorder(prepared(model, x, spread=0.0, init_scale=1.5))
    Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1).loss(model, recorder, x)
    [(trace, parameters)] = recorder.calls
    log_q = log_q_by_hand(recorder.guide, trace, parameters)[("z",)]
    weights = (dist.Dirichlet(two(4.0, 8.0, 12.0)).log_prob(trace.nodes["z"]["value"]) - log_q).exp()
    assert abs(weights.mean() - 1.0) < 4.0 * weights.std() / len(weights) ** 0.5


# --- expectations: what is drawn really is q


@by_family
@pytest.mark.parametrize("prior", ["real_vector", "simplex", "lower_cholesky"])
def test_draws_have_the_moments_of_q(prior, family):
    model, x = Local(PRIORS[prior]()), rows(3)
    guide = prepared(model, x, family=family)
    draws = guide.posterior(x, num_draws=20_000).draws["z"]
    check_moments(guide, x, unconstrain(model.prior.support, draws))


def check_moments(guide, x, u, group=0):
    recorder = Recorder(guide)
    recorder(x)
    q = normal(guide.network.family(group), recorder.calls[0][1][group].detach())
    variance, covariance = q.variance, q.covariance_matrix
    assert ((u.mean(0) - q.mean).abs() < 4.5 * (variance / len(u)).sqrt()).all()
    deviation = u - u.mean(0)
    found = torch.einsum("sbi,sbj->bij", deviation, deviation) / len(u)
    error = ((variance.unsqueeze(-1) * variance.unsqueeze(-2) + covariance.square()) / len(u)).sqrt()
    assert ((found - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("size", [None, 20], ids=["full", "subsampled"])
@pytest.mark.parametrize("particles", ["looped", "vectorized"])
@pytest.mark.parametrize("elbo", ["Trace", "TraceGraph", "TraceMeanField", "TraceEnum"])
@by_family
def test_the_mean_loss_is_the_analytic_one(family, elbo, particles, size):
    prior = PRIORS["real_vector"]()
    model, x, count = Local(prior, size), rows(3), 40 if particles == "looped" else 4000
    scale = 1.0 if size is None else size / len(x)
    recorder = Recorder(prepared(model, x, family=family, spread=0.2))
    options = {"num_particles": count, "vectorize_particles": particles == "vectorized"}
    loss = ELBOS[elbo](max_plate_nesting=1, **options).loss(model, recorder, x)
    q = normal(recorder.guide.network.family(0), recorder.calls[0][1][0].detach())
    p = MultivariateNormal(prior.mean, prior.variance.diag_embed())
    noise = 0.7**2
    error = (x - q.mean @ model.weight).square().sum(-1)
    error = error + (model.weight.T @ q.covariance_matrix @ model.weight).diagonal(dim1=-2, dim2=-1).sum(-1)
    likelihood = -0.5 * error / noise - math.log(2.0 * math.pi * noise)
    expected = -float((likelihood - kl_divergence(q, p)).sum()) * scale
    weights = torch.cat([log_weights(model, *call, recorder.guide, x) for call in recorder.calls]).sum(-1)
    assert abs(loss - expected) < 4.0 * scale * float(weights.std()) / count**0.5


# --- q = p leaves nothing: the loss of a model without data is exactly zero


def priors_alone(support, size, plate):
    def model(x):
        prior = pushed(support, size)
        if plate == "none":
            pyro.sample("z", prior)
        elif plate == "subsampled":
            with pyro.plate("data", 100, subsample_size=10):
                pyro.sample("z", prior)
        else:
            with pyro.plate("data", len(x)):
                pyro.sample("z", prior)

    return model


def set_to_prior(guide, support, size):
    prior = pushed(support, size)
    head = guide.network.heads[0]
    bias = head.output.bias if hasattr(head, "output") else head.bias
    loc = prior.loc.reshape(-1)
    raw = (prior.scale.reshape(-1) - 1e-6).expm1().log()
    with torch.no_grad():
        bias.zero_()
        bias[..., : 2 * len(loc)] = torch.cat([loc, raw])


@pytest.mark.crossed
@pytest.mark.parametrize("plate", ["none", "learned", "amortized", "subsampled"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_a_guide_at_the_prior_loses_exactly_nothing(name, plate):
    support, size = SUPPORTS[name]
    model, x = priors_alone(support, size, plate), rows(7)
    family = list(FAMILIES.values())[list(SUPPORTS).index(name) % len(FAMILIES)]
    options = {} if plate == "amortized" else {"amortize": ()}
    guide = AmortizedGuide(model, family=family, **options).setup(x)
    set_to_prior(guide, support, size)
    for elbo in ELBOS.values():
        for particles in PARTICLES.values():
            assert abs(elbo(max_plate_nesting=1, **particles).loss(model, guide, x)) < 1e-6


def test_every_support_that_has_a_bijection_is_covered():
    covered = {type(base) for support, _ in SUPPORTS.values() for base in constraints_in(support)}
    assert set(biject_to._registry) <= covered


def constraints_in(support):
    yield support
    for part in (getattr(support, "base_constraint", None), *getattr(support, "cseq", ())):
        if part is not None:
            yield from constraints_in(part)


# --- five ways to write a plate


def internally(x):
    with pyro.plate("data", len(x), subsample_size=4) as chosen:
        _row(x[chosen])


def explicitly(x, chosen):
    with pyro.plate("data", 20, subsample=chosen):
        _row(x[chosen] if len(x) == 20 else x)


def sizeless(x):
    with pyro.plate("data"):
        _row(x)


def batch_in(x):
    with pyro.plate("data", 20, subsample_size=len(x)):
        _row(x)


def whole(x):
    with pyro.plate("data", len(x)):
        _row(x)


def _row(x):
    z = pyro.sample("z", dist.Gamma(two(2.0, 1.0), 1.0).to_event(1).expand([len(x)]))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


TAKEN = torch.tensor([17, 3, 0, 11])
# name -> model, the arguments of the set-up and of each call, N / B in each call
IDIOMS = {
    "batch in": (batch_in, (rows(8),), [(rows(8),), (rows(4),), (rows(1),)], [2.5, 5.0, 20.0]),
    "internal": (internally, (rows(20),), [(rows(20),)] * 3, [5.0] * 3),
    "explicit": (explicitly, (rows(20), TAKEN), [(rows(20), TAKEN), (rows(20), TAKEN[:3])], [5.0, 20 / 3]),
    "explicit rows": (explicitly, (rows(4), TAKEN), [(rows(4), TAKEN), (rows(3), TAKEN[:3])], [5.0, 20 / 3]),
    "whole": (whole, (rows(8),), [(rows(8),), (rows(3),), (rows(1),)], [1.0] * 3),
    "size-less": (sizeless, (rows(8),), [(rows(8),), (rows(3),), (rows(1),)], [1.0] * 3),
}


@pytest.mark.parametrize("idiom", IDIOMS)
@by_particles
@by_sum
def test_every_idiom_of_a_plate(elbo, particles, idiom):
    model, first, calls, scales = IDIOMS[idiom]
    guide = prepared(model, *first, family=FullRankNormal())
    read = []
    guide.network.encoders[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for args, scale in zip(calls, scales, strict=True):
        recorder = check_loss(model, guide, *args, elbo=elbo, particles=particles, scale=scale)
        trace = recorder.calls[-1][0]
        taken = trace.nodes["data"]["value"] if idiom != "size-less" else torch.arange(len(args[0]))
        if idiom.startswith("explicit"):
            assert torch.equal(taken, args[1])
        if idiom == "internal":
            assert len(set(taken.tolist())) == 4
        expected = args[0][taken] if len(args[0]) == 20 else args[0]
        assert torch.equal(read[-1], expected)


def test_internal_subsamples_differ_between_calls():
    guide = AmortizedGuide(internally).setup(rows(20))
    taken = [poutine.trace(guide).get_trace(rows(20)).nodes["data"]["value"] for _ in range(20)]
    assert len({tuple(sorted(chosen.tolist())) for chosen in taken}) > 10
    assert set(torch.cat(taken).tolist()) == set(range(20))


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("amortize", [None, ()], ids=["amortized", "learned"])
def test_parameters_are_those_of_the_cells_taken(amortize, replayed):
    x = rows(6, 8)
    guide = prepared(chosen, x, amortize=amortize)
    recorder, asked = Recorder(guide), poutine.trace(chosen).get_trace(x)
    (poutine.replay(recorder, trace=asked) if replayed else recorder)(x)
    trace, parameters = recorder.calls[0]
    i, j = (trace.nodes[plate]["value"] for plate in "ab")
    if replayed:
        assert i is asked.nodes["a"]["value"]
    [head], encoders = guide.network.heads, guide.network.encoders
    every = head(encoders[0](x.reshape(-1, 1)).reshape(6, 8, -1), None, {}) if encoders else head.bias
    assert torch.allclose(parameters[0], every[i][:, j], rtol=1e-12)


# --- shapes of models


@pytest.mark.crossed
@by_every_family
@pytest.mark.parametrize("amortize", [None, ()], ids=["amortized", "learned"])
@pytest.mark.parametrize("name", ZOO)
def test_models_of_many_shapes(name, amortize, family):
    model, args, depth, scale = ZOO[name]
    guide = prepared(model, *args, family=family, amortize=amortize)
    for elbo, particles in product(SUMS, PARTICLES):
        check_loss(model, guide, *args, elbo=ELBOS[elbo], depth=depth, particles=particles, scale=scale)


def by_row(name, draws):
    top = draws["top"] if name == "dependent_rows" else draws["top"].unsqueeze(-1)
    return top, draws["z"]


@pytest.mark.parametrize("name", ["dependent", "dependent_rows"])
def test_no_draw_leaves_a_dependent_support(name):
    model, args, _, _ = ZOO[name]
    guide = prepared(model, *args, spread=0.6)
    top, z = by_row(name, guide.posterior(*args, num_draws=10_000).draws)
    assert z.shape == (10_000, len(args[0]))
    assert (z.abs() <= top).all()
    assert (z.abs() > 0.9 * top).any()


def test_draws_fill_a_dependent_support():
    """Relative to the support's ends, which vary from draw to draw, they have the moments of q."""
    model, args, _, _ = ZOO["dependent"]
    guide = prepared(model, *args, condition_on_upstream=False)
    top, z = by_row("dependent", guide.posterior(*args, num_draws=10_000).draws)
    check_moments(guide, *args, ((top + z) / (top - z)).log().unsqueeze(-1), group=1)


@by_family
def test_other_rows_than_those_of_the_set_up(family):
    guide = prepared(normal_rows, rows(6), family=family)
    for x in (rows(6, seed=1), rows(9, seed=2), rows(1, seed=3)):
        check_loss(normal_rows, guide, x)
        one_by_one = [guide.median(row.unsqueeze(0))["z"][0] for row in x]
        assert torch.allclose(guide.median(x)["z"], torch.stack(one_by_one))


def test_single_precision_stays_single():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = rows().float()
    recorder = Recorder(prepared(model, x))
    loss = Trace_ELBO().loss(model, recorder, x)
    recorder.calls = recorder.calls[-1:]
    assert recorder.calls[0][0].nodes["z"]["value"].dtype == torch.float32
    assert loss == pytest.approx(hand_written_loss(model, recorder, x), rel=1e-4)


# --- controls: the checks above see faults that are planted into the package


def narrow(self, noise, push=VectorNormal.push):
    value, log_volume = push(self, noise)
    return self.loc + 0.95 * (value - self.loc), log_volume


JACOBIAN = ("distributions.sites.Piece.log_jacobian", lambda self, u, value: u.new_zeros(u.shape[:-1]))
DETERMINANT = (
    "distributions.normal.VectorNormal.log_prob_from",
    lambda self, origin: -0.5 * origin[0].square().sum(-1),
)
SCALE = ("guide.AmortizedGuide.forward", poutine.scale(AmortizedGuide.forward, scale=4 / 20))
FAULTS = {
    "jacobian, positive": (JACOBIAN, Local(PRIORS["positive"]()), {}),
    "jacobian, simplex": (JACOBIAN, Local(PRIORS["simplex"]()), {}),
    "jacobian, matrix": (JACOBIAN, Local(PRIORS["positive_definite"]()), {}),
    "determinant": (DETERMINANT, Local(PRIORS["real_vector"]()), {}),
    "plate's scale": (SCALE, Local(PRIORS["real_vector"](), 20), {"scale": 5.0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_control_a_planted_fault_is_seen(fault, monkeypatch):
    (target, wrong), model, options = FAULTS[fault]
    monkeypatch.setattr(f"pyro_guides.{target}", wrong)
    guide = prepared(model, rows())
    with pytest.raises(AssertionError, match="instead of"):
        check_loss(model, guide, rows(), **options)


def test_control_draws_of_another_width_are_seen(monkeypatch):
    model, x = Local(PRIORS["real_vector"]()), rows(3)
    guide = prepared(model, x)
    monkeypatch.setattr(VectorNormal, "push", narrow)
    draws = guide.posterior(x, num_draws=20_000).draws["z"]
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check_moments(guide, x, draws)
