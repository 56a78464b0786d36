"""Reads an encoder's inputs in one call, and checks them.

A wrong row must stop the training with a sentence that says which one, not end up in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor

from pyro_guides.inputs.given import Given, unpack
from pyro_guides.inputs.sources import Field, Source
from pyro_guides.structure import Observed, Plate, Structure

__all__ = ["Rows", "check_finite", "read_rows"]


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """The inputs of one call.

    Attributes:
        x: ``(*batch, *features)``; batch dimensions lie where the plates have theirs, and may have more on
            the left. Of a ragged source, ``(N, *features)``.
        mask: what is there, in the shape of the leading dimensions of ``x``; None if all is.
        index: of a ragged source, the element that each row belongs to.
        batch_dim: how many dimensions of ``x`` are no features.
    """

    x: Tensor
    mask: Tensor | None
    index: Tensor | None
    batch_dim: int


def read_rows(
    source: Source,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    *,
    kept: Collection[str] | None,
    missing: Callable[[], bool] = lambda: False,
    outer: bool = False,
) -> Rows:
    """The inputs of one call, checked.

    Args:
        source: where they come from.
        structure: the model's structure in this call.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        indices: the elements that subsampled plates take.
        kept: the plates whose elements get a context each; over others the encoder sees all elements. If
            None, all rows at hand are returned.
        missing: whether the encoder takes NaN for what a mask takes out, rather than zero.
        outer: whether there may be dimensions on the left of the plates': several data sets, or particles
            that the model has simulated, laid out as its plates are.
    """
    given = unpack(source.get(*args, **kwargs), source.label)
    if given.tensors.keys() != source.fields.keys():
        raise ValueError(
            f"{source.label} holds {list(given.tensors)}, but the guide was set up with {list(source.fields)}"
        )
    plates = structure.plates_of(source.plates)
    pick = partial(_take_rows, plates=plates, indices=indices, kept=kept)
    tensors = []
    for key, field in source.fields.items():
        x, feature_dim = given.tensors[key], len(field.feature_shape)
        row_dim = _check_kind(x, source, field, outer=outer)
        if not source.ragged and row_dim == len(field.plates):
            x = pick(x, field.plates, label=field.label)
        tensors.append((x, feature_dim))
    x, feature_dim = _joined(tensors, steps=1 if source.varies else 0)
    if source.ragged:
        x, index = _ragged_rows(x, given, plates[0], indices, source.label)
        return Rows(x, None, index, 1)
    mask = given.mask
    if mask is not None:
        most = len(plates) + feature_dim
        if not len(plates) <= mask.dim() <= most:
            raise _wrong_mask(mask, x, source)
        mask = pick(mask, source.plates, label=f"the mask of {source.label}")
    elif source.mask_site in structure.observed:
        site = structure.observed[cast("str", source.mask_site)]
        mask = None if kept is None else _mask_of_model(site, structure, plates, kept, source.label)
    batch_dim = x.dim() - feature_dim
    if mask is not None:
        mask = _fitted(mask, x, source)
        absent = math.nan if missing() else 0.0
        x = torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), x, absent)
    return Rows(x, mask, None, batch_dim)


def check_finite(x: Tensor, label: str, *, missing: Callable[[], bool]) -> None:
    """Raise a ValueError that names the first bad rows if ``x`` holds NaN or infinity.

    One sum settles the good case; only a bad one is searched.
    """
    if math.isfinite(x.detach().sum().item()):
        return
    allowed = missing()
    fine = ~x.isinf() if allowed else x.isfinite()
    if bool(fine.all()):
        return
    bad = (~fine).reshape(x.shape[0] if x.dim() else 1, -1).any(-1).nonzero().flatten()
    kind = "NaN" if not allowed and bool(x.isnan().any()) else "infinite values"
    advice = "remove them" if allowed else "remove them, or declare NaN missing with MLP(missing=True)"
    raise ValueError(
        f"{label} holds {kind} in {len(bad)} of {x.shape[0] if x.dim() else 1} rows, the first ones "
        f"{bad[:5].tolist()}; {advice}"
    )


def _check_kind(x: Tensor, source: Source, field: Field, *, outer: bool) -> int:
    """Check one tensor against what it was when the guide was set up; how many dimensions are rows."""
    if x.dtype != field.dtype or x.device != field.device:
        raise TypeError(
            f"{field.label} is {x.dtype} on {x.device}, but the guide was set up with {field.dtype} "
            f"on {field.device}; convert it with .to({field.device.type!r}, {field.dtype})"
        )
    row_dim = x.dim() - len(field.feature_shape)
    expected = 1 if source.ragged else len(field.plates)
    if row_dim < expected or (row_dim > expected and not outer):
        raise ValueError(
            f"{field.label} has shape {tuple(x.shape)}, expected the plates {list(field.plates)} and then "
            f"features of shape {tuple(field.feature_shape)}; give one row the shape (1, ...)"
        )
    fixed = field.feature_shape[1:] if source.varies else field.feature_shape
    if x.shape[x.dim() - len(fixed) :] != fixed:
        raise ValueError(
            f"{field.label} has features of shape {tuple(x.shape[row_dim:])}, but the guide was set "
            f"up with {tuple(field.feature_shape)}; give it the same features, or make a new guide"
        )
    return row_dim


def _take_rows(
    x: Tensor,
    names: Sequence[str],
    *,
    plates: Sequence[Plate],
    indices: Mapping[str, Tensor],
    kept: Collection[str] | None,
    label: str,
) -> Tensor:
    """Pick a tensor's rows, and lay its dimensions out as those of the named plates."""
    own = [plate for plate in plates if plate.name in names]
    for dim, plate in enumerate(own):
        count = x.shape[dim]
        if kept is None:
            continue
        if plate.name not in kept:
            _check_complete(count, plate, label)
        elif plate.subsampled and count == plate.size:
            x = x.index_select(dim, indices[plate.name].to(x.device))
        elif count != plate.batch:
            whole = f" of {plate.size}" if plate.subsampled else ""
            raise ValueError(
                f"{label} has {count} rows in dimension {dim}, but plate '{plate.name}' has "
                f"{plate.batch}{whole}; pass the plate's rows, or all of them"
            )
    return _laid_out(x, own)


def _laid_out(x: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Put one dimension per plate where the plate has its own: ``(*batch, *features)``."""
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for dim, plate in enumerate(plates):
        shape[plate.dim] = x.shape[dim]
    return x.reshape(*shape, *x.shape[len(plates) :])


def _check_complete(count: int, plate: Plate, label: str) -> None:
    """What is pooled over must be all there, or q would change with the subsample."""
    if plate.size != -1 and count != plate.size:
        raise ValueError(
            f"{label} has {count} rows of plate '{plate.name}', which has {plate.size}; latents outside of "
            "that plate depend on all of its rows, so inputs=... must return all of them (the model may "
            "still take a subsample)"
        )
    if not count:
        raise ValueError(f"{label} has no rows of plate '{plate.name}' to pool; pass at least one")


def _joined(tensors: Sequence[tuple[Tensor, int]], steps: int) -> tuple[Tensor, int]:
    """One tensor as it is; several broadcast over plates (and steps) and joined along their features."""
    if len(tensors) == 1:
        return tensors[0]
    flat = []
    for x, feature_dim in tensors:
        batch, features = x.shape[: x.dim() - feature_dim], x.shape[x.dim() - feature_dim :]
        flat.append(x.reshape(*batch, *(features[:steps] or (1,) * steps), -1))
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in flat))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in flat], dim=-1), 1 + steps


def _ragged_rows(
    x: Tensor, given: Given, plate: Plate, indices: Mapping[str, Tensor], label: str
) -> tuple[Tensor, Tensor]:
    """The rows of this call's elements of a plate, and which of them each belongs to."""
    index, mask = given.index, given.mask
    if index is None:
        raise ValueError(f"{label} came with an index when the guide was set up; return (features, index)")
    if index.shape != x.shape[:1]:
        raise ValueError(
            f"the index of {label} has shape {tuple(index.shape)}, expected one number per row of its "
            f"features, ({len(x)},)"
        )
    size = plate.batch if plate.size == -1 else plate.size
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"the index of {label} runs from {int(index.min())} to {int(index.max())}, but plate "
            f"'{plate.name}' has {size} elements, from 0 to {size - 1}"
        )
    there = torch.ones_like(index, dtype=torch.bool)
    if mask is not None:
        if mask.shape != index.shape:
            raise ValueError(
                f"the mask of {label} has shape {tuple(mask.shape)}, expected one value per row, ({len(x)},)"
            )
        there = mask
    if plate.name in indices:
        position = index.new_full((size,), -1)
        chosen = indices[plate.name].to(index.device)
        position[chosen] = torch.arange(len(chosen), device=index.device, dtype=index.dtype)
        index = position[index]
        there = there & (index >= 0)
    return x[there], index[there].long()


def _mask_of_model(
    site: Observed,
    structure: Structure,
    plates: Sequence[Plate],
    kept: Collection[str],
    label: str,
) -> Tensor | None:
    """What the model counts of an observed site."""
    if site.mask is None:
        return None
    pooled = structure.plates_of(set(site.plates) - set(kept))
    if any(plate.subsampled for plate in pooled):
        raise ValueError(
            f"{label} is masked by the model, which takes a subsample of {[p.name for p in pooled]}, so that "
            "the mask of all rows is not known; return it: inputs=lambda *args: {'x': ..., 'mask': ...}"
        )
    mask = torch.as_tensor(site.mask).expand(structure.batch_shape(site.plates))
    return _laid_out(mask.reshape([plate.batch for plate in structure.plates_of(site.plates)]), plates)


def _fitted(mask: Tensor, x: Tensor, source: Source) -> Tensor:
    """A mask in the shape of the leading dimensions of ``x``."""
    if mask.dim() <= x.dim():
        shape = x.shape[: mask.dim()]
        if all(n in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
            return mask.expand(shape)
    raise _wrong_mask(mask, x, source)


def _wrong_mask(mask: Tensor, x: Tensor, source: Source) -> ValueError:
    return ValueError(
        f"the mask of {source.label} has shape {tuple(mask.shape)}, expected the leading dimensions of "
        f"inputs of shape {tuple(x.shape)}: one value per element of the plates {list(source.plates)}, or "
        "also one per step or feature"
    )
