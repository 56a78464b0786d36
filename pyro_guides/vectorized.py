"""Runs a function at many draws with the meaning of a loop, all at once if that can be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import pyro
import torch
from torch import Tensor

__all__ = ["Vectorized", "count", "draw"]


@final
class Vectorized:
    """A function on many draws by ``torch.vmap``; where that fails once, by a loop from then on."""

    def __init__(self) -> None:
        self._loops = False

    def __call__(self, run: Callable[..., Any], inputs: tuple[Any, ...], at_once: int) -> Any:
        """Run something at every draw.

        Args:
            run: a function of nests of dicts and tuples of tensors, that returns such a nest.
            inputs: its arguments, each tensor with a dimension of draws on the left.
            at_once: how many draws to take in one pass.
        """
        if not self._loops:
            try:
                # Validation asks for Python booleans, and missing batching rules warn before they loop.
                with pyro.validation_enabled(False), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return torch.vmap(run, chunk_size=at_once, randomness="different")(*inputs)
            except Exception:  # noqa: BLE001 - one draw goes well, so vmap is what failed: anything may come
                self._loops = True
        return _stacked([run(*draw(inputs, at)) for at in range(count(inputs))])


def count(values: Any) -> int:
    """How many draws a nest of dicts and tuples of tensors holds."""
    if isinstance(values, Tensor):
        return len(values)
    return max(map(count, values.values() if isinstance(values, dict) else values), default=0)


def draw(values: Any, at: int) -> Any:
    """One draw of a nest of dicts and tuples of tensors."""
    if isinstance(values, dict):
        return {name: draw(value, at) for name, value in values.items()}
    return tuple(draw(value, at) for value in values) if isinstance(values, tuple) else values[at]


def _stacked(nests: Sequence[Any]) -> Any:
    """One nest of stacked tensors from one nest per draw."""
    first = nests[0]
    if isinstance(first, dict):
        return {name: _stacked([nest[name] for nest in nests]) for name in first}
    if isinstance(first, tuple):
        return tuple(map(_stacked, zip(*nests, strict=True)))
    return torch.stack(list(nests))
