"""Amortized hierarchies, sets and tables against exact posteriors."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median, init_to_sample, init_to_value

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, optim
from tests.problems import gaussian_linear, lsat, nested, radon, rats, table

pytestmark = pytest.mark.slow


def train(model, guide, batches, rate, steps, particles=4, plates=1, last=0.01):
    """Adam, its rate falling exponentially down to ``last`` of what it was."""
    optimizer = optim.Adam({"lr": rate}, {"clip_norm": 10.0}, schedule=lambda step: last ** (step / steps))
    elbo = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=plates)
    svi = SVI(model, guide, optimizer, elbo)
    return [svi.step(*batches()) for _ in range(steps)]


def errors(posterior, sites):
    """Errors of means in exact sds, and relative errors of sds, by site and in its shape."""
    means, sds = posterior.mean(), posterior.sd()
    return {
        name: (((means[name].reshape(mean.shape) - mean) / sd), sds[name].reshape(sd.shape) / sd - 1.0)
        for name, (mean, sd) in sites.items()
    }


def worst(found):
    """The largest error of a mean and of an sd; prints both of every site."""
    largest = {name: [float(e.abs().max()) for e in pair] for name, pair in found.items()}
    for name, (mean, sd) in largest.items():
        print(f"  {name}: mean {mean:.3f} sd, sd {100.0 * sd:.1f} %")
    return [max(pair[i] for pair in largest.values()) for i in range(2)]


def gap(posterior, evidence):
    """Log p(x) minus the ELBO, summed over rows, and its Monte Carlo error."""
    log_weight = (posterior.log_p - posterior.log_q).reshape(posterior.num_draws, -1).sum(-1)
    return float(evidence - log_weight.mean()), float(log_weight.std()) / math.sqrt(len(log_weight))


# --- rows


def test_students_never_seen():
    """Trained on 800 students, asked for the ability of 200 others."""
    responses, alpha, beta = lsat.load()
    order = torch.randperm(len(responses))
    seen, unseen = responses[order[:800]], responses[order[800:]]
    guide = AmortizedGuide(lsat.model).setup(seen, alpha, beta)
    train(lsat.model, guide, lambda: (seen[torch.randint(800, (200,))], alpha, beta), 5e-3, 1000)
    posterior = guide.posterior(unseen, alpha, beta, num_draws=2000)
    missing, error = (x / 200 for x in gap(posterior, lsat.exact_log_evidence(unseen, alpha, beta).sum()))
    print(f"gap {missing:.5f} ± {error:.5f} nats per student")
    assert error < 0.0005
    assert -3.0 * error < missing < 0.002


def test_data_sets_never_seen():
    """One guide for all data sets; its KL from the exact posteriors of ten given ones."""
    x, _, _ = gaussian_linear.load()
    simulated = gaussian_linear.simulate(10_000)
    guide = AmortizedGuide(gaussian_linear.model).setup(simulated)
    batches = lambda: (simulated[torch.randint(10_000, (256,))],)  # noqa: E731
    train(gaussian_linear.model, guide, batches, 5e-3, 800)
    posterior = guide.posterior(x, num_draws=2000)
    divergence, error = (v / 10 for v in gap(posterior, gaussian_linear.exact(x)[0].sum()))
    print(f"KL {divergence:.5f} ± {error:.5f} nats per data set")
    assert error < 0.001
    assert -3.0 * error < divergence < 0.005


# --- nested plates, both subsampled


@pytest.mark.parametrize(
    ("model", "steps", "means", "sds"),
    [(nested.model, 2000, 0.05, 0.05), (nested.model_of_mean, 2500, 0.05, 0.05)],
    ids=["fixed mean", "latent mean"],
)
def test_nested_effects(model, steps, means, sds):
    """Half of the areas and six of eight groups per step; checked on all of them.

    A subsample of the groups leaves noise in the gradient for their area even where q is exact, so that the
    learning rate must fall far. The posteriors are linear in y, and so are the encoders.
    """
    y = nested.simulate(30, 8, 4)
    encoder = {"a": DeepSet(16, depth=0), "g": MLP(16, depth=0)}
    guide = AmortizedGuide(model, encoder).setup(y)
    train(model, guide, lambda: (y, 15, 6), 2e-2, steps, particles=8, plates=2, last=0.002)
    sites, _ = nested.exact(y, model is nested.model_of_mean)
    posterior = guide.posterior(y, num_draws=20_000)
    found = worst(errors(posterior, {name: sites[name] for name in posterior.draws}))
    assert found[0] < means
    assert found[1] < sds


# --- ragged counties


def start(values):
    """Rough guesses from the data, and medians of the rest."""
    return init_to_value(values=values, fallback=init_to_median)


RADON = {
    "intercept": (
        radon.intercept_model,
        lambda floor, log_uppm, log_radon, county: ({"f": floor, "u": log_uppm, "r": log_radon}, county),
        (16, 0),  # a county's effect is linear in its houses; deeper, 84 counties do not say what an 85th is
    ),
    "slope": (
        radon.slope_model,
        lambda floor, log_radon, county: ({"floor": floor, "log_radon": log_radon}, county),
        (32, 1),
    ),
}
"""The models, what the encoder of a county reads, its houses, and its width and depth."""


def radon_args(kind, without=None):
    floor, log_uppm, log_radon, county = radon.load()
    args = [floor, log_uppm, log_radon, county] if kind == "intercept" else [floor, log_radon, county]
    return args if without is None else [x[county != without] for x in args]


def radon_guide(kind, args, steps=2000, family=None, **options):
    model, inputs, size = RADON[kind]
    log_radon = args[-2]
    values = {"mu_alpha": log_radon.mean(), "sigma_y": log_radon.std()}
    values |= {name: torch.tensor(0.3) for name in ("sigma_alpha", "sigma_beta")}
    encoder = {"county": DeepSet(*size)}
    guide = AmortizedGuide(model, encoder, family, inputs=inputs, init_loc_fn=start(values), **options)
    guide.setup(*args)
    train(model, guide, lambda: args, 2e-2, steps, particles=8, last=0.02)
    return guide


@pytest.mark.parametrize(
    ("kind", "means", "sds"),
    [("intercept", 0.15, 0.2), ("slope", 0.35, 0.35)],
)
def test_radon(kind, means, sds):
    """Every county and every global."""
    args = radon_args(kind)
    posterior = radon_guide(kind, args).posterior(*args, num_draws=20_000)
    reference, evidence = radon.exact(kind)
    print(kind, "gap {:.3f} ± {:.3f} nats".format(*gap(posterior, evidence)))
    found = worst(errors(posterior, reference.sites()))
    assert found[0] < means
    assert found[1] < sds


def test_radon_without_upstream_values_is_too_narrow():
    """The control: counties that do not know the globals."""
    args = radon_args("slope")
    guide = radon_guide("slope", args, family=DiagonalNormal(), condition_on_upstream=False)
    posterior = guide.posterior(*args, num_draws=5000)
    mean, sd = worst(errors(posterior, radon.exact("slope")[0].sites()))
    assert max(mean / 0.35, sd / 0.35) > 1.0


def test_county_never_seen():
    """A guide that has never seen the houses of a county says what one that was trained on them says."""
    counts = radon.load()[3].bincount(minlength=radon.COUNTIES)
    county = int((counts - 25).abs().argmin())
    seen, everything = radon_args("intercept", county), radon_args("intercept")
    assert len(everything[0]) - len(seen[0]) == int(counts[county])
    old, new = (
        radon_guide("intercept", args, 1000).posterior(*everything, num_draws=10_000)
        for args in (seen, everything)
    )
    mean, sd = (old.mean()["alpha"], new.mean()["alpha"]), (old.sd()["alpha"], new.sd()["alpha"])
    shift = float((mean[0] - mean[1])[county] / sd[1][county])
    ratio = float((sd[0] / sd[1])[county])
    houses = int(counts[county])
    print(f"county {county}, {houses} houses: mean moved by {shift:.3f} sd, ratio of sds {ratio:.3f}")
    assert abs(shift) < 0.15
    assert abs(ratio - 1.0) < 0.15


# --- pairs of latents per rat


def test_rats():
    """A line per rat, its two numbers jointly."""
    age, weight = rats.load()
    day = age - rats.MIDDLE
    line = (weight.mean(1, keepdim=True), (weight @ day / day.square().sum()).unsqueeze(-1))
    rest = weight - line[0] - line[1] * day
    values = {"alpha": line[0], "mu_alpha": line[0].mean(), "sigma_alpha": line[0].std()}
    values |= {"beta": line[1], "mu_beta": line[1].mean(), "sigma_beta": line[1].std(), "sigma_y": rest.std()}
    guide = AmortizedGuide(
        rats.model, {"rat": MLP(16, depth=0)}, inputs=lambda age, weight: weight, init_loc_fn=start(values)
    ).setup(age, weight)
    train(rats.model, guide, lambda: (age, weight), 3e-2, 2000, particles=8, plates=2, last=0.02)
    posterior = guide.posterior(age, weight, num_draws=20_000)
    reference, evidence = rats.exact()
    print("gap {:.3f} ± {:.3f} nats".format(*gap(posterior, evidence)))
    mean, sd = worst(errors(posterior, reference.sites()))
    assert mean < 0.2
    assert sd < 0.15


# --- crossed plates with holes


def test_table():
    """Rows amortized, columns learned: as good a prediction of what is missing as with a normal per row."""
    y, observed, truth = table.load()
    guide = AmortizedGuide(
        table.model,
        {"u": MLP(24, depth=1, missing=True)},
        inputs=lambda y, observed: {"y": y, "mask": observed},
        amortize=["row"],
        condition_on_upstream=False,
        init_loc_fn=init_to_sample,
    ).setup(y, observed)
    auto = AutoNormal(table.model, init_loc_fn=init_to_sample)
    score, size = {}, {}
    for name, q, rate, steps in (("amortized", guide, 2e-2, 2000), ("per row", auto, 5e-2, 3000)):
        flat_then_falling = lambda step, n=steps: min(1.0, max(0.01, 2.0 - 2.0 * step / n))  # noqa: E731
        optimizer = optim.Adam({"lr": rate}, schedule=flat_then_falling)
        elbo = Trace_ELBO(1, vectorize_particles=True, max_plate_nesting=2)
        svi = SVI(table.model, q, optimizer, elbo)
        losses = [svi.step(y, observed) for _ in range(steps)]
        if name == "amortized":
            draws = guide.posterior(y, observed, num_draws=500).draws
        else:
            with torch.no_grad(), pyro.plate("draws", 500, dim=-3):
                draws = auto(y, observed)
        score[name] = float(table.held_out_log_density(draws, truth, ~observed))
        size[name] = sum(p.numel() for p in q.parameters())
        late = sum(losses[-50:]) / 50
        print(f"{name}: ELBO {-late:.0f}, density {score[name]:.4f}, {size[name]} parameters")
    exact = float(table.held_out_log_density(table.gibbs(y, observed), truth, ~observed))
    print(f"Gibbs sampler: density {exact:.4f}")
    assert size["amortized"] < 0.7 * size["per row"]
    assert score["amortized"] > score["per row"] - 0.01
