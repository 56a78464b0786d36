"""From a list of nodes to the objects, running no code that a file could choose.

Objects are made empty and filled with attributes; no constructor sees what a file says. Each node is made of
nodes before it, so that there is nothing to recurse into.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from pyro_guides.storage.encoding import DERIVED, OWN_OF_MODULES
from pyro_guides.storage.names import DEEPEST, find_class, find_function, is_key

__all__ = ["Decoder"]


@final
class Decoder:
    """Makes objects from nodes.

    Args:
        tensors: the tensors by name.
        external: the objects that nodes only name.
        device: where tensors go, and what stands for any device; if None, they stay where they are.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], external: Mapping[str, object], device: torch.device | None
    ) -> None:
        self._tensors = tensors
        self._external = external
        self._device = device
        self._made: list[tuple[Any, int]] = []  # objects, and how deeply they are nested
        self._depth = 0  # of what the present node is made of
        self._makers: dict[str, Callable[..., Any]] = {
            "list": self._values,
            "tuple": lambda items: tuple(self._values(items)),
            "size": lambda items: torch.Size(self._values(items)),
            "set": lambda items: set(self._keys(items)),
            "frozenset": lambda items: frozenset(self._keys(items)),
            "dict": self._dict,
            "ordered_dict": lambda items: OrderedDict(self._dict(items)),
            "float": float,
            "dtype": _dtype,
            "device": lambda name: torch.device(name) if device is None else device,
            "class": _module_class,
            "function": find_function,
            "external": lambda name: self._external[name],
            "tensor": self._tensor,
            "parameter": lambda name, grad: nn.Parameter(self._tensor(name), _is(bool, grad)),
            "object": self._object,
            "module": self._module,
        }

    def make(self, nodes: Sequence[Any]) -> None:
        """Make the object of each node.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, RuntimeError: there is none.
        """
        for kind, *content in nodes:
            self._depth = 0
            made = self._makers[kind](*content)
            if self._depth >= DEEPEST:
                raise ValueError(f"has more than {DEEPEST} objects within each other")
            self._made.append((made, self._depth + 1))

    def value(self, x: Any) -> Any:
        """The object that ``x`` stands for."""
        if not isinstance(x, list):
            return _is((type(None), bool, int, float, str), x)
        (position,) = x
        if not 0 <= _is(int, position) < len(self._made):
            raise ValueError("has a node that is made of later ones")
        made, depth = self._made[position]
        self._depth = max(self._depth, depth)
        return made

    def _values(self, items: Any) -> list[Any]:
        return [self.value(item) for item in _is(list, items)]

    def _keys(self, items: Any) -> list[Any]:
        keys = self._values(items)
        if not all(map(is_key, keys)):
            raise ValueError("has a set or a dict with elements that it may not have")
        return keys

    def _dict(self, items: Any) -> dict[Any, Any]:
        keys = self._keys([key for key, _ in _is(list, items)])
        return dict(zip(keys, self._values([value for _, value in items]), strict=True))

    def _attributes(self, items: Any, kind: Any = object) -> dict[str, Any]:
        return {key: _is(kind, self.value(value)) for key, value in _is(dict, items).items()}

    def _tensor(self, name: str, grad: bool = False) -> Tensor:
        tensor = self._tensors[name]
        tensor = tensor if self._device is None else tensor.to(self._device)
        return tensor.requires_grad_(_is(bool, grad)) if grad else tensor

    def _object(self, name: str, state: Any) -> Any:
        cls = find_class(name)
        if issubclass(cls, nn.Module):
            raise ValueError(f"takes {name} for what is no module")
        made = object.__new__(cls)
        vars(made).update(self._attributes(state))
        return made

    def _module(
        self,
        name: str,
        training: bool,
        volatile: list[str],
        parameters: Any,
        buffers: Any,
        modules: Any,
        own: Any,
    ) -> nn.Module:
        made: nn.Module = object.__new__(_module_class(name))
        nn.Module.__init__(made)  # empty, and without hooks
        made.training = _is(bool, training)
        made._non_persistent_buffers_set.update(_is(str, buffer) for buffer in volatile)
        made._parameters.update(self._attributes(parameters, (nn.Parameter, type(None))))
        made._buffers.update(self._attributes(buffers, (Tensor, type(None))))
        made._modules.update(self._attributes(modules, (nn.Module, type(None))))
        if taken := own.keys() & (OWN_OF_MODULES | DERIVED):
            raise ValueError(f"sets {sorted(taken)}, which modules keep for themselves")
        vars(made).update(self._attributes(own))
        if isinstance(made, nn.RNNBase):
            made._init_flat_weights()
        return made


def _is(kind: Any, x: Any) -> Any:
    """``x``, if it is of the kind that it must be."""
    if not isinstance(x, kind):
        raise TypeError(f"has a {type(x).__name__} in a place where it cannot be")
    return x


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = _is(torch.dtype, vars(torch).get(name))
    return dtype


def _module_class(name: str) -> type[nn.Module]:
    cls = find_class(name)
    if not issubclass(cls, nn.Module):
        raise ValueError(f"takes {name} for a module")
    return cls
