"""Simulation-based calibration: right guides pass, wrong ones are caught, and the reason is named."""

import math
import re
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import ZOO, prepared
from pyro.infer.autoguide import init_to_feasible
from scipy import stats
from test_posterior import NOISE, SD, Column, X, by_itself, close, exact_guide, growing, of_many, rows

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, Posterior, to_arviz
from pyro_guides.diagnostics import comparison, simulations
from pyro_guides.diagnostics.calibration import calibrate
from pyro_guides.statistics import uniformity


def noise(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


def altered(model=rows, scale=1.0, shift=0.0, weight=1.0):
    """The exact guide with another standard deviation, a mean off by some of them, another slope."""
    guide = exact_guide(model)
    output = guide.network.heads[0].output
    with torch.no_grad():
        output.weight.mul_(weight)
        output.bias.copy_(torch.tensor([shift * SD, math.log(math.expm1(scale * SD - 1e-6))]))
    return guide


def p_values(guide, count, x=X, **options):
    posterior = guide.posterior(x)
    found = [calibrate(posterior, **options, seed=seed) for seed in range(count)]
    return np.array([calibration.p_value for calibration in found]), found


# --- right and wrong guides, in 500 simulations of 200 draws

WRONG = {
    "too narrow": {"scale": 0.7},
    "too wide": {"scale": 1.4},
    "shifted up": {"shift": 0.5},
    "shifted down": {"shift": -0.5},
}


@pytest.mark.parametrize("model", [rows, growing, of_many], ids=lambda model: model.__name__)
def test_exact_guide_is_calibrated(model):
    found, calibrations = p_values(exact_guide(model), 2, num_simulations=500, num_draws=200)
    assert found.max() > 0.01  # of one in two repeats a false alarm is allowed
    assert re.fullmatch(r"calibrated \(p = [0-9.]+, 504 simulations\)", repr(calibrations[found.argmax()]))


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_guides_are_caught_and_the_fault_is_named(kind):
    p, found = p_values(altered(**WRONG[kind]), 2, num_simulations=500, num_draws=200)
    assert p.max() < 1e-5
    for calibration in found:
        assert not calibration.is_calibrated()
        assert f", 504 simulations): z is {kind}; train on" in repr(calibration)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, *WRONG])
def test_verdicts_of_a_hundred_repeats(kind):
    found, _ = p_values(altered(**WRONG.get(kind, {})), 100, num_simulations=500, num_draws=200)
    wrong = int((found < 0.01).sum())
    print(f"{kind}: {wrong} of 100 flagged")
    assert wrong >= 95 if kind else wrong <= 5


def test_an_unlearned_guide_is_caught_though_its_marginals_are_right():
    """Q is the prior: ranks and densities of whole data sets are uniform, and yet x is ignored."""
    guide = altered(weight=0.0, scale=1 / SD)
    calibration = calibrate(guide.posterior(X), seed=0)
    p = calibration.p_values()
    assert min(p["z"], p["density region"]) > 0.01
    assert p["tarp"] < 1e-10
    assert "q misses how latents depend on the data or on each other" in repr(calibration)


def summed(x):
    """Exact: z | x has the means x/σ²s, s = 1 + 2/σ², and a correlation that a diagonal normal lacks."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), NOISE), obs=x)


def test_missing_correlation_is_caught_though_marginals_are_right():
    precision = torch.eye(2) + 1 / NOISE**2
    sd = float(precision.inverse()[0, 0].sqrt())
    slope = 1 / NOISE**2 / (1 + 2 / NOISE**2)
    guide = AmortizedGuide(summed, Column(), family=DiagonalNormal()).setup(X)
    output = guide.network.heads[0].output
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[slope], [slope], [0.0], [0.0]]) / output.gain)
        output.bias.copy_(torch.tensor([0.0, 0.0, *2 * [math.log(math.expm1(sd - 1e-6))]]))
    calibration = calibrate(guide.posterior(X), seed=0)
    p = calibration.p_values()
    assert p["z"].shape == (2,)
    assert p["z"].min() > 0.01
    assert p["density region"] < 1e-5
    assert "q as a whole is too wide" in repr(calibration)


def two_sided(x):
    """Exact: log odds of k given x are x/σ² − 1/2σ²."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.full((2,), 0.5)))
        pyro.sample("x", dist.Normal(k.to(x.dtype), NOISE), obs=x)


@pytest.mark.parametrize("slope", [1.0, 0.3])
def test_discrete_latents_have_ties_that_chance_breaks(slope):
    guide = AmortizedGuide(two_sided, Column()).setup(X)
    output = guide.network.heads[0].output
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[0.0], [slope / NOISE**2]]) / output.gain)
        output.bias.copy_(torch.tensor([0.0, -0.5 * slope / NOISE**2]))
    calibration = calibrate(guide.posterior(X), num_simulations=2000, num_draws=50, seed=0)
    assert len(np.unique(calibration.ranks["k"])) == 51
    assert calibration.is_calibrated() == (slope == 1.0)


# --- models of every shape; their data say nothing of z, so that the prior is the right q


def nested(x):
    with pyro.plate("group", len(x), dim=-2):
        pyro.sample("centre", noise())
        with pyro.plate("item", x.shape[1], dim=-1):
            pyro.sample("z", noise(2))
            pyro.sample("x", noise(), obs=x)


def shared(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", noise())
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def whole(x):
    pyro.sample("z", noise(2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", noise(), obs=x)


def deep(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", noise())
        pyro.sample("x", noise(), obs=x)


def covariate(observations, c):
    with pyro.plate("data", len(c)):
        pyro.sample("z", noise())
        pyro.sample("x", dist.Normal(c, 1.0), obs=observations)


def masked(x, there):
    with pyro.plate("data", len(x)):
        pyro.sample("z", noise())
        with pyro.poutine.mask(mask=there):
            pyro.sample("x", noise(), obs=x)


def sequence(x):
    with pyro.plate("data", len(x)):
        for t in range(3):
            pyro.sample(f"z_{t}", noise())
        pyro.sample("x", noise(3), obs=x)


def live(x):
    """A support that depends on another latent."""
    with pyro.plate("data", len(x)):
        bound = pyro.sample("bound", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", Above(bound))
        pyro.sample("x", noise(), obs=x)


class Above(dist.TransformedDistribution):
    """A log-normal that starts at a bound."""

    def __init__(self, bound):
        self.bound = bound
        transforms = [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(bound, 1.0)]
        super().__init__(dist.Normal(torch.zeros_like(bound), 1.0), transforms, validate_args=False)

    @property
    def support(self):
        return dist.constraints.greater_than(self.bound)

    def expand(self, shape, _instance=None):
        return Above(self.bound.expand(shape))


def both(observations, c):
    return torch.stack([observations, c], -1)


FREELY = {"family": DiagonalNormal(), "init_loc_fn": init_to_feasible}  # all unconstrained values from zero
FREE = {  # model, arguments, options, plates and shape of a row by site, whether data lie side by side
    "nested": (nested, (X.reshape(3, 4),), {}, {"centre": ((), ()), "z": (("item",), (4, 2))}, True),
    "shared": (shared, (X,), {}, {"z": ((), ())}, True),
    "whole": (whole, (X,), {"encoder": MLP(8)}, {"z": ((), (2,))}, True),
    "whole, pooled": (whole, (X,), {"encoder": DeepSet()}, {"z": ((), (2,))}, True),
    "deep": (deep, (X[:, None],), {}, {"z": ((), ())}, False),
    "covariate": (covariate, (X, X + 1), {"inputs": both}, {"z": ((), ())}, False),
    "masked": (masked, (X, torch.arange(12) % 3 > 0), {}, {"z": ((), ())}, False),
    "sequence": (sequence, (X.reshape(4, 3),), {}, {f"z_{t}": ((), ()) for t in range(3)}, True),
    "live": (live, (X,), {}, {"bound": ((), ()), "z": ((), ())}, False),
}


def free_guide(name, scale=1.0):
    """Every unconstrained value is normal, with this standard deviation, whatever the data are."""
    model, args, options, *_ = FREE[name]
    return AmortizedGuide(model, **options, **FREELY, init_scale=scale).setup(*args), args


@pytest.mark.parametrize("name", FREE)
def test_models_of_every_shape(name):
    guide, args = free_guide(name)
    *_, expected, side_by_side = FREE[name]
    assert comparison._lie_side_by_side(simulations.amortized(guide.posterior(*args))) == side_by_side
    calibration = calibrate(guide.posterior(*args), num_simulations=120, num_draws=50, seed=2)
    assert {n: (calibration.plates[n], r.shape[1:]) for n, r in calibration.ranks.items()} == expected
    assert calibration.is_calibrated()
    guide, args = free_guide(name, scale=0.5)  # control
    calibration = calibrate(guide.posterior(*args), num_simulations=100, num_draws=50, seed=2)
    assert calibration.p_value < 1e-3
    assert "is too narrow" in repr(calibration)


def test_what_the_guide_learned_is_held_and_not_judged():
    guide, args = free_guide("shared")
    given = {"mean": torch.tensor(1.5)}
    for posterior in (guide.posterior(*args), guide.posterior(*args).local(given)):
        query = simulations.amortized(posterior)
        assert set(query.held) == {"mean"}
        assert query.row_plates == ("data",)
    assert torch.equal(query.held["mean"], given["mean"])
    data = simulations.simulate(query, 2000).data["x"]
    assert abs(float(data.mean()) - 1.5) < 4.5 / math.sqrt(data.numel())


def test_amortized_globals_are_judged_with_their_rows():
    def model(x):
        pyro.sample("mean", noise())
        with pyro.plate("data", len(x)):
            pyro.sample("z", noise())
            pyro.sample("x", noise(), obs=x)

    guide = AmortizedGuide(model, {"mean": DeepSet(8), "z": MLP(8)}, **FREELY, init_scale=1.0)
    calibration = calibrate(guide.posterior(X), num_simulations=100, num_draws=50)
    assert {name: rank.shape for name, rank in calibration.ranks.items()} == {"mean": (100,), "z": (100, 12)}
    assert calibration.plates == {"mean": (), "z": ("data",)}
    assert calibration.is_calibrated()


# --- the passes

EXACT = {
    "normal_rows": True,
    "hierarchy": True,
    "subsampled_hierarchy": True,
    "crossed": False,
    "nested": False,
}


@pytest.mark.parametrize("name", EXACT)
def test_each_data_set_gets_its_own_posterior(name):
    """Log q of draws and of true values is what the guide says when it is given one simulated data set."""
    model, args, *_ = ZOO[name]
    guide = prepared(model, *args)
    query = simulations.amortized(guide.posterior(*args))
    assert comparison._lie_side_by_side(query) == EXACT[name]
    simulated = simulations.simulate(query, 12)
    truths, data = simulated.truths, simulated.data
    if not EXACT[name]:
        truths, data = ({n: x[1:2] for n, x in values.items()} for values in (truths, data))
    truth = query.log_q_of(comparison.run(query, data, 1, truths))[0]
    trace = comparison.run(query, data, 3)
    log_q, nodes = query.log_q_of(trace), trace.nodes
    drawn = {n: nodes[n]["value"].reshape(3, *x.shape) for n, x in truths.items()}
    for at, x in enumerate(data["x"]):
        alone, other = (Posterior(replace(query, args=(values,))) for values in (x, x + 1.0))
        own, draws = {n: x[at] for n, x in truths.items()}, {n: x[:, at] for n, x in drawn.items()}
        close(truth[at], alone.log_prob(own))
        close(log_q[:, at], alone.log_prob(draws))
        assert (truth[at] - other.log_prob(own)).abs().max() > 1e-2  # control


def test_rows_are_told_apart_by_their_plates():
    """Of group g in data set m: one centre, 4 items of 2 values; other draws stay where they are."""
    guide, args = free_guide("nested")
    query = simulations.amortized(guide.posterior(*args))
    values = {"centre": torch.randn(5, 2, 3, 1), "z": torch.randn(5, 2, 3, 4, 2)}
    rows = {n: simulations.in_rows(query, x, query.latents[n], lead=1) for n, x in values.items()}
    points = simulations.coordinates(query, values, lead=1)
    for m in range(2):
        for g in range(3):
            own = [values["centre"][:, m, g, 0], values["z"][:, m, g]]
            assert torch.equal(rows["centre"][:, 3 * m + g], own[0])
            assert torch.equal(rows["z"][:, 3 * m + g], own[1])
            close(points[:, 3 * m + g], torch.cat([own[0][:, None], own[1].flatten(1)], -1))


def test_memory_is_bounded_and_the_verdict_the_same(monkeypatch):
    monkeypatch.setattr(comparison, "_VALUES_PER_PASS", 400)
    monkeypatch.setattr(comparison, "_VALUES_KEPT", 7 * 300)
    for scale in (1.0, 0.7):
        query = simulations.amortized(altered(scale=scale).posterior(X))
        found = comparison.compare(query, simulations.simulate(query, 300), 100)
        assert found.draws.shape == (7, 300, 1)
        pit = uniformity.ranks_to_pit(found.ranks["z"].numpy(), 100)
        assert (uniformity.p_value(pit) > 0.01) == (scale == 1.0)


def test_ranks_count_draws_and_break_ties_evenly():
    tally = comparison._Tally(torch.tensor([0.0, 1.0, 5.0]).expand(6000, 3))
    for draws in ([[-1.0, 1.0, 1.0], [2.0, 1.0, 2.0]], [[0.0, 0.0, 3.0]]):
        tally.add(torch.tensor(draws)[:, None].expand(-1, 6000, -1))
    shares = torch.stack([(tally.ranks() == rank).double().mean(0) for rank in range(4)], -1)
    expected = [[0, 1 / 2, 1 / 2, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 1]]
    torch.testing.assert_close(shares, torch.tensor(expected).double(), atol=0.03, rtol=0)


def test_equal_densities_may_differ_by_rounding():
    tally = comparison._Tally(torch.tensor([100.0, -torch.inf, 1.0]), rounding=1e-5)
    tally.add(torch.tensor([[100.0001, 0.0, 1.1], [100.1, -torch.inf, 0.9]]))
    assert tally.below.tolist() == [0, 0, 1]
    assert tally.equal.tolist() == [1, 1, 0]


def test_seeds_repeat_and_leave_everything_as_it_is():
    guide = exact_guide(rows)
    posterior = guide.posterior(X)
    before = torch.get_rng_state()
    one, same, other = (calibrate(posterior, num_simulations=100, num_draws=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for values in ("hpd", "tarp"):
        assert np.array_equal(getattr(one, values), getattr(same, values))
        assert not np.array_equal(getattr(one, values), getattr(other, values))
    assert np.array_equal(one.pit["z"], same.pit["z"])
    loose = [calibrate(posterior, num_simulations=100, num_draws=50).tarp for _ in range(2)]
    assert not np.array_equal(*loose)
    assert guide.training
    assert all(p.grad is None and p.requires_grad for p in guide.parameters())
    assert not pyro.get_param_store().keys()


# --- what is said of it


def test_numbers_are_those_of_the_ranks():
    calibration = calibrate(
        altered(scale=0.8).posterior(X), num_simulations=200, num_draws=99, levels=[0.5, 0.9]
    )
    assert calibration.num_simulations == 204  # whole data sets of 12 rows
    assert calibration.num_draws == 99
    ranks, pit = calibration.ranks["z"], calibration.pit["z"]
    assert ranks.shape == pit.shape == calibration.hpd.shape == calibration.tarp.shape == (204,)
    assert ranks.dtype == np.int64
    assert (np.floor(pit * 100) == ranks).all()
    p = calibration.p_values()
    assert set(p) == {"z", "density region", "tarp"}
    assert p["z"] == uniformity.p_value(pit)
    assert calibration.p_value == pytest.approx(3 * min(p.values()))
    assert calibration.is_calibrated(calibration.p_value * 0.99)
    assert not calibration.is_calibrated(calibration.p_value * 1.01)


def test_coverage_is_less_than_its_level_where_q_is_too_narrow():
    calibration = calibrate(altered(scale=0.7).posterior(X), num_simulations=2000, num_draws=200, seed=0)
    coverage = calibration.coverage([0.5, 0.9])
    inside = [2 * stats.norm.cdf(0.7 * stats.norm.ppf(0.5 + level / 2)) - 1 for level in (0.5, 0.9)]
    for shares in (coverage.central["z"], coverage.density):
        assert shares == pytest.approx(inside, abs=0.04)
        assert (shares < coverage.band.lower).all()
    right = calibrate(
        exact_guide(rows).posterior(X), levels=[0.2, 0.5, 0.9], probability=0.999, seed=0
    ).coverage()
    assert right.levels.tolist() == [0.2, 0.5, 0.9]
    for shares in (right.central["z"], right.density):
        assert ((right.band.lower <= shares) & (shares <= right.band.upper)).all()


def test_export():
    guide, args = free_guide("nested")
    calibration = calibrate(guide.posterior(*args), num_simulations=100, num_draws=50)
    variables = calibration.to_groups()["prior_sbc"]
    assert {n: (v.values.shape, v.dims) for n, v in variables.items()} == {
        "centre": ((1, 102), ("chain", "draw")),
        "z": ((1, 102, 4, 2), ("chain", "draw", "item")),
    }
    assert calibration.attrs == {"sbc_num_draws": 50, "sbc_p_value": calibration.p_value}
    found = to_arviz(calibration)["prior_sbc"]
    assert found["z"].dims == ("chain", "draw", "item", "z_dim_1")
    assert np.array_equal(found["z"].values[0], calibration.ranks["z"])
    assert np.issubdtype(found["z"].dtype, np.integer)


# --- errors


def factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", noise())
        pyro.factor("weight", -(z**2))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def computed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", noise()), 1.0), obs=x / 2)


def heavy(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 300.0))
        pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)


def broadcast(x):
    with pyro.plate("group", 2, dim=-2), pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", noise()), 1.0), obs=x)


def hidden(x):
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=torch.arange(len(x)) > 2):
        pyro.sample("x", dist.Normal(pyro.sample("z", noise()), 1.0), obs=x)


def deaf(x, c):
    return c


def guide_of(model, **options):
    return lambda: AmortizedGuide(model, **options).posterior(X)


ERRORS = {
    "few simulations": (guide_of(rows), {"num_simulations": 99}, ValueError, "at least 100, got 99"),
    "few draws": (guide_of(rows), {"num_draws": 19}, ValueError, "at least 20, got 19"),
    "no int": (guide_of(rows), {"num_draws": 1e3}, TypeError, "num_draws must be an int"),
    "levels": (guide_of(rows), {"levels": [0.5, 0.2]}, ValueError, "increasing"),
    "probability": (guide_of(rows), {"probability": 95}, ValueError, "between 0 and 1"),
    "learned": (guide_of(rows, amortize=()), {}, ValueError, r"\['z'\] was learned for this one data set"),
    "by itself": (guide_of(by_itself), {}, NotImplementedError, r"subsamples \['data'\] by itself"),
    "masked": (guide_of(hidden), {}, NotImplementedError, r"masks the latents \['z'\]"),
    "factor": (guide_of(factor), {}, ValueError, "the factor 'weight' weighs latents but draws nothing"),
    "computed": (
        guide_of(computed),
        {},
        ValueError,
        "observed site 'x' is computed from the model's arguments",
    ),
    "heavy": (
        guide_of(heavy),
        {},
        ValueError,
        "'x' holds NaN or infinity in .* take priors with lighter tails",
    ),
    "broadcast": (
        guide_of(broadcast),
        {},
        ValueError,
        r"draws 'x' in shape \(2, 12\), but .* in shape \(12,\)",
    ),
    "deaf": (
        lambda: AmortizedGuide(covariate, inputs=deaf).posterior(X, X + 1),
        {},
        ValueError,
        r"simulated values of \['x'\] do not reach",
    ),
    "refined": (lambda: guide_of(rows)().refine(max_steps=50), {}, ValueError, "refined for its own rows"),
    "resampled": (lambda: guide_of(rows)().resample(), {}, ValueError, "resampled for its own rows"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    make, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        calibrate(make(), **options)
