"""One bad input: how it is given, and the error that must answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Case", "check_message", "table"]


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: what it is, after the area it belongs to.
        call: gives it; it takes the guide if there is one.
        error: the kind of error.
        message: the parts of its message in order, joined by " ... ": the site or argument, what was
            expected, what was got, the next step.
        guide: which of ``models.GUIDES`` it is given to; none if empty. That guide, and Pyro, must be left as
            they were, and serve a good call afterwards.
        later: whether that guide has answered a good call before.
    """

    name: str
    call: Callable[..., Any]
    error: type[BaseException]
    message: str
    guide: str = ""
    later: bool = False


def table(area: str, rows: Mapping[str, tuple[Callable[..., Any], type[BaseException], str]]) -> list[Case]:
    """Cases without a guide, by name."""
    return [Case(f"{area}: {name}", *row) for name, row in rows.items()]


def check_message(message: str, pattern: str) -> None:
    """All parts of the pattern occur, in their order."""
    position = 0
    for part in pattern.split(" ... "):
        position = message.find(part, position)
        assert position >= 0, f"no {part!r} in its place in: {message}"
        position += len(part)
