"""The generators of random numbers that a step may draw from: torch's, NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch

__all__ = ["Stream", "load_state", "own_numbers", "seed_of", "state"]

_LARGEST = 2**63 - 1


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, each of which matters."""
    mixed = np.random.SeedSequence([number % 2**64 for number in numbers])
    return int(mixed.generate_state(1, np.uint64)[0]) & _LARGEST


@contextmanager
def own_numbers(*numbers: int) -> Iterator[None]:
    """Random numbers that depend on a seed alone, and leave those outside as they were."""
    before = _read()
    _seed(seed_of(*numbers))
    try:
        yield
    finally:
        _restore(before)


@final
class Stream:
    """Random numbers of one's own that go on, each time it is opened, where they stopped."""

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._state: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw from it; the numbers outside stay as they were."""
        outside = _read()
        if self._seed is not None:
            _seed(self._seed)
            self._seed = None
        else:
            _restore(self._state)
        try:
            yield
        finally:
            self._state = _read()
            _restore(outside)


def state() -> dict[str, Any]:
    """The states of all generators, as a file can hold them."""
    found = _read()
    kind, key, position, has_gauss, gauss = found["numpy"]
    version, internal, next_gauss = found["python"]
    found["numpy"] = [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, gauss]
    found["python"] = [version, torch.tensor(internal, dtype=torch.int64), next_gauss]
    return found


def load_state(saved: dict[str, Any]) -> None:
    """Go back to a :func:`state`."""
    kind, key, position, has_gauss, gauss = saved["numpy"]
    version, internal, next_gauss = saved["python"]
    numpy = (kind, key.numpy().astype(np.uint32), position, has_gauss, gauss)
    _restore({**saved, "numpy": numpy, "python": (version, tuple(internal.tolist()), next_gauss)})


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a traceback, for CUDA to come
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users' models draw from it
    random.seed(seed)


def _read() -> dict[str, Any]:
    found = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():  # otherwise nobody has drawn there
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _restore(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    np.random.set_state(saved["numpy"])  # noqa: NPY002
    random.setstate(saved["python"])
    if torch.cuda.is_initialized():  # maybe on another machine, with fewer devices
        for device, one in zip(range(torch.cuda.device_count()), saved.get("cuda", ()), strict=False):
            torch.cuda.set_rng_state(one, device)
