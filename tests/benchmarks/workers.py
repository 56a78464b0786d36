"""Independent runs in processes of their own, one per core, one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
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
    workers = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_alone) as pool:
        return list(pool.map(function, items))


def _alone() -> None:
    torch.set_num_threads(1)
