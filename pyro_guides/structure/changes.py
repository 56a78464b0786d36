"""Whether another call of a model may have another structure.

A structure is kept per *signature* of the arguments. That is safe if no tensor's values reached Python
while the model ran, for only there can they decide which sites exist and how large their plates are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EscapeDetector", "outer_dims", "signature"]


def signature(
    model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Hashable | None:
    """What a static structure may depend on; None if the arguments cannot be compared.

    Shapes, dtypes and devices of tensors, values of everything else, the plates around the call and
    whether the model is in training mode.
    """
    owner = getattr(model, "__self__", model)
    try:
        return (_key(args), _key(kwargs), getattr(owner, "training", None), outer_dims())
    except TypeError:
        return None


@final
class EscapeDetector:
    """Notes whether a tensor's *values* reached Python or decided a shape while a model ran."""

    def __init__(self) -> None:
        self.found = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what the block does."""
        with _FunctionWatch(self), _DispatchWatch(self):
            yield

    def ignoring(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that is no part of the model, whatever it looks at."""
        found = self.found
        result = function(*args)
        self.found = found
        return result


@final
class _DispatchWatch(TorchDispatchMode):
    """Sees the operations that torch itself marks as depending on values."""

    def __init__(self, detector: EscapeDetector) -> None:
        super().__init__()
        self.detector = detector

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        if any(tag in func.tags for tag in tags) and not _indexes_by_integers(func, args):
            self.detector.found = True
        return func(*args, **(kwargs or {}))


@final
class _FunctionWatch(TorchFunctionMode):
    """Sees the conversions that read memory without any operation."""

    _conversions = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__))

    def __init__(self, detector: EscapeDetector) -> None:
        super().__init__()
        self.detector = detector

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._conversions:
            self.detector.found = True
        return func(*args, **(kwargs or {}))


def _indexes_by_integers(func: Any, args: Any) -> bool:
    """Whether this is indexing whose result has a shape that the values do not decide."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def outer_dims() -> tuple[int, ...]:
    """The dimensions of plates that are open around a call."""
    return tuple(-1 - i for i, name in enumerate(_DIM_ALLOCATOR._stack) if name is not None)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (Tensor, value.shape, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_key, value)))
    if isinstance(value, dict):
        return (dict, tuple((key, _key(item)) for key, item in value.items()))
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    raise TypeError(f"{type(value).__name__} cannot be compared between calls")
