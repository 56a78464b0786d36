"""From a tree of objects to a list of nodes, each made of those before it, and the tensors in it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from pyro_guides.storage.names import DEEPEST, class_name, function_name, is_key, is_nameable

__all__ = ["DERIVED", "OWN_OF_MODULES", "Encoder", "described"]

SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", torch.Size: "size"}
SETS: dict[type, str] = {set: "set", frozenset: "frozenset"}
DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict"}

OWN_OF_MODULES = frozenset(vars(nn.Module()))  # what every module keeps for itself: parameters, hooks, ...
DERIVED = frozenset({"_compiled_call_impl", "_flat_weights", "_flat_weight_refs"})  # made anew when loaded


@final
class Encoder:
    """Writes objects down as nodes; an object that is met twice is written once.

    Args:
        external: objects that are not written but named.

    Attributes:
        nodes: what was written.
        tensors: the tensors in it, by where they were met first.
    """

    def __init__(self, external: Mapping[str, object]) -> None:
        self.nodes: list[list[Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._names = {id(value): name for name, value in external.items()}
        # By id: position, height and the object itself, or its id could come again.
        self._written: dict[int, tuple[int, int, object]] = {}
        self._above: list[int] = []
        self._heights = [0]  # of what was met so far at each level

    def value(self, x: Any, where: str = "") -> Any:
        """What stands for an object: itself if JSON has it, else the position of its node in a list.

        Args:
            x: the object.
            where: how it is reached, for error messages and the names of tensors.

        Raises:
            TypeError: there is something in it that no file can hold, or that lies within itself.
            ValueError: it is nested too deeply.
        """
        x = x.item() if isinstance(x, np.generic) else x
        if x is None or isinstance(x, (bool, str)):
            return x
        if isinstance(x, int):
            return int(x)
        return float(x) if isinstance(x, float) and math.isfinite(x) else [self._position(x, where)]

    def _position(self, x: Any, where: str) -> int:
        if id(x) not in self._written:
            if id(x) in self._above:
                raise TypeError(f"{where} lies within itself, which no file can hold")
            self._write(x, where)
        position, height, _ = self._written[id(x)]
        self._heights[-1] = max(self._heights[-1], height)
        return position

    def _write(self, x: Any, where: str) -> None:
        self._above.append(id(x))
        self._heights.append(0)
        _check_height(len(self._above), where)  # first of all, so that there is no end to the stack
        node = self._node(x, where)
        height = self._heights.pop() + 1
        _check_height(height, where)
        self._above.pop()
        self._written[id(x)] = len(self.nodes), height, x
        self.nodes.append(node)

    def _node(self, x: Any, where: str) -> list[Any]:
        kind = type(x)
        if id(x) in self._names:
            return ["external", self._names[id(x)]]
        if kind in SEQUENCES:
            return [SEQUENCES[kind], [self.value(item, _at(where, i)) for i, item in enumerate(x)]]
        if kind in SETS:
            return [SETS[kind], [self._key(item, where) for item in sorted(x, key=repr)]]
        if kind in DICTS:
            items = [[self._key(key, where), self.value(item, _at(where, key))] for key, item in x.items()]
            return [DICTS[kind], items]
        if isinstance(x, Tensor):
            return self._tensor(x, where)
        return self._atom(x) or self._instance(x, where)

    def _atom(self, x: Any) -> list[Any] | None:
        if isinstance(x, float):
            return ["float", str(float(x))]
        if isinstance(x, torch.dtype):
            return ["dtype", str(x).removeprefix("torch.")]
        if isinstance(x, torch.device):
            return ["device", str(x)]
        if isinstance(x, type) and issubclass(x, nn.Module) and is_nameable(x):
            return ["class", class_name(x)]
        name = function_name(x)
        return None if name is None else ["function", name]

    def _key(self, key: Any, where: str) -> Any:
        if not is_key(key):
            raise TypeError(
                f"{where} has {described(key)} as a key or element, expected a number, a string, or a tuple "
                "of these"
            )
        return self.value(key, where)

    def _tensor(self, x: Tensor, where: str) -> list[Any]:
        if type(x) not in (Tensor, nn.Parameter):
            _refuse(x, where)
        name = where or "tensor"
        while name in self.tensors or name == "__metadata__":
            name += "_"
        self.tensors[name] = x.detach()
        return [
            "parameter" if isinstance(x, nn.Parameter) else "tensor",
            name,
            x.requires_grad and x.is_leaf,
        ]

    def _instance(self, x: Any, where: str) -> list[Any]:
        if not is_nameable(type(x)):
            _refuse(x, where)
        if isinstance(x, nn.Module):
            return self._module(x, where)
        return ["object", class_name(type(x)), self._values(vars(x), where)]

    def _module(self, x: nn.Module, where: str) -> list[Any]:
        if x._forward_hooks or x._forward_pre_hooks:
            raise TypeError(
                f"{where} has hooks on its calls, which may change what it computes and which no file can "
                "hold; remove them first"
            )
        own = {key: item for key, item in vars(x).items() if key not in OWN_OF_MODULES | DERIVED}
        return [
            "module",
            class_name(type(x)),
            x.training,
            sorted(x._non_persistent_buffers_set),
            *(self._values(held, where) for held in (x._parameters, x._buffers, x._modules, own)),
        ]

    def _values(self, held: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {key: self.value(item, _at(where, key)) for key, item in held.items()}


def described(x: object) -> str:
    """What error messages call an object: where it is defined, and its name."""
    named = x if hasattr(x, "__qualname__") else type(x)
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', None)}"


def _check_height(height: int, where: str) -> None:
    if height > DEEPEST:
        raise ValueError(f"{where} lies deeper than {DEEPEST} objects within each other")


def _at(where: str, key: object) -> str:
    key = key if isinstance(key, str) else repr(key)
    return f"{where}.{key}" if where else key


def _refuse(x: object, where: str) -> None:
    raise TypeError(
        f"{where or 'this'} is {described(x)}: a file holds numbers, tensors, containers of these, "
        "and modules of this package and of torch.nn, but no code of others"
    )
