"""Names that run on with a number, as in ``z_1, z_2, z_3``."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["numbered", "runs", "title"]


def numbered(name: str) -> tuple[str, int] | None:
    """The stem and the number of a name; None if it does not end in one.

    Example:
        >>> numbered("z_12"), numbered("scale")
        (('z_', 12), None)
    """
    match = re.fullmatch(r"(.*\D)(\d+)", name)
    return None if match is None else (match[1], int(match[2]))


def runs(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """For each stem, the names by their numbers, in rising order.

    Example:
        >>> runs(["z_2", "scale", "z_1"])
        {'z_': {1: 'z_1', 2: 'z_2'}}
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        run = numbered(name)
        if run is not None:
            found.setdefault(run[0], {})[run[1]] = name
    return {stem: dict(sorted(numbers.items())) for stem, numbers in found.items()}


def title(stem: str) -> str:
    """What users call a sequence.

    Example:
        >>> title("z_")
        'z'
    """
    return stem.rstrip("_ .[(-") or stem
