"""What a file may name: a few kinds of classes and functions, and nothing that could do harm.

Nothing is imported on a file's behalf. A class is looked up among the modules that are loaded anyway, and
only in this package and in ``torch.nn.modules``; a function, in a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import initialization
from torch import nn

__all__ = ["DEEPEST", "class_name", "find_class", "find_function", "function_name", "is_key", "is_nameable"]

DEEPEST = 64  # how many objects may lie within each other

_OWN = "pyro_guides"
_TORCH = "torch.nn.modules."
_NAMES: dict[Any, tuple[str, ...]] = {
    torch: ("cos", "exp", "relu", "sigmoid", "sin", "square", "tanh"),
    nn.functional: (
        "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
        "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "tanhshrink",
    ),
    initialization: (
        "init_to_feasible", "init_to_mean", "init_to_median", "init_to_sample", "init_to_uniform",
    ),
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}:{name}": getattr(module, name) for module, names in _NAMES.items() for name in names
}
_SCALARS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def class_name(cls: type) -> str:
    """What a file calls a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_nameable(cls: type) -> bool:
    """Whether files may hold the class and its instances."""
    return _may_hold(cls) and _loaded(class_name(cls)) is cls


def find_class(name: str) -> type:
    """The class that a file names.

    Raises:
        ValueError: files may not hold it, or it is not there.
    """
    module = str(name).partition(":")[0]
    if not _is_open(module):
        raise ValueError(f"names {name!r}, which is none of the classes that a file may hold")
    found = _loaded(name)
    if not isinstance(found, type) or class_name(found) != name or not _may_hold(found):
        raise ValueError(f"holds a {name!r}, which this version of the package or of PyTorch does not have")
    return found


def function_name(function: object) -> str | None:
    """What a file calls a function; None if it may not name it."""
    return next((name for name, other in _FUNCTIONS.items() if other is function), None)


def find_function(name: str) -> Callable[..., Any]:
    """The function that a file names.

    Raises:
        ValueError: files may not name it.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"names the function {name!r}, which is none of those that a file may name")
    return _FUNCTIONS[name]


def is_key(value: object) -> bool:
    """Whether a file may hold this as an element of a set or a dict's key.

    Tuples of tuples may not: with shared parts, to hash them can take forever.
    """
    if type(value) in (tuple, torch.Size):
        return all(isinstance(item, _SCALARS) for item in value)  # type: ignore[attr-defined]
    return isinstance(value, _SCALARS)


def _is_open(module: str) -> bool:
    return module == _OWN or module.startswith((_OWN + ".", _TORCH))


def _may_hold(cls: type) -> bool:
    """Whether an instance is made of its attributes alone, and of a kind that does no harm."""
    construct: object = cls.__new__
    plain = construct is object.__new__ and _is_open(cls.__module__)
    return plain and (issubclass(cls, nn.Module) or not cls.__module__.startswith(_TORCH))


def _loaded(name: str) -> object:
    module, _, attribute = name.partition(":")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
