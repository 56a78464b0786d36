"""Several processes: what they average, what they agree on, and who writes."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import lightning_fabric  # noqa: F401 - which children would otherwise import one by one
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, fit
from pyro_guides.training.loading import source_of

EXAMPLES = Path(__file__).parents[1] / "examples"
F64 = {"dtype": torch.float64}
LOADINGS = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]], **F64)
SECONDS = 60


def rows(count, seed=0):
    """Rows of which fewer are the first of more."""
    drawn = torch.randn(200, 5, generator=torch.Generator().manual_seed(seed), **F64)[:count]
    return drawn[:, :2] @ LOADINGS + drawn[:, 2:]


# --- two processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(job, folder, world=2):
    """What a job returns in each of several processes, forked from this one, that know each other."""
    folder.mkdir(exist_ok=True)
    port, children = str(free_port()), []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about forks and threads
            child = os.fork()
        if not child:
            _be_process(job, folder / f"{rank}", rank, world, port)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(world)]


def _be_process(job, out, rank, world, port):
    found = "it was killed, or took too long"
    try:
        signal.alarm(SECONDS)
        names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ.update(zip(names, (str(rank), "0", str(world), "127.0.0.1", port), strict=True))
        pyro.clear_param_store()
        torch.manual_seed(rank)  # nothing may depend on what is drawn outside
        found = job(rank)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent has to see it
        found = traceback.format_exc()
    finally:
        out.write_text(json.dumps(found))
        os._exit(0)


def bits(*modules):
    """All tensors of modules, and of Pyro's store, as text that no bit is missing from."""
    tensors = {name: x for name, x in pyro.get_param_store().items() if "Guide" not in name}
    for module in modules:
        tensors |= module.state_dict() if isinstance(module, nn.Module) else {}
    return {name: tensors[name].detach().numpy().tobytes().hex() for name in sorted(tensors)}


class Factors(nn.Module):
    """A factor model that learns its loadings."""

    def __init__(self):
        super().__init__()
        self.loadings = nn.Parameter(LOADINGS.clone())

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings, 0.5).to_event(1), obs=x)


class Sparse(Factors):
    """Uses a parameter only if row 0 is there."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3, **F64))

    def forward(self, x):
        there = bool((x == rows(1)).all(-1).any())
        super().forward(x - self.offset if there else x)


class Failing(Factors):
    """Has no finite density of rows 3 and 40."""

    def forward(self, x):
        bad = torch.stack([(x == rows(41)[row]).all(-1) for row in (3, 40)]).any(0)
        super().forward(torch.where(bad.unsqueeze(-1), math.nan, x))


def trained(model=Factors, data=None, **options):
    """What a process says of a run."""
    function = model()
    guide = AmortizedGuide(function, MLP(width=8, depth=1), family=options.pop("family", FullRankNormal()))
    options = {"max_steps": 12, "batch_size": 16, "validation": None, "seed": 3, "devices": 2, **options}
    result = fit(function, guide, rows(60) if data is None else data, **options)
    return {
        "weights": bits(function, guide),
        "losses": np.nan_to_num(result.losses, nan=-1.0).tolist(),
        "looks": [[look.step, look.elbo, look.error] for look in result.looks],
        "skipped": result.skipped,
        "stopped_by": result.stopped_by,
        "restarts": list(result.restarts),
        "rungs": [repr(rung) for rung in result.rungs],
        "families": list(result.families),
    }


def mean_model(x, w):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3, **F64), 1.0).to_event(1))
    slope = pyro.param("slope", torch.ones(3, **F64))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(loc + slope * w, 0.5).to_event(1), obs=x)


def without_noise(devices, batch_size=16, **options):
    """A run whose gradients do not depend on noise."""
    pyro.clear_param_store()
    guide = AutoDelta(mean_model)
    x = rows(66)
    result = fit(
        mean_model, guide, (x, x.flip(0)), max_steps=20, batch_size=batch_size, validation=None, seed=0,
        devices=devices, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), clip=None, **options,
    )  # fmt: skip
    values = {name: value.detach().tolist() for name, value in pyro.get_param_store().items()}
    return {"values": values, "losses": result.losses.tolist()}


def test_two_halves_of_a_batch_are_one_batch(tmp_path):
    """20 steps on halves are 20 steps on the whole, to rounding; an odd batch leaves one row out."""
    found = in_processes(lambda rank: [without_noise(2), without_noise(2, batch_size=17)], tmp_path)
    alone, wider = without_noise(1), without_noise(1, batch_size=17)
    for run in [run for both in found for run in both]:
        assert np.allclose(run["losses"], alone["losses"], rtol=1e-12)
        for name, value in alone["values"].items():
            assert np.allclose(run["values"][name], value, rtol=0, atol=1e-10)
    assert not np.allclose(wider["losses"], alone["losses"], rtol=1e-4)  # a control


def several_runs(rank):
    """Runs one after the other: the processes are made once."""
    return {
        "plain": trained(max_steps=20, validation=0.3),
        "unused": trained(Sparse, max_steps=8),
        "failing": trained(Failing, max_steps=20, max_skips=20),
        "own numbers": trained(model=Drawing),
        "dataset": trained(data=TensorDataset(rows(60)), validation=0.3),
        "loader": trained(data=DataLoader(TensorDataset(rows(60)), batch_size=16, shuffle=True)),
        "seen": SEEN,
    }


SEEN = []


class Drawing(Factors):
    """Notes the rows that it is given, and the noise that is drawn."""

    def forward(self, x):
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
            if torch.is_grad_enabled():
                SEEN.append([x.tolist(), z.tolist()])
            pyro.sample("x", dist.Normal(z @ self.loadings, 0.5).to_event(1), obs=x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two processes say of several runs."""
    first, second = in_processes(several_runs, tmp_path_factory.mktemp("processes"))
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    return first, second


@pytest.mark.parametrize("what", ["plain", "unused", "failing", "own numbers", "dataset", "loader"])
def test_processes_end_with_the_same_weights(what, runs):
    first, second = (run[what] for run in runs)
    assert first == second


def test_a_parameter_that_one_process_does_not_use_is_trained(runs):
    offset = np.frombuffer(bytes.fromhex(runs[0]["unused"]["weights"]["offset"]))
    assert (np.abs(offset) > 1e-4).all()


def test_a_step_that_fails_in_one_process_is_skipped_in_all(runs):
    """Those are the steps that a single process skips."""
    alone = trained(Failing, max_steps=20, max_skips=20, devices=1)
    skipped, expected = (np.array(run["losses"]) == -1.0 for run in (runs[0]["failing"], alone))
    assert 0 < sum(expected) < 20
    assert (skipped == expected).all()
    assert runs[0]["failing"]["skipped"] == sum(expected)


def test_processes_share_rows_but_no_noise(runs):
    first, second = (run["seen"] for run in runs)
    assert len(first) == len(second) == 12
    for (x, z), (other_x, other_z) in zip(first, second, strict=True):
        assert len(x) == len(other_x) == 8
        assert not {map(tuple, x)} & {map(tuple, other_x)}
        assert not np.allclose(z, other_z)
    epoch = {tuple(row) for run in (first, second) for x, _ in run[:3] for row in x}
    assert len(epoch) == 48  # of 60, in batches of 16


# --- data sets and loaders


@pytest.mark.parametrize("kind", ["dataset", "shuffled", "in order"])
def test_every_process_loads_its_share(kind):
    data = TensorDataset(torch.arange(10.0))
    given = data if kind == "dataset" else DataLoader(data, batch_size=5, shuffle=kind == "shuffled")
    sources = [source_of(given, 5, rank, 2) for rank in (0, 1)]
    seen = [[batch.args[0].tolist() for batch in source.epoch(7, 0)] for source in sources]
    assert [len(batch) for run in seen for batch in run] == [
        2,
        2,
        2,
        2,
    ]  # as many for each, and whole batches
    assert len({number for run in seen for batch in run for number in batch}) == 8
    rest = [[batch.args[0].tolist() for batch in source.epoch(7, 1)] for source in sources]
    assert rest == [run[1:] for run in seen]
    if kind == "in order":
        assert seen == [[[0.0, 2.0], [4.0, 6.0]], [[1.0, 3.0], [5.0, 7.0]]]


def test_a_loader_with_an_order_of_its_own_must_share_it():
    data = TensorDataset(torch.arange(10.0))
    own = DataLoader(data, batch_size=2, sampler=WeightedRandomSampler([1.0] * 10, 10))
    with pytest.raises(ValueError, match="DataLoader with a WeightedRandomSampler chooses; give it a torch"):
        source_of(own, 4, 0, 2)
    shared = [DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, rank)) for rank in (0, 1)]
    epochs = [
        sorted(x for one in shared for batch in source_of(one, 4, 0, 2).epoch(seed, 0) for x in batch.args[0])
        for seed in (1, 2)
    ]
    assert epochs[0] == epochs[1] == list(range(10))


def test_fewer_rows_than_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batches of 1 rows are less than one row for each of 2 processes"):
        source_of(rows(5), 1, 0, 2).first()


# --- files


def late(rank):
    """Makes a parameter in its fifth step."""
    steps = []

    def model(x):
        steps.extend([1] * torch.is_grad_enabled())
        loc = pyro.param("late", torch.zeros(3, **F64)) if len(steps) > 4 else 0.0
        Factors.forward(factors, x - loc)

    factors = Factors()
    try:
        fit(model, AmortizedGuide(model, MLP(width=8, depth=1)), rows(60), devices=2, validation=None)
    except NotImplementedError as error:
        return str(error)
    return "no error"


def test_a_parameter_that_comes_late_is_refused(tmp_path):
    for said in in_processes(late, tmp_path):
        assert "made the parameters ['late[real].late'] only in step 4" in said


class Crash(RuntimeError):
    """Stands for all that may end a process."""


class CrashAt(Factors):
    """Ends its process after so many steps."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def forward(self, x):
        self.left -= torch.is_grad_enabled()
        if self.left < 0:
            raise Crash
        super().forward(x)


@pytest.mark.slow
def test_a_checkpoint_is_written_once_and_resumed_by_all(tmp_path):
    """Noise included: every process goes on with its own."""
    path = tmp_path / "run.ck"
    options = {"validation": 0.3, "max_steps": 30, "checkpoint_every": 5}

    def crashing(rank):
        try:
            trained(lambda: CrashAt(17), checkpoint=path, **options)
        except Crash:
            return "crashed"

    exact = in_processes(lambda rank: trained(**options), tmp_path / "exact")
    assert in_processes(crashing, tmp_path / "crashed") == ["crashed"] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["crashed", "exact", "run.ck"]
    assert (
        in_processes(lambda rank: trained(checkpoint=path, resume=True, **options), tmp_path / "resumed")
        == exact
    )
    again = in_processes(lambda rank: trained(checkpoint=path, **options), tmp_path / "again")
    assert all("FileExistsError" in said for said in again)


@pytest.mark.slow
def test_all_decide_the_same(tmp_path):
    """When to stop, which start is best, and whether to climb."""

    def job(rank):
        return {
            "patience": trained(max_steps=60, patience=3, validation=0.3, schedule=lambda share: 0.0),
            "restarts": trained(max_steps=30, restarts=3, validation=0.3),
            "ladder": trained(
                max_steps=60, family=DiagonalNormal(), ladder=[FullRankNormal()], validation=0.3
            ),
        }

    first, second = in_processes(job, tmp_path)
    assert isinstance(first, dict), first
    assert first == second
    assert first["patience"]["stopped_by"] == "patience"
    assert len(set(first["restarts"]["restarts"])) == 3
    assert first["ladder"]["rungs"]


# --- output, and the script


def test_one_process_prints_nothing(capfd):
    without_noise(1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_example(tmp_path):
    """Fabric starts the second process itself."""
    run = subprocess.run(
        [sys.executable, EXAMPLES / "distributed.py", "--devices", "2", "--steps", "20"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    speeds = re.findall(r"process (\d) of 2: ([\d,]+) rows a second", run.stdout)
    assert sorted(rank for rank, _ in speeds) == ["0", "1"]
    assert len(re.findall(r"validation ELBO: -?[\d.]+ ± [\d.]+ nats per image", run.stdout)) == 1
