"""Cuts a plate that a model subsamples by itself into subsamples of the model's own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.structure import Plate

__all__ = ["Blocks"]

PerSite = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """A plate that a model subsamples by itself, cut into subsamples of its size.

    Attributes:
        plate: the plate, as the model opens it.
        event_dims: the latents inside of it, and how many dimensions one of their values has.
    """

    plate: Plate
    event_dims: Mapping[str, int]

    @property
    def indices(self) -> list[Tensor]:
        """The elements of each block; the last one may begin in the one before."""
        size, batch = self.plate.size, self.plate.batch
        starts = [*range(0, size - batch, batch), size - batch]
        return [torch.arange(start, start + batch) for start in starts]

    def joined(self, parts: Sequence[PerSite], event_dims: Mapping[str, int]) -> PerSite:
        """Values of all elements, from those of each block.

        Args:
            parts: what each block has, by site.
            event_dims: the sites inside the plate, and how many dimensions stand on the right of it.
        """
        joined = dict(parts[0])
        for name in joined.keys() & event_dims.keys():
            dim = self.plate.dim - event_dims[name]
            pieces = [part[name].index_select(dim, self._new(at)) for at, part in enumerate(parts)]
            joined[name] = torch.cat(pieces, dim)
        return joined

    def _new(self, block: int) -> Tensor:
        """Which elements of a block are not in the one before, by position."""
        return torch.arange(block * self.plate.batch - int(self.indices[block][0]), self.plate.batch)

    def part(self, values: Mapping[str, Tensor], index: Tensor) -> PerSite:
        """Values of latents, of those in the plate one block's."""
        dim = self.plate.dim
        inside = self.event_dims
        return {
            name: value.index_select(dim - inside[name], index) if name in inside else value
            for name, value in values.items()
        }
