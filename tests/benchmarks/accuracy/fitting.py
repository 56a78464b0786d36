"""Guides, and how each is trained: one setting for all targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, init_to_feasible
from pyro.optim import ClippedAdam

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, NormalizingFlow, NormalMixture, fit
from tests.benchmarks.accuracy.targets import Target
from tests.benchmarks.clock import isolated

__all__ = ["OURS", "PARTICLES", "PYROS", "trained", "workplace"]

PARTICLES = 4
_RATE, _DECAY = 0.01, 20.0

_FAMILIES = {
    "diagonal": DiagonalNormal,
    "full rank": FullRankNormal,
    "flow": NormalizingFlow,
    "mixture": partial(NormalMixture, 2),
}


def _autoregressive(size: int) -> Any:
    """Two transforms of Pyro's, whose networks must be at least as wide as what they transform."""
    return iterated(2, affine_autoregressive, size, hidden_dims=[max(64, size)] * 2)


_AUTOGUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": partial(AutoNormal, init_loc_fn=init_to_feasible),
    "AutoMultivariateNormal": partial(AutoMultivariateNormal, init_loc_fn=init_to_feasible),
    "AutoNormalizingFlow": partial(AutoNormalizingFlow, init_transform_fn=_autoregressive),
}
OURS, PYROS = tuple(_FAMILIES), tuple(_AUTOGUIDES)


@contextmanager
def workplace(seed: int) -> Iterator[None]:
    """Float64, one thread, random numbers from a seed, and nothing left behind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with isolated(), pyro.validation_enabled(False):
            pyro.set_rng_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def trained(target: Target, name: str, steps: int, seed: int) -> tuple[Callable[..., Any], float]:
    """A guide of that name, trained on the target, and the seconds it took."""
    began = time.perf_counter()
    make = _fitted if name in _FAMILIES else _stepped
    guide = make(target, name, steps, seed)
    return guide, time.perf_counter() - began


def _fitted(target: Target, name: str, steps: int, seed: int) -> Callable[..., Any]:
    """One of ours by ``fit``: λ of all latents are parameters, since there is one data set to serve."""
    guide = AmortizedGuide(target.model, family=_FAMILIES[name](), amortize=())
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)
    options: dict[str, Any] = {"batch_size": None, "max_steps": steps, "learning_rate": _RATE}
    fit(target.model, guide, target.data, loss=elbo, seed=seed, progress=False, **options)
    return guide


def _stepped(target: Target, name: str, steps: int, seed: int) -> Callable[..., Any]:
    """One of Pyro's by plain steps."""
    guide = _AUTOGUIDES[name](target.model)
    optimizer = ClippedAdam({"lr": _RATE, "lrd": _DECAY ** (-1.0 / steps)})
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=target.nesting)
    svi = SVI(target.model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*target.data)
    return guide
