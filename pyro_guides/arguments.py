"""Arguments of constructors: what they must be, or an error that says what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_guides.statistics.arguments import flag

__all__ = ["check_choice", "check_count", "check_flags", "check_sizes"]


def check_choice(owner: str, argument: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a ValueError unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: {argument} must be one of {list(choices)}, got {value!r}")


def check_count(owner: str, argument: str, value: Any, least: int, instead: str) -> None:
    """Raise a TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    _check_int(owner, argument, value)
    if value < least:
        raise ValueError(f"{owner}: {argument} must be at least {least}, got {value}; {instead}")


def check_flags(owner: str, **flags: Any) -> None:
    """Raise a TypeError unless all flags are True or False."""
    for argument, value in flags.items():
        flag(f"{owner}: {argument}", value)


def check_sizes(owner: str, least: int = 1, **sizes: Any) -> None:
    """Raise a TypeError or ValueError unless all sizes are ints of at least ``least``, which is 0 or 1."""
    for argument, value in sizes.items():
        _check_int(owner, argument, value)
        if value < least:
            limit = f"be at least {least}" if least else "not be negative"
            raise ValueError(f"{owner}: {argument} must {limit}, got {value}")


def _check_int(owner: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {argument} must be an int, got {value!r}")
