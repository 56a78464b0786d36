"""What ``fit`` trains on: rows in tensors, a data set, a loader, or one call of the model with everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

__all__ = [
    "Arguments",
    "Rows",
    "Source",
    "Whole",
    "arguments_of",
    "check_rows",
    "held_out",
    "multiple",
    "tensors_of",
]


@final
@dataclass(frozen=True, eq=False)
class Arguments:
    """What one call of the model is made with.

    Attributes:
        args: the arguments.
        kwargs: the keyword arguments.
        rows: which rows of the data these are; None if that is unknown.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor | None = None

    @property
    def count(self) -> int | None:
        """How many rows there are, if all tensors agree."""
        counts = {len(tensor) if tensor.dim() else 0 for _, tensor in tensors_of(self)}
        return counts.pop() if len(counts) == 1 else None

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every argument with a name that an error can tell."""
        for index, value in enumerate(self.args):
            yield f"argument {index}", value
        yield from ((f"argument '{name}'", value) for name, value in self.kwargs.items())

    def each(self, change: Any) -> Arguments:
        """The same arguments with a function applied to every tensor in them."""
        return Arguments(
            tuple(_each(value, change) for value in self.args),
            {name: _each(value, change) for name, value in self.kwargs.items()},
            self.rows,
        )


def arguments_of(batch: Any) -> Arguments:
    """A batch as arguments: a dict names them, a tuple holds several, anything else is the only one."""
    if isinstance(batch, Mapping):
        return Arguments((), dict(batch))
    return Arguments(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})


class Source(ABC):
    """Where batches come from.

    Attributes:
        count: N, how many rows there are; None if that is unknown.
    """

    count: int | None

    @abstractmethod
    def first(self) -> Arguments:
        """A batch like any other, to find out about the model."""

    @abstractmethod
    def epoch(self, seed: int, start: int) -> Iterator[Arguments]:
        """The batches of one epoch from position ``start`` on; the same for the same seed."""

    @property
    @abstractmethod
    def steps(self) -> int | None:
        """How many batches an epoch has; None if that is unknown."""


@final
@dataclass(frozen=True, eq=False)
class Rows(Source):
    """Tensors whose first dimension is the rows; what is no tensor goes to every call as it is.

    Attributes:
        data: the tensors, as the model takes them.
        batch_size: B, of all processes together; the rows that are left over at the end of an epoch are not
            used in it.
        rank: which process this is.
        world: how many there are; each takes its share of every batch.
        numbers: the rows' numbers in the data that the user gave, if these are some of them.
    """

    data: Arguments
    batch_size: int
    rank: int = 0
    world: int = 1
    numbers: Tensor | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        count = len(next(tensor for _, tensor in tensors_of(self.data)))
        object.__setattr__(self, "count", count)

    @property
    def size(self) -> int:
        """How many rows a batch has: B, unless there are fewer; as many for every process."""
        return multiple(min(self.batch_size, self.count), self.world)

    @property
    def steps(self) -> int:
        return self.count // self.size

    def first(self) -> Arguments:
        return self.take(torch.arange(self.size)[self.rank :: self.world])

    def epoch(self, seed: int, start: int) -> Iterator[Arguments]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        for step in range(start, self.steps):
            index = order[step * self.size : (step + 1) * self.size]
            yield self.take(index[self.rank :: self.world])

    def take(self, index: Tensor) -> Arguments:
        """Some of the rows."""
        taken = self.data.each(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        return replace(taken, rows=index if self.numbers is None else self.numbers[index])

    def part(self, index: Tensor) -> Rows:
        """Some of the rows, as data."""
        taken = self.take(index)
        return replace(self, data=taken, numbers=taken.rows)

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """The rows for training, and those held out, which are nobody's share.

        Raises:
            ValueError: one of the two would be empty.
        """
        kept, held = held_out(self.count, share, seed)
        return self.part(kept), replace(self.part(held), rank=0, world=1)


def held_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the rows that are kept for training, and of those that are held out.

    Raises:
        ValueError: one of the two would be empty.
    """
    held = round(share * count)
    if not 0 < held < count:
        raise ValueError(
            f"validation={share} of {count} rows leaves {count - held} to train on and {held} to validate "
            "with; give a share that leaves some of both, or validation=None"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


@final
@dataclass(frozen=True, eq=False)
class Whole(Source):
    """One call with everything: a model that takes all rows at once, or subsamples by itself."""

    data: Arguments
    count: None = None

    @property
    def steps(self) -> int:
        return 100  # what is called an epoch where there is none: the time between two looks

    def first(self) -> Arguments:
        return self.data

    def epoch(self, seed: int, start: int) -> Iterator[Arguments]:
        for _ in range(start, self.steps):
            yield self.data


def multiple(size: int, world: int) -> int:
    """The largest multiple up to a size, so that all processes have as many rows.

    Raises:
        ValueError: there is none.
    """
    if size < world:
        raise ValueError(f"batches of {size} rows are less than one row for each of {world} processes")
    return size - size % world


def check_rows(data: Arguments, label: str = "data") -> None:
    """Raise an error unless the tensors agree on how many rows there are, and these are at least two."""
    found = dict(tensors_of(data))
    if not found:
        raise TypeError(
            f"{label} hold no tensor but {[type(value).__name__ for _, value in data.items()]}; give tensors "
            "whose first dimension is the rows, a Dataset, a DataLoader, or batch_size=None to pass them on "
            "as they are"
        )
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the first dimension of every tensor is the rows, but their lengths are {counts}; give what is "
            "no row to the model in another way (a closure, functools.partial), or batch_size=None to pass "
            "all rows in every step"
        )
    count = next(iter(counts.values()))
    if count < 2 and label == "data":
        raise ValueError(
            f"data have {count} row{'s' * (count != 1)}, and minibatches take at least two; give more, or "
            "batch_size=None for a model that is not amortized"
        )
    if count < 1:
        raise ValueError(f"{label} have no row; give some, or None")


def tensors_of(data: Arguments) -> Iterator[tuple[str, Tensor]]:
    """All tensors among the arguments, with names that an error can tell."""
    for label, value in data.items():
        yield from _tensors(label, value)


def _tensors(label: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield label, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(f"{label}[{name!r}]", item)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each(item, change) for name, item in value.items()}
    return value
