"""Models, encoders and guides that bad inputs are given to."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, calibrate, check

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
INF, NAN = float("inf"), float("nan")
ZEROS = torch.zeros(8)
ONES = torch.ones(8)


def spoilt(value, *rows):
    x = X.clone()
    x[list(rows), 1] = value
    return x


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


# --- what else is asked bad things


def whole_rows(x):
    """Rows whose observations have the shape of the data, so that data can be simulated."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0 * z, 1.0))
        likelihood = dist.Normal(z[..., None], s[..., None]).expand([*z.shape, 3])
        pyro.sample("x", likelihood.to_event(1), obs=x)


def levels(x):
    """A latent that all rows share."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


def with_a_flag(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k[..., None], 1.0).expand([*k.shape, 3]).to_event(1), obs=x)


def new_guide(model=whole_rows, **options):
    return AmortizedGuide(model, **options)


@cache
def guide(model=whole_rows):
    """A guide that is set up; nothing may train it."""
    return AmortizedGuide(model, family=DiagonalNormal()).setup(X)


@cache
def posterior(draws=30, model=whole_rows):
    return guide(model).posterior(X, num_draws=draws)


@cache
def report():
    return check(posterior(), gaps=False, modes=False, show=False)


@cache
def calibration():
    return calibrate(posterior(), num_simulations=100, num_draws=20, seed=0)


@cache
def folder():
    return Path(mkdtemp(prefix="bad_inputs"))


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
# fmt: on
