"""Whether another call of a model may have another structure.

A structure is kept per *signature* of the arguments. That is safe if no tensor's values reached Python
while the model ran, for only there can they decide which sites exist and how large their plates are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, final

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["EscapeDetector", "signature"]


def signature(
    model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Hashable | None:
    """What a static structure may depend on; None if the arguments cannot be compared.

    Shapes, dtypes and devices of tensors, values of everything else, the plates around the call and
    whether the model is in training mode.
    """
    owner = getattr(model, "__self__", model)
    outside = tuple(i for i, name in enumerate(_DIM_ALLOCATOR._stack) if name is not None)
    try:
        return (_key(args), _key(kwargs), getattr(owner, "training", None), outside)
    except TypeError:
        return None


@final
class EscapeDetector(TorchFunctionMode):
    """Notes whether a tensor's *values* reached Python, where they can decide anything."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def ignoring(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that is no part of the model, whatever it looks at."""
        found = self.found
        result = function(*args)
        self.found = found
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in _ESCAPES or _selects_by_mask(func, args)
        return func(*args, **(kwargs or {}))


_ESCAPES = frozenset(
    getattr(owner, name)
    for owner, names in (
        (
            Tensor,
            "item tolist numpy __array__ __bool__ __int__ __float__ __index__ __complex__ "
            "__contains__ nonzero unique unique_consecutive masked_select argwhere equal allclose",
        ),
        (
            torch,
            "is_nonzero nonzero unique unique_consecutive masked_select argwhere equal allclose bincount",
        ),
    )
    for name in names.split()
)


def _selects_by_mask(func: Any, args: Any) -> bool:
    if func is not Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (Tensor, value.shape, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_key, value)))
    if isinstance(value, dict):
        return (dict, tuple((key, _key(item)) for key, item in value.items()))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be compared between calls")
