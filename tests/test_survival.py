"""Runs that survive: killed, interrupted or failed, they go on to the last bit as if nothing was."""

import hashlib
import logging
import math
import os
import random
import signal
import time
import traceback
import warnings

import lightning_fabric  # noqa: F401 - which children would otherwise import one by one
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, NormalMixture, fit, storage
from pyro_guides.objectives import IWELBO, CyclicalWarmup, FreeBits, LinearWarmup, WeightedSum, kl_weight
from pyro_guides.storage import UnreadableFileError
from pyro_guides.training import checkpoints, run, stages
from pyro_guides.training.ladder import Evidence

F64 = {"dtype": torch.float64}
LOADINGS = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]], **F64)


def rows(count, seed=0):
    """Rows of which fewer are the first of more."""
    drawn = torch.randn(200, 5, generator=torch.Generator().manual_seed(seed), **F64)[:count]
    return drawn[:, :2] @ LOADINGS + drawn[:, 2:]


class Factors(nn.Module):
    """A factor model that learns its loadings; ``shift`` stands for weights that another process drew."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.loadings = nn.Parameter(LOADINGS + shift)

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings, 0.5).to_event(1), obs=x)


class Normed(Factors):
    """With statistics of batches, which no step learns."""

    def __init__(self, shift=0.0):
        super().__init__(shift)
        self.norm = nn.BatchNorm1d(3, **F64)

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.norm(z @ self.loadings), 0.5).to_event(1), obs=x)


class Noisy(Factors):
    """Draws from NumPy's and Python's generators, too."""

    def forward(self, x):
        super().forward(x + 0.1 * np.random.randn() + 0.1 * random.random())  # noqa: NPY002, S311


class Subsampling(Factors):
    """Chooses its rows itself."""

    def forward(self, x):
        with pyro.plate("row", len(x), subsample_size=20) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings, 0.5).to_event(1), obs=x[index])


class InStore:
    """A function with parameters in Pyro's store, of which one comes with the first batch that has row 52."""

    def __init__(self, shift=0.0):
        self.initial = LOADINGS + shift

    def __call__(self, x):
        loadings = pyro.param("loadings", self.initial)
        noise = torch.tensor(0.5, **F64)
        if len(x) <= 32 and (x == rows(60)[52]).all(-1).any():  # fewer than a guide is set up with
            noise = pyro.param("noise", noise, constraint=constraints.positive)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings, noise).to_event(1), obs=x)


def guide_of(model, **options):
    return AmortizedGuide(model, MLP(width=8, depth=1), **options)


def digest(model, guide, result):
    """All that a run came to."""
    whole = hashlib.sha256(np.nan_to_num(result.losses).tobytes())
    whole.update(repr((result.looks, result.best, result.restarts, result.rungs, result.families)).encode())
    tensors = {name: x for name, x in pyro.get_param_store().items() if "AmortizedGuide" not in name}
    for module in (model, guide):
        tensors |= module.state_dict() if isinstance(module, nn.Module) else {}
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].detach().numpy().tobytes())
    return whole.hexdigest()


# --- killed

JOBS = {
    "alone": (Factors, {"validation": None, "max_steps": 40}),
    "plain": (Factors, {"tempering": LinearWarmup, "max_steps": 60}),
    "restarts": (Factors, {"restarts": 2, "max_steps": 60}),
    "ladder": (Factors, {"ladder": [FullRankNormal()], "max_steps": 40}),
    "loader": (Factors, {"loader": True, "max_steps": 40}),
    "store": (InStore, {"max_steps": 40}),
    "subsampling": (Subsampling, {"batch_size": None, "validation": None, "max_steps": 60}),
    "numpy": (Noisy, {"validation": None, "max_steps": 40}),
}


def do_job(kind, path, **changes):
    """One life of a run."""
    make, options = JOBS[kind]
    options = {"validation": 0.3, "batch_size": 32, "patience": None, **options, **changes}
    pyro.clear_param_store()
    torch.manual_seed(os.getpid())
    model = make(float(torch.randn(())) if path.exists() and kind != "restarts" else 0.0)
    guide = guide_of(model, family=DiagonalNormal())
    data = rows(150)
    if options.pop("loader", False):  # whose last batch is shorter than the others
        data = DataLoader(TensorDataset(data), batch_size=32, shuffle=True)
        options["validation"] = rows(50, seed=1)
    if "tempering" in options:
        options["tempering"] = options["tempering"](30)
    result = fit(model, guide, data, seed=1, checkpoint=path, resume=True, checkpoint_every=3, **options)
    return digest(model, guide, result)


def life(kind, path, out):
    """A child that does a job, and writes what it came to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about forks and threads
        child = os.fork()
    if child:
        return child
    try:
        out.write_text(do_job(kind, path))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent has to see it
        out.write_text(traceback.format_exc())
    finally:
        os._exit(0)


def finished(kind, path, out):
    """What a run without trouble comes to, and how long it takes."""
    begun = time.monotonic()
    os.waitpid(life(kind, path, out), 0)
    return out.read_text(), time.monotonic() - begun


def survives(kind, folder, kills):
    """Kill a run that often at random times, and then let it finish; how many kills it had to go on from."""
    exact, seconds = finished(kind, folder / "exact.ck", folder / "exact")
    assert len(exact) == 64, exact
    path, out, generator = folder / "run.ck", folder / "run", random.Random(kind)  # noqa: S311
    resumed = 0
    for _ in range(kills):
        child = life(kind, path, out)
        while not (path.exists() or out.exists()):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            assert out.read_text() in ("", exact)
            out.unlink()
            path.unlink()
        resumed += path.exists()
    assert finished(kind, path, out)[0] == exact
    left, right = (storage.load(folder / name, kind=checkpoints._KIND) for name in ("run.ck", "exact.ck"))
    assert same(left, right)
    return resumed


def same(left, right):
    """Whether two checkpoints hold the same, up to how long it took."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(left[key], right[key]) for key in left if key != "seconds"
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def test_a_killed_run_goes_on(tmp_path):
    assert survives("alone", tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", JOBS)
def test_every_run_goes_on_however_often_it_is_killed(kind, tmp_path):
    assert survives(kind, tmp_path, kills=2 if kind == "ladder" else 4)


# --- failed in its course


class Crash(RuntimeError):
    """Stands for all that may end a process."""


class CrashAt:
    """A logger that ends the run."""

    def __init__(self, step, error=Crash):
        self.step, self.error = step, error

    def log_metrics(self, metrics, step=None):
        if step == self.step:
            raise self.error


def grouped(parameters):
    first, *rest = parameters
    return torch.optim.SGD(
        [{"params": [first], "lr": 1e-4}, {"params": rest}], lr=1e-3, momentum=0.9, nesterov=True
    )


def with_a_discrete_site(x):
    scale = torch.tensor([0.5, 2.0], **F64)
    with pyro.plate("row", len(x)):
        baseline = {"use_decaying_avg_baseline": True}
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, **F64)), infer={"baseline": baseline})
        pyro.sample("x", dist.Normal(0.0, scale[k.long()].unsqueeze(-1)).to_event(1), obs=x)


def bernoulli_guide(x):
    logits = pyro.param("logits", torch.zeros(3, **F64))
    with pyro.plate("row", len(x)):
        baseline = {"use_decaying_avg_baseline": True}
        pyro.sample("k", dist.Bernoulli(logits=x @ logits), infer={"baseline": baseline})


REMEMBERED = {
    "momentum of several groups": (Factors, {}, {"optimizer": grouped}),
    "AdamW": (Factors, {}, {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)}),
    "RMSprop": (Factors, {}, {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3), "clip": "normalize"}),
    "cycles": (Factors, {}, {"tempering": lambda: CyclicalWarmup(10)}),
    "free bits": (Factors, {}, {"tempering": lambda: FreeBits(50.0)}),
    "a sum of losses": (
        Factors,
        {},
        {"loss": lambda: WeightedSum((IWELBO(2), lambda t: 1.0 - t / 20), (Trace_ELBO(), lambda t: t / 20))},
    ),
    "batch norm": (Normed, {}, {"clip": 5.0, "validation": 0.3}),
    "control variates": (
        Factors,
        {"family": NormalMixture(2, baseline="running_mean")},
        {},
    ),
    "late parameters": (InStore, {}, {}),
    "baselines": (None, {}, {"loss": TraceGraph_ELBO, "batch_size": 20}),
}


def short(model, guide, **options):
    made = {name: options[name]() for name in ("loss", "tempering") if callable(options.get(name))}
    options = {"max_steps": 16, "batch_size": 16, "validation": None, "seed": 2, **options, **made}
    return fit(model, guide, rows(60), patience=None, checkpoint_every=7, **options)


@pytest.mark.parametrize("case", REMEMBERED)
def test_all_that_a_step_depends_on_is_remembered(case, tmp_path):
    make, family, options = REMEMBERED[case]

    def both(shift=0.0):
        pyro.clear_param_store()
        if make is None:
            return with_a_discrete_site, bernoulli_guide
        model = make(shift)
        return model, guide_of(model, **family)

    model, guide = both()
    exact = digest(model, guide, short(model, guide, **options))
    path = tmp_path / "run.ck"
    with pytest.raises(Crash):
        short(*both(), checkpoint=path, logger=CrashAt(10), **options)
    state = storage.load(path, kind=checkpoints._KIND)["state"]["run"]
    assert state["at"][0] == 7
    assert ("late[positive].noise" in state["weights"]) == (case == "late parameters")
    model, guide = both(shift=0.3)
    result = short(model, guide, checkpoint=path, resume=True, **options)
    assert digest(model, guide, result) == exact


def test_control_a_run_that_forgets_one_thing_ends_elsewhere(tmp_path, monkeypatch):
    """The digest notices a clip's running mean that is lost, the least of all that is remembered."""
    exact = digest(*(pair := fresh()), short(*pair, clip="auto"))
    path = tmp_path / "run.ck"
    with pytest.raises(Crash):
        short(*fresh(), checkpoint=path, logger=CrashAt(10), clip="auto")
    monkeypatch.setattr(run.randomness, "load_state", lambda state: None)
    pair = fresh()
    assert digest(*pair, short(*pair, checkpoint=path, resume=True, clip="auto")) != exact


def fresh(shift=0.0, **options):
    pyro.clear_param_store()
    model = Factors(shift)
    return model, guide_of(model, **options)


def test_ctrl_c_keeps_the_best_and_a_resume_goes_on(tmp_path):
    exact = digest(*(pair := fresh()), short(*pair, validation=0.3))
    path = tmp_path / "run.ck"
    result = short(*fresh(), checkpoint=path, logger=CrashAt(10, KeyboardInterrupt), validation=0.3)
    assert result.stopped_by == "interrupt"
    assert len(result.losses) == 10
    pair = fresh(shift=0.3)
    result = short(*pair, checkpoint=path, resume=True, validation=0.3)
    assert result.stopped_by == "steps"
    assert digest(*pair, result) == exact


def test_a_finished_run_is_returned_at_once_and_nothing_outside_is_drawn(tmp_path):
    path = tmp_path / "run.ck"
    first = short(*(pair := fresh()), checkpoint=path)
    expected = digest(*pair, first)
    pair = fresh(shift=0.3)
    np.random.seed(4), random.seed(4)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    second = short(*pair, checkpoint=path, resume=True, logger=CrashAt(10))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert digest(*pair, second) == expected
    assert second.seconds >= first.seconds
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("crash", [True, False])
def test_neither_a_run_nor_its_resume_draws_outside(crash, tmp_path):
    path = tmp_path / "run.ck"
    if crash:
        with pytest.raises(Crash):
            short(*fresh(), checkpoint=path, logger=CrashAt(10))
    pair = fresh()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    short(*pair, checkpoint=path, resume=True)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_guide_that_was_promoted_is_promoted_again(tmp_path, monkeypatch):
    """The family must seem to hold q back; whether it does, other tests tell."""
    held_back = Evidence(gap=1.0, error=0.1, lost=0.0, k_hat=-math.inf)
    monkeypatch.setattr(stages, "examine", lambda *args: held_back)
    options = {"ladder": [FullRankNormal()], "max_steps": 12, "validation": 0.3}
    pair = fresh(family=DiagonalNormal())
    result = short(*pair, **options)
    exact = digest(*pair, result)
    assert [rung.how for rung in result.rungs][:2] == ["as it was", "promoted"]
    path = tmp_path / "run.ck"
    logger = CrashAt(10)  # the first rung has 6 steps only
    with pytest.raises(Crash):
        short(*fresh(family=DiagonalNormal()), checkpoint=path, logger=logger, **options)
    pair = fresh(shift=0.3, family=DiagonalNormal())
    resumed = short(*pair, checkpoint=path, resume=True, **options)
    assert resumed.rungs == result.rungs
    assert digest(*pair, resumed) == exact


def test_the_best_weights_may_be_older_than_a_parameter():
    """One that comes after the best look stays as it is."""
    steps = []

    def model(x):
        steps.extend([1] * torch.is_grad_enabled())
        late = len(steps) > 8
        wide = pyro.param("wide", torch.tensor(99.0, **F64)) if late else torch.tensor(1.0, **F64)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS, wide).to_event(1), obs=x)

    result = short(model, guide_of(model), validation=0.3)
    assert result.best.step <= 8
    assert 90.0 < float(pyro.param("wide").detach()) < 99.0


# --- refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The bytes of a run's checkpoint."""
    path = tmp_path_factory.mktemp("survival") / "run.ck"
    pyro.clear_param_store()
    short(*fresh(), checkpoint=path, max_steps=8)
    pyro.clear_param_store()
    return path.read_bytes()


class Wider(Factors):
    """Has one parameter more."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, **F64))

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings * self.scale, 0.5).to_event(1), obs=x)


OTHERS = {
    "parameters": {"model": Wider},
    "family": {"family": DiagonalNormal()},
    "data": {"data": rows(60).flip(0)},
    "rows": {"data": rows(61)},
    "learning_rate": {"learning_rate": 0.02},
    "schedule": {"schedule": None},
    "max_steps": {"max_steps": 9},
    "batch_size": {"batch_size": 15},
    "loss": {"loss": Trace_ELBO(num_particles=2)},
    "ladder": {"family": FullRankNormal(), "ladder": [NormalMixture(2)]},
    "restarts": {"restarts": 2},
    "tempering": {"tempering": LinearWarmup(10)},
    "clip": {"clip": 1.0},
    "patience": {"patience": 3},
    "validation": {"validation": 0.2},
    "optimizer": {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)},
}


def resume(path, *, model=Factors, family=None, data=None, **options):
    function = model()
    guide = guide_of(function, **({} if family is None else {"family": family}))
    options = {"max_steps": 8, "batch_size": 16, "validation": None, "patience": None, **options}
    return fit(function, guide, rows(60) if data is None else data, checkpoint=path, resume=True, **options)


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused(what, begun, tmp_path):
    path = tmp_path / "run.ck"
    path.write_bytes(begun)
    with pytest.raises(ValueError, match=rf"belongs to another run: (.*; )?{what} was .* is ") as caught:
        resume(path, **OTHERS[what])
    assert type(caught.value) is ValueError
    assert path.read_bytes() == begun


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LinearWarmup(10), LinearWarmup(20)),
        (kl_weight(0.5), kl_weight(0.6)),
        (kl_weight({"z": 0.5}), kl_weight({"z": 0.6})),
        (FreeBits(0.1), LinearWarmup(10)),
    ],
)
def test_another_tempering_is_refused(first, second, tmp_path):
    path = tmp_path / "run.ck"
    with pytest.raises(Crash):
        resume(path, tempering=first, max_steps=20, logger=CrashAt(10))
    assert first.step if hasattr(first, "step") else True
    with pytest.raises(ValueError, match="tempering was"):
        resume(path, tempering=second, max_steps=20)
    resume(path, tempering=first, max_steps=20)  # which has counted on, and that is no difference


def test_another_seed_and_another_version_are_refused(begun, tmp_path, monkeypatch):
    path = tmp_path / "run.ck"
    path.write_bytes(begun)
    with pytest.raises(ValueError, match="has the seed 2, got seed=3"):
        resume(path, seed=3)
    monkeypatch.setattr(checkpoints, "_VERSION", 2)
    with pytest.raises(ValueError, match="is of version 1, and this version of pyro_guides goes on from"):
        resume(path)


@pytest.mark.parametrize("fault", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(fault, begun, tmp_path):
    path, generator = tmp_path / "run.ck", random.Random(0)  # noqa: S311
    for _ in range(100 if fault == "flipped" else 5):  # before anything is read about model and data
        at = generator.randrange(len(begun))
        flipped = begun[:at] + bytes([begun[at] ^ 1 << generator.randrange(8)]) + begun[at + 1 :]
        damaged = flipped if fault == "flipped" else begun[:at]
        path.write_bytes(damaged)
        with pytest.raises(UnreadableFileError):
            fit(Factors(), bernoulli_guide, rows(60), checkpoint=path, resume=True)
        assert path.read_bytes() == damaged
    path.write_bytes(begun)
    resume(path)  # and what is whole is not


def test_an_existing_checkpoint_is_not_overwritten(begun, tmp_path):
    path = tmp_path / "run.ck"
    path.write_bytes(begun)
    with pytest.raises(FileExistsError, match="give resume=True"):
        short(*fresh(), checkpoint=path)
    assert path.read_bytes() == begun


def test_where_no_file_can_be_training_does_not_begin(tmp_path, monkeypatch):
    tried = (tmp_path / "none" / "run.ck", FileNotFoundError), (tmp_path, IsADirectoryError)
    for path, error in tried:
        with pytest.raises(error, match="checkpoint"):
            fit(Factors(), never, rows(60), checkpoint=path)
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="checkpoint"):
        fit(Factors(), never, rows(60), checkpoint=tmp_path / "run.ck")


def never(x):
    raise AssertionError("training has begun")


def full_disk(monkeypatch, broken):
    """Every write for which ``broken``, of its number, is true finds the disk full."""
    real, writes = storage.save, []

    def save(*args, **kwargs):
        writes.append(1)
        if broken(len(writes)):
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(storage, "save", save)
    return writes


def test_a_disk_that_is_full_from_the_start_is_an_error(tmp_path, monkeypatch):
    writes = full_disk(monkeypatch, lambda number: True)
    with pytest.raises(OSError, match="No space left"):
        short(*fresh(), checkpoint=tmp_path / "run.ck")
    assert len(writes) == 1


def test_a_disk_that_gets_full_is_logged_and_training_goes_on(tmp_path, monkeypatch, caplog):
    exact = digest(*(pair := fresh()), short(*pair, restarts=2))
    path, pair = tmp_path / "run.ck", fresh()
    writes = full_disk(monkeypatch, lambda number: number > 2)
    with caplog.at_level(logging.ERROR, "pyro_guides"):
        result = short(*pair, restarts=2, checkpoint=path)
    assert digest(*pair, result) == exact
    assert len(caplog.records) == len(writes) - 2 > 2
    assert "could not be written" in caplog.text
    monkeypatch.undo()
    pair = fresh()
    assert digest(*pair, short(*pair, restarts=2, checkpoint=path, resume=True)) == exact


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused():
    with pytest.raises(TypeError, match="LBFGS, whose steps evaluate the loss several times"):
        short(*fresh(), optimizer=torch.optim.LBFGS)
