"""From what ``fit`` is given to what is trained: rows, seed, steps, and what tells one run from another."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyro_guides.families import Family
from pyro_guides.guide import AmortizedGuide
from pyro_guides.statistics.arguments import count
from pyro_guides.training import randomness
from pyro_guides.training.data import Rows, Source, Whole, tensors_of
from pyro_guides.training.faults import fault
from pyro_guides.training.loading import Loaded, source_of
from pyro_guides.training.processes import Processes
from pyro_guides.training.rows import rows_have_latents
from pyro_guides.training.task import Task

__all__ = ["check_finite", "identity", "seed_for", "sources", "steps_for"]

_STEPS = 3000
_HELD_OUT = 0.1  # of the rows
_MOST_NAMED = 10
_FOUND_OUT = ("kl", "max_plate_nesting", "step")  # what objectives change themselves


def seed_for(given: int | None, resumed: int | None, processes: Processes) -> int:
    """The seed of a run, the same in all processes.

    Raises:
        TypeError, ValueError: the seed is no such number, or not that of the run to go on with, or
            processes see different checkpoints.
    """
    if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise TypeError(f"seed must be an int, got {given!r}")
    # Nobody goes on, and writes a file, before all have looked whether there is one.
    if len(found := set(processes.all(resumed))) > 1:
        raise ValueError(
            f"processes see checkpoints of different seeds, {found}, or none; put the file where every "
            "machine reads the same one"
        )
    if resumed is not None:
        if given not in (None, resumed):
            raise ValueError(f"the run to go on with has the seed {resumed}, got seed={given}; leave it out")
        return resumed
    seed = int(torch.randint(2**31, ())) if given is None else given
    return int(processes.same(seed))


def sources(
    model: Callable[..., Any],
    data: Any,
    batch_size: int | None,
    validation: Any,
    seed: int,
    processes: Processes,
) -> tuple[Source, Source | None]:
    """The rows to train on, and those to validate with.

    Raises:
        TypeError, ValueError: there are too few rows, or the validation rows are none.
    """
    train = source_of(data, batch_size, processes.rank, processes.world)
    if validation is None:
        return train, None
    if isinstance(validation, str) and validation == "auto":
        # Rows that are held out are missing from the posterior of what all rows share.
        few = round(_HELD_OUT * (train.count or 0)) == 0
        if few or not _can_be_split(train) or not rows_have_latents(model, train):
            return train, None
        return _split(train, _HELD_OUT, seed)
    if isinstance(validation, (int, float)):
        if isinstance(validation, bool) or not 0.0 < validation < 1.0:
            raise ValueError(
                f"validation must be a share between 0 and 1, other data, or None, got {validation!r}"
            )
        return _split(train, validation, seed)
    if isinstance(validation, (Tensor, tuple, list, dict, Dataset, DataLoader)):
        return train, source_of(validation, batch_size, label="validation")
    raise TypeError(
        f"validation must be a share between 0 and 1, other data, or None, got a {type(validation).__name__}"
    )


def _can_be_split(train: Source) -> TypeGuard[Rows | Loaded]:
    return isinstance(train, Rows) or (isinstance(train, Loaded) and train.can_be_split)


def _split(train: Source, share: float, seed: int) -> tuple[Source, Source]:
    if _can_be_split(train):
        return train.split(share, randomness.seed_of(seed, 5))
    what = "a DataLoader of its own order" if isinstance(train, Loaded) else "batch_size=None"
    raise ValueError(
        f"validation={share} of the rows cannot be held out with {what}; give other data as validation=, or "
        "validation=None"
    )


def steps_for(max_steps: int | None, max_epochs: int | None, train: Source) -> int:
    """How many steps to make.

    Raises:
        TypeError, ValueError: there are both numbers, or one is none.
    """
    if max_steps is not None and max_epochs is not None:
        raise ValueError(f"give max_steps or max_epochs, not both: got {max_steps} and {max_epochs}")
    if max_epochs is not None:
        count("max_epochs", max_epochs)
        if train.steps is None:
            raise ValueError("max_epochs needs a DataLoader that knows its length; give max_steps")
        return max_epochs * (1 if isinstance(train, Whole) else train.steps)
    if max_steps is not None:
        count("max_steps", max_steps)
    return _STEPS if max_steps is None else max_steps


def check_finite(task: Task) -> None:
    """Raise a ValueError if rows with NaN or infinity have no finite density.

    Missing values are fine where model and encoder know about them.
    """
    for source in (task.train, task.held):
        if isinstance(source, Rows):
            _check_finite(task, source)


def _check_finite(task: Task, train: Rows) -> None:
    for name, tensor in tensors_of(train.data):
        bad = ~tensor.isfinite() if tensor.is_floating_point() else torch.zeros(1, dtype=torch.bool)
        if not bool(bad.any()):
            continue
        rows = bad.reshape(len(bad), -1).any(-1).nonzero().reshape(-1)
        batch = task.processes.receive(train.take(rows[: train.size]))
        if (found := fault(task.model, task.guide, batch)) is not None:
            numbers = rows if train.numbers is None else train.numbers[rows]
            named = ", ".join(str(int(row)) for row in numbers[:_MOST_NAMED])
            named += ", ..." * (len(rows) > _MOST_NAMED)
            raise ValueError(
                f"{name} holds NaN or infinity in {len(rows)} rows ({named}), "
                f"and {found}; leave these rows out, or let the model mask what is missing"
            )


def identity(task: Task, restarts: int, ladder: tuple[Family, ...]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    guide, settings = task.guide, task.settings
    families = (
        [str(x) for x in guide.families] if isinstance(guide, AmortizedGuide) else [type(guide).__name__]
    )
    probed = range(0, settings.max_steps, max(1, settings.max_steps // 8))
    shapes = {name: list(tensor.shape) for name, tensor in task.weights.parameters.items()}
    return {
        "family": families,
        "parameters": sorted(f"{_plain(name)} {shape}" for name, shape in shapes.items()),
        "loss": _told(task.elbo),
        "data": _summaries(task.train),
        "rows": task.train.count,
        "row plates": sorted(task.counting.plates),
        "batch_size": _batch_size(task.train),
        "validation": None if task.held is None else [task.held.count, *_summaries(task.held)],
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "schedule": [settings.rate(step) for step in probed],
        "optimizer": _optimizer(task),
        "clip": settings.clip,
        "patience": settings.patience,
        "tempering": _told(task.tempering),
        "restarts": restarts,
        "ladder": [str(family) for family in ladder],
        "processes": task.processes.world,
    }


def _plain(name: str) -> str:
    """A parameter's name without the number that Pyro's store keeps guides apart with."""
    owner, _, rest = name.partition(".")
    return rest if owner == "guide" else name


def _batch_size(source: Source) -> int | None:
    if isinstance(source, Loaded):
        return source.batch_size or source.loader.batch_size
    return source.batch_size if isinstance(source, Rows) else None


def _summaries(source: Source) -> list[str]:
    """What tells data from others; of data sets that do not lie in memory, only how many rows there are."""
    if isinstance(source, (Rows, Whole)):
        return [_summary(name, tensor) for name, tensor in tensors_of(source.data)]
    found: Any = source.loader.dataset if isinstance(source, Loaded) else None
    while isinstance(found, Subset):
        found = found.dataset
    return [_summary("tensor", x) for x in found.tensors] if isinstance(found, TensorDataset) else []


def _summary(name: str, tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(values.data):08x}"


def _optimizer(task: Task) -> str:
    """What the optimizer is, and what it was told.

    Raises:
        TypeError: it evaluates the loss by itself.
    """
    made = task.settings.make_optimizer(list(task.weights.parameters.values()))
    closure = inspect.signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer made a {type(made).__name__}, whose steps evaluate the loss several times; give one "
            "that takes a gradient at a time, such as Adam"
        )
    groups = [{**group, "params": len(group["params"])} for group in made.param_groups]
    return f"{type(made).__name__} {groups}"


def _told(thing: Any) -> str:
    """What an objective or a schedule of its weights is, and what it was told; not what it counts."""
    if isinstance(thing, (list, tuple)):
        return f"[{', '.join(map(_told, thing))}]"
    if isinstance(thing, (bool, int, float, str, dict, type(None))):
        return repr(thing)
    if not isinstance(thing, (ELBO, AbstractContextManager)):
        return type(thing).__name__
    known = {name: x for name, x in vars(thing).items() if name[0] != "_" and name not in _FOUND_OUT}
    return f"{type(thing).__name__}({', '.join(f'{name}={_told(x)}' for name, x in known.items())})"
