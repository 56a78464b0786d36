"""Every exact answer of ``tests/problems`` against an independent computation, all in float64."""

from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch.distributions import MultivariateNormal

from tests.problems import chorales, gaussian_linear, linear, lsat, nested, radon, rats, state_space, table

F64 = torch.float64


def traced(model, args, values=()):
    trace = poutine.trace(poutine.condition(model, dict(values))).get_trace(*args)
    trace.compute_log_prob()
    return trace


def log_joint(model, args, values=()):
    return traced(model, args, values).log_prob_sum()


def latents(trace):
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], dist.Delta)
        if type(site["fn"]).__name__ != "_Subsample"
    }


# --- every model runs, alone and under a plate of particles


def problems():
    x = state_space.simulate(3, 4, dtype=F64)
    notes, lengths = (part[:3] for part in chorales.load("valid", F64))
    floor, log_uppm, log_radon, county = radon.load(F64)
    effects = nested.simulate(4, 3, 2, dtype=F64)
    responses = lsat.load(F64)
    return {
        "state_space": (state_space.model, x),
        "padded": (state_space.padded_model, x, torch.tensor([4, 1, 2])),
        "radon_intercept": (radon.intercept_model, floor, log_uppm, log_radon, county),
        "radon_slope": (radon.slope_model, floor, log_radon, county),
        "rats": (rats.model, *rats.load(F64)),
        "lsat": (lsat.model, *responses),
        "nested": (nested.model, effects),
        "nested_mean": (nested.model_of_mean, effects),
        "nested_three": (nested.model_of_three_plates, effects),
        "nested_subsampled": (nested.model_of_mean, effects, 2, 2),
        "gaussian_linear": (gaussian_linear.model, gaussian_linear.load(F64)[0]),
        "chorales": (chorales.DeepMarkovModel(latents=3).double().model, notes[:, :5], lengths.clamp(max=5)),
        "table": (table.model, *table.load(dtype=F64)[:2]),
    }


PROBLEMS = problems()
by_problem = pytest.mark.parametrize("problem", PROBLEMS)


@by_problem
def test_model_runs(problem):
    model, *args = PROBLEMS[problem]
    assert torch.isfinite(log_joint(model, args))


@by_problem
def test_model_runs_in_vectorized_particles(problem):
    """Each particle has the density that its latents have alone."""
    model, *args = PROBLEMS[problem]
    with pyro.plate("particles", 3, dim=-4):
        trace = traced(model, args)
    total = sum(
        site["log_prob"]
        .expand(torch.broadcast_shapes(site["log_prob"].shape, (3, 1, 1, 1)))
        .flatten(1)
        .sum(1)
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["log_prob"].dim() == 4
    )
    for i in range(3):
        values = {name: value[i] for name, value in latents(trace).items()}
        values |= {name: site["value"] for name, site in trace.nodes.items() if name in ("area", "group")}
        assert torch.allclose(total[i], log_joint(model, args, values).to(total.dtype), rtol=1e-5)


# --- state space: conditioning the joint normal of all z and x by linear algebra


def dense_state_space(x):
    """Log p(x), and mean and covariance of (z_1, .., z_T), from loadings on independent noises."""
    steps = x.shape[1]
    loadings = torch.zeros(2 * steps, 2 * steps, dtype=F64)
    for t in range(steps):
        for s in range(t + 1):
            power = torch.linalg.matrix_power(state_space.TRANSITION, t - s)
            loadings[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = power * (state_space.DRIFT if s else 1.0)
    prior, sensors = loadings @ loadings.T, torch.kron(torch.eye(steps, dtype=F64), state_space.SENSORS)
    spread = sensors @ prior @ sensors.T + state_space.NOISE**2 * torch.eye(3 * steps, dtype=F64)
    gain = torch.linalg.solve(spread, sensors @ prior).T
    flat = x.flatten(1)
    evidence = MultivariateNormal(torch.zeros(3 * steps, dtype=F64), spread).log_prob(flat)
    return evidence, flat @ gain.T, prior - gain @ sensors @ prior


def test_state_space_is_exact():
    x = state_space.simulate(3, 5, dtype=F64)
    evidence, mean, covariance = dense_state_space(x)
    log_p, means, sds = state_space.exact(x)
    assert torch.allclose(log_p, evidence)
    assert torch.allclose(means.flatten(1), mean)
    assert torch.allclose(sds.flatten(1), covariance.diagonal().sqrt().expand(3, -1))

    filtered = state_space.exact(x[:, :3])  # the future matters: a filter is not the answer
    assert (filtered[1] - means[:, :3]).abs().max() > 0.1
    assert ((filtered[2] - sds[:, :3]) > 1e-3).any()


def test_state_space_model_has_that_posterior():
    """Log p(z, x) - log p(z | x) is log p(x) for any z."""
    x = state_space.simulate(3, 5, dtype=F64)
    evidence, mean, covariance = dense_state_space(x)
    z = torch.randn(3, 10, dtype=F64)
    values = {f"z_{t + 1}": z[:, 2 * t : 2 * t + 2] for t in range(5)}
    conditional = MultivariateNormal(mean, covariance).log_prob(z).sum()
    assert torch.allclose(log_joint(state_space.model, [x], values) - conditional, evidence.sum())


def test_padded_state_space_is_exact():
    lengths = torch.tensor([6, 1, 4])
    whole = state_space.simulate(3, 6, dtype=F64)
    answer = state_space.exact(state_space.pad(whole, lengths), lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = state_space.exact(whole[b : b + 1, :n])
        assert torch.allclose(answer[0][b], alone[0][0])
        assert torch.allclose(answer[1][b, :n], alone[1][0])
        assert torch.allclose(answer[2][b, :n], alone[2][0])
    unmasked = state_space.exact(state_space.pad(whole, lengths))
    assert (unmasked[0] - answer[0]).abs().max() > 1.0


def sum_of_series(model, x, lengths, values):
    """Log densities of the sequences, each one alone."""
    return sum(
        log_joint(model, [x[b : b + 1, :n], lengths[b : b + 1]], {k: v[b : b + 1] for k, v in values.items()})
        for b, n in enumerate(lengths.tolist())
    )


def test_padded_state_space_model_ignores_the_padding():
    lengths, x = torch.tensor([4, 1, 2]), state_space.simulate(3, 4, dtype=F64)
    values = latents(traced(state_space.padded_model, [x, lengths]))
    total = log_joint(state_space.padded_model, [state_space.pad(x, lengths), lengths], values)
    assert torch.allclose(total, log_joint(state_space.padded_model, [x, lengths], values))
    assert torch.allclose(total, sum_of_series(state_space.padded_model, x, lengths, values))
    assert not torch.allclose(total, log_joint(state_space.model, [x], values))


def test_state_space_simulations_have_their_variance():
    x = state_space.simulate(20_000, 3, dtype=F64)
    spread = state_space.SENSORS @ state_space.SENSORS.T + state_space.NOISE**2 * torch.eye(3, dtype=F64)
    for t in range(3):
        assert torch.allclose(torch.cov(x[:, t].T), spread, atol=0.08)


# --- hierarchies: densities by hand, evidence by dense normals, references by quadrature


def log_normal(x, mean, sd):
    return (-0.5 * ((np.asarray(x) - mean) / sd) ** 2 - np.log(sd * np.sqrt(2.0 * np.pi))).sum()


def log_half_normal(x, sd=1.0):
    return log_normal(x, 0.0, sd) + np.log(2.0)


def random_values(model, args):
    return {name: value.double() for name, value in latents(traced(model, args)).items()}


def intercept_density(v, floor, log_uppm, log_radon, county):
    total = log_half_normal(v["sigma_alpha"]) + log_half_normal(v["sigma_y"])
    total += log_normal(v["mu_alpha"], 0.0, 10.0) + log_normal(v["beta"], 0.0, 10.0)
    total += log_normal(v["alpha"], v["mu_alpha"], v["sigma_alpha"])
    for n in range(len(county)):
        mean = v["alpha"][county[n]] + v["beta"][0] * log_uppm[n] + v["beta"][1] * floor[n]
        total += log_normal(log_radon[n], mean, v["sigma_y"])
    return total


def slope_density(v, floor, log_radon, county):
    total = sum(log_half_normal(v[f"sigma_{name}"]) for name in ("y", "alpha", "beta"))
    for name in ("alpha", "beta"):
        total += log_normal(v[f"mu_{name}"], 0.0, 10.0)
        total += log_normal(v[name], v[f"mu_{name}"], v[f"sigma_{name}"])
    for n in range(len(county)):
        mean = v["alpha"][county[n]] + v["beta"][county[n]] * floor[n]
        total += log_normal(log_radon[n], mean, v["sigma_y"])
    return total


def rats_density(v, age, weight):
    total = sum(log_half_normal(v[f"sigma_{name}"], 100.0) for name in ("y", "alpha", "beta"))
    for name in ("alpha", "beta"):
        total += log_normal(v[f"mu_{name}"], 0.0, 100.0)
        total += log_normal(v[name], v[f"mu_{name}"], v[f"sigma_{name}"])
    for i in range(len(weight)):
        total += log_normal(weight[i], v["alpha"][i] + v["beta"][i] * (age - 22.0), v["sigma_y"])
    return total


DENSITIES = {"radon_intercept": intercept_density, "radon_slope": slope_density, "rats": rats_density}
HIERARCHIES = {
    "radon_intercept": (lambda: radon.design("intercept"), lambda: radon.exact("intercept")),
    "radon_slope": (lambda: radon.design("slope"), lambda: radon.exact("slope")),
    "rats": (rats.design, rats.exact),
}
STAN = {
    "radon_intercept": lambda: radon.reference("intercept"),
    "radon_slope": lambda: radon.reference("slope"),
    "rats": rats.reference,
}
by_hierarchy = pytest.mark.parametrize("name", HIERARCHIES)


@by_hierarchy
def test_hierarchy_has_the_density_written_by_hand(name):
    model, *args = PROBLEMS[name]
    values = random_values(model, args)
    arrays = [a.numpy() for a in args]
    flat = {k: v.numpy().reshape(-1) if v.dim() else v.numpy() for k, v in values.items()}
    by_hand = DENSITIES[name](flat, *arrays)
    assert np.isclose(float(log_joint(model, args, values)), by_hand, rtol=1e-9)
    arrays[-1] = np.roll(arrays[-1], 1, axis=0)  # houses of other counties, weights of other rats
    assert not np.isclose(by_hand, DENSITIES[name](flat, *arrays), rtol=1e-6)


@by_hierarchy
def test_hierarchy_is_linear_in_its_effects(name):
    """The columns that the exact answer is computed from, and its readout, are those of the model."""
    model, *args = PROBLEMS[name]
    values = random_values(model, args)
    (columns, _, _, scales, data, readout), names = HIERARCHIES[name][0]()
    theta = torch.stack([scalar(values, n) for n in names[len(scales) :]])
    fitted = dist.Normal(columns @ torch.linalg.solve(readout, theta), values["sigma_y"])
    observed = traced(model, args, values).nodes["weight" if name == "rats" else "log_radon"]["log_prob_sum"]
    assert torch.allclose(observed, fitted.log_prob(data).sum())


def scalar(values, name):
    site, _, index = name.rstrip("]").partition("[")
    return values[site].flatten()[int(index) - 1] if index else values[site]


@by_hierarchy
def test_evidence_and_posterior_given_the_scales(name):
    (columns, fixed, group, scales, data, _), _ = HIERARCHIES[name][0]()
    values = torch.tensor([(s.low * s.high) ** 0.5 for s in scales], dtype=F64)
    sds = torch.cat([fixed, values[group]])
    answer = linear.condition(columns, sds, values[-1], data)
    spread = (columns * sds.square()) @ columns.T + values[-1].square() * torch.eye(len(data), dtype=F64)
    marginal = MultivariateNormal(torch.zeros_like(data), spread)
    assert torch.allclose(answer.log_evidence, marginal.log_prob(data))
    gain = torch.linalg.solve(spread, columns * sds.square()).T
    assert torch.allclose(answer.mean, gain @ data, atol=1e-8)
    covariance = sds.square().diag() - gain @ (columns * sds.square())
    assert torch.allclose(answer.covariance, covariance, atol=1e-8)


@by_hierarchy
def test_quadrature_agrees_with_long_runs_of_stan(name):
    """4,000 draws know a mean to 0.016 sd, the worst of 175 to about 0.05, and an sd to a few percent."""
    exact, stan = HIERARCHIES[name][1]()[0], STAN[name]()
    assert exact.names == stan.names
    assert ((exact.mean - stan.mean) / exact.sd).abs().max() < 0.06
    assert (stan.sd / exact.sd - 1.0).abs().max() < 0.06
    assert all(mean.shape == sd.shape for mean, sd in exact.sites().values())


def test_quadrature_has_converged():
    """Another rule, on other nodes: the same answer."""
    (*parts, scales, data, readout), _ = rats.design()
    finer = [s._replace(low=s.low / 1.2, high=s.high * 1.1, nodes=3 * s.nodes // 2) for s in scales]
    evidence = linear.integrate(*parts, finer, data, readout).log_evidence
    assert torch.isclose(evidence, rats.exact()[1], atol=1e-5, rtol=0.0)
    coarse = [s._replace(nodes=4) for s in scales]  # too few nodes are seen
    assert not torch.isclose(
        linear.integrate(*parts, coarse, data, readout).log_evidence, evidence, atol=1e-2, rtol=0.0
    )


def test_priors_of_the_rats_scales_hardly_matter():
    """HalfNormal(100) for Stan's flat priors moves nothing by a hundredth of an sd; HalfNormal(10) does."""
    ours, flat, narrow = (rats.exact(prior)[0] for prior in (100.0, 1e6, 10.0))
    assert ((ours.mean - flat.mean) / flat.sd).abs().max() < 0.01
    assert (ours.sd / flat.sd - 1.0).abs().max() < 0.01
    assert ((narrow.mean - flat.mean) / flat.sd).abs().max() > 0.1


def test_references_by_site():
    sites = radon.reference("slope").sites()
    names, mean, sd = radon.reference("slope")
    assert sites["alpha"][0].shape == sites["beta"][1].shape == (85,)
    assert sites["beta"][0][84] == mean[names.index("beta[85]")]
    assert sites["sigma_beta"][1] == sd[names.index("sigma_beta")]
    assert rats.reference().sites()["alpha"][0].shape == (30,)


def test_radon_is_ragged():
    counts = radon.load()[3].bincount(minlength=radon.COUNTIES)
    assert (len(counts), int(counts.sum())) == (85, 919)
    assert (int(counts.min()), int(counts.max())) == (1, 116)


# --- students


def test_lsat_evidence():
    responses, alpha, beta = lsat.load(F64)
    assert responses.shape == (1000, 5)
    assert abs(float(lsat.exact_log_evidence(responses, alpha, beta).sum()) + 2466.942) < 1e-3
    assert abs(float(lsat.exact_log_evidence(responses, alpha, 0.0 * beta).sum()) + 2466.942) > 10.0
    patterns = torch.cartesian_prod(*[torch.arange(2.0, dtype=F64)] * 5)
    assert torch.allclose(
        lsat.exact_log_evidence(patterns, alpha, beta).logsumexp(0), torch.zeros((), dtype=F64)
    )


def test_lsat_posteriors_by_another_quadrature():
    responses, alpha, beta = lsat.load(F64)
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    chance = torch.sigmoid(beta * nodes[:, None] - alpha)
    likelihood = torch.where(responses[:, None, :] > 0.0, chance, 1.0 - chance).prod(-1)
    weights = likelihood * weights / weights.sum()
    evidence = weights.sum(-1)
    mean = weights @ nodes / evidence
    sd = (weights @ nodes.square() / evidence - mean.square()).sqrt()
    for found, expected in zip(lsat.exact(responses, alpha, beta), (evidence.log(), mean, sd), strict=True):
        assert torch.allclose(found, expected, atol=1e-7)


def test_lsat_model_has_the_density_written_by_hand():
    responses, alpha, beta = (a.numpy() for a in lsat.load(F64))
    theta = np.random.default_rng(0).normal(size=1000)
    chance = 1.0 / (1.0 + np.exp(alpha - beta * theta[:, None]))
    by_hand = stats.norm.logpdf(theta).sum() + stats.bernoulli.logpmf(responses, chance).sum()
    found = log_joint(lsat.model, lsat.load(F64), {"theta": torch.tensor(theta)})
    assert np.isclose(float(found), by_hand, rtol=1e-10)


# --- nested effects


@pytest.mark.parametrize("model", [nested.model, nested.model_of_mean])
def test_nested_posterior_is_exact(model):
    """Log p(y, u) - log p(u | y) is log p(y) for any u, and the sds are the roots of the covariance."""
    y, latent_mean = nested.simulate(4, 3, 2, dtype=F64), model is nested.model_of_mean
    mean, covariance, evidence = nested.exact_joint(y, latent_mean)
    sites, same = nested.exact(y, latent_mean)
    first = 0 if latent_mean else 1
    for _ in range(3):
        u = mean + torch.randn(len(mean), dtype=F64)
        values = {"mu": u[0], "a": u[1:5, None], "g": u[5:].view(4, 3)}
        posterior = MultivariateNormal(mean[first:], covariance[first:, first:])
        found = log_joint(model, [y], values) - posterior.log_prob(u[first:])
        assert torch.allclose(found, evidence)
        assert torch.allclose(same, evidence)
        other = MultivariateNormal(mean[first:], covariance[first:, first:].diagonal().diag())
        assert not torch.allclose(log_joint(model, [y], values) - other.log_prob(u[first:]), evidence)
    assert torch.allclose(sites["a"][0], mean[1:5])
    assert torch.allclose(sites["g"][1].square(), covariance.diagonal()[5:].view(4, 3))


def test_nested_evidence_by_a_dense_normal():
    y = nested.simulate(4, 3, 2, dtype=F64)
    area, group = (torch.arange(24) // n for n in (6, 2))
    same_area, same_group = (a[:, None] == a for a in (area, group))
    for latent_mean in (False, True):
        spread = nested.AREA**2 * same_area + nested.GROUP**2 * same_group + nested.MU_SD**2 * latent_mean
        spread = spread.double() + nested.NOISE**2 * torch.eye(24, dtype=F64)
        evidence = MultivariateNormal(torch.full((24,), nested.MU, dtype=F64), spread).log_prob(y.flatten())
        assert torch.allclose(nested.exact(y, latent_mean)[1], evidence)


def test_nested_models_agree_on_observations_in_a_plate_and_in_an_event():
    y, a, g = nested.simulate(4, 3, 2, dtype=F64), torch.randn(4, 1, dtype=F64), torch.randn(4, 3, dtype=F64)
    flat = log_joint(nested.model, [y], {"a": a, "g": g})
    deep = log_joint(nested.model_of_three_plates, [y], {"a": a[..., None], "g": g[..., None]})
    assert torch.allclose(flat, deep)


def test_nested_subsamples_are_scaled_to_the_whole():
    """The mean over all pairs of areas and of groups is the density of everything."""
    y, a, g = nested.simulate(4, 3, 2, dtype=F64), torch.randn(4, 1, dtype=F64), torch.randn(4, 3, dtype=F64)
    found = []
    for areas in combinations(range(4), 2):
        for groups in combinations(range(3), 2):
            area, group = torch.tensor(areas), torch.tensor(groups)
            values = {"area": area, "group": group, "a": a[area], "g": g[area][:, group]}
            found.append(log_joint(nested.model, [y, 2, 2], values))
    whole = log_joint(nested.model, [y], {"a": a, "g": g})
    assert torch.allclose(torch.stack(found).mean(), whole)
    assert torch.stack(found).std() > 1.0


# --- the benchmark's linear task


def test_gaussian_linear_is_exact():
    x, reference_mean, reference_sd = gaussian_linear.load(F64)
    evidence, mean, covariance = gaussian_linear.exact(x)
    assert x.shape == (10, 10)
    theta = torch.randn(10, 10, dtype=F64)
    posterior = MultivariateNormal(mean, covariance).log_prob(theta).sum()
    assert torch.allclose(log_joint(gaussian_linear.model, [x], {"theta": theta}) - posterior, evidence.sum())
    sd = covariance.diagonal().sqrt()  # 10,000 draws know a mean to 0.01 sd, the worst of 100 to 0.03
    assert ((reference_mean - mean) / sd).abs().max() < 0.04
    assert (reference_sd / sd - 1.0).abs().max() < 0.03
    assert ((reference_mean.flip(0) - mean) / sd).abs().max() > 1.0


def test_gaussian_linear_simulations_have_their_variance():
    assert torch.isclose(
        gaussian_linear.simulate(10_000, dtype=F64).var(), torch.tensor(0.2, dtype=F64), rtol=0.02
    )


# --- chorales


def test_chorales():
    sizes = {"train": (229, 13_807), "valid": (76, 4_602), "test": (77, 4_725)}
    for split, (count, steps) in sizes.items():
        x, lengths = chorales.load(split)
        assert (len(x), int(lengths.sum()), x.shape[2]) == (count, steps, 88)
        after = torch.arange(x.shape[1]) >= lengths[:, None]
        assert x[after].sum() == 0.0
        voices = x[~after].sum(-1)
        assert voices.max() == 4.0  # never more than four voices, and nearly always at least three
        assert (voices >= 3.0).float().mean() > 0.9


def test_chorales_model_ignores_the_padding():
    model, x, lengths = PROBLEMS["chorales"]
    lengths = torch.tensor([5, 1, 3])
    values = latents(traced(model, [x, lengths]))
    total = log_joint(model, [x, lengths], values)
    assert torch.allclose(total, log_joint(model, [state_space.pad(x, lengths), lengths], values))
    assert torch.allclose(total, sum_of_series(model, x, lengths, values))
    assert not torch.allclose(total, log_joint(model, [x, torch.full((3,), 5)], values))


def test_chorales_model_learns_everything_it_has():
    network = chorales.DeepMarkovModel(latents=3)
    x, lengths = chorales.load("test")
    log_joint(network.model, [x[:4, :5], lengths[:4]]).backward()
    assert len(pyro.get_param_store()) == len(list(network.parameters()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0.0 for p in network.parameters())


# --- the table with holes


def test_table():
    y, observed, truth = table.load(dtype=F64)
    assert y.shape == (569, 30)
    assert abs(float(observed.double().mean()) - 0.8) < 0.01
    assert (y[~observed] == 0.0).all()
    assert torch.equal(y[observed], truth[observed])
    assert torch.allclose(y.sum(0), torch.zeros(30, dtype=F64), atol=1e-8)
    assert torch.allclose(y.square().sum(0) / observed.sum(0), torch.ones(30, dtype=F64))
    other = table.load(seed=1, dtype=F64)[1]
    assert not torch.equal(observed, other)


def test_table_model_ignores_the_holes():
    y, observed, truth = table.load(dtype=F64)
    values = random_values(table.model, [y, observed])
    whole = torch.ones_like(observed)
    total = log_joint(table.model, [y, observed], values)
    assert torch.allclose(total, log_joint(table.model, [truth, observed], values))
    assert not torch.allclose(
        log_joint(table.model, [y, whole], values), log_joint(table.model, [truth, whole], values)
    )


def test_conditionals_of_the_table_are_those_of_the_model():
    """Log p(y, u, v, t) - log p(u | v, t, y) does not depend on u; likewise v and t."""
    y, observed, _ = table.load(dtype=F64)
    draw = table.gibbs(y, observed, draws=2, warmup=0)
    old, new = ({name: values[i] for name, values in draw.items()} for i in range(2))

    def joint(v):
        return log_joint(table.model, [y, observed], v | {"u": v["u"].unsqueeze(-2)})

    conditionals = {
        "u": table.factors_given_others(y, observed, old["v"], old["precision"]),
        "v": table.factors_given_others(y.T, observed.T, old["u"], old["precision"]),
        "precision": table.precision_given_factors(y, observed, old["u"], old["v"]),
    }
    for name, conditional in conditionals.items():
        change = joint(old | {name: new[name]}) - joint(old)
        expected = conditional.log_prob(new[name]).sum() - conditional.log_prob(old[name]).sum()
        assert expected.abs() > 0.1
        assert torch.allclose(change, expected)


def test_factors_predict_what_was_held_out():
    y, observed, truth = table.load(dtype=F64)
    draws = table.gibbs(y, observed, draws=60, warmup=60)
    density = table.held_out_log_density(draws, truth, ~observed)
    assert density > table.column_mean_log_density(y, observed, truth) + 0.5
    spaced = draws | {"u": draws["u"].unsqueeze(2), "v": draws["v"].unsqueeze(1)}
    assert torch.allclose(density, table.held_out_log_density(spaced, truth, ~observed))
    by_hand = []
    for n, m in (~observed).nonzero()[:50].tolist():
        mean = (draws["u"][:, n] * draws["v"][:, m]).sum(-1)
        by_hand.append(np.log(stats.norm.pdf(truth[n, m], mean, draws["precision"] ** -0.5).mean()))
    first = torch.zeros_like(observed)
    first[tuple((~observed).nonzero()[:50].T)] = True
    assert np.isclose(float(table.held_out_log_density(draws, truth, first)), np.mean(by_hand))
    shuffled = draws | {"u": draws["u"][:, torch.randperm(569)]}
    assert table.held_out_log_density(shuffled, truth, ~observed) < density - 1.0
