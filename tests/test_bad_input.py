"""Every bad call must say what is wrong and what to do, and leave everything as it was.

A message is written as its parts in order, joined by " ... ": the site or argument, what was expected, what
was got, the next step. Afterwards guide, encoder and Pyro's store are unchanged, and a good call works.
"""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    calibrate,
    to_arviz,
)

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
INF, NAN = float("inf"), float("nan")
ZEROS = torch.zeros(8)
ONES = torch.ones(8)


def spoilt(value, *rows):
    x = X.clone()
    x[list(rows), 1] = value
    return x


# --- models


def rows(x=None, y=None, *, fault="", dtype=torch.float32):
    """The usual model: two latents per row; ``fault`` names what goes wrong."""
    if fault == "raise":
        raise LookupError("the model's own error")
    size = 8 if fault == "size" else 8 // (fault != "divide")
    with pyro.plate("data", len(x) if fault != "size" else size, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        with poutine.scale(scale=2.0 if fault == "scale" else 1.0):
            s = z.exp() if fault == "gone" else pyro.sample("s", dist.LogNormal(0.0 * z, 1.0))
        if fault == "new":
            pyro.sample("new", dist.Normal(z, 1.0))
        if x.is_floating_point():
            pyro.sample("x", dist.Normal(z[..., None].to(x), s[..., None].to(x)).to_event(1), obs=x)


def double_rows(x):
    rows(x, dtype=torch.float64)


def one(name="z", fn=None, **options):
    return lambda x: pyro.sample(name, fn or dist.Normal(0.0, 1.0), **options)


def twice(x):
    return one()(x), one()(x)


def sequential(x):
    return [one(f"z_{i}")(x) for i in pyro.plate("data", len(x))]


def subsampled(x):
    with pyro.plate("data", 8, subsample_size=4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def grid(x, n=8, m=3):
    with pyro.plate("row", n, dim=-2), pyro.plate("column", m, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def plates(x):
    return pyro.plate("data", 8, dim=-1) if len(x) == 8 else ["data"]


def computed(x):
    rows(x + 1.0)


class Encoder(nn.Module):
    """Returns something bad while ``spoil`` is set."""

    def __init__(self):
        super().__init__()
        self.linear, self.spoil = nn.Linear(3, 4), lambda context: context

    def forward(self, x):
        return self.spoil(self.linear(x))


def spoiling(spoil):
    """A call during which the guide's encoder returns ``spoil(context)``."""

    def call(guide):
        encoder = guide._plan.encoder
        original, encoder.spoil = encoder.spoil, spoil
        try:
            guide(X)
        finally:
            encoder.spoil = original

    return call


# --- the tables

# fmt: off
# How guides are made that have good calls, too: model, options, good call.
GUIDES = {
    "rows": (rows, dict, lambda g: g(X)),
    "own MLP": (rows, lambda: {"encoder": MLP(width=8)}, lambda g: g(X)),
    "missing": (rows, lambda: {"encoder": MLP(missing=True)}, lambda g: g(spoilt(NAN, 1, 4))),
    "encoder": (rows, lambda: {"encoder": Encoder()}, lambda g: g(X)),
    "fixed": (rows, dict, lambda g: g(X, fault="size")),
    "keyword": (rows, dict, lambda g: g(x=X)),
    "double": (double_rows, dict, lambda g: g(X.double())),
    "learned": (rows, lambda: {"amortize": ()}, lambda g: g(X)),
    "subsampled": (subsampled, lambda: {"amortize": ["data"]}, lambda g: g(X)),
    "inputs": (rows, lambda: {"inputs": lambda x: x[:8]}, lambda g: g(X)),
    "grid": (grid, dict, lambda g: g(X)),
    "computed": (computed, dict, lambda g: g(X)),
    "whole": (one(), lambda: {"encoder": nn.Sequential(nn.Flatten(), nn.Linear(24, 4))}, lambda g: g(X)),
    "plates": (rows, lambda: {"create_plates": plates}, lambda g: g(X)),
}
# name: guide, phases (a bad first call, a bad later call), bad call, error, message
CALLS = {
    "nan": ("rows", "fl", lambda g: g(spoilt(NAN, 2, 5)), ValueError,
        "argument 0 holds NaN in 2 of 8 rows ... [2, 5] ... MLP(missing=True)"),
    "all nan": ("rows", "fl", lambda g: g(X * NAN), ValueError, "NaN in 8 of 8 rows ... [0, 1, 2, 3, 4]"),
    "inf": ("rows", "fl", lambda g: g(spoilt(-INF, 7)), ValueError,
        "argument 0 holds infinite values in 1 of 8 rows ... [7] ... remove them"),
    "nan, own MLP": ("own MLP", "fl", lambda g: g(spoilt(NAN, 0)), ValueError, "NaN in 1 of 8 rows ... [0]"),
    "nan, own encoder": ("encoder", "fl", lambda g: g(spoilt(NAN, 0)), ValueError, "NaN in 1 of 8 rows"),
    "inf, missing": ("missing", "fl", lambda g: g(spoilt(INF, 1)), ValueError,
        "infinite values in 1 of 8 rows ... [1]; remove them"),
    "features": ("rows", "l", lambda g: g(X[:, :2]), ValueError,
        "argument 0 has features of shape (2,) ... set up with (3,) ... same features"),
    "rank": ("subsampled", "l", lambda g: g(X[:, 0]), ValueError,
        "argument 0 has shape (8,), expected the plates ['data'] ... (3,) ... (1, ...)"),
    "higher rank": ("subsampled", "l", lambda g: g(X.expand(5, 8, 3)), ValueError,
        "argument 0 ... (5, 8, 3) ... 'data'"),
    "higher rank 2": ("grid", "l", lambda g: g(X.expand(5, 8, 3)), ValueError, "argument 0 ... (5, 8, 3)"),
    "integers": ("rows", "fl", lambda g: g(X.long()), TypeError, "argument 0 ... torch.int64 ... .float()"),
    "booleans": ("rows", "fl", lambda g: g(X > 0), TypeError, "argument 0 ... torch.bool ... .float()"),
    "float64": ("rows", "fl", lambda g: g(X.double()), TypeError,
        "argument 0 is torch.float64 ... torch.float32 ... .to('cpu', torch.float32)"),
    "float64, own MLP": ("own MLP", "fl", lambda g: g(X.double()), TypeError, "argument 0 is torch.float64"),
    "float32": ("double", "fl", lambda g: g(X), TypeError,
        "argument 0 is torch.float32 ... torch.float64 ... .to('cpu', torch.float64)"),
    "no rows": ("rows", "fl", lambda g: g(X[:0]), ValueError,
        "plate 'data' has size 0 ... empty ... at least one row"),
    "too many rows": ("fixed", "fl", lambda g: g(X.repeat(2, 1), fault="size"), ValueError,
        "plate 'data' has size 8, but its batch has 16 rows ... whole data set"),
    "neither batch nor all": ("subsampled", "l", lambda g: g(X[:5]), ValueError,
        "argument 0 has 5 rows in dimension 0 ... plate 'data' has 4 of 8 ... or all of them"),
    "other rows, learned": ("learned", "l", lambda g: g(X[:5]), ValueError,
        "latents 'z', 's' are learned per element of the plates ['data'] ... (8,) ... (5,) ... Amortize"),
    "ambiguous": ("rows", "f", lambda g: g(X, y=X), ValueError,
        "argument 0 (8, 3); argument 'y' (8, 3) ... inputs= ... {'0': args[0], 'y': kwargs['y']}"),
    "no tensor": ("subsampled", "l", lambda g: g(list(X)), TypeError,
        "argument 0 is a list, expected a torch.Tensor"),
    "keyword missing": ("keyword", "l", lambda g: g(X), TypeError,
        "argument 'x' is missing ... the encoder's input"),
    "inputs: rows": ("inputs", "l", lambda g: g(X.repeat(2, 1)), ValueError,
        "inputs(...) for latents 'z', 's' has 8 rows in dimension 0 ... plate 'data' has 16"),
    "encoder: tuple": ("encoder", "fl", spoiling(lambda c: (c, c)), TypeError,
        "encoder Encoder returned tuple, expected one float tensor of shape (8, C) ... wrap it"),
    "encoder: none": ("encoder", "fl", spoiling(lambda c: None), TypeError,
        "encoder Encoder returned NoneType"),
    "encoder: integers": ("encoder", "fl", spoiling(lambda c: c.long()), TypeError,
        "Encoder returned torch.int64"),
    "encoder: rows": ("encoder", "fl", spoiling(lambda c: c[:5]), ValueError,
        "encoder Encoder ... shape (5, 4), expected (8, C)"),
    "encoder: 1-D": ("encoder", "fl", spoiling(lambda c: c[:, 0]), ValueError,
        "encoder Encoder ... shape (8,), expected (8, C)"),
    "encoder: 3-D": ("encoder", "fl", spoiling(lambda c: c[None]), ValueError,
        "shape (1, 8, 4), expected (8, C)"),
    "encoder: NaN": ("encoder", "fl", spoiling(lambda c: c * NAN), ValueError,
        "encoder Encoder returned NaN or infinite values ... lower the learning rate"),
    "encoder: float64": ("encoder", "f", spoiling(lambda c: c.double()), TypeError,
        "context is torch.float64 ... torch.float32"),
    "encoder: dtype": ("encoder", "l", spoiling(lambda c: c.double()), ValueError,
        "encoder ... torch.float64 ... torch.float32"),
    "encoder: width": ("encoder", "l", spoiling(lambda c: c[:, :2]), ValueError,
        "encoder ... 2 ... 4"),
    "nothing to read": ("whole", "f", lambda g: g(3), ValueError,
        "an encoder was given ... no float tensor ... inputs="),
    "plates": ("plates", "l", lambda g: g(X[:5]), TypeError,
        "create_plates must return pyro.plate ... 'data'"),
    "model raises": ("rows", "fl", lambda g: g(X, fault="raise"), LookupError, "the model's own error"),
    "model divides": ("rows", "fl", lambda g: g(X, fault="divide"), ZeroDivisionError, "by zero"),
    "latent gone": ("rows", "l", lambda g: g(X, fault="gone"), ValueError,
        "'z', 's' are drawn jointly ... does not sample 's' ... family={'s': ...}"),
    "latent new": ("rows", "l", lambda g: g(X, fault="new"), ValueError,
        "latents ['new'] ... not there when the guide was set up"),
    "scales": ("rows", "l", lambda g: g(X, fault="scale"), ValueError,
        "'z', 's' ... jointly ... 'z' by 1.0 and 's' by 2.0 ... family={'s': ...} ... DiagonalNormal"),
    "parameters": ("rows", "f", lambda g: list(g.parameters()), RuntimeError,
        "no parameters yet ... guide.setup(*args)"),
    "load": ("rows", "f", lambda g: g.load_state_dict({}), RuntimeError,
        "no parameters yet ... guide.setup(*args)"),
    "save": ("rows", "f", lambda g: g.state_dict(), RuntimeError, "no parameters yet ... guide.setup(*args)"),
    "without model": ("rows", "l", lambda g: pickle.loads(pickle.dumps(g))(X[:5]), RuntimeError,  # noqa: S301
        "loaded without its model ... set guide.model = model"),
    "same name": ("rows", "l", lambda g: AmortizedGuide(rows, name=g._store_name)(X), RuntimeError,
        "another tensor under 'AmortizedGuide ... another name= ... clear_param_store"),
    "simulated": ("computed", "l", lambda g: g(X, observations={"x": X}), ValueError,
        "observed site 'x' is not one of the model's arguments ... pass it to the model"),
    "simulated: name": ("rows", "l", lambda g: g(X, observations={"w": X}), ValueError, "'w' ... ['x']"),
    "draws: 0": ("rows", "l", lambda g: g.posterior(X, num_draws=0), ValueError,
        "num_draws must be at least 1, got 0"),
    "draws: 1.5": ("rows", "l", lambda g: g.posterior(X, num_draws=1.5), TypeError, "num_draws ... 1.5"),
    "quantiles: 1.5": ("rows", "l", lambda g: g.quantiles([0.5, 1.5], X), ValueError,
        "quantiles must be ... from 0 to 1, got [0.5, 1.5]"),
    "quantiles: NaN": ("rows", "l", lambda g: g.quantiles([NAN], X), ValueError,
        "quantiles must be ... from 0 to 1, got [nan]"),
    "quantiles: none": ("rows", "l", lambda g: g.quantiles([], X), ValueError, "quantiles"),
    "log_prob: site": ("rows", "l", lambda g: g.log_prob({"z": ZEROS}, X), ValueError,
        "all latents ... 's' is missing"),
    "log_prob: shape": ("rows", "l", lambda g: g.log_prob({"z": ZEROS[:5], "s": ONES}, X), ValueError,
        "'z' has shape (5,), expected (8,) or (S, 8)"),
    "log_prob: draws": ("rows", "l", lambda g: g.log_prob({"z": X.T, "s": ONES.expand(4, 8)}, X), ValueError,
        "'z' ... 3 ... 's' ... 4"),
    "log_prob: number": ("rows", "l", lambda g: g.log_prob({"z": 0.0, "s": ONES}, X), TypeError,
        "'z' ... float"),
    "log_prob: support": ("rows", "l", lambda g: g.log_prob({"z": ZEROS, "s": -ONES}, X), ValueError,
        "'s' ... support"),
    "log_prob: name": ("rows", "l", lambda g: g.log_prob({"z": ZEROS, "s": ONES, "zed": ONES}, X), ValueError,
        "'zed'"),
    "dims: name": ("rows", "l", lambda g: to_arviz(g.posterior(X), dims={"zed": ["a"]}), ValueError,
        "dims names 'zed' ... 'z'"),
    "dims: number": ("rows", "l", lambda g: to_arviz(g.posterior(X), dims={"z": ["a"]}), ValueError,
        "'z' ... 'a'"),
    "bound: count": ("rows", "l", lambda g: g.posterior(X, num_draws=3).bound(2.5), TypeError,
        "num_draws must be an int, got 2.5"),
    "batches": ("rows", "l", lambda g: next(g.posteriors(X)), TypeError,
        "batches must be a DataLoader ... got a Tensor; ... split"),
    "calibrate": ("rows", "l", calibrate, TypeError,
        "takes what guide.posterior(...) returns ... AmortizedGuide"),
}
# Guides that no call suits: model, options, error, message.
GUIDES_OF_NO_USE = {
    "inputs: array": (rows, {"inputs": lambda x: x.numpy()}, TypeError,
        "inputs(...) for latents 'z', 's' is a ndarray, expected a torch.Tensor"),
    "inputs: integers": (rows, {"inputs": lambda x: x.long()}, TypeError,
        "inputs(...) ... torch.int64 ... .float()"),
    "inputs: rows": (rows, {"inputs": lambda x: x[:7]}, ValueError, "inputs(...) ... (7, 3) ... ('data', 8)"),
    "inputs: rows, by plate": (rows, {"inputs": {"data": lambda x: x[:7]}}, ValueError,
        "'z', 's' ... ('data', 8)"),
    "nothing fits": (grid, {"amortize": ["column"], "inputs": lambda x: x}, ValueError,
        "'z' ... ('column', 3)"),
    "two plates fit": (lambda x: grid(x, 8, 8), {}, ValueError,
        "(8, 3) ... ['row'] or ['column'] ... amortize=["),
    "one encoder per site": (rows, {"encoder": {"z": Encoder(), "s": Encoder()}}, ValueError,
        "'z', 's' ... ['z', 's'] name different choices"),
    "one encoder per plate": (grid, {"encoder": {"row": MLP(), "column": MLP()}}, ValueError,
        "'z' ... 'row', 'column' ... different choices ... name the site"),
    "family of": (rows, {"family": {"zed": DiagonalNormal()}}, ValueError,
        "family={...} names ['zed'] ... ['z', 's'] ... ['data']"),
    "encoder of": (rows, {"encoder": {"x": MLP()}}, ValueError,
        "encoder={...} names ['x'] ... ['z', 's'] ... ['data']"),
    "inputs of": (rows, {"inputs": {"dat": len}}, ValueError,
        "inputs={...} names ['dat'] ... ['z', 's'] ... ['data']"),
    "amortize": (rows, {"amortize": ["z"]}, ValueError, "amortize=['z'] names ['z'] ... ['data']"),
    "no latents": (lambda x: None, {}, RuntimeError, "the model has no latent variables ... obs="),
    "two of a name": (twice, {}, ValueError, "two sites named 'z' ... its own name"),
    "sequential plate": (sequential, {}, NotImplementedError,
        "'z_0' lies in the sequential plate 'data' ... with pyro.plate("),
    "no plate": (one(fn=dist.Normal(ZEROS, 1.0)), {}, ValueError,
        "'z' has batch shape (8,) ... dim -1 ... .to_event("),
    "count": (one("k", dist.Poisson(3.0)), {}, ValueError,
        "'k' is discrete ... no list of at most 1024 values ... truncate a count ... hide=['k']"),
    "spherical": (one("v", dist.VonMises3D(torch.ones(3))), {}, ValueError,
        "'v' lives on a sphere ... ProjectedNormalReparam"),
    "init: edge": (rows, {"init_loc_fn": init_to_value(values={"s": ZEROS})}, ValueError,
        "'s' ... edge of its support ... inside"),
    "init: outside": (rows, {"init_loc_fn": init_to_value(values={"s": -ONES})}, ValueError,
        "'s' ... support ... inside"),
}
# What the constructors refuse at once: arguments, error, message.
ARGUMENTS = { "init_scale: 0": ({"init_scale": 0.0}, ValueError, "init_scale must be positive ... 0.0"),
    "init_scale: -1": ({"init_scale": -1}, ValueError, "init_scale must be positive ... -1"),
    "init_scale: NaN": ({"init_scale": NAN}, ValueError, "init_scale must be positive ... nan"),
    "init_scale: inf": ({"init_scale": INF}, ValueError, "init_scale must be positive ... inf"),
    "init_scale: tiny": ({"init_scale": 1e-9}, ValueError, "init_scale must be ... 1e-06 ... 1e-09"),
    "init_scale: string": ({"init_scale": "0.1"}, TypeError, "init_scale must be a number, got '0.1'"),
    "init_scale: bool": ({"init_scale": True}, TypeError, "init_scale must be a number, got True"),
    "family: string": ({"family": "FullRankNormal"}, TypeError,
        "family must be ... FullRankNormal(), got 'FullRankNormal'"),
    "family: class": ({"family": FullRankNormal}, TypeError,
        "family must be ... FullRankNormal(), got <class"),
    "family: dict of classes": ({"family": {"z": DiagonalNormal}}, TypeError,
        "family must be ... got <class"),
    "encoder: function": ({"encoder": torch.tanh}, TypeError,
        "encoder must be a torch.nn.Module, got <built-in"),
    "encoder: class": ({"encoder": MLP}, TypeError, "encoder must be a torch.nn.Module, got <class"),
    "encoder: dict": ({"encoder": {"data": len}}, TypeError,
        "encoder must be a torch.nn.Module, got <built-in"),
    "inputs: tensor": ({"inputs": X}, TypeError, "inputs must be a function of the model's arguments, got"),
    "inputs: dict": ({"inputs": {"data": 0}}, TypeError,
        "inputs must be a function of the model's arguments, got 0"),
    "amortize: string": ({"amortize": "data"}, TypeError,
        "amortize must be a list of plate names ... 'data'"),
    "amortize: bool": ({"amortize": True}, TypeError, "amortize must be a list of plate names ... True"),
    "init_loc_fn": ({"init_loc_fn": 0.0}, TypeError, "init_loc_fn must be a function ... 0.0"),
    "create_plates": ({"create_plates": ["data"]}, TypeError,
        "create_plates must be a function ... ['data']"),
    "name": ({"name": 3}, TypeError, "name must be ... 3"),
    "model": ({"model": "rows"}, TypeError, "model must be ... 'rows'"),
}
# fmt: on


def check(message, pattern):
    """All parts of the pattern occur, in their order."""
    position = 0
    for part in pattern.split(" ... "):
        position = message.find(part, position)
        assert position >= 0, f"no {part!r} in its place in: {message}"
        position += len(part)


def state_of(guide):
    """Everything that a bad call must not change."""
    store = pyro.get_param_store()
    found = {f"store.{name}": store[name].detach().clone() for name in store}
    modules = {"guide": guide if guide.is_set_up else None, "encoder": guide._plan.encoder}
    for label, module in modules.items():
        tensors = module.state_dict() if isinstance(module, nn.Module) else {}
        found |= {f"{label}.{name}": value.clone() for name, value in tensors.items()}
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0, msg=f"{name} has changed")


def raised_by(call, guide, error):
    """The message, and the guide and Pyro as they were."""
    before, set_up = state_of(guide), guide.is_set_up
    with pytest.raises(error) as caught:
        call(guide)
    assert caught.type is error
    assert guide.is_set_up is set_up
    assert_same(before, state_of(guide))
    assert (list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)) == ([], [])
    return str(caught.value)


@pytest.mark.parametrize(("name", "phase"), [(n, p) for n, row in CALLS.items() for p in row[1]])
def test_bad_call(name, phase):
    made, _, bad, error, message = CALLS[name]
    model, options, good = GUIDES[made]
    guide = AmortizedGuide(model, **options())
    if phase == "l":
        good(guide)
    check(raised_by(bad, guide, error), message)
    assert all(value.isfinite().all() for value in good(guide).values())


@pytest.mark.parametrize("name", GUIDES_OF_NO_USE)
def test_bad_guide(name):
    model, options, error, message = GUIDES_OF_NO_USE[name]
    guide = AmortizedGuide(model, **options)
    for _ in range(2):  # the same again, not an error about what the first attempt left behind
        check(raised_by(lambda g: g(X), guide, error), message)
    assert not guide.is_set_up
    AmortizedGuide(rows)(X)  # control: the call is good


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_argument(name):
    options, error, message = ARGUMENTS[name]
    with pytest.raises(error) as caught:
        AmortizedGuide(**{"model": rows} | options)
    check(str(caught.value), message)
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize(
    ("rank", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_rank(rank, error):
    with pytest.raises(error) as caught:
        AmortizedGuide(rows, family=LowRankNormal(rank))
    check(str(caught.value), f"LowRankNormal: rank must be ... got {rank}")


def test_there_are_enough_rows_and_the_checker_checks():
    assert sum(len(row[1]) for row in CALLS.values()) + len(GUIDES_OF_NO_USE) + len(ARGUMENTS) >= 45
    check("a b c", "a ... c")
    for wrong in ("c ... a", "a ... d"):
        with pytest.raises(AssertionError, match="in its place"):
            check("a b c", wrong)
    with pytest.raises(AssertionError, match="has changed"):
        assert_same({"a": ZEROS}, {"a": ONES})
