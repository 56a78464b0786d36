"""Runs a description as a Pyro model, and makes data for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .description import Axis, Description, Latent, Seen
from .priors import F64, LIKELIHOODS, PRIORS, signal

__all__ = ["Program", "make_data", "mask"]

MEMBERSHIP = (0, 1, 1, 0, 2)  # which group each row belongs to


class Program:
    """The model: its arguments are the values of the observed sites, in their order."""

    def __init__(self, description: Description) -> None:
        self.description = description

    def __call__(self, *data: Tensor | None) -> dict[str, Tensor]:
        return _Run(self.description, data).all()

    def inputs(self, *data: Tensor) -> Any:
        """What encoders read, where the guide is to be told."""
        found = {seen.name: value.to(torch.float64) for seen, value in self._named(data)}
        return (found, torch.tensor(MEMBERSHIP)) if self.description.ragged else found

    def of_rows(self, *data: Tensor) -> dict[str, Tensor]:
        """The same without the index."""
        return {seen.name: value.to(torch.float64) for seen, value in self._named(data)}

    def _named(self, data: tuple[Tensor, ...]) -> Iterator[tuple[Seen, Tensor]]:
        return zip(self.description.seen, data, strict=True)


class _Run:
    """One run: plates that are open, and values so far."""

    def __init__(self, description: Description, data: tuple[Tensor | None, ...]) -> None:
        rows = [value for value in data if value is not None and value.dim() > 0]
        self.description = description.with_rows(len(rows[0])) if rows else description
        self.data = data
        self.values: dict[str, Tensor] = {}
        self.event_dims: dict[str, int] = {}
        self.opened: dict[str, pyro.plate] = {}
        self.indices: dict[str, Tensor] = {}

    def all(self) -> dict[str, Tensor]:
        with poutine.scale(scale=self.description.scale):
            for latent in self.description.latents:
                self.sample(latent, PRIORS[latent.kind], None, masked=latent.masked)
            for seen, value in zip(self.description.seen, self.data, strict=True):
                self.observe(seen, value)
        return self.values

    def observe(self, seen: Seen, value: Tensor | None) -> None:
        with self.inside(seen.plates):
            if value is not None:
                value = self.taken(seen, value)
            if seen.mask == "obs_mask" and value is not None:
                self.sample(seen, LIKELIHOODS[seen.kind], value, obs_mask=mask(self.description, seen.plates))
            else:
                self.sample(seen, LIKELIHOODS[seen.kind], value, masked=seen.mask == "mask")

    def sample(
        self, site: Latent | Seen, kind: Any, value: Tensor | None, *, masked: bool = False, **options: Any
    ) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.inside(site.plates))
            if masked:
                stack.enter_context(poutine.mask(mask=mask(self.description, site.plates)))
            if site.scale != 1.0:
                stack.enter_context(poutine.scale(scale=site.scale))
            fn = kind(self.location(site))
            self.event_dims[site.name] = fn.event_dim
            self.values[site.name] = pyro.sample(site.name, fn, obs=value, **options)

    def location(self, site: Latent | Seen) -> Tensor:
        # A plate without a size does not expand what lies in it.
        sizes = [plate.size for plate in map(self.description.plate, site.plates) if plate.take == "unsized"]
        total = torch.full(sizes, 0.2, **F64)
        for parent in site.parents:
            seen = signal(self.values[parent], self.event_dims[parent], linear=self.description.linear)
            source = next(x for x in self.description.latents if x.name == parent)
            if self.description.ragged and source.plates == ("group",) and site.plates == ("row",):
                seen = seen[..., torch.tensor(MEMBERSHIP)[self.indices["row"]]]
            total = total + seen
        return total

    def taken(self, seen: Seen, value: Tensor) -> Tensor:
        """The elements of an observation that this call uses."""
        depth = -min((self.description.plate(name).dim for name in seen.plates), default=0)
        for name in seen.plates:
            plate = self.description.plate(name)
            if plate.taken < plate.size:
                value = value.index_select(depth + plate.dim, self.indices[name])
        return value

    @contextmanager
    def inside(self, names: tuple[str, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                if name not in self.opened:
                    plate = self.description.plate(name)
                    self.opened[name] = opened(plate)
                    stack.enter_context(self.opened[name])
                    part = plate.taken < plate.size
                    self.indices[name] = self.opened[name].indices if part else torch.arange(plate.size)
                elif self.opened[name] not in poutine.runtime._PYRO_STACK:
                    stack.enter_context(self.opened[name])
            yield


def mask(description: Description, names: tuple[str, ...]) -> Tensor:
    """Every third element is left out, counted over the plates; the same elements in every call."""
    total = torch.zeros((), dtype=torch.long)
    for plate in map(description.plate, names):
        total = total + torch.arange(plate.size).reshape(-1, *[1] * (-plate.dim - 1))
    return total % 3 != 1


def opened(plate: Axis) -> pyro.plate:
    if plate.take == "unsized":
        return pyro.plate(plate.name, dim=plate.dim)
    if plate.take == "batch":
        return pyro.plate(plate.name, int(plate.size * plate.scale), plate.size, dim=plate.dim)
    if plate.take == "own":
        return pyro.plate(plate.name, plate.size, plate.taken, dim=plate.dim)
    if plate.take == "chosen":
        index = 2 * torch.arange(plate.taken)
        return pyro.plate(plate.name, plate.size, subsample=index, dim=plate.dim)
    return pyro.plate(plate.name, plate.size, dim=plate.dim)


def make_data(description: Description) -> tuple[Tensor, ...]:
    """One value of each observed site, drawn from the model with all elements of its plates."""
    pyro.set_rng_seed(description.seed)
    whole = Program(description.whole)
    with torch.no_grad(), poutine.block():
        values = whole(*[None] * len(description.seen))
    return tuple(values[seen.name] for seen in description.seen)
