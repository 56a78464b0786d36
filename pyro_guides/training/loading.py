"""Data sets and their loaders as sources of rows, several processes included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from pyro_guides.training.data import (
    Arguments,
    Rows,
    Source,
    Whole,
    arguments_of,
    check_rows,
    held_out,
    multiple,
)
from pyro_guides.training.randomness import Stream, own_numbers

__all__ = ["Loaded", "source_of"]

_NONE = object()
# What a loader of one process's share has from the user's.
_KEPT = (
    "collate_fn", "multiprocessing_context", "num_workers", "persistent_workers", "pin_memory",
    "prefetch_factor", "timeout", "worker_init_fn",
)  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class Loaded(Source):
    """A ``DataLoader``, with random numbers of its own: its order does not depend on what a model draws.

    Attributes:
        loader: the loader, of this process's share of every batch.
        batch_size: of a data set that has no loader of the user's; None for a user's loader.
        rank: which process this is.
        world: how many there are.
    """

    loader: DataLoader[Any]
    batch_size: int | None = None
    rank: int = 0
    world: int = 1
    count: int | None = field(init=False)

    def __post_init__(self) -> None:
        data = self.loader.dataset
        object.__setattr__(self, "count", len(data) if isinstance(data, Sized) else None)

    @property
    def steps(self) -> int | None:
        try:
            return len(self.loader)
        except TypeError:  # an iterable data set need not know
            return None

    def first(self) -> Arguments:
        with own_numbers(0):
            for batch in self.loader:
                return arguments_of(batch)
        raise ValueError("the DataLoader gives no batch; give one with rows, or a smaller batch_size in it")

    def epoch(self, seed: int, start: int) -> Iterator[Arguments]:
        self._begin(seed)
        stream = Stream(seed)
        with stream.open():
            batches = iter(self.loader)
        for position in itertools.count():
            with stream.open():
                batch = next(batches, _NONE)
            if batch is _NONE:
                return
            if position >= start:
                yield arguments_of(batch)

    def _begin(self, seed: int) -> None:
        """Bring what has an order of its own to that of this epoch."""
        for part in (self.loader, self.loader.sampler):
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.set_epoch(seed % 2**32)

    @property
    def can_be_split(self) -> bool:
        """Whether rows can be held out: of a data set, not of a loader that somebody else has made."""
        return self.batch_size is not None and self.count is not None

    def split(self, share: float, seed: int) -> tuple[Loaded, Loaded]:
        """The rows for training, and those held out.

        Raises:
            ValueError: one of the two would be empty.
        """
        kept, held = held_out(self.count or 0, share, seed)
        train, rest = (Subset(self.loader.dataset, part.tolist()) for part in (kept, held))
        loader = _loader(train, self.batch_size, self.rank, self.world)
        return (
            Loaded(loader, self.batch_size, self.rank, self.world),
            Loaded(_in_order(rest, self.batch_size), self.batch_size),
        )


def source_of(
    data: Any, batch_size: int | None, rank: int = 0, world: int = 1, *, label: str = "data"
) -> Source:
    """The source that some data are.

    Raises:
        TypeError, ValueError: the data are none, or too few.
    """
    if isinstance(data, DataLoader):
        return Loaded(data if world == 1 else _shared(data, rank, world), None, rank, world)
    if isinstance(data, Dataset):
        if not isinstance(data, Sized):
            raise TypeError(f"{label}: a data set without a length needs a DataLoader around it")
        return Loaded(_loader(data, batch_size, rank, world), batch_size, rank, world)
    arguments = arguments_of(data)
    if batch_size is None:
        return Whole(arguments)
    check_rows(arguments, label)
    return Rows(arguments, batch_size, rank, world)


@final
class _Shares(Sampler[int]):
    """One process's share of every batch of a data set; all processes draw the same order."""

    def __init__(self, count: int, size: int, rank: int, world: int, *, shuffled: bool) -> None:
        self._count, self._size = count, multiple(size, world)
        self._rank, self._world = rank, world
        self._shuffled = shuffled

    @property
    def each(self) -> int:
        """How many rows of a batch a process gets."""
        return self._size // self._world

    def __len__(self) -> int:
        return self._count // self._size * self.each

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._count) if self._shuffled else torch.arange(self._count)
        for start in range(0, self._count - self._size + 1, self._size):
            yield from order[start : start + self._size][self._rank :: self._world].tolist()


def _loader(data: Any, batch_size: int | None, rank: int, world: int) -> DataLoader[Any]:
    size = _size(data, batch_size)
    if world == 1:
        return DataLoader(data, batch_size=size, shuffle=True, drop_last=True)
    shares = _Shares(len(data), size, rank, world, shuffled=True)
    return DataLoader(data, batch_size=shares.each, sampler=shares)


def _in_order(data: Any, batch_size: int | None) -> DataLoader[Any]:
    return DataLoader(data, batch_size=_size(data, batch_size))


def _size(data: Any, batch_size: int | None) -> int:
    if not len(data):
        raise ValueError("the data set is empty; give one with rows")
    return len(data) if batch_size is None else min(batch_size, len(data))


def _shared(loader: DataLoader[Any], rank: int, world: int) -> DataLoader[Any]:
    """A user's loader as one that loads this process's share of every batch.

    Raises:
        ValueError: its batches are chosen in a way of its own.
    """
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler):
        return loader  # the user has seen to it
    plain = type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None
    if (
        not plain
        or type(sampler) not in (RandomSampler, SequentialSampler)
        or not isinstance(loader.dataset, Sized)
    ):
        raise ValueError(
            f"several processes cannot share what a DataLoader with a {type(sampler).__name__} chooses; give "
            "it a torch.utils.data.DistributedSampler, or give the Dataset itself with batch_size=..."
        )
    shuffled = isinstance(sampler, RandomSampler)
    shares = _Shares(len(loader.dataset), loader.batch_size or 1, rank, world, shuffled=shuffled)
    kept = {name: getattr(loader, name) for name in _KEPT}
    return DataLoader(loader.dataset, batch_size=shares.each, sampler=shares, **kept)
