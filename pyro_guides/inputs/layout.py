"""Which dimensions of the inputs are rows, and which are pooled; and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from pyro_guides.inputs.rows import Rows
from pyro_guides.inputs.sources import Source
from pyro_guides.structure import Structure

__all__ = ["Layout"]


@final
class Layout:
    """Which dimensions of the inputs are rows, and which are pooled.

    Args:
        read: the inputs.
        source: where they come from.
        kept: the plates whose elements get a context each.
        structure: the model's structure in this call.
    """

    def __init__(self, read: Rows, source: Source, kept: Sequence[str], structure: Structure) -> None:
        self.read = read
        self.source = source
        self.kept = kept
        self.structure = structure
        self.extra = sorted(structure.plates[name].dim for name in source.plates if name not in kept)

    def rows(self) -> tuple[Tensor, tuple[int, ...]]:
        """Rows ``(B, *features)``, plates without contexts among the features, and the batch they are of."""
        x, batch = self._pooled_last(self.read.x)
        return x.reshape(math.prod(batch), *(x.shape[len(batch) :] or (1,))), batch

    def sets(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Elements ``(M, *features)``, the set that each belongs to, and the batch that the sets are of."""
        if self.read.index is not None:
            return self.read.x, self.read.index, tuple(self.structure.batch_shape(self.source.plates))
        x, batch = self._pooled_last(self.read.x)
        pooled = len(self.extra) or 1
        if x.dim() < len(batch) + pooled:
            raise ValueError(
                f"{self.source.label} has one value per element of the plates {list(self.source.plates)}, "
                "and so no set to pool: give it one more dimension, or another encoder"
            )
        count, size = math.prod(batch), math.prod(x.shape[len(batch) : len(batch) + pooled])
        elements = x.reshape(count * size, *(x.shape[len(batch) + pooled :] or (1,)))
        index = torch.arange(count, device=x.device).repeat_interleave(size)
        there = self._there(x.shape[: len(batch) + pooled])
        return (elements, index, batch) if there is None else (elements[there], index[there], batch)

    def restored(self, values: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Contexts ``(B, ...)`` as ``(*batch, ...)``, laid out as the plates."""
        values = values.reshape(*batch, *values.shape[1:])
        event_dim = values.dim() - len(batch)
        for dim in reversed(self.extra):  # rightmost first, so that the others find their places
            values = values.unsqueeze(dim - event_dim)
        if not self.source.plates and batch:  # several data sets at once lie on the left of all plates
            values = values.reshape(*batch, *[1] * self.structure.depth, *values.shape[len(batch) :])
        needed = max((-self.structure.plates[name].dim for name in self.kept), default=0)
        while values.dim() - event_dim > needed and values.shape[0] == 1:
            values = values.squeeze(0)
        return values

    def _pooled_last(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Move plates without contexts behind the others; the shape of those others, too."""
        batch_dim = self.read.batch_dim
        feature_dim = x.dim() - batch_dim
        if not self.extra:
            return x, tuple(x.shape[:batch_dim])
        ends = range(-feature_dim - len(self.extra), -feature_dim)
        x = x.movedim([dim - feature_dim for dim in self.extra], list(ends))
        return x, tuple(x.shape[: batch_dim - len(self.extra)])

    def _there(self, shape: torch.Size) -> Tensor | None:
        """Which elements a mask leaves; a mask finer than elements marks missing values within them."""
        mask, batch_dim = self.read.mask, self.read.batch_dim
        if mask is None or mask.dim() > batch_dim + (not self.extra):
            return None
        if mask.dim() < batch_dim + (not self.extra):
            mask = mask.unsqueeze(-1)
        if self.extra:
            mask = mask.movedim(self.extra, list(range(-len(self.extra), 0)))
        return mask.expand(shape).reshape(-1)
