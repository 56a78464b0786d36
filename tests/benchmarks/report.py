"""What a benchmark returns, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cell", "Report", "Result", "Table", "Tier", "markdown", "table"]

Tier = Literal["quick", "full"]
Cell = str | float | None


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        what: what is compared.
        where: the sizes.
        value: the number, a ratio unless ``what`` says otherwise.
        spread: half the distance between the quartiles of the rounds; zero for what is counted.
        target: the largest value that counts as good; None if there is none.
        floor: the smallest value that counts as good; None if there is none.
    """

    what: str
    where: str
    value: float
    spread: float = 0.0
    target: float | None = None
    floor: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the number meets its target; empty if it has none."""
        if self.target is None and self.floor is None:
            return ""
        high = math.inf if self.target is None else self.target
        low = -math.inf if self.floor is None else self.floor
        return "met" if math.isfinite(self.value) and low <= self.value <= high else "missed"

    @property
    def bounds(self) -> str:
        """The values that count as good, in words."""
        if self.target is None:
            return "" if self.floor is None else f"≥ {self.floor:g}"
        return f"≤ {self.target:g}" if self.floor is None else f"{self.floor:g} to {self.target:g}"


@dataclass(frozen=True)
class Table:
    """Numbers that are read side by side.

    Attributes:
        title: what the table shows.
        columns: their names.
        rows: as many cells each; None is left empty.
        note: what a reader must know beside it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a benchmark found."""

    results: Sequence[Result] = ()
    tables: Sequence[Table] = ()


def markdown(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    rows = [
        (
            result.what,
            result.where,
            f"{result.value:.4g}",
            f"{result.spread:.2g}" if result.spread else "",
            result.bounds,
            result.verdict,
        )
        for result in results
    ]
    return table(("measured", "at", "value", "±", "target", ""), rows, numbers={2, 3, 4})


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: set[int] | None = None) -> str:
    """A Markdown table; columns of numbers (found, unless named) are aligned to the right."""
    if numbers is None:
        numbers = {i for i in range(len(columns)) if any(isinstance(row[i], int | float) for row in rows)}
    rule = ["---:" if i in numbers else "---" for i in range(len(columns))]
    lines = [columns, rule, *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else f"{cell:.4g}"
