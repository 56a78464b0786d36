"""fit(): exact answers, the rows it counts, the numbers it draws, and what it does when things go wrong."""

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric.loggers import CSVLogger
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, FullRankNormal, fit
from pyro_guides.objectives import IWELBO, FreeBits, LinearWarmup
from pyro_guides.training import randomness
from pyro_guides.training.data import Rows, Whole, arguments_of
from pyro_guides.training.gradients import Clip, average
from pyro_guides.training.judging import Judge
from pyro_guides.training.objective import Objective
from pyro_guides.training.rows import counting

F64 = {"dtype": torch.float64}
LOADINGS = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]], **F64)
NOISE = 0.5


def factors(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)


def evidence(x):
    covariance = LOADINGS.T @ LOADINGS + NOISE**2 * torch.eye(3, **F64)
    return dist.MultivariateNormal(torch.zeros(3, **F64), covariance).log_prob(x)


def rows(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(count, 2, generator=draw, **F64), torch.randn(count, 3, generator=draw, **F64)
    return z @ LOADINGS + NOISE * noise


def shared_mean(x):
    """Rows around a mean that they share; the model counts the rows that it is given."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), **F64), 10.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def small(model=factors, **options):
    return AmortizedGuide(model, MLP(width=8, depth=1), **options)


def quick(model, guide, data, **options):
    return fit(model, guide, data, **{"max_steps": 30, "seed": 0, **options})


# --- exact answers


def test_the_validation_elbo_of_rows_held_out_is_their_log_evidence():
    x = rows(1200)
    guide = small()
    result = fit(factors, guide, x, max_steps=250, validation=rows(300, seed=1), seed=0)
    exact = evidence(rows(300, seed=1)).mean()
    assert result.best.elbo == pytest.approx(float(exact), abs=0.02)  # draws: STL leaves 0.002 of noise
    assert result.best.elbo < float(exact) + 1e-3


def test_a_diagonal_family_misses_it_by_its_gap():
    result = fit(factors, small(family=DiagonalNormal()), rows(1200), max_steps=250, seed=0, validation=0.2)
    precision = torch.eye(2, **F64) + LOADINGS @ LOADINGS.T / NOISE**2
    gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    held = Rows(arguments_of(rows(1200)), 128).split(0.2, randomness.seed_of(0, 5))[1]
    assert gap > 0.04
    exact = float(evidence(held.data.args[0]).mean())
    assert exact - result.best.elbo == pytest.approx(gap, abs=0.02)


@pytest.mark.parametrize("where", [3.0, 100.0])
def test_latents_that_rows_share_see_every_row_as_often_as_it_is_there(where):
    """q of the mean has the exact spread for N rows; of a batch alone it would be 4 times wider."""
    x = where + torch.randn(1600, generator=torch.Generator().manual_seed(0), **F64) * math.sqrt(
        1.0 + NOISE**2
    )
    guide = small(shared_mean)
    fit(shared_mean, guide, x, batch_size=100, max_steps=200, seed=0, validation=None)
    draws = guide.posterior(x[:10], num_draws=2000).draws["mean"]
    exact = math.sqrt((1.0 + NOISE**2) / 1600)
    assert float(draws.std()) == pytest.approx(exact, rel=0.2)  # 1.6 % Monte-Carlo error
    assert float(draws.mean() - x.mean()) == pytest.approx(0.0, abs=0.6 * exact)


def fixed_mean(x, size=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), **F64), 1.0))
    with pyro.plate("row", len(x) if size is None else size, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@pytest.mark.parametrize("size", [None, 12])
def test_losses_of_minibatches_average_to_the_loss_of_all_rows(size):
    """With a guide that draws nothing random, the mean over an epoch is exact, whoever counts the rows."""

    def model(x):
        fixed_mean(x, size)

    x = torch.linspace(-1.0, 2.0, 12, **F64)
    guide = AutoDelta(model)
    guide(x)
    source = Rows(arguments_of(x), 4)
    objective = Objective(Trace_ELBO(), model, guide, counting(model, source))
    losses = [float(objective(batch).detach()) for batch in source.epoch(seed=0, start=0)]
    whole = Trace_ELBO().loss(fixed_mean, guide, x) / 12
    assert len(losses) == 3
    assert np.mean(losses) == pytest.approx(whole, rel=1e-12)
    assert np.std(losses) > 0.01


def test_the_first_epoch_uses_every_row_once():
    x = torch.arange(10.0)
    source = Rows(arguments_of(x), 5)
    seen = torch.cat([batch.args[0] for batch in source.epoch(seed=3, start=0)])
    assert sorted(seen.tolist()) == x.tolist()
    again = torch.cat([batch.args[0] for batch in source.epoch(seed=3, start=1)])
    assert torch.equal(again, seen[5:])


def test_processes_share_a_batch():
    source = [Rows(arguments_of(torch.arange(9.0)), 4, rank, 2) for rank in (0, 1)]
    both = zip(*(one.epoch(seed=0, start=0) for one in source), strict=True)
    joint = Rows(arguments_of(torch.arange(9.0)), 4).epoch(seed=0, start=0)
    for (first, second), batch in zip(both, joint, strict=True):
        assert {*first.args[0].tolist(), *second.args[0].tolist()} == set(batch.args[0].tolist())


# --- what can be trained, and on what


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "nested"])
def test_data_of_every_form_give_the_same_run(kind):
    x = rows(60)
    model = (lambda data: factors(data["x"])) if kind == "nested" else factors
    data = {"tensor": x, "tuple": (x,), "dict": {"x": x}, "nested": ({"x": x},)}[kind]
    guide = small(model, inputs=(lambda data: data["x"]) if kind == "nested" else None)
    result = quick(model, guide, data, max_steps=5)
    torch.manual_seed(0)
    plain = quick(factors, small(), x, max_steps=5)
    assert np.allclose(result.losses, plain.losses)


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_data_sets_and_loaders(kind):
    data = TensorDataset(rows(400))
    given = data if kind == "dataset" else DataLoader(data, batch_size=50, shuffle=True)
    held = 0.2 if kind == "dataset" else rows(100, seed=1)
    guide = small()
    result = fit(factors, guide, given, batch_size=50, max_steps=200, seed=0, validation=held)
    exact = float(evidence(rows(500, seed=2)).mean())
    posterior = guide.posterior(rows(500, seed=2), num_draws=50)
    assert float(posterior.elbo.mean()) == pytest.approx(exact, abs=0.1)
    assert result.best is not None
    assert result.best.elbo == pytest.approx(exact, abs=0.5)


def test_a_model_that_subsamples_by_itself():
    x = rows(200)

    def model(x):
        with pyro.plate("row", len(x), subsample_size=20) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x[index])

    result = fit(model, small(model), x, batch_size=None, max_steps=200, seed=0)
    assert result.best is None
    assert result.losses[-40:].mean() == pytest.approx(-float(evidence(x).mean()), abs=0.3)


class Decoder(PyroModule):
    """A model that is a module, with a parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 3, dtype=torch.float64)
        self.noise = PyroParam(torch.tensor(1.0, **F64), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.linear(z), self.noise).to_event(1), obs=x)


def test_parameters_of_modules_and_of_functions_are_trained_along():
    decoder, linear = Decoder(), nn.Linear(2, 3, dtype=torch.float64)

    def function(x):
        pyro.module("linear", linear)
        noise = pyro.param("noise", torch.tensor(1.0, **F64), constraint=constraints.positive)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(linear(z), noise).to_event(1), obs=x)

    x = rows(300)
    for model in (decoder, function):
        quick(model, small(model), x, max_steps=150, learning_rate=0.03)
    for noise in (decoder.noise, pyro.param("noise")):
        assert 0.3 < float(noise.detach()) < 0.9  # from 1 on the way to 0.5
    assert linear.weight.grad is None  # nothing is left behind


def test_a_guide_of_pyro_is_trained_as_well():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), **F64)
    guide = AutoNormal(fixed_mean)
    fit(fixed_mean, guide, x, max_steps=300, batch_size=None, seed=0)
    assert float(guide.median()["mean"]) == pytest.approx(float(x.sum() / 51), abs=0.05)


def test_rows_are_held_out_only_if_they_have_latents_of_their_own():
    x = rows(60)[:, 0]
    assert quick(shared_mean, small(shared_mean), x, max_steps=2).best is not None
    shared = quick(fixed_mean, AmortizedGuide(fixed_mean), x, max_steps=2)
    assert shared.best is None
    assert quick(fixed_mean, AmortizedGuide(fixed_mean), x, max_steps=2, validation=0.5).best is not None


def test_a_parameter_that_comes_later_is_taken_in():
    calls = []

    def model(x):
        calls.append(1)
        loc = pyro.param("late", torch.zeros(3, **F64)) if len(calls) > 40 else torch.zeros(3, **F64)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ LOADINGS, NOISE).to_event(1), obs=x)

    quick(model, small(model), 5.0 + rows(60), max_steps=100, validation=None)
    assert float(pyro.param("late").detach().min()) > 0.1


def test_other_elbos_draw_the_same_and_lose_the_same():
    trace = quick(factors, small(), rows(60), max_steps=10)
    graph = quick(factors, small(), rows(60), max_steps=10, loss=TraceGraph_ELBO())
    assert np.allclose(trace.losses, graph.losses, rtol=1e-9)


def clusters(x):
    with pyro.plate("row", len(x)):
        k = pyro.sample(
            "k", dist.Categorical(torch.tensor([0.3, 0.7], **F64)), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(4.0 * k.double(), 1.0), obs=x)


def test_sites_that_the_model_sums_out_are_validated_in_parts():
    x = torch.cat([torch.randn(60, **F64), 4.0 + torch.randn(140, **F64)])

    def model(x):
        loc = pyro.param("loc", torch.zeros((), **F64))
        clusters(x - 1e-3 * loc)

    result = quick(
        model, lambda x: None, x, loss=TraceEnum_ELBO(max_plate_nesting=1), learning_rate=1e-9, validation=0.1
    )
    held = Rows(arguments_of(x), 128).split(0.1, randomness.seed_of(0, 5))[1].data.args[0]
    first, second = (math.log(p) + dist.Normal(m, 1.0).log_prob(held) for p, m in ((0.3, 0.0), (0.7, 4.0)))
    assert result.best.elbo == pytest.approx(float(torch.logaddexp(first, second).mean()), abs=1e-6)


@pytest.mark.parametrize("tempering", [LinearWarmup(10), FreeBits(0.1)], ids=["warm-up", "free bits"])
def test_tempering_counts_its_steps(tempering):
    quick(factors, small(), rows(60), max_steps=20, tempering=tempering)
    if isinstance(tempering, LinearWarmup):
        assert tempering.weight == 1.0
        assert tempering.step == 20


def test_iwelbo_is_validated_as_what_it_is():
    options = {"max_steps": 20, "validation": 0.5}
    guide = small(family=DiagonalNormal())
    tight = quick(factors, guide, rows(200), loss=IWELBO(num_particles=20), **options)
    held = Rows(arguments_of(rows(200)), 128).split(0.5, randomness.seed_of(0, 5))[1].data.args[0]
    elbo = float(guide.posterior(held, num_draws=200).elbo.mean())
    assert tight.best.elbo > elbo + 0.1


# --- random numbers, rows held out, output


def test_a_seed_is_a_run_and_leaves_the_numbers_outside_alone():
    first, second, third = (quick(factors, small(), rows(60), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.losses, second.losses)
    assert not np.array_equal(first.losses, third.losses)
    assert first.seed == 1


def test_fit_draws_no_number_outside():
    guide, x = small().setup(rows(60)), rows(60)
    before = torch.get_rng_state()
    quick(factors, guide, x)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_held_out_do_not_reach_the_standardization():
    x = rows(100)
    held = Rows(arguments_of(x), 128).split(0.5, randomness.seed_of(0, 5))[1].numbers
    x[held] += 100.0
    guide = small()
    quick(factors, guide, x, validation=0.5, max_steps=1)
    kept = torch.ones(100, dtype=torch.bool)
    kept[held] = False
    means = [b for name, b in guide.named_buffers() if name.endswith("mean")]
    assert torch.allclose(means[0], x[kept].mean(0))


def test_nothing_is_printed_outside_a_terminal(capfd):
    quick(factors, small(), rows(60))
    assert capfd.readouterr() == ("", "")


class Metrics:
    def __init__(self, stop_at=math.inf):
        self.seen, self.stop_at = [], stop_at

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))
        if step >= self.stop_at:
            raise KeyboardInterrupt


def test_a_logger_gets_the_losses():
    metrics = Metrics()
    result = quick(factors, small(), rows(60), logger=metrics)
    assert [step for step, _ in metrics.seen] == [10, 20, 30]
    assert metrics.seen[0][1]["loss"] == result.losses[9]
    assert metrics.seen[-1][1]["validation_elbo"] == result.looks[-1].elbo


def test_a_logger_of_lightning_writes_its_file(tmp_path):
    quick(factors, small(), rows(60), logger=CSVLogger(tmp_path, "run", version=0))
    lines = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4  # a header, and steps 10, 20 and 30


def test_data_with_a_graph_of_their_own_are_cut_off_from_it():
    x = rows(60).requires_grad_() * 1.0
    assert np.isfinite(quick(factors, small(), x).losses).all()


def test_ctrl_c_returns_the_best_so_far(caplog):
    guide = small()
    with caplog.at_level(logging.WARNING, "pyro_guides"):
        result = quick(factors, guide, rows(300), max_steps=100, logger=Metrics(stop_at=20), validation=0.3)
    assert result.stopped_by == "interrupt"
    assert result.steps == 20
    assert "interrupted" in caplog.text
    assert result.best == max(result.looks, key=lambda look: look.elbo)


def test_the_result_in_short():
    result = quick(factors, small(), rows(60))
    assert repr(result).startswith("FitResult(30 steps in ")
    assert "validation ELBO" in repr(result)
    assert len(repr(result)) < 200


# --- looking and stopping


def judged(series, patience=3):
    """What a judge makes of these ELBOs per row; the weights are the number of the look."""
    looks = iter(series)
    count = iter(range(100))
    judge = Judge(lambda: next(looks), lambda: {"number": torch.tensor(next(count))}, patience)
    for step in range(len(series)):
        judge.look(step)
        if judge.settled:
            break
    return judge


def test_a_gain_within_the_noise_is_none_but_its_weights_are_kept():
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), **F64)
    base = torch.zeros(50, **F64)
    judge = judged([base, base + 0.01 + noise, base + 0.02 - noise, base + 0.03 + noise.flip(0), base + 9.0])
    assert judge.settled
    assert len(judge.looks) == 4


def test_a_small_gain_of_every_row_is_one():
    """The same noise in all looks cancels: a hundredth of it is a gain."""
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), **F64)
    judge = judged([noise + 0.01 * step for step in range(20)])
    assert not judge.settled
    assert judge.best.step == 19


def test_looks_without_a_finite_elbo_are_no_best():
    judge = judged([torch.zeros(5), torch.full((5,), math.nan), torch.full((5,), math.inf)], patience=None)
    assert judge.best.step == 0


def test_clips():
    def gradient(clip, *norms):
        parameter = nn.Parameter(torch.zeros(4))
        for norm in norms:
            parameter.grad = torch.full((4,), norm / 2.0)
            assert clip([parameter]) == pytest.approx(norm)
        return float(parameter.grad.norm())

    assert gradient(Clip(None), 1.0, 1e6) == pytest.approx(1e6)
    assert gradient(Clip(2.0), 1e6) == pytest.approx(2.0)
    assert gradient(Clip(2.0), 1.0) == pytest.approx(1.0)
    assert gradient(Clip("normalize"), 1e-3) == pytest.approx(1.0)
    assert gradient(Clip("auto"), *[3.0] * 20, 1e6) == pytest.approx(30.0)
    assert gradient(Clip("auto"), *[3.0] * 20, 29.0) == pytest.approx(29.0)


def test_gradients_of_processes_are_averaged_with_those_that_one_lacks():
    ours, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    ours.grad = torch.tensor([1.0, 3.0])
    other = torch.tensor([3.0, 5.0, 2.0, 2.0, 2.0, 7.0])  # gradients and loss of the other process
    loss = average(torch.tensor(5.0), [ours, theirs], lambda x, reduce_op: (x + other) / 2.0)
    assert float(loss) == 6.0
    assert ours.grad.tolist() == [2.0, 4.0]
    assert theirs.grad.tolist() == [1.0, 1.0, 1.0]


# --- what is not finite


def spoiled(x, wrong):
    """Rows whose noise is NaN where they say so."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
        noise = torch.where(wrong > 0, math.nan, NOISE).unsqueeze(-1)
        pyro.sample("x", dist.Normal(z @ LOADINGS, noise).to_event(1), obs=x)


def finite(module):
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_a_step_without_a_finite_loss_is_skipped_counted_and_named(caplog):
    wrong = torch.zeros(100, **F64)
    wrong[17] = 1.0
    guide = small(spoiled, inputs=lambda x, wrong: x)
    with caplog.at_level(logging.WARNING, "pyro_guides"):
        result = fit(spoiled, guide, (rows(100), wrong), batch_size=20, max_steps=50, seed=0, validation=None)
    assert result.skipped == 10  # one batch in five
    assert np.isnan(result.losses).sum() == 10
    assert "site 'x' has log-density nan in rows 17 of plate 'row'" in caplog.text
    assert finite(guide)


def test_too_many_in_a_row_are_an_error_that_names_site_and_rows():
    wrong = torch.zeros(100, **F64)
    wrong[::2] = 1.0
    guide = small(spoiled, inputs=lambda x, wrong: x)
    guide.setup(rows(100), torch.zeros(100, **F64))
    before = [parameter.clone() for parameter in guide.parameters()]
    with pytest.raises(FloatingPointError, match=r"10 steps in a row .* site 'x' .* nan in rows \d+, \d+"):
        fit(spoiled, guide, (rows(100), wrong), seed=0, validation=None)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_skipped_as_well():
    def model(x):
        weight = pyro.param("weight", torch.zeros((), **F64))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS + weight.abs().sqrt(), NOISE).to_event(1), obs=x)

    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        quick(model, small(model), rows(60), validation=None)
    assert float(pyro.param("weight").detach()) == 0.0


def test_numbers_outside_a_support_are_found_in_the_first_epoch():
    def model(x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    with pytest.raises(ValueError, match=r"[Ss]upport|within"):
        quick(model, small(model), torch.full((40,), 3.0, **F64), validation=None)


# --- bad input


def unplated(x):
    z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(x.dim()), obs=x)


NAN = rows(60).index_fill(0, torch.tensor([3]), math.nan)
BAD = {
    "no rows": ({"data": rows(0)}, ValueError, "data have 0 rows"),
    "one row": ({"data": rows(1)}, ValueError, "data have 1 row, and minibatches take at least two"),
    "no tensor": ({"data": "x.csv"}, TypeError, "hold no tensor"),
    "lengths": ({"data": (rows(60), rows(3))}, ValueError, "lengths are .*60.*3"),
    "empty loader": ({"data": TensorDataset(rows(0))}, ValueError, "empty"),
    "NaN": ({"data": NAN, "validation": None}, ValueError, "NaN"),
    "share leaves none": ({"data": rows(3), "validation": 0.01}, ValueError, "leaves 3 .* and 0"),
    "share of all": ({"validation": 1.0}, ValueError, "share between 0 and 1"),
    "share by name": ({"validation": "half"}, TypeError, "share between 0 and 1"),
    "no validation row": ({"validation": rows(0)}, ValueError, "validation have no row"),
    "steps": ({"max_steps": -1}, ValueError, "max_steps must be at least 1, got -1"),
    "steps in part": ({"max_steps": 2.5}, TypeError, "max_steps must be an int"),
    "epochs": ({"max_steps": None, "max_epochs": 0}, ValueError, "max_epochs must be at least 1"),
    "steps and epochs": ({"max_epochs": 3}, ValueError, "not both"),
    "batch": ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    "rate": ({"learning_rate": -0.1}, ValueError, "learning_rate must be a positive number"),
    "rate by name": ({"learning_rate": "fast"}, TypeError, "learning_rate must be a positive number"),
    "clip": ({"clip": -1.0}, ValueError, "clip must be"),
    "clip by name": ({"clip": "hard"}, ValueError, "clip must be"),
    "patience": ({"patience": 0}, ValueError, "patience must be at least 1"),
    "skips": ({"max_skips": 0}, ValueError, "max_skips must be at least 1"),
    "restarts": ({"restarts": 0}, ValueError, "restarts must be at least 1"),
    "seed": ({"seed": "lucky"}, TypeError, "seed must be an int"),
    "devices": ({"devices": 0}, ValueError, "devices must be at least 1"),
    "ELBO class": ({"loss": Trace_ELBO}, TypeError, r"write Trace_ELBO\(\)"),
    "no ELBO": ({"loss": "elbo"}, TypeError, "one of Pyro's ELBOs"),
    "Pyro's optimizer": ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, TypeError, "torch optimizer"),
    "no optimizer": ({"optimizer": lambda parameters: 3}, TypeError, "must return a torch optimizer"),
    "schedule": ({"schedule": 0.1}, TypeError, "schedule must be a function"),
    "bad schedule": ({"schedule": lambda progress: -1.0}, ValueError, "factor of at least 0"),
    "tempering": ({"tempering": 0.5}, TypeError, "LinearWarmup"),
    "tempering class": ({"tempering": LinearWarmup}, TypeError, "LinearWarmup"),
    "guide": ({"guide": None}, TypeError, "guide must be a function"),
    "resume from nothing": ({"resume": True}, ValueError, "give checkpoint=path"),
    "ladder downwards": ({"ladder": [DiagonalNormal()]}, ValueError, "must go upwards"),
    "ladder of names": ({"ladder": ["flow"]}, TypeError, "families"),
    "ladder in place": ({"ladder": [FullRankNormal()]}, ValueError, "changes nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    options = {"model": factors, "guide": small(), "data": rows(60), "max_steps": 3, "seed": 0, **changed}
    with pytest.raises(error, match=message):
        fit(**options)


def test_a_model_without_a_plate_for_its_rows_is_refused():
    with pytest.raises(ValueError, match="no plate of the model grows with the rows"):
        quick(unplated, AmortizedGuide(unplated), rows(60))


def by_column(x):
    with pyro.plate("column", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        with pyro.plate("row", len(x), dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_an_encoder_that_would_pool_a_minibatch_is_refused():
    with pytest.raises(ValueError, match="batch_size=None"):
        quick(by_column, AmortizedGuide(by_column, DeepSet(width=8)), rows(60))


def test_nothing_to_train_is_refused():
    def guide(x):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))

    with pytest.raises(ValueError, match="nothing to train"):
        quick(factors, guide, rows(60))


def test_a_whole_is_one_batch():
    whole = Whole(arguments_of(rows(5)))
    assert [batch is whole.data for batch in whole.epoch(0, 98)] == [True, True]


def test_every_start_is_warmed_up_anew():
    warmup = LinearWarmup(10_000)
    quick(factors, small(), rows(60), max_steps=30, restarts=3, tempering=warmup)
    assert warmup.step == 30


def test_patience_begins_when_the_warm_up_has_ended():
    """The untempered ELBO may fall while weights are small, which says nothing."""
    noise = torch.zeros(5)
    looks = [noise, noise - 1.0, noise - 2.0, noise - 3.0]
    judge = Judge(iter(looks).__next__, dict, patience=2)
    for step in range(4):
        judge.look(step, patient=True)
    assert not judge.settled
    objective = Objective(Trace_ELBO(), factors, small(), None, LinearWarmup(3))
    assert objective.warms_up
    assert not Objective(Trace_ELBO(), factors, small(), None, FreeBits(0.1)).warms_up
