"""What a call's inputs hold: a tensor, or several, a mask, an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Given", "unpack"]


@final
@dataclass(frozen=True, eq=False)
class Given:
    """What a call's inputs hold.

    Attributes:
        tensors: float tensors by name.
        mask: what of them is there; None if all is.
        index: the element that each row belongs to; None if rows are laid out by plates.
    """

    tensors: Mapping[str, Tensor]
    mask: Tensor | None = None
    index: Tensor | None = None


def unpack(value: Any, label: str) -> Given:
    """Sort out what a user's function returned.

    Raises:
        TypeError: it is not one of the things that this module's documentation names.
    """
    index = None
    if isinstance(value, tuple):
        if len(value) != 2 or not _is_integer(value[1]):
            raise TypeError(
                f"{label} is a tuple, expected (features, index) with an integer tensor that says which "
                "element of the plate each row belongs to; give several inputs as a dict"
            )
        value, index = value
    if not isinstance(value, Mapping):
        return Given({"": _as_float_tensor(value, label)}, None, index)
    masks = [item for item in value.values() if isinstance(item, Tensor) and item.dtype == torch.bool]
    tensors = {
        key: _as_float_tensor(item, f"{label}[{key!r}]")
        for key, item in value.items()
        if not any(item is mask for mask in masks)
    }
    if not tensors or len(masks) > 1:
        raise TypeError(
            f"{label} is a dict of {len(tensors)} float tensors and {len(masks)} boolean masks, expected at "
            "least one float tensor and at most one mask, with True for what is there"
        )
    return Given(tensors, masks[0] if masks else None, index)


def _as_float_tensor(value: Any, label: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{label} is a {type(value).__name__}, expected a torch.Tensor; convert it with "
            "torch.as_tensor(...)"
        )
    if not value.is_floating_point():
        raise TypeError(f"{label} is {value.dtype}, expected floating point; convert it with .float()")
    return value


def _is_integer(value: Any) -> bool:
    kinds = (torch.bool, torch.uint8)
    is_tensor = isinstance(value, Tensor) and value.dtype not in kinds
    return is_tensor and not value.is_floating_point() and not value.is_complex()
