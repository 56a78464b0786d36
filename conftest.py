"""Every test and doctest starts from seed 0 and must leave the process as it found it.

This file is at the root because a `tests/conftest.py` does not reach the package's doctests.
"""

import sys
import warnings
import zlib

import pyro
import pytest
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch.distributions import Distribution


def _refill(target):
    """Return a setter that restores a list in place, for lists that others hold by reference."""
    return lambda values: target.__setitem__(slice(None), values)


# What is watched: how to read it, and how to put it back so that one leak fails one test.
GLOBAL_STATE = {
    "torch default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    # None, not the device read: setting "cpu" would install a dispatch mode that was not there.
    "torch default device": (torch.get_default_device, lambda _: torch.set_default_device(None)),
    "torch thread count": (torch.get_num_threads, torch.set_num_threads),
    "torch grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch distribution validation": (
        lambda: Distribution._validate_args,
        Distribution.set_default_validate_args,
    ),
    "Pyro settings": (pyro.settings.get, lambda values: pyro.settings.set(**values)),
    "Pyro handler stack": (lambda: list(_PYRO_STACK), _refill(_PYRO_STACK)),
    "Pyro plate dimensions": (
        lambda: list(_DIM_ALLOCATOR._stack),
        _refill(_DIM_ALLOCATOR._stack),
    ),
    # A tuple, and replaced whole: pytest swaps the list itself around each test.
    "warnings filters": (lambda: _filters(), lambda f: _refill(warnings.filters)(f)),
}


def _filters():
    """The filters of warnings, but for the one that xarray adds whenever it reads a file."""
    return tuple(f for f in warnings.filters if getattr(f[1], "pattern", f[1]) != "decode_timedelta")


def snapshot():
    """Return the present value of everything watched."""
    return {name: read() for name, (read, _) in GLOBAL_STATE.items()}


def restore(before):
    """Put back what differs from `before`, and return one line for each difference."""
    after = snapshot()
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        GLOBAL_STATE[name][1](before[name])
    return [f"{name}: {before[name]} -> {after[name]}" for name in changed]


def pytest_configure():
    """Use one thread: the tests are small, and sums in one order are reproducible."""
    torch.set_num_threads(1)


# Runs in an environment of its own, with a package that is not wanted here.
collect_ignore = ["tests/benchmarks/sbibm/with_sbi.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(items):
    """Of large products of parametrizations, all tiers but the last run a third: the same one every time."""
    for item in items:
        if item.get_closest_marker("crossed") and zlib.crc32(item.nodeid.encode()) % 3:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def guard_global_state():
    """Seed the test, and fail it if it leaves global state changed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before, modules = snapshot(), len(sys.modules)
    yield
    pyro.clear_param_store()
    if len(sys.modules) > modules:  # packages add filters of their own when first imported
        before["warnings filters"] = _filters()
    if changes := restore(before):
        pytest.fail("the test left global state changed:\n  " + "\n  ".join(changes))
