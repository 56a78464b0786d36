"""Discrete latents: log q, ELBOs and gradients are those of a sum over all values.

Whatever is finite is summed out by hand; continuous latents beside it are integrated over a grid.
"""

import copy
import pickle
from itertools import product
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Recorder, log_p_by_pyro
from models import ELBOS, F64, PARTICLES, two
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from test_mixtures import Axis, apart, continuous, exact_gradient, gradients, trained, worst
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical
from torch.nn.functional import one_hot, pad
from torch.nn.utils import parameters_to_vector

from pyro_guides import MLP, AmortizedGuide, Discrete, FullRankNormal, NormalMixture, to_arviz
from pyro_guides.distributions import discrete

ROWS = torch.tensor([[1.5, 0.3], [-0.6, 1.2]], **F64)
TOTALS = torch.tensor([3.0, 1.0], **F64)  # of the two rows
COPIES = 200


def table(*values):
    return torch.tensor(values, **F64)


def all_of(count, width):
    """All vectors of numbers from zero, ``(V, width)``."""
    return torch.cartesian_prod(*[torch.arange(count)] * width).reshape(-1, width)


class Kind(NamedTuple):
    """A kind of discrete site: its prior for some rows, q by torch from λ, all values and their encoding."""

    prior: Any
    by_hand: Any
    values: torch.Tensor
    encode: Any

    @property
    def axis(self):
        return Axis(self.values, self.encode(self.values), 1.0, self.by_hand)


def flag(logits):
    return Bernoulli(logits=logits[..., 0])


def flags(logits):
    return Independent(Bernoulli(logits=logits), 1)


def numbers(logits):
    return Independent(Categorical(logits=logits.unflatten(-1, (2, 3))), 1)


def binomial_of_rows(count):
    return dist.Binomial(TOTALS.repeat(count // 2), FLAGS[0], validate_args=False)


def up_to_totals(logits):
    rows = TOTALS.repeat(logits.shape[-2] // 2).unsqueeze(-1)
    return Categorical(logits=logits.masked_fill(torch.arange(4) > rows, -1e30))


def indicators(value):
    return one_hot(value.long(), 4 if value.is_floating_point() else 3).to(two(0.0)).flatten(1)


def as_it_is(value):
    return value.reshape(len(value), -1)


SMALL, FLAGS = table(0.2, 0.5, 0.3), table(0.3, 0.8)
PAIR = torch.stack([SMALL, SMALL.flip(0)])
NUMBERS, COUNTS = torch.arange(3), torch.arange(4, **F64)
KINDS = {
    "bernoulli": (lambda n: dist.Bernoulli(FLAGS[0]), flag, two(0.0, 1.0), as_it_is),
    "bernoullis": (lambda n: dist.Bernoulli(FLAGS).to_event(1), flags, all_of(2, 2).double(), as_it_is),
    "categorical": (lambda n: dist.Categorical(SMALL), lambda p: Categorical(logits=p), NUMBERS, indicators),
    "categoricals": (lambda n: dist.Categorical(PAIR).to_event(1), numbers, all_of(3, 2), indicators),
    "one_hot": (
        lambda n: dist.OneHotCategorical(SMALL),
        lambda p: OneHotCategorical(logits=p),
        torch.eye(3, **F64),
        as_it_is,
    ),
    "binomial": (lambda n: dist.Binomial(3, FLAGS[0]), lambda p: Categorical(logits=p), COUNTS, indicators),
    "binomial of rows": (binomial_of_rows, up_to_totals, COUNTS, indicators),
}
KINDS = {name: Kind(*kind) for name, kind in KINDS.items()}
by_kind = pytest.mark.parametrize("kind", KINDS)


def mean_of(kind, value):
    """A mean that no symmetry of the value leaves alone."""
    value = value.to(two(0.0)).reshape(*value.shape[: value.dim() - kind.prior(2).event_dim], -1)
    weight = torch.arange(1.0, 1.0 + value.shape[-1], **F64)
    return (weight * value).sum(-1) ** 2 / 4.0


def model_of(kind, scale=1, mask=True):
    def model(x):
        rows = pyro.plate("data", scale * len(x), subsample_size=len(x))
        with rows, poutine.mask(mask=mask):
            k = pyro.sample("k", kind.prior(len(x)))
            pyro.sample("x", dist.Normal(mean_of(kind, k), 1.0), obs=x[..., 0])

    return model


def log_joint_of(kind):
    def log_joint(x, value):
        prior = kind.prior(2)
        allowed = value.minimum(TOTALS) if kind.prior is binomial_of_rows else value
        seen = Normal(mean_of(kind, value), 1.0).log_prob(x[..., 0])
        return prior.log_prob(allowed.expand(-1, len(x), *prior.event_shape)) + seen

    return log_joint


@by_kind
def test_log_q_is_exact_for_all_values(kind):
    kind = KINDS[kind]
    guide = apart(model_of(kind), None, ROWS)
    values = kind.values.unsqueeze(1).expand(-1, 2, *kind.values.shape[1:])
    expected = kind.by_hand(guide.network.head(0)(ROWS, None, {})).log_prob(values)
    actual = guide.posterior(ROWS).log_prob({"k": values})
    possible = expected > -1e20
    assert torch.allclose(actual[possible], expected[possible], rtol=1e-10)
    assert (actual[~possible] < -1e20).all()


@pytest.mark.parametrize(("elbo", "particles"), [("Trace", "looped"), ("TraceGraph", "vectorized")])
@by_kind
def test_the_elbo_is_that_written_by_hand(kind, elbo, particles):
    kind = KINDS[kind]
    model = model_of(kind)
    recorder = Recorder(apart(model, None, ROWS))
    loss = ELBOS[elbo](max_plate_nesting=1, **PARTICLES[particles]).loss(model, recorder, ROWS)
    bounds = []
    for trace, parameters in recorder.calls:
        log_q = kind.by_hand(parameters[0]).log_prob(trace.nodes["k"]["value"])
        bounds.append(log_p_by_pyro(model, trace, ROWS) - log_q.sum() / (log_q.numel() / 2))
    assert loss == pytest.approx(-float(sum(bounds).detach()) / len(bounds), rel=1e-10)


def worst_of(kind, elbo, particles="vectorized", rows=ROWS, **options):
    kind, x = KINDS[kind], ROWS.repeat(COPIES, 1)
    model = model_of(kind, **options)
    guide = apart(model, None, x)
    bound = ELBOS[elbo](max_plate_nesting=1, **PARTICLES[particles])
    exact = exact_gradient(guide, log_joint_of(kind), [kind.axis], rows) * options.get("scale", 1)
    return worst(gradients(bound, model, guide, x, 40, COPIES), exact)


@pytest.mark.parametrize(
    ("kind", "elbo"), [*product(KINDS, ["Trace", "TraceGraph"]), ("categoricals", "TraceEnum")]
)
def test_the_gradient_of_draws_is_exact_on_average(kind, elbo):
    assert worst_of(kind, elbo, "looped" if elbo == "Trace" else "vectorized") < 4.0


@pytest.mark.parametrize("elbo", ["Trace", "TraceGraph", "TraceEnum"])
def test_a_subsample_counts_for_all_rows_and_a_masked_row_for_nothing(elbo):
    assert worst_of("categorical", elbo, scale=3) < 4.0
    masked = torch.arange(2 * COPIES) % 2 == 0
    assert worst_of("categoricals", elbo, rows=ROWS[:1], mask=masked) < 4.0


@pytest.mark.parametrize("how", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[-1] != "s" or kind == "binomial of rows"])
def test_the_gradient_of_an_enumerated_site_is_exact(kind, how):
    kind = KINDS[kind]
    guide = apart(model_of(kind), Discrete(enumerate=how), ROWS)
    bound = ELBOS["TraceEnum"](max_plate_nesting=1)
    [actual] = gradients(bound, model_of(kind), guide, ROWS, 1)
    expected = exact_gradient(guide, log_joint_of(kind), [kind.axis], ROWS)
    assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-8)


# --- discrete and continuous latents that depend on each other


def k_above_z(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SMALL))
        z = pyro.sample("z", dist.Normal(k.to(x) - 1.0, 0.7))
        pyro.sample("sees z", dist.Normal(z**2, 1.0), obs=x[..., 0])
        pyro.sample("sees k", dist.Normal((k == 1).to(x), 0.6), obs=x[..., 1])


def log_k_above_z(x, k, z):
    z = z[..., 0]
    log_p = SMALL.log()[k] + Normal(k - 1.0, 0.7).log_prob(z) + Normal(z**2, 1.0).log_prob(x[..., 0])
    return log_p + Normal((k == 1).to(x), 0.6).log_prob(x[..., 1])


def chain(x):
    """z decides about k, and both about w."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(two(0.2)[0], 1.0))
        k = pyro.sample("k", dist.Bernoulli(logits=2.0 * z - 0.5))
        w = pyro.sample("w", dist.Normal(z + 2.0 * k, 0.8))
        pyro.sample("sees w", dist.Normal(w, 0.7), obs=x[..., 0])
        pyro.sample("sees z", dist.Normal(z**2, 0.9), obs=x[..., 1])


def log_chain(x, z, k, w):
    z, w = z[..., 0], w[..., 0]
    log_p = Normal(0.2, 1.0).log_prob(z) + Bernoulli(logits=2.0 * z - 0.5).log_prob(k)
    log_p = log_p + Normal(z + 2.0 * k, 0.8).log_prob(w) + Normal(w, 0.7).log_prob(x[..., 0])
    return log_p + Normal(z**2, 0.9).log_prob(x[..., 1])


def worst_beside(model, elbo, family, how=None, repeats=40):
    line = continuous(family, 1, points=81)
    axes, log_joint = {
        k_above_z: ([KINDS["categorical"].axis, line], log_k_above_z),
        chain: ([line, KINDS["bernoulli"].axis, line], log_chain),
    }[model]
    families = {"z": family, "k": Discrete(enumerate=how)} | ({"w": family} if model is chain else {})
    x = ROWS.repeat(120, 1)
    guide = apart(model, families, x, 0.5)
    bound = ELBOS[elbo](max_plate_nesting=1, **PARTICLES["looped" if how == "sequential" else "vectorized"])
    samples = gradients(bound, model, guide, x, repeats, 120)
    return worst(samples, exact_gradient(guide, log_joint, axes, ROWS))


WAYS = [("Trace", None), ("TraceGraph", None), ("TraceEnum", None), ("TraceEnum", "parallel")]
FAMILIES = {k_above_z: FullRankNormal(), chain: NormalMixture(2)}


@pytest.mark.parametrize(
    ("model", "elbo", "how"),
    [*((m, *way) for m in FAMILIES for way in WAYS), (chain, "TraceEnum", "sequential")],
)
def test_the_gradient_is_exact_beside_continuous_latents(model, elbo, how):
    assert worst_beside(model, elbo, FAMILIES[model], how) < 4.0


@pytest.mark.parametrize("model", [k_above_z, chain])
def test_control_without_tags_trace_graph_is_wrong(model, monkeypatch):
    monkeypatch.setattr(discrete, "tagged", lambda value, tags: value)
    monkeypatch.setattr("pyro_guides.distributions.sites.tagged", lambda value, tags: value)
    assert worst_beside(model, "TraceGraph", NormalMixture(2)) > 8.0


# --- a real use: which cluster a row comes from


CENTERS = table(0.0, 0.0, 2.0, 0.0, 0.5, 1.8).reshape(3, 2)


def clusters(x):
    """Clusters that differ in the first two of all features."""
    centers = pad(CENTERS, (0, x.shape[-1] - 2))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SMALL))
        pyro.sample("x", dist.Normal(centers[k], 1.0).to_event(1), obs=x)


def drawn(count, width):
    k = Categorical(SMALL).sample((count,))
    return pad(CENTERS[k], (0, width - 2)) + torch.randn(count, width, **F64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("elbo", "how", "steps"), [("TraceGraph", None, 200), ("TraceEnum", "parallel", 100)]
)
def test_assignments_are_learned(elbo, how, steps):
    x, new = drawn(300, 2), drawn(300, 2)
    guide = AmortizedGuide(clusters, MLP(width=16, depth=1), Discrete(enumerate=how)).setup(x)
    optimizer = torch.optim.Adam(guide.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        gradients(ELBOS[elbo](max_plate_nesting=1), clusters, guide, x, 1)
        optimizer.step()
        schedule.step()
    q = guide.log_prob({"k": NUMBERS.unsqueeze(-1).expand(3, len(new))}, new).exp().T
    exact = (SMALL.log() + Normal(CENTERS, 1.0).log_prob(new.unsqueeze(1)).sum(-1)).softmax(-1)
    error = float((q - exact).abs().mean())
    print(f"{elbo}: mean absolute error {error:.4f}")
    assert error < 0.02


@pytest.mark.slow
def test_the_amortized_baseline_takes_the_noise_out():
    x, noise = drawn(100, 50), {}
    for baseline in ("amortized", None):
        guide = AmortizedGuide(clusters, MLP(width=16, depth=1), Discrete(baseline=baseline)).setup(x)
        predictors = list(guide.network.predictors.parameters())
        for _ in range(100 if predictors else 0):
            gradients(TraceGraph_ELBO(), clusters, guide, x, 1)
            [p.data.sub_(0.1 * p.grad) for p in predictors]
        noise[baseline] = float(gradients(TraceGraph_ELBO(), clusters, guide, x, 50).var(0).sum())
    print(f"variance with and without a baseline: {noise}")
    assert noise["amortized"] < noise[None] / 10.0


# --- what users do with a guide


def test_the_posterior_knows_discrete_values():
    kind = KINDS["categorical"]
    guide = apart(model_of(kind), None, ROWS)
    posterior = guide.posterior(ROWS, num_draws=4000)
    q, draws = kind.by_hand(guide.network.head(0)(ROWS, None, {}).detach()), posterior.draws["k"]
    assert (draws.dtype, draws.shape) == (torch.int64, (4000, 2))
    assert torch.allclose(posterior.log_q, q.log_prob(draws))
    prior = Categorical(SMALL).log_prob(draws)
    expected = prior + Normal(mean_of(kind, draws), 1.0).log_prob(ROWS[:, 0])
    assert torch.allclose(posterior.log_p, expected)
    mean = (q.probs * NUMBERS).sum(-1)
    assert ((posterior.mean()["k"] - mean).abs() < 4.0 * posterior.sd()["k"] / 4000**0.5).all()
    levels = posterior.quantiles([0.1, 0.5, 0.9])["k"]
    assert torch.equal(levels[1], posterior.median()["k"])
    assert torch.equal(levels, (q.probs.cumsum(-1) < table(0.1, 0.5, 0.9).reshape(3, 1, 1)).sum(-1))
    data = to_arviz(posterior)
    assert data.posterior["k"].dtype.kind == "i"
    assert data.posterior["k"].shape == (1, 4000, 2)


def test_a_copy_and_a_file_hold_the_same_guide():
    guide = apart(chain, {"k": Discrete()}, ROWS)
    values = {name: draws[0] for name, draws in guide.posterior(ROWS, num_draws=1).draws.items()}
    other = apart(chain, {"k": Discrete()}, ROWS)
    other.load_state_dict(guide.state_dict())
    unpickled = pickle.loads(pickle.dumps(guide))  # noqa: S301
    unpickled.model = chain
    for same in (copy.deepcopy(guide), unpickled, other):
        assert torch.equal(same.log_prob(values, ROWS), guide.log_prob(values, ROWS))
        assert TraceGraph_ELBO().loss_and_grads(chain, same, ROWS) < 1e3


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_pyro_can_ask_for_enumeration_itself(how):
    kind = KINDS["categorical"]
    guide = apart(model_of(kind), None, ROWS)
    TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model_of(kind), config_enumerate(guide, how), ROWS)
    actual = parameters_to_vector([p.grad for p in trained(guide)])
    assert torch.allclose(actual, exact_gradient(guide, log_joint_of(kind), [kind.axis], ROWS))


def test_what_the_model_enumerates_is_left_to_it():
    def model(x):
        with pyro.plate("data", len(x)):
            j = pyro.sample("j", dist.Bernoulli(FLAGS[0]))
            k = pyro.sample("k", dist.Bernoulli(FLAGS[1]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(j + 2.0 * k, 1.0), obs=x[..., 0])

    guide = apart(model, Discrete(enumerate="parallel"), ROWS)
    assert guide(ROWS).keys() == {"j"}
    j, k = table(0.0, 1.0).reshape(2, 1, 1), table(0.0, 1.0).reshape(2, 1)
    seen = Bernoulli(FLAGS[1]).log_prob(k) + Normal(j + 2.0 * k, 1.0).log_prob(ROWS[:, 0])
    log_p = Bernoulli(FLAGS[0]).log_prob(j.squeeze(-1)) + seen.logsumexp(1)
    log_q = flag(guide.network.head(0)(ROWS, None, {})).log_prob(j.squeeze(-1))
    expected = -float((log_q.exp() * (log_p - log_q)).sum().detach())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, ROWS)
    assert loss == pytest.approx(expected, rel=1e-10)


def counts(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Poisson(2.0 * SMALL[0]))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x[..., 0])


CATEGORICAL, CATEGORICALS = model_of(KINDS["categorical"]), model_of(KINDS["categoricals"])


@pytest.mark.parametrize(
    ("model", "family", "depth", "message"),
    [
        (counts, None, 1, r"'k' is discrete.*truncate a count"),
        (CATEGORICAL, {"k": FullRankNormal()}, 1, r"'k' is discrete.*give it Discrete\(\)"),
        (chain, {"z": Discrete()}, 1, r"Discrete\(\) is for discrete latents"),
        (CATEGORICAL, Discrete(enumerate="parallel"), 0, r"TraceEnum_ELBO\(max_plate_nesting=1\)"),
        (CATEGORICALS, Discrete(enumerate="parallel"), 1, r"[Ee]numerat"),
        (CATEGORICALS, Discrete(enumerate="sequential"), 1, r"[Ee]numerat"),
    ],
)
def test_what_cannot_be_is_said(model, family, depth, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        TraceEnum_ELBO(max_plate_nesting=depth).loss(model, apart(model, family, ROWS), ROWS)


@pytest.mark.parametrize("value", [3, -1])
def test_values_outside_the_support_have_no_density(value):
    guide = apart(CATEGORICAL, None, ROWS)
    with pytest.raises(ValueError, match="outside its support"):
        guide.log_prob({"k": torch.tensor([0, value])}, ROWS)
