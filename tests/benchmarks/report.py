"""What a benchmark returns, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Result", "markdown"]


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        what: what is compared.
        where: the sizes.
        value: the number, a ratio unless ``what`` says otherwise.
        spread: half the distance between the quartiles of the rounds; zero for what is counted.
        target: the largest value that counts as good; None if the number is only reported.
    """

    what: str
    where: str
    value: float
    spread: float = 0.0
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the number meets its target."""
        if self.target is None:
            return ""
        return "met" if math.isfinite(self.value) and self.value <= self.target else "missed"


def markdown(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    rows = [("measured", "at", "value", "±", "target", "")]
    rows += [
        (
            result.what,
            result.where,
            f"{result.value:.4g}",
            f"{result.spread:.2g}" if result.spread else "",
            "" if result.target is None else f"≤ {result.target:g}",
            result.verdict,
        )
        for result in results
    ]
    rows.insert(1, ("---", "---", "---:", "---:", "---:", "---"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
