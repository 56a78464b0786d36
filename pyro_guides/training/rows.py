"""How a model counts its rows, and what a minibatch of them stands for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_guides.structure import Structure, read
from pyro_guides.training.data import Rows, Source, Whole

__all__ = ["Counting", "RowScale", "counting", "rows_have_latents"]


@final
@dataclass(frozen=True)
class Counting:
    """What makes of the loss of one batch one row's share of the loss of all rows.

    Attributes:
        plates: the plates that the rows are in.
        total: N, how many rows there are.
        size: what the loss is divided by.
        repeat: how often each row of a batch counts before that: N/B around all sites in the row plates,
            unless the model sees to it or nothing but rows is there.
        by_model: whether the model sees to it.
    """

    plates: frozenset[str]
    total: float
    size: float
    repeat: float = 1.0
    by_model: bool = False

    def of(self, rows: int) -> Counting:
        """The same for a batch of another size."""
        if self.by_model:
            return self
        if self.size == self.total:
            return replace(self, repeat=self.total / rows)
        return replace(self, size=float(rows))


@final
class RowScale(Messenger):
    """Counts the sites inside the row plates N/B times, in guide and model alike."""

    def __init__(self, plates: Collection[str], scale: float) -> None:
        super().__init__()
        self._plates = frozenset(plates)
        self._scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and any(f.name in self._plates for f in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self._scale


def counting(model: Callable[..., Any], source: Source) -> Counting:
    """Find out how a model counts its rows, from readings with batches of two sizes.

    Args:
        model: the model.
        source: the data.

    Raises:
        ValueError: the model has no plate that holds the rows.
    """
    batch = source.first()
    structure = read(model, batch.args, batch.kwargs)
    if isinstance(source, Whole):
        return _of_everything(structure)
    rows = Rows(batch, 1)
    count = rows.count - 1 if rows.count > 1 else 2  # one row, twice: an empty batch is no batch
    others = rows.take(torch.arange(count) % rows.count)
    other = read(model, others.args, others.kwargs)
    own = frozenset(
        name
        for name, plate in structure.plates.items()
        if name in other.plates and plate.batch == rows.count and other.plates[name].batch == count
    )
    if not own:
        raise ValueError(
            f"no plate of the model grows with the rows: given {rows.count} rows its plates are "
            f"{ {name: plate.batch for name, plate in structure.plates.items()} }, so that a minibatch would "
            "count as all data. Put the rows in a pyro.plate, or give batch_size=None to pass all rows in "
            "every step"
        )
    first = structure.plates[next(iter(own))]
    if first.subsampled and other.plates[first.name].size == first.size:
        return Counting(own, float(first.size), float(first.size), by_model=True)
    total = float(source.count or rows.count)
    if _all_inside(structure, own):
        return Counting(own, total, float(rows.count))
    return Counting(own, total, total, total / rows.count)


def rows_have_latents(model: Callable[..., Any], source: Source) -> bool:
    """Whether some latents lie inside the plates of the rows."""
    batch = source.first()
    plates = counting(model, source).plates
    latents = read(model, batch.args, batch.kwargs).latents.values()
    return any(plates & set(latent.plates) for latent in latents)


def _of_everything(structure: Structure) -> Counting:
    """Per element of the largest plate that all amortized or observed sites share; else per call."""
    sites = [set(site.plates) for site in structure.observed.values() if site.plates]
    common = set[str].intersection(*sites) if sites else set()
    sizes = [p.batch if p.size == -1 else p.size for p in structure.plates_of(common)]
    total = float(max(sizes, default=1))
    return Counting(frozenset(common), total, total, by_model=True)


def _all_inside(structure: Structure, plates: Collection[str]) -> bool:
    stacks = [site.plates for site in structure.latents.values()]
    stacks += [site.plates for site in structure.observed.values()]
    return all(set(stack) & set(plates) for stack in stacks)
