"""Times steps against each other on a machine that does other things too.

Absolute times mean little there. All candidates take turns within short rounds, each round gives one ratio
per candidate, and the median over the rounds is reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["SEED", "Allocations", "Effort", "Step", "Timing", "allocations", "compare", "isolated", "seeded"]

SEED = 0

Step = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 40
    steps: int = 10
    warmup: int = 20


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU per step: one number per round, in the order of the rounds."""

    rounds: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        """The median."""
        return 1e3 * statistics.median(self.rounds)

    def over(self, other: Timing) -> tuple[float, float]:
        """Median ratio of the rounds to another candidate's, and half the distance of its quartiles."""
        ratios = sorted(a / b for a, b in zip(self.rounds, other.rounds, strict=True))
        if len(ratios) < 2:
            return ratios[0], 0.0
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, 0.5 * (high - low)


@contextmanager
def isolated() -> Iterator[None]:
    """One thread, a parameter store of its own, and both left as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pyro.get_param_store().scope(), torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def seeded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``make`` returns, from the same seed for every candidate."""
    pyro.set_rng_seed(SEED)
    return make(*args, **kwargs)


def compare(steps: Mapping[str, Step], effort: Effort) -> dict[str, Timing]:
    """CPU time per step of all candidates, measured in turns."""
    for step in steps.values():
        for _ in range(effort.warmup):
            step()
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would hit whoever happens to be running
    try:
        for round_ in range(effort.rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_seconds(steps[name], effort.steps))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(rounds)) for name, rounds in times.items()}


def _seconds(step: Step, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


@dataclass(frozen=True)
class Allocations:
    """What one step allocates: all bytes, and the elements of the largest single tensor."""

    bytes: int
    largest: int


def allocations(step: Step) -> Allocations:
    """Count the tensors that torch operations allocate in one step, backward included."""
    with _AllocationCounter() as counter:
        step()
    return Allocations(counter.bytes, counter.largest)


class _AllocationCounter(TorchDispatchMode):
    """Adds up the results of all operations that are not views of, or writes to, their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if _storage(tensor) not in known:
                self.bytes += tensor.untyped_storage().nbytes()
                self.largest = max(self.largest, tensor.numel())
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
