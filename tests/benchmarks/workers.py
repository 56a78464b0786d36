"""Independent runs in processes of their own, one per core, one thread each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

__all__ = ["each"]


def each(function: Callable[..., Any], items: Iterable[Any], processes: int | None = None) -> list[Any]:
    """What ``function`` returns for every item, in their order.

    A process serves many items, so that a function must not rely on what it finds there: seeds and
    parameter stores are its own business (``clock.isolated``).
    """
    context = get_context("spawn")  # a fork would inherit torch's threads in whatever state they are
    work = list(items)
    workers = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_alone) as pool:
        return list(_told(pool.map(function, work), len(work)))


def _told(results: Iterator[Any], count: int) -> Iterator[Any]:
    """The results, each announced as it comes: some runs take an hour."""
    for done, result in enumerate(results, start=1):
        print(f"{done} of {count}", file=sys.stderr, flush=True)
        yield result


def _alone() -> None:
    torch.set_num_threads(1)
