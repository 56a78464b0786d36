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
from pyro_guides.inputs import Layout, Source, check_finite, read_rows
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
    """

    source: Source
    encoder: int
    plates: tuple[str, ...]
    offset: int | None = None


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
    source, missing = encoding.source, partial(_declares_missing, encoder)
    rows = read_rows(
        source, structure, args, kwargs, indices, kept=encoding.plates, missing=missing, outer=outer
    )
    layout = Layout(rows, source, encoding.plates, structure)
    if isinstance(encoder, SetEncoder):
        elements, index, batch = layout.sets()
        check_finite(elements, source.label, missing=missing)
        values = _checked(encoder, encoder(elements, index, math.prod(batch)), math.prod(batch))
        return Contexts(layout.restored(values, batch))
    if isinstance(encoder, SequenceEncoder):
        mask = _mask_of_steps(encoding, structure, steps) if rows.mask is None else rows.mask
        return _encode_sequences(encoding, encoder, layout, mask, steps, missing)
    x, batch = layout.rows()
    check_finite(x, source.label, missing=missing)
    return Contexts(layout.restored(_checked(encoder, encoder(x), len(x)), batch))


def _encode_sequences(
    encoding: Encoding,
    encoder: SequenceEncoder,
    layout: Layout,
    mask: Tensor | None,
    steps: Sequence[str],
    missing: Callable[[], bool],
) -> Contexts:
    source = encoding.source
    x, batch = layout.rows()
    if not source.field.feature_shape:
        raise ValueError(
            f"{source.label} has no dimension of steps behind its plates {list(source.plates)}, which "
            f"{type(encoder).__name__} needs"
        )
    if encoding.offset is not None and x.shape[1] - len(steps) != encoding.offset:
        raise ValueError(
            f"{source.label} has {x.shape[1]} steps, but this call of the model has {len(steps)} "
            f"latents like '{steps[0]}', expected {len(steps) + encoding.offset} steps"
        )
    lengths = _lengths(mask, source, x)
    x = _cut_short(x, lengths)
    check_finite(x, source.label, missing=missing)
    values = _checked(encoder, encoder(x, lengths), len(x), steps=x.shape[1])

    def summary() -> Tensor:
        return layout.restored(_checked(encoder, encoder.summary(values, lengths), len(x)), batch)

    return Contexts(layout.restored(values, batch), summary, encoding.offset or 0)


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
    layout = Layout(rows, source, encoding.plates, structure)
    x, *_ = layout.sets() if isinstance(encoder, SetEncoder) else layout.rows()
    check_finite(x, source.label, missing=lambda: layer.missing)
    if len(x):
        layer.fit(x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1))


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
