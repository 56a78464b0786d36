"""Files: whole or refused, never executed; a guide that was loaded is the guide that was saved.

What a loaded guide says is compared bit by bit, in a process of its own, with what the saved one said.
"""

import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from models import (
    EVERY_FAMILY,
    F64,
    Regression,
    dependent,
    hierarchy,
    masked,
    nested,
    normal_rows,
    rows,
    subsampled_hierarchy,
    two,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DeepSet,
    DiagonalNormal,
    Discrete,
    Family,
    FullRankNormal,
    GRUEncoder,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    SequenceEncoder,
    SetTransformer,
    ZukoFlow,
    optim,
)
from pyro_guides.storage import UnreadableFileError, decode, encode, files, objects


def seeded():
    return random.Random(0)  # noqa: S311 - chance, not secrecy


FLOW = NormalizingFlow(2, hidden=(8,), context_size=4)


# --- guides of every kind


def chain(x):
    with pyro.plate("series", x.shape[0], dim=-1):
        z = torch.zeros(2)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5).to_event(1), obs=x[:, t - 1])


def counted(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3, **F64)))
        b = pyro.sample("b", dist.Bernoulli(two(0.3)[0]))
        z = pyro.sample("z", dist.Normal(k + b, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=x)


class Steps(SequenceEncoder):
    """A user's own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, x, lengths=None):
        return self.linear(x)

    def summary(self, contexts, lengths=None):
        return contexts.mean(1)


class Features(nn.Module):
    """A user's own, with a lazy layer, a tied weight and an encoder of the package inside."""

    def __init__(self, width=3):
        super().__init__()
        self.first = nn.LazyLinear(width, **F64)
        self.second, self.third = nn.Linear(width, width, **F64), nn.Linear(width, width, **F64)
        self.third.weight = self.second.weight
        self.mlp = MLP(width, 1)

    def forward(self, x):
        return self.third(self.second(self.first(x)).sin()) + self.mlp(x)


def as_it_is(x):
    return x


def own_plates(x):
    return pyro.plate("data", len(x))


def plain(*layers):
    return nn.Sequential(*layers).double()


SERIES = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(3))
GRID = rows(3, 4)
WIDTH = {"encoder": lambda: MLP(8, 1)}

# name -> model, its argument, what the guide is made with (modules by their makers), what is given again
CASES = {
    **{f"family {name}": (hierarchy, rows(), {"family": f, **WIDTH}, ()) for name, f in EVERY_FAMILY.items()},
    "affine flow": (hierarchy, rows(), {"family": NormalizingFlow(2, "affine", (8,)), **WIDTH}, ()),
    "discrete": (counted, rows(), WIDTH, ()),
    "discrete, one by one": (
        counted,
        rows(),
        {
            "family": {"k": Discrete(baseline="running_mean"), "z": NormalMixture(2, baseline="amortized")},
            **WIDTH,
        },
        (),
    ),
    "missing": (normal_rows, rows(), {"encoder": lambda: MLP(8, 0, missing=True)}, ()),
    "sets": (nested, GRID, {"encoder": lambda: {"a": DeepSet(8), "p": MLP(4)}}, ()),
    "attention": (nested, GRID, {"encoder": lambda: {"a": SetTransformer(8, 2, 2, 2)}}, ()),
    "sequence": (chain, SERIES, {"encoder": lambda: GRUEncoder(8, layers=2)}, ()),
    "sequence, causal": (chain, SERIES, {"encoder": lambda: GRUEncoder(8, causal=True)}, ()),
    "own sequence": (chain, SERIES, {"encoder": Steps}, ("encoder",)),
    "own encoder": (
        hierarchy,
        rows(),
        {"encoder": lambda: {"data": Features()}, "inputs": {"data": as_it_is}, "create_plates": own_plates},
        ("encoder", "inputs", "create_plates"),
    ),
    "torch encoder": (
        normal_rows,
        rows(),
        {"encoder": lambda: plain(nn.Linear(2, 8), nn.GELU(), nn.BatchNorm1d(8), nn.PReLU())},
        (),
    ),
    "torch transformer": (
        normal_rows,
        rows(),
        {"encoder": lambda: plain(nn.TransformerEncoderLayer(2, 1, 4, 0.0), nn.Softsign())},
        (),
    ),
    "learned": (hierarchy, rows(), {"amortize": ()}, ()),
    "names with dots": (Regression(), rows(), {"family": {"linear.weight": FullRankNormal()}}, ()),
    "wishes": (
        hierarchy,
        rows(),
        {"order": ("spread", "center", "s", "z"), "given": {"center": {"spread"}}, **WIDTH},
        (),
    ),
    "supports of values": (dependent, rows(), WIDTH, ()),
    "masks": (masked("inside, constrained")[0], rows(), WIDTH, ()),
    "subsample": (subsampled_hierarchy, rows(), WIDTH, ()),
}


def guide_of(case, **changes):
    model, x, options, _ = CASES[case]
    pyro.set_rng_seed(0)
    options = {key: value() if key == "encoder" else value for key, value in options.items()}
    guide = AmortizedGuide(model, **{**options, **changes}).setup(x)
    return apart(guide)


def apart(guide):
    with torch.no_grad():
        for parameter in guide.network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return guide


def promoted():
    guide = guide_of("family diagonal").promote({"data": FullRankNormal()})
    return apart(apart(guide).promote({"data": FLOW}, only_new=True))


SAVED = {name: (name, lambda name=name: guide_of(name)) for name in CASES}
SAVED["promoted"] = "family diagonal", promoted
SAVED["promoted sequence"] = (
    "sequence",
    lambda: apart(guide_of("sequence", family=DiagonalNormal()).promote(LowRankNormal(1))),
)


def loaded_of(path, case, **changes):
    model, _, options, again = CASES[case]
    arguments = {key: options[key]() if key == "encoder" else options[key] for key in again}
    return AmortizedGuide.load(path, model, **{**arguments, **changes})


def answers(guide, x, values):
    """Everything one can ask; densities come first, without a call before them."""
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(x)
    trace.compute_log_prob()
    exact = {"density": {name: trace.nodes[name]["log_prob"].detach() for name in values}}
    pyro.set_rng_seed(1)
    posterior = guide.posterior(x, num_draws=3)
    exact |= {"draws": dict(posterior.draws), "median": guide.median(x)}
    exact["state"] = {name: value.clone() for name, value in guide.state_dict().items()}
    exact["trainable"] = [parameter.requires_grad for parameter in guide.parameters()]
    exact["shape"] = [str(guide.families), guide.is_trained, guide.training]
    # Sums over sites, which are in a set and so in another order in each process.
    return {"exact": exact, "sums": [guide.log_prob(values, x), posterior.log_q]}


def answer_all(folder):
    """In a process of its own: load every guide and ask it."""
    torch.set_num_threads(1)
    for name, (case, _) in SAVED.items():
        expected = objects.load(folder / f"{name}.expected", "answers")
        guide = loaded_of(folder / f"{name}.guide", case)
        guide.save(folder / f"{name}.again")  # before batch norms move
        got = answers(guide, CASES[case][1], expected["values"])
        objects.save(folder / f"{name}.got", got, "answers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Guides, what they answered, and what they answered after they were loaded by another process."""
    folder = tmp_path_factory.mktemp("guides")
    for name, (case, make) in SAVED.items():
        guide, x = make(), CASES[case][1]
        values = {site: draws[0] for site, draws in guide.posterior(x, num_draws=1).draws.items()}
        guide.save(folder / f"{name}.guide")
        tree = {"values": values, "answers": answers(guide, x, values)}
        objects.save(folder / f"{name}.expected", tree, "answers")
    pyro.clear_param_store()
    code = "import sys, pathlib, test_storage; test_storage.answer_all(pathlib.Path(sys.argv[1]))"
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or one != one  # NaN


@pytest.mark.parametrize("name", SAVED)
def test_another_process_answers_bit_by_bit(folder, name):
    expected = objects.load(folder / f"{name}.expected", "answers")["answers"]
    got = objects.load(folder / f"{name}.got", "answers")
    assert_same(got["exact"], expected["exact"])
    torch.testing.assert_close(got["sums"], expected["sums"])
    assert (folder / f"{name}.again").read_bytes() == (folder / f"{name}.guide").read_bytes()


@pytest.mark.parametrize("name", ["family mixture", "discrete", "own encoder", "promoted", "sequence"])
def test_a_loaded_guide_trains_on_as_the_one_before(folder, name):
    case, make = SAVED[name]
    model, x, *_ = CASES[case]
    losses, weights = [], []
    for guide in (make(), loaded_of(folder / f"{name}.guide", case)):
        pyro.set_rng_seed(2)
        svi = SVI(model, guide, optim.Adam({"lr": 0.01}), TraceGraph_ELBO())
        losses.append([svi.step(x) for _ in range(3)])
        weights.append([parameter.detach().clone() for parameter in guide.parameters()])
    assert losses[0] == losses[1]
    assert_same(*weights)
    assert len(set(losses[0])) == 3


def test_a_loaded_guide_is_promoted_and_has_a_name_of_its_own(folder):
    path = folder / "family diagonal.guide"
    guides = [guide_of("family diagonal"), *(loaded_of(path, "family diagonal") for _ in range(2))]
    assert len({guide._store_name for guide in guides}) == 3
    assert AmortizedGuide.load(path, hierarchy, name="mine")._store_name == "mine"
    richer = [guide.promote(FullRankNormal()) for guide in guides]
    values = guides[0](rows())
    assert_same(richer[0].log_prob(values, rows()), richer[1].log_prob(values, rows()))


def test_dtypes_follow_and_a_device_can_be_named(folder):
    loaded = loaded_of(folder / "sequence.guide", "sequence", device="meta")
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    assert loaded.network.parts[0].encodings[0].source.field.device.type == "meta"
    assert {p.dtype for p in loaded_of(folder / "discrete.guide", "discrete").parameters()} == {torch.float64}


# --- what is the user's own


def test_own_code_is_asked_for(folder, tmp_path):
    path = folder / "own encoder.guide"
    again = {"encoder": {"data": Features()}, "inputs": {"data": as_it_is}, "create_plates": own_plates}
    with pytest.raises(TypeError, match=r"encoder\['data'\] \(test_storage\.Features\), inputs\['data'\]"):
        AmortizedGuide.load(path, hierarchy)
    for left_out in again:
        rest = {key: value for key, value in again.items() if key != left_out}
        with pytest.raises(TypeError, match=rf"arguments again, which are missing: {left_out}"):
            AmortizedGuide.load(path, hierarchy, **rest)
    with pytest.raises(TypeError, match=r"missing: encoder\['data'\]"):
        AmortizedGuide.load(path, hierarchy, **{**again, "encoder": Features()})
    with pytest.raises(TypeError, match=r"encoder\['data'\] must be a torch.nn.Module"):
        AmortizedGuide.load(path, hierarchy, **{**again, "encoder": {"data": as_it_is}})
    with pytest.raises(
        TypeError, match=r"load\(\) got encoder, but .* holds all that it needs; leave it out"
    ):
        AmortizedGuide.load(folder / "missing.guide", normal_rows, encoder=MLP(8))
    guide = AmortizedGuide(normal_rows, MLP(8), inputs=lambda x: x).setup(rows())
    guide.save(tmp_path / "g")
    with pytest.raises(TypeError, match=r"inputs \(test_storage\..*<lambda>\)"):
        AmortizedGuide.load(tmp_path / "g", normal_rows)
    loaded = AmortizedGuide.load(tmp_path / "g", normal_rows, inputs=lambda x: x)
    assert torch.equal(loaded.median(rows())["z"], guide.median(rows())["z"])


class MoreFeatures(Features):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(2, 2)


def test_a_state_that_does_not_fit_changes_nothing(folder):
    again = {"inputs": {"data": as_it_is}, "create_plates": own_plates}
    wide, floats, more = Features(4), Features().float(), MoreFeatures()
    wide(rows()), floats(rows().float()), more(rows())
    for encoder, message in (
        (wide, r"(?s)encoder\['data'\] is not the module whose state .* holds.*size mismatch"),
        (more, "(?s)is not the module whose state .*more.weight"),
        (floats, r"torch.float32 in 'first.weight', but .* holds torch.float64; convert it"),
    ):
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            AmortizedGuide.load(folder / "own encoder.guide", hierarchy, encoder={"data": encoder}, **again)
        assert_same(dict(encoder.state_dict()), before)


def test_modes_and_frozen_parameters_are_kept(tmp_path):
    guide = AmortizedGuide(normal_rows, Features()).setup(rows())
    guide.network.encoders[0].first.requires_grad_(requires_grad=False)
    guide.network.heads[0].eval()
    for change, trained in ((lambda: None, False), (lambda: apart(guide.eval()), True)):
        change()
        guide.save(tmp_path / "g")
        loaded = AmortizedGuide.load(tmp_path / "g", normal_rows, encoder=Features())
        assert loaded.is_trained == guide.is_trained == trained
        assert [m.training for m in loaded.modules()] == [m.training for m in guide.modules()]
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in guide.parameters()]
        encoder = loaded.network.encoders[0]
        assert encoder.third.weight is encoder.second.weight


class OwnFamily(Family):
    """A family of the user's."""

    def bind(self, size):
        return DiagonalNormal().bind(size)


class Shifted(nn.Linear):
    def forward(self, context):
        return dist.Normal(super().forward(context), 1.0).to_event(1)


def test_what_no_file_can_hold_is_refused_when_it_is_saved(tmp_path):
    zuko = ZukoFlow(lambda features, context: Shifted(context, features), 4)
    guides = {
        r"network\.parts\.0\.family is test_storage\.OwnFamily": (normal_rows, OwnFamily(), rows()),
        r"network\.families\.0\.scorer\.flow is test_storage\.Shifted": (one_by_one, zuko, rows().float()),
    }
    for message, (model, family, x) in guides.items():
        guide = AmortizedGuide(model, family=family).setup(x)
        with pytest.raises(TypeError, match=message + r".*keep guide\.state_dict\(\)"):
            guide.save(tmp_path / "g")
    hooked = guide_of("learned")
    hooked.network.heads[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"network\.heads\.0 has hooks on its calls"):
        hooked.save(tmp_path / "g")
    with pytest.raises(RuntimeError, match=r"no parameters yet: call guide.setup"):
        AmortizedGuide(normal_rows).save(tmp_path / "g")
    assert not list(tmp_path.iterdir())


def test_saving_leaves_the_guide_as_it_is(tmp_path):
    guide = guide_of("family full_rank")
    svi = SVI(hierarchy, guide, optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(rows())
    parameters = list(guide.parameters())
    assert any("unconstrained" in vars(parameter) for parameter in parameters)  # of Pyro's store
    before = [dict(vars(parameter)) for parameter in parameters], dict(vars(guide))
    guide.save(tmp_path / "g")
    assert ([dict(vars(parameter)) for parameter in parameters], dict(vars(guide))) == before
    first = (tmp_path / "g").read_bytes()
    svi.step(rows())
    guide.save(tmp_path / "g")
    assert (tmp_path / "g").read_bytes() != first
    assert_same(AmortizedGuide.load(tmp_path / "g", hierarchy).state_dict(), guide.state_dict())


# --- another model


def one_by_one(x, name="z", plate="data", prior=None, more=False):
    prior = prior or dist.Normal(0.0, 1.0)
    with pyro.plate(plate, len(x)):
        z = pyro.sample(name, prior)
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if more else 0.0
        pyro.sample("x", dist.Normal(z.reshape(len(x), -1).sum(-1) + w, 1.0), obs=x[..., 0])


OTHERS = {
    "name": ({"name": "y"}, r"'z' is missing; 'y' is new"),
    "plate": ({"plate": "rows"}, r"in the plates \['rows'\], not a Real of .* in the plates \['data'\]"),
    "support": ({"prior": dist.LogNormal(0.0, 1.0)}, r"'z' is a GreaterThan of .*, not a Real"),
    "shape": ({"prior": dist.Normal(torch.zeros(2), 1.0).to_event(1)}, r"event shape \(2,\).*, not .*\(\)"),
    "more": ({"more": True}, r"'w' is new"),
    "discrete": ({"prior": dist.Bernoulli(0.5)}, r"'z' is a Boolean"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused_at_the_first_call(tmp_path, change, message):
    x = rows().float()
    AmortizedGuide(one_by_one).setup(x).save(tmp_path / "g")
    guide = AmortizedGuide.load(tmp_path / "g", lambda x: one_by_one(x, **change))
    for ask in (guide, guide.posterior, guide.median):
        with pytest.raises(ValueError, match=r"not the model that the guide was saved for.*" + message):
            ask(x)
    guide.model = lambda x: one_by_one(x, prior=dist.Normal(0.0, 3.0))
    assert guide(x)["z"].shape == (4,)


def test_a_model_that_lacks_a_latent_is_another_one(tmp_path):
    x = rows().float()
    AmortizedGuide(lambda x: one_by_one(x, more=True)).setup(x).save(tmp_path / "g")
    with pytest.raises(ValueError, match="'w' is missing"):
        AmortizedGuide.load(tmp_path / "g", one_by_one)(x)


def test_only_the_first_call_must_reach_all_latents(tmp_path):
    model, x = one_by_one, rows().float()
    guide = AmortizedGuide(model, family={"w": DiagonalNormal()}, inputs=as_it_is_with).setup(x, more=True)
    guide.save(tmp_path / "g")
    loaded = AmortizedGuide.load(tmp_path / "g", model, inputs=as_it_is_with)
    with pytest.raises(ValueError, match="'w' is missing"):
        loaded(x, more=False)
    assert set(loaded(x, more=True)) == {"z", "w"}
    assert set(loaded(x, more=False)) == {"z"}


def as_it_is_with(x, more):
    return x


# --- files


@pytest.fixture
def guide_file(tmp_path):
    path = tmp_path / "guide.safetensors"
    AmortizedGuide(one_by_one, MLP(4, 0)).setup(rows().float()).save(path)
    return path


def refused(path, message=None, kind="guide"):
    with pytest.raises(UnreadableFileError, match=message) as caught:
        objects.load(path, kind)
    assert str(path) in str(caught.value)


def test_every_flipped_byte_is_noticed(guide_file):
    whole = guide_file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    digest = whole.index(b'sha256\\": \\"') + 12
    generator = seeded()
    places = {
        *generator.sample(range(len(whole)), 100),
        *range(8),
        *range(digest - 2, digest + 66),
        *range(length, len(whole), 7),
    }
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        guide_file.write_bytes(flipped)
        refused(guide_file)
    guide_file.write_bytes(whole)
    AmortizedGuide.load(guide_file, one_by_one)


def test_no_part_of_a_file_is_read(guide_file):
    whole = guide_file.read_bytes()
    for size in (0, 3, 8, 500, len(whole) // 2, len(whole) - 1):
        guide_file.write_bytes(whole[:size])
        refused(guide_file, "is damaged, cut short")
    guide_file.write_bytes(whole + b"\0")
    refused(guide_file, "is damaged")
    guide_file.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])  # more than any memory
    refused(guide_file, "is damaged")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_what_others_wrote_is_refused(guide_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide_file.write_bytes(pickle.dumps(Evil()))
    refused(guide_file, "another copy of it; what other programs wrote, such as a .pt file, is not read")
    torch.save(Evil(), guide_file)
    refused(guide_file, "such as a .pt file")
    safetensors.torch.save_file({"a": torch.ones(2)}, guide_file, {"pyro": "guides"})
    refused(guide_file, "is a safetensors file of something else")
    assert not (tmp_path / "evil").exists()
    monkeypatch.setattr(files, "_VERSION", 2)
    files.write(guide_file, {}, {})
    monkeypatch.setattr(files, "_VERSION", 1)
    refused(guide_file, "has format version 2, and 1 is the newest known here: upgrade pyro_guides")
    objects.save(guide_file, [1, 2], "checkpoint")
    refused(guide_file, "holds a checkpoint, not a guide")
    objects.save(guide_file, [1, 2], "guide")
    with pytest.raises(UnreadableFileError, match="does not hold what makes up a guide"):
        AmortizedGuide.load(guide_file, one_by_one)
    with pytest.raises(FileNotFoundError):
        AmortizedGuide.load(tmp_path / "nowhere", one_by_one)
    with pytest.raises(IsADirectoryError):
        AmortizedGuide.load(tmp_path, one_by_one)


def test_any_tool_reads_the_tensors(guide_file):
    loaded = safetensors.torch.load_file(guide_file)
    state = AmortizedGuide.load(guide_file, one_by_one).state_dict()
    assert loaded.keys() == state.keys()
    assert_same({name: loaded[name] for name in state}, dict(state))


TENSORS = {
    "0-d": torch.tensor(1.5),
    "empty": torch.zeros(3, 0),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3).half(),
    "brain": torch.randn(3).bfloat16(),
    "long": torch.tensor([2**62]),
    "double": torch.tensor([math.pi, math.nan, -math.inf], dtype=torch.float64),
    "strided": torch.randn(4, 6).t()[::2],
    "expanded": torch.ones(1).expand(3),
    'ünï ."\\': torch.ones(1),
}


def test_tensors_of_every_kind(tmp_path):
    shared = torch.arange(6.0)
    tensors = {**TENSORS, "shared": shared, "part": shared[2:4], "leaf": torch.ones(2, requires_grad=True)}
    description = {"a": [1, None, True, 'ü"sha256": "' + "0" * 64], "b": {"nan": math.nan, "inf": -math.inf}}
    files.write(tmp_path / "f", tensors, description)
    got, read = files.read(tmp_path / "f")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].nan_to_num(7.0), tensor.detach().nan_to_num(7.0))
    assert_same(read, description)
    got["shared"] += 1
    assert torch.equal(got["part"], shared[2:4])
    first = (tmp_path / "f").read_bytes()
    files.write(tmp_path / "f", tensors, description)
    assert (tmp_path / "f").read_bytes() == first
    for wrong in (torch.eye(2).to_sparse(), torch.empty(2, dtype=torch.bits8)):
        with pytest.raises(TypeError, match=r"expected a dense one|cannot hold tensors of these kinds"):
            files.write(tmp_path / "f", {"a": wrong}, {})
    with pytest.raises(ValueError, match="__metadata__"):
        files.write(tmp_path / "f", {"__metadata__": torch.ones(1)}, {})
    assert (tmp_path / "f").read_bytes() == first


# --- all or nothing


def limited(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(owner, name, error):
    def fault(monkeypatch):
        real = getattr(owner, name)

        def broken(*args, **kwargs):
            if name == "open" and args[-1] != "xb":
                return real(*args, **kwargs)
            raise error

        monkeypatch.setattr(owner, name, broken)
        return monkeypatch.undo

    return fault


FULL, DENIED = OSError(28, "No space left on device"), PermissionError(13, "Permission denied")
FAULTS = {
    "no space while writing": (limited, OSError, "File too large"),
    "no space at the end": (failing(os, "fsync", FULL), OSError, "No space left on device"),
    "directory not writable": (failing(Path, "open", DENIED), PermissionError, "Permission denied"),
    "not replaced": (failing(Path, "replace", DENIED), PermissionError, "Permission denied"),
    "interrupted": (failing(os, "fsync", KeyboardInterrupt()), KeyboardInterrupt, None),
}


@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_a_failed_save_leaves_the_file_of_before(guide_file, monkeypatch, fault, kind, message):
    before = guide_file.read_bytes()
    guide = AmortizedGuide(one_by_one).setup(rows().float())
    undo = fault(monkeypatch)
    try:
        with pytest.raises(kind, match=message) as caught:
            guide.save(guide_file)
    finally:
        undo()
    assert list(guide_file.parent.iterdir()) == [guide_file]
    assert guide_file.read_bytes() == before
    if message:
        assert "an earlier file is unchanged" in str(caught.value)
        assert caught.value.filename == str(guide_file)
    guide.save(guide_file)
    assert guide_file.read_bytes() != before


def test_where_a_file_goes(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    mask = os.umask(0o027)
    try:
        files.write(link, {}, 1)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert files.read(target) == ({}, 1)
    assert target.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError, match=r"unchanged: .*/no/f'"):
        files.write(tmp_path / "no" / "f", {}, 1)
    with pytest.raises(IsADirectoryError, match="no ordinary file"):
        files.write(tmp_path, {}, 1)


def test_leftovers_go_unless_somebody_is_at_work(tmp_path):
    dead, alive = (tmp_path / f".f.{digit * 16}.tmp" for digit in "ab")
    others = tmp_path / ".f.tmp", tmp_path / f".g.{'c' * 16}.tmp"
    for path in (dead, alive, *others):
        path.write_text("half")
    with alive.open("rb") as file:
        files._lock(file)
        files.write(tmp_path / "f", {}, 1)
    assert set(tmp_path.iterdir()) == {tmp_path / "f", alive, *others}
    files.write(tmp_path / "f", {}, 1)
    assert set(tmp_path.iterdir()) == {tmp_path / "f", *others}


def test_writers_of_one_file_leave_each_other_alone(tmp_path, monkeypatch):
    real = os.fsync

    def meanwhile(descriptor):
        real(descriptor)
        monkeypatch.undo()
        files.write(tmp_path / "f", {}, "second")

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write(tmp_path / "f", {}, "first")
    assert files.read(tmp_path / "f") == ({}, "first")  # the last to finish
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def killed_while_writing(path, kills):
    """Kill a process that writes one file after the other, again and again; how many leftovers it left."""
    leftovers, generator = 0, seeded()
    for _ in range(kills):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about forks and threads
            child = os.fork()
        if not child:
            try:
                for step in range(100_000):
                    files.write(path, {"a": torch.full((200_000,), float(step))}, step)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, step = files.read(path)
        assert (tensors["a"] == step).all()
        leftovers += len(list(path.parent.iterdir())) - 1
    files.write(path, {}, "last")
    assert list(path.parent.iterdir()) == [path]
    return leftovers


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_writer_loses_nothing(tmp_path, kills):
    path = tmp_path / "f"
    files.write(path, {"a": torch.zeros(1)}, 0)
    leftovers = killed_while_writing(path, kills)
    assert kills < 10 or leftovers  # some were killed in the midst of it


# --- trees of objects


class Tied(nn.Module):
    def __init__(self):
        super().__init__()


def shared_tree():
    linear, rate = nn.Linear(2, 2), [0.1]
    again = nn.Linear(2, 2)
    again.weight = linear.weight
    return {"modules": nn.ModuleList([linear, linear, again]), "rates": (rate, rate), "w": linear.weight}


def test_what_is_shared_stays_shared():
    tree = decode(*encode(shared_tree()))
    first, second, again = tree["modules"]
    assert first is second
    assert again is not first
    assert again.weight is first.weight is tree["w"]
    assert tree["rates"][0] is tree["rates"][1]
    assert len(encode(shared_tree())[1]) == 3  # one weight and two biases


TREES = {
    "numbers": [0, -0.0, 2**70, math.inf, -math.inf, True, None, 5e-324, "ü"],
    "containers": [(), [], {}, set(), ((1,), [2]), {"a"}, frozenset({2.5}), torch.Size([2, 3])],
    "keys": {1: "a", "1": "b", (0, "w"): "c", None: "d", 2.5: "e", torch.float32: "f"},
    "ordered": OrderedDict(b=1, a=2),
    "torch": [torch.float16, torch.device("cpu"), nn.functional.gelu, torch.tanh, MLP, nn.Linear],
    "random": [seeded().getstate(), torch.Generator().manual_seed(0).get_state()],
    "families": [NormalMixture(3), FLOW, Discrete(), LowRankNormal(2)],
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_plain_trees(tree):
    description, tensors = encode(tree)
    got = decode(json.loads(json.dumps(description)), tensors)
    assert_same(got, tree)
    assert repr(got) == repr(tree)


def test_states_of_optimizers():
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, amsgrad=True)
    for _ in range(2):
        sum((parameter**2).sum() for parameter in parameters).backward()
        optimizer.step()
    state = optimizer.state_dict()
    got = decode(*encode({"optimizers": [state]}))["optimizers"][0]
    assert_same(got, state)
    torch.optim.AdamW(parameters, lr=0.1, amsgrad=True).load_state_dict(got)


def nested_lists(depth):
    tree = []
    for _ in range(depth - 1):
        tree = [tree]
    return tree


def test_what_cannot_be_written_says_where():
    loop = {}
    loop["a"] = [loop]
    wrong = {
        "b.1 is builtins.bytes": {"b": [1, b"x"]},
        "a.0.0.a lies within itself": {"a": [loop["a"]]},
        "model is test_storage.Tied": {"model": Tied()},
        r"f is builtins.eval": {"f": eval},
        "f is posix.system": {"f": os.system},
        "has builtins.tuple as a key": {"a": {((1,), 2): 3}},
        "c is subprocess.Popen": {"c": subprocess.Popen},
        "deeper than 64": [nested_lists(5000)],
    }
    for message, tree in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            encode(tree)
    low = high = nested_lists(40)
    for _ in range(30):
        high = [high]
    with pytest.raises(ValueError, match="deeper than 64"):
        encode([low, high])  # neither is too deep where it is met first
    assert_same(decode(*encode(nested_lists(64))), nested_lists(64))


MAY_NOT, HAS_NOT = "none of the classes that a file may hold", "which this version .* does not have"
WRONG_KIND = "in a place where it cannot be"
EVIL = {
    "a class": (["object", "subprocess:Popen", {"args": "true"}], MAY_NOT),
    "a module not loaded": (["object", "antigravity:fly", {}], MAY_NOT),
    "ours, but not loaded": (["object", "pyro_guides.nowhere:Thing", {}], HAS_NOT),
    "an alias": (["object", "pyro_guides.storage.files:Path", {}], HAS_NOT),
    "a method": (["object", "pyro_guides.guide:AmortizedGuide.load", {}], HAS_NOT),
    "an exception": (["object", "pyro_guides.storage.files:UnreadableFileError", {}], HAS_NOT),
    "torch's own": (["object", "torch.nn.modules.module:_IncompatibleKeys", {}], HAS_NOT),
    "no module": (["module", "pyro_guides.groups:Group", True, [], {}, {}, {}, {}], "for a module"),
    "no object": (["object", "torch.nn.modules.linear:Linear", {}], "for what is no module"),
    "no class": (["object", 3, {}], MAY_NOT),
    "a class to call": (["class", "pyro_guides.groups:Group"], "for a module"),
    "a function": (["function", "os:system"], "none of those that a file may name"),
    "torch's loader": (["function", "torch:load"], "none of those that a file may name"),
    "a dtype": (["dtype", "load"], WRONG_KIND),
    "a lazy module": (["dtype", "_inductor"], WRONG_KIND),
    "a device": (["device", "/etc"], "device"),
    "hooks": (
        ["module", "pyro_guides.heads:LearnedHead", True, [], {}, {}, {}, {"_forward_hooks": 1}],
        "keep",
    ),
    "a child": (["module", "pyro_guides.heads:LearnedHead", True, [], {}, {}, {"a": 1}, {}], WRONG_KIND),
    "a parameter": (["module", "pyro_guides.heads:LearnedHead", True, [], {"a": 1}, {}, {}, {}], WRONG_KIND),
    "a GRU": (["module", "torch.nn.modules.rnn:GRU", True, [], {}, {}, {}, {}], "_flat_weights"),
    "a kind": (["exec", "1"], "exec"),
    "a node of its own": (["list", [[1]]], "made of later ones"),
    "a later node": (["list", [[5]]], "made of later ones"),
    "a negative node": (["list", [[-1]]], "made of later ones"),
    "a list of two": (["list", [[0, 0]]], "too many values"),
    "a bare dict": (["list", [{}]], WRONG_KIND),
    "no list": (["tuple", 7], WRONG_KIND),
    "an unhashable": (["set", [[0]]], "elements that it may not have"),
    "a tensor": (["tensor", "nowhere", False], "nowhere"),
    "an external": (["external", "encoder"], "encoder"),
    "nothing": ([], "not enough values"),
    "no node": (7, "int"),
}


@pytest.mark.parametrize(("node", "message"), EVIL.values(), ids=EVIL)
def test_evil_descriptions_are_refused_before_anything_is_imported(tmp_path, node, message):
    path, before = tmp_path / "f", set(sys.modules)
    contents = {"kind": "guide", "root": [0], "external": {}, "nodes": [["list", []], node]}
    files.write(path, {}, contents)
    refused(path, "holds no description of objects: .*" + message)
    assert set(sys.modules) == before


CHAIN = [["list", []], *(["list", [[i]]] for i in range(100))]
NO_DESCRIPTIONS = {
    "nothing": None,
    "a list": [],
    "no kind": {},
    "no externals": {"kind": "guide"},
    "no nodes": {"kind": "guide", "external": {}, "nodes": 3, "root": 1},
    "no root": {"kind": "guide", "external": {}, "nodes": [["list", []]], "root": [1]},
    "too deep": {"kind": "guide", "external": {}, "nodes": CHAIN, "root": [9]},
    "deep itself": nested_lists(300),
}


@pytest.mark.parametrize("description", NO_DESCRIPTIONS.values(), ids=NO_DESCRIPTIONS)
def test_descriptions_of_nothing_are_refused(tmp_path, description):
    files.write(tmp_path / "f", {}, description)
    refused(tmp_path / "f")


def test_deep_json_is_refused(tmp_path, monkeypatch):
    deep = "[" * 100_000 + "]" * 100_000
    text = f'{{"sha256": "{"0" * 64}", "version": 1, "description": {deep}}}'
    monkeypatch.setattr(json, "dumps", lambda contents: text)
    files.write(tmp_path / "f", {}, None)
    refused(tmp_path / "f", "is damaged")
