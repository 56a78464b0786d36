"""The models of the accuracy benchmark are those of its references; its scoring tells right from wrong."""

import math

import pyro
import pytest
import torch
from pyro import poutine

from tests.benchmarks.accuracy import figures, fitting, scoring
from tests.benchmarks.accuracy.jobs import Job, done, jobs, targets
from tests.benchmarks.accuracy.series import populations
from tests.benchmarks.accuracy.targets import Known, Ordered, Target, known, scalars

TARGETS = targets()


@pytest.fixture(autouse=True)
def workplace():
    with fitting.workplace(0):
        yield


def drawn(target, count=3):
    """Draws of the prior, stacked as a guide's would be."""
    traces = [poutine.trace(target.model).get_trace(*target.data) for _ in range(count)]
    sites = [
        n for n in traces[0].stochastic_nodes if "_Subsample" not in type(traces[0].nodes[n]["fn"]).__name__
    ]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in sites}


def at(target, mean):
    """Log p(x, z) of a model whose sites are those of its reference, where its scalars have these values."""
    names = target.known.names
    values = {}
    for scalar, value in zip(names, mean, strict=True):
        values.setdefault(scalar.split("[")[0], []).append(value)
    sites = {site: torch.stack(v) if f"{site}[1]" in names else v[0] for site, v in values.items()}
    trace = poutine.trace(poutine.condition(target.model, sites)).get_trace(*target.data)
    assert {*sites} <= {*trace.nodes}
    return float(trace.log_prob_sum())


def test_there_are_targets_of_every_kind():
    assert len(TARGETS) == 33
    assert {target.kind for target in TARGETS.values()} == {
        "regression",
        "GLM",
        "hierarchy",
        "series",
        "bimodal",
    }


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_has_the_scalars_of_its_reference(name):
    target = TARGETS[name]
    found = scalars(target, drawn(target))
    assert found.shape == (3, len(target.known.names))
    assert bool((target.known.mcse < 0.06 * target.known.sd).all())


@pytest.mark.parametrize(
    "name",
    ["sblrc", "wells_dae_inter", "seeds_stanified", "radon_intercept", "hmm_example", "gp_regr", "arK"],
)
def test_the_reference_is_where_the_model_puts_it(name):
    """Log p is higher at the reference's means than four sds away from any of the first."""
    target = TARGETS[name]
    best = at(target, target.known.mean)
    assert math.isfinite(best)
    for index, scalar in list(enumerate(target.known.names))[:3]:
        for far in (-4.0, 4.0):
            mean = target.known.mean.clone()
            mean[index] += far * target.known.sd[index]
            inside = not scalar.startswith("theta") and (mean * target.known.mean > 0).all()
            if inside:  # scales stay positive, and simplexes do not move one coordinate at a time
                assert at(target, mean) < best


def test_populations_are_those_of_a_finer_grid():
    mean = dict(zip(known("hudson_lynx_hare").names, known("hudson_lynx_hare").mean, strict=True))
    theta = torch.stack([mean[f"theta[{i}]"] for i in range(1, 5)])
    start = torch.stack([mean["z_init[1]"], mean["z_init[2]"]]).log()
    rough, fine = populations(start, theta, 20), populations(start, theta, 20, steps=64)
    assert float((rough - fine).abs().max()) < 2e-3  # the noise is 0.25


def test_ordered_values_come_in_order():
    drawn = Ordered(pyro.distributions.Normal(torch.tensor([0.0, 3.0]), 1.0), positive=True).sample((100,))
    assert bool((drawn > 0).all())
    assert bool((drawn.diff(dim=-1) > 0).all())


def exact(y):
    """Two means of one observation each: the posterior is N(y / 2, 1 / 2)."""
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", pyro.distributions.Normal(z, 1.0), obs=y)


def guide(shift, factor):
    def posterior(y):
        with pyro.plate("row", len(y)):
            pyro.sample("z", pyro.distributions.Normal(y / 2 + shift, factor * math.sqrt(0.5)))

    return posterior


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5)])
def test_a_score_is_that_of_the_guide(shift, factor):
    y, sd = torch.tensor([1.0, -2.0]), torch.full((2,), math.sqrt(0.5))
    target = Target("exact", "series", exact, (y,), Known(["z[1]", "z[2]"], y / 2, sd, sd / 100), nesting=1)
    found = scoring.score(target, guide(shift, factor), 0.0, draws=4000)
    log_evidence = float(torch.distributions.Normal(0.0, math.sqrt(2.0)).log_prob(y).sum())
    gap = 2 * (shift**2 + 0.5 * (factor**2 - 1.0) - math.log(factor))
    assert found.worst_mean == pytest.approx(shift / math.sqrt(0.5), abs=0.05)
    assert found.ratios[0] == pytest.approx(factor, abs=0.03)
    assert found.elbo == pytest.approx(log_evidence - gap, abs=5 * found.elbo_error + 1e-6)


def test_the_whole_way_from_a_job_to_a_report():
    job = Job("nes_logit", "full rank", steps=2, draws=100)
    report = figures.report({job: done(job)})
    assert report.results[0].value < 0.5  # it starts where the posterior lies
    assert len(report.tables[0].rows) == 1


def test_a_guide_that_fails_is_named():
    report = figures.report({Job("sblrc", "flow"): "ValueError: no"})
    assert "sblrc, flow, seed 0: ValueError: no" in report.tables[0].note


def test_mixtures_are_for_several_modes_only():
    assert {job.target for job in jobs("full") if job.guide == "mixture"} == {"low_dim_gauss_mix_collapse"}
