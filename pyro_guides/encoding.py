"""From one call's inputs to contexts, laid out as the plates are.

Encoders see rows ``(B, *features)``, a ragged collection of sets, or padded sequences, whatever the plates
are; a data set as a whole is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.encoders import MLP, DeepSet, SequenceEncoder, SetEncoder, SetTransformer, Standardize
from pyro_guides.inputs import Rows, Source, check_finite, read_rows
from pyro_guides.structure import Structure

__all__ = ["Contexts", "Encoding", "encode", "standardize"]


@final
@dataclass(frozen=True, eq=False)
class Encoding:
    """What an encoder reads, and what it returns a context for.

    Attributes:
        source: the inputs.
        encoder: which encoder reads them, by position.
        plates: the plates whose elements get a context each, leftmost dimension first.
            offset: of a sequence, how many more steps the inputs have than the latents, at the start.
        masked: whether the encoder needs the model's mask of what it reads.
    """

    source: Source
    encoder: int
    plates: tuple[str, ...]
    offset: int | None = None
    masked: bool = False


@final
class Contexts:
    """What an encoder returned in one call.

    Args:
        values: ``(*batch, C)``, or ``(*batch, T, C)`` of a sequence.
        summary: of a sequence, what makes one context of all steps, ``(*batch, C)``.
        offset: how many more steps the inputs have than the latents, at the start.
    """

    def __init__(self, values: Tensor, summary: Callable[[], Tensor] | None = None, offset: int = 0) -> None:
        self.values = values
        self.summary = summary
        self.offset = offset

    def at(self, step: int | None) -> Tensor:
        """The context of one step, by position; of the whole if None, or if the inputs start later."""
        if self.summary is None:
            return self.values
        if step is None or step + self.offset < 0:
            return self._whole
        return self._steps[step + self.offset]

    @cached_property
    def _steps(self) -> tuple[Tensor, ...]:
        return self.values.unbind(-2)  # all at once: the gradients of slices would be as large as the whole

    @cached_property
    def _whole(self) -> Tensor:
        return cast("Callable[[], Tensor]", self.summary)()


def encode(
    encoding: Encoding,
    encoder: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    *,
    steps: Sequence[str] = (),
    outer: bool = False,
) -> Contexts:
    """One pass of an encoder over this call's inputs.

    Args:
        encoding: what it reads.
        encoder: the encoder.
        structure: the model's structure in this call.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        indices: the elements that subsampled plates take.
        steps: of a sequence, one latent of each step.
        outer: whether inputs may have dimensions on the left of the plates'.

    Raises:
        TypeError: the encoder returns no floating-point tensor.
        ValueError: its context has another number of rows, or is not finite; the inputs are not as before.
    """
    source = encoding.source
    missing = partial(_declares_missing, encoder)
    rows = read_rows(
        source, structure, args, kwargs, indices, kept=encoding.plates, missing=missing, outer=outer
    )
    layout = _Layout(rows, encoding, structure)
    if isinstance(encoder, SetEncoder):
        if source.ragged:
            shape = structure.batch_shape(source.plates)
            elements, index, batch = rows.x, cast("Tensor", rows.index), tuple(shape)
        else:
            elements, index, batch = layout.sets(source)
        check_finite(elements, source.label, missing=missing)
        values = _checked(encoder, encoder(elements, index, math.prod(batch)), math.prod(batch))
        return Contexts(layout.restored(values, batch, structure))
    x, batch = layout.rows()
    lengths = None
    if isinstance(encoder, SequenceEncoder):
        if x.dim() < 2 or (len(x.shape) == 2 and not rows.x.dim() > len(batch)):
            raise ValueError(f"{source.label} has no dimension of steps behind its plates for {encoder}")
        mask = rows.mask
        if encoding.offset is not None:
            if x.shape[1] - len(steps) != encoding.offset:
                raise ValueError(
                    f"{source.label} has {x.shape[1]} steps, but this call of the model has {len(steps)} "
                    f"latents like '{steps[0]}', expected {len(steps) + encoding.offset} steps"
                )
            mask = _mask_of_steps(encoding, structure, steps) if mask is None else mask
        lengths = _lengths(mask, source, x)
        x = _cut_short(x, lengths)
    check_finite(x, source.label, missing=missing)
    if not isinstance(encoder, SequenceEncoder):
        values = _checked(encoder, encoder(x), len(x))
        return Contexts(layout.restored(values, batch, structure))
    values = _checked(encoder, encoder(x, lengths), len(x), steps=x.shape[1])

    def summary() -> Tensor:
        whole = _checked(encoder, encoder.summary(values, lengths), len(x))
        return layout.restored(whole, batch, structure)

    return Contexts(layout.restored(values, batch, structure), summary, encoding.offset or 0)


@torch.no_grad()
def standardize(
    encoding: Encoding,
    encoder: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Take the statistics of inputs from all rows at hand, even if the model subsamples them."""
    source = encoding.source
    if not isinstance(encoder, (MLP, DeepSet, SetTransformer)) or not source.plates:
        return
    layer = next(module for module in encoder.modules() if isinstance(module, Standardize))
    if layer.mean is not None:
        return
    rows = read_rows(source, structure, args, kwargs, {}, kept=None, missing=lambda: layer.missing)
    layout = _Layout(rows, encoding, structure)
    if source.ragged:
        x = rows.x
    else:
        x = layout.sets(source)[0] if isinstance(encoder, SetEncoder) else layout.rows()[0]
    check_finite(x, source.label, missing=lambda: layer.missing)
    if len(x):
        layer.fit(x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1))


@final
class _Layout:
    """Which dimensions of the inputs are rows, and which are pooled.

    Args:
        rows: the inputs.
        encoding: what is read, and for which plates.
        structure: the model's structure in this call.
    """

    def __init__(self, rows: Rows, encoding: Encoding, structure: Structure) -> None:
        self.rows_read = rows
        self.plates, self.kept = encoding.source.plates, encoding.plates
        self.extra = sorted(structure.plates[name].dim for name in self.plates if name not in self.kept)

    def rows(self) -> tuple[Tensor, tuple[int, ...]]:
        """Rows ``(B, *features)``, plates without contexts among the features, and the batch they are of."""
        x, batch = self._pooled_last(self.rows_read.x)
        return x.reshape(math.prod(batch), *(x.shape[len(batch) :] or (1,))), batch

    def sets(self, source: Source) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Elements ``(M, *features)``, the set that each belongs to, and the batch that the sets are of."""
        x, batch = self._pooled_last(self.rows_read.x)
        pooled = len(self.extra) or 1
        if x.dim() < len(batch) + pooled:
            raise ValueError(
                f"{source.label} has one value per element of the plates {list(source.plates)}, and so no "
                "set to pool: give it one more dimension, or another encoder"
            )
        count, size = math.prod(batch), math.prod(x.shape[len(batch) : len(batch) + pooled])
        elements = x.reshape(count * size, *(x.shape[len(batch) + pooled :] or (1,)))
        index = torch.arange(count, device=x.device).repeat_interleave(size)
        there = self._there(x.shape[: len(batch) + pooled])
        return (elements, index, batch) if there is None else (elements[there], index[there], batch)

    def restored(self, values: Tensor, batch: tuple[int, ...], structure: Structure) -> Tensor:
        """Contexts ``(B, ...)`` as ``(*batch, ...)``, laid out as the plates."""
        values = values.reshape(*batch, *values.shape[1:])
        event_dim = values.dim() - len(batch)
        for dim in reversed(self.extra):  # rightmost first, so that the others find their places
            values = values.unsqueeze(dim - event_dim)
        if not self.plates and batch:  # several data sets at once lie on the left of all plates
            values = values.reshape(*batch, *[1] * structure.depth, *values.shape[len(batch) :])
        needed = max((-structure.plates[name].dim for name in self.kept), default=0)
        while values.dim() - event_dim > needed and values.shape[0] == 1:
            values = values.squeeze(0)
        return values

    def _pooled_last(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Move plates without contexts behind the others; the shape of those others, too."""
        batch_dim = self.rows_read.batch_dim
        feature_dim = x.dim() - batch_dim
        if not self.extra or self.rows_read.index is not None:
            return x, tuple(x.shape[:batch_dim])
        ends = range(-feature_dim - len(self.extra), -feature_dim)
        x = x.movedim([dim - feature_dim for dim in self.extra], list(ends))
        return x, tuple(x.shape[: batch_dim - len(self.extra)])

    def _there(self, shape: torch.Size) -> Tensor | None:
        """Which elements a mask leaves; a mask finer than elements marks missing values within them."""
        mask, batch_dim = self.rows_read.mask, self.rows_read.batch_dim
        if mask is None or mask.dim() > batch_dim + (not self.extra):
            return None
        if mask.dim() < batch_dim + (not self.extra):
            mask = mask.unsqueeze(-1)
        if self.extra:
            mask = mask.movedim(self.extra, list(range(-len(self.extra), 0)))
        return mask.expand(shape).reshape(-1)


def _lengths(mask: Tensor | None, source: Source, x: Tensor) -> Tensor | None:
    """How many steps each row has, ``(B,)``, by a mask; None without one."""
    if mask is None:
        return None
    mask = mask.reshape(-1, mask.shape[-1])
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"the mask of the steps of {source.label} has shape {tuple(mask.shape)}, expected one value per "
            f"row and step, {tuple(x.shape[:2])}"
        )
    lengths = mask.sum(-1)
    if not torch.equal(mask, torch.arange(mask.shape[-1], device=mask.device) < lengths.unsqueeze(-1)):
        raise ValueError(
            f"the mask of the steps of {source.label} has gaps; absent steps must come last (mark a value "
            "that is missing in between with NaN and GRUEncoder(missing=True))"
        )
    return lengths


def _mask_of_steps(encoding: Encoding, structure: Structure, steps: Sequence[str]) -> Tensor | None:
    """The model's masks of a sequence's latents, as a mask of the inputs' steps."""
    masks = [structure.latents[name].mask for name in steps if name in structure.latents]
    if all(mask is None for mask in masks):
        return None
    offset = encoding.offset or 0
    shape = structure.batch_shape(encoding.plates)
    there = [torch.as_tensor(True)] * offset
    there += [torch.as_tensor(True if mask is None else mask) for mask in masks[max(0, -offset) :]]
    device = next((mask.device for mask in masks if isinstance(mask, Tensor)), None)
    return torch.stack([step.to(device).expand(shape) for step in there], dim=-1)


def _cut_short(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros in the place of whatever stands behind the last step."""
    if lengths is None:
        return x
    there = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)
    return torch.where(there.reshape(there.shape + (1,) * (x.dim() - 2)), x, torch.zeros_like(x))


def _declares_missing(encoder: nn.Module) -> bool:
    """Whether the encoder, or a ``Standardize`` in it, takes NaN for a missing value."""
    own = getattr(encoder, "missing", False)
    return bool(own) or any(isinstance(m, Standardize) and m.missing for m in encoder.modules())


def _checked(encoder: nn.Module, context: Any, rows: int, *, steps: int | None = None) -> Tensor:
    name = type(encoder).__name__
    shape = (rows,) if steps is None else (rows, steps)
    expected = f"({', '.join(map(str, shape))}, C)"
    if not isinstance(context, Tensor) or not context.is_floating_point():
        got = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(
            f"encoder {name} returned {got}, expected one float tensor of shape {expected}; wrap it in "
            "a module that returns the tensor to condition on"
        )
    if context.shape[:-1] != shape:
        raise ValueError(
            f"encoder {name} returned contexts of shape {tuple(context.shape)}, expected {expected}"
        )
    # A sum settles it, unless it overflows itself.
    if not math.isfinite(context.detach().sum().item()) and not bool(context.isfinite().all()):
        raise ValueError(
            f"encoder {name} returned NaN or infinite values for finite inputs; its weights may have "
            "diverged: lower the learning rate or clip gradients"
        )
    return context
