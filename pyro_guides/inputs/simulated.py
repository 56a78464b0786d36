"""Puts what a model has simulated in the place of the observed arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_guides.structure import Structure

__all__ = ["accepts", "with_observations"]


def accepts(model: Callable[..., Any] | None, name: str) -> bool:
    """Whether a model has an argument of this name."""
    if model is None:
        return False
    try:
        return name in inspect.signature(model).parameters
    except (TypeError, ValueError):
        return False


def with_observations(
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observations: Mapping[str, Tensor] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with simulated observations in the place of real ones."""
    if observations is None:
        return args, kwargs
    positional, named = list(args), dict(kwargs)
    for name, value in observations.items():
        if name not in structure.observed:
            raise ValueError(
                f"observations hold '{name}', but the model's observed sites are {list(structure.observed)}"
            )
        argument = structure.observed[name].argument
        if argument is None:
            raise ValueError(
                f"observed site '{name}' is not one of the model's arguments but computed from them, so "
                "simulated data cannot take its place; pass it to the model as obs= unchanged"
            )
        if isinstance(argument, int):
            positional[argument] = value
        else:
            named[argument] = value
    return tuple(positional), named
