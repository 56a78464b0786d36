"""Arguments of constructors: what they must be, or an error that says what they are."""

from __future__ import annotations

from typing import Any

__all__ = ["check_flags", "check_sizes"]


def check_flags(owner: str, **flags: Any) -> None:
    """Raise a TypeError unless all flags are True or False."""
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}: {argument} must be True or False, got {value!r}")


def check_sizes(owner: str, least: int = 1, **sizes: Any) -> None:
    """Raise a TypeError or ValueError unless all sizes are ints of at least ``least``, which is 0 or 1."""
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {argument} must be an int, got {value!r}")
        if value < least:
            limit = f"be at least {least}" if least else "not be negative"
            raise ValueError(f"{owner}: {argument} must {limit}, got {value}")
