"""The tasks of the benchmark for simulation-based inference: densities, simulators, scores, one short run."""

import math

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.integrate import solve_ivp
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import distributions as exact

from pyro_guides import FullRankNormal
from tests.benchmarks import sbibm
from tests.benchmarks.sbibm import against_sbi, densities, equations, stored, training
from tests.benchmarks.sbibm.scores import c2st
from tests.benchmarks.sbibm.stages import STAGES, Outcome, Request, study
from tests.benchmarks.sbibm.tasks import TASKS
from tests.benchmarks.sbibm.training import PLANS, Plan

F64 = {"dtype": torch.float64}


def theta_of(name, count=50, seed=0):
    torch.manual_seed(seed)
    return TASKS[name].prior().sample((count,)).double()


def log_joint(name, theta, x):
    """Log p(θ, x) of the model, by row."""
    trace = poutine.trace(poutine.condition(TASKS[name], {"theta": theta})).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["theta"]["log_prob"] + trace.nodes["x"]["log_prob"]


# --- densities


def test_a_moon_is_a_density_on_half_the_plane():
    """In polar coordinates around its centre it integrates to one; a step to the left there is nothing."""
    theta = torch.tensor([0.3, -0.5], **F64)
    radius = torch.linspace(0.03, 0.17, 401, **F64)
    angle = torch.linspace(-0.5 * math.pi, 0.5 * math.pi, 100, **F64)[1:-1]
    centre = torch.tensor([0.25 - 0.2 / math.sqrt(2), -0.8 / math.sqrt(2)], **F64)
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    density = densities.Moon(theta).log_prob(centre + radius[:, None, None] * ring).exp()
    mass = torch.trapezoid((density.mean(1) * math.pi * radius), radius)
    assert abs(float(mass) - 1.0) < 1e-3
    assert (densities.Moon(theta).log_prob(centre - 0.1 * ring) == -math.inf).all()
    x = densities.Moon(theta).sample((4000,)) - centre
    assert abs(float(x.norm(dim=-1).mean()) - 0.1) < 1e-3
    assert (x[:, 0] > 0).all()


def test_four_points_are_normal():
    theta = theta_of("slcp")
    x = densities.FourPoints(theta).sample()
    first, second, rho = theta[:, 2].square(), theta[:, 3].square(), theta[:, 4].tanh()
    cross = rho * first * second
    covariance = torch.stack([first**2 + 1e-6, cross, cross, second**2 + 1e-6], -1).unflatten(-1, (2, 2))
    points = exact.MultivariateNormal(theta[:, None, :2], covariance.unsqueeze(1))
    wanted = points.log_prob(x.unflatten(-1, (4, 2))).sum(-1)
    assert torch.allclose(densities.FourPoints(theta).log_prob(x), wanted, rtol=1e-6)


def test_distractors_tell_nothing():
    theta, x = TASKS["slcp_distractors"].simulate(20)
    q, order = TASKS["slcp_distractors"].observation(theta), stored.table("permutation").long()
    known = x[:, order.argsort()[:8]]
    assert torch.equal(q.log_prob(x), densities.FourPoints(theta).log_prob(known))
    assert torch.allclose(
        stored.observations("slcp_distractors")[:, order.argsort()[:8]], stored.observations("slcp")
    )
    assert x.std() > 5.0  # but they are there


def test_two_scales_are_a_mixture():
    theta = theta_of("gaussian_mixture")
    x = densities.TwoScales(theta).sample()
    parts = [exact.Normal(theta, sd).log_prob(x).sum(-1).exp() for sd in (1.0, 0.1)]
    assert torch.allclose(densities.TwoScales(theta).log_prob(x), (0.5 * (parts[0] + parts[1])).log())


@pytest.mark.parametrize("name", ["bernoulli_glm", "bernoulli_glm_raw"])
def test_spikes_are_seen_through_a_sufficient_statistic(name):
    theta = theta_of(name).float()
    design = stored.table("design")
    y = torch.bernoulli((theta @ design.T).sigmoid())
    wanted = exact.Bernoulli(logits=theta @ design.T).log_prob(y).sum(-1)
    x = y if name.endswith("raw") else y @ design
    assert torch.allclose(TASKS[name].observation(theta).log_prob(x), wanted, atol=1e-3)


@pytest.mark.parametrize("name", ["gaussian_mixture", "slcp", "bernoulli_glm", "bernoulli_glm_raw"])
def test_simulators_follow_the_densities(name):
    """The mean of the gradient of log p(x | θ) over x is zero."""
    theta = theta_of(name, 1, seed=3).float().expand(4000, -1).clone().requires_grad_()
    q = TASKS[name].observation(theta)
    with torch.no_grad():
        x = q.sample()
    (slope,) = torch.autograd.grad(q.log_prob(x).sum(), theta)
    assert ((slope.mean(0) / slope.std(0)).abs() * math.sqrt(len(slope)) < 4.0).all()


def test_equations_are_solved():
    beta, gamma = 0.5, 0.13
    found = equations.epidemic(torch.tensor([beta, gamma], **F64))
    slope = lambda _, y: [-beta * y[0] * y[1], beta * y[0] * y[1] - gamma * y[1]]  # noqa: E731
    times = 17.0 * np.arange(10)
    other = solve_ivp(slope, (0, 153), [1 - 1e-6, 1e-6], t_eval=times, rtol=1e-9, atol=1e-14).y[1]
    assert np.allclose(found.numpy(), other, rtol=1e-3)

    a, b, c, d = 0.9, 0.05, 0.9, 0.05
    found = equations.predators(torch.tensor([a, b, c, d], **F64)).exp()
    slope = lambda _, y: [a * y[0] - b * y[0] * y[1], d * y[0] * y[1] - c * y[1]]  # noqa: E731
    other = solve_ivp(slope, (0, 19), [30.0, 1.0], t_eval=2.1 * np.arange(10), rtol=1e-9, atol=1e-9).y
    assert np.allclose(found.numpy(), other.ravel(), rtol=2e-3)


# --- evidences


def posterior_of(name, x):
    """The exact posterior, where it is one of PyTorch's distributions up to the edges of the prior."""
    if name == "gaussian_linear":
        return exact.Independent(exact.Normal(0.5 * x, math.sqrt(0.05)), 1), 0.0
    sd = math.sqrt(0.1)
    inside = exact.Normal(x, sd).cdf(torch.ones_like(x)) - exact.Normal(x, sd).cdf(-torch.ones_like(x))
    return exact.Independent(exact.Normal(x, sd), 1), inside.log().sum(-1)


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform"])
def test_evidences_of_normal_tasks(name):
    x = stored.observations(name).double()
    posterior, log_inside = posterior_of(name, x)
    theta = x.clamp(-0.9, 0.9)
    found = log_joint(name, theta, x) - (posterior.log_prob(theta) - log_inside)
    assert torch.allclose(found, stored.log_evidence(name), atol=1e-4)


def test_evidences_of_two_moons():
    """Draws of θ given x, up to the prior: by the simulator's own a and r, for both signs."""
    x = stored.observations("two_moons").double()
    noise = densities.Moon(torch.zeros(2, **F64)).sample((20_000,))
    u, v = ((x - noise.unsqueeze(1)) * math.sqrt(2.0)).unbind(-1)
    inside = [((s * u - v).abs() < 2) & ((s * u + v).abs() < 2) & (u < 0) for s in (1.0, -1.0)]
    found = torch.stack(inside).double().mean(1).sum(0).log() - math.log(4.0)
    assert torch.allclose(found, stored.log_evidence("two_moons"), atol=0.03)


# --- scores and figures


def test_c2st():
    """Draws from the same distribution, from a shifted one, and from one that is a little wider."""
    draws = np.random.default_rng(0).normal(size=(2, 300, 2))
    equal, shifted = c2st([draws[0]] * 2, [draws[1], draws[1] + 6.0])
    assert abs(equal - 0.5) < 0.07
    assert shifted > 0.99


@pytest.mark.slow
def test_classifiers_side_by_side_score_like_those_of_scikit_learn():
    reference = stored.table("gaussian_linear_observations")[:1, :2].numpy()
    noise = np.random.default_rng(0).normal(size=(2, 1000, 2))
    a, b = reference + noise[0], reference + 1.4 * noise[1] + 0.3
    features = np.concatenate([a - a.mean(0), b - a.mean(0)]) / a.std(0, ddof=1)
    classifier = MLPClassifier((20, 20), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    other = cross_val_score(classifier, features, np.repeat([0, 1], 1000), cv=folds).mean()
    (found,) = c2st([a], [b])
    print(f"{found:.3f} and {other:.3f}")
    assert abs(found - other) < 0.01


def test_what_is_published():
    assert set(PLANS) == set(TASKS)
    assert [sbibm.best("two_moons", [m]) for m in ("NPE", "SNLE")] == pytest.approx([0.542, 0.582], abs=1e-3)
    assert sbibm.best("gaussian_mixture", ["NPE"]) == pytest.approx(0.548, abs=1e-3)
    assert all(sbibm.best(name, ["SNPE", "SNLE"]) > 0.5 for name in TASKS)


def test_reference_draws_come_in_a_package(monkeypatch):
    monkeypatch.setattr(stored, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps sbibm"):
        stored.reference("slcp", 0)


@pytest.mark.slow
def test_a_short_run_through_all_stages():
    outcome = study(Request("gaussian_linear", share=0.1, observations=2, draws=200, proposals=400))
    shapes = {stage: draws.shape for stage, draws in outcome.draws.items()}
    assert shapes == dict.fromkeys(STAGES, (2, 200, 10))
    assert outcome.gaps["refined"].max() < 0.05
    assert outcome.gaps["refined"].max() < outcome.gaps["amortized"].max()
    assert outcome.simulations == 20_000 + 40 * 256


def test_training_is_from_simulations_alone(monkeypatch):
    """Both objectives bring the loss down; nobody asks for an observation."""
    monkeypatch.setattr(stored, "observations", None)
    monkeypatch.setattr(training, "SETUP", 200)
    for simulated in (True, False):
        plan = Plan(FullRankNormal(), 40, 0.01, batch=64, simulated=simulated)
        first, last = (training.train(TASKS["gaussian_linear"], p).loss for p in (plan.shortened(0.1), plan))
        assert last < first - 0.5


def test_tables_and_results():
    """Made-up scores: 0.55 everywhere, but 0.51 where methods are resampled."""
    draws = {stage: np.zeros((2, 3, 2)) for stage in STAGES}
    gaps = {stage: np.array([0.1, 0.3]) for stage in ("amortized", "refined")}
    outcomes = [Outcome(name, draws, gaps, np.ones(2), np.ones(2), 60.0, 1000, 5.0) for name in TASKS]
    scores = {
        name: {stage: np.full(2, 0.51 if stage == "resampled" else 0.55) for stage in STAGES}
        for name in TASKS
    }
    first, second = sbibm.tables(outcomes, scores)
    assert first.rows[0][:3] == ["two_moons", "0.550", "0.550"]
    assert all(len(row) == len(table.columns) for table in (first, second) for row in table.rows)
    found = {(r.what, r.where): r for r in sbibm.results(scores, full=True)}
    reached = {
        (method, stage): found[f"tasks that reach {method}", f"{stage}, of 10"].value
        for method in ("NPE", "the best of SNPE and SNLE")
        for stage in ("resampled", "amortized")
    }
    assert list(reached.values()) == [8.0, 6.0, 8.0, 5.0]  # counted by hand
    assert found["C2ST, slcp", "resampled, mean of 2"].verdict == "met"


def test_without_the_package_sbi_it_is_not_run():
    (table,) = against_sbi.run(None, [], {}, 1, quick=False).tables
    assert "SBI_PYTHON" in str(table.rows)
    given = against_sbi.exchange("two_moons", 3)
    assert given["theta"].shape == given["x"].shape == (10_000, 2)
    assert given["low"].tolist() == [-1.0, -1.0]
