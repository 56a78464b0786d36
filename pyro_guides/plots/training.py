"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from pyro_guides.plots.drawing import FAINT, MAIN, axes
from pyro_guides.statistics.arguments import Array, as_reals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["losses"]

_MOST_MEDIANS = 500  # that can be told apart


def losses(values: ArrayLike, ax: Axes | None = None, *, smooth: int | None = None) -> Axes:
    """The loss of each step, and its running median.

    Losses that are NaN or infinite are left out, and so are heights that only the first twentieth reaches.

    Args:
        values: what ``svi.step`` returned, one per step.
        ax: where to draw.
        smooth: how many steps a median is of; a fiftieth of all if None.

    Raises:
        TypeError, ValueError: ``values`` are no list of numbers, or none is finite; ``smooth`` is no positive
            int.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import plots
        >>> ax = plots.losses([9.0, 5.0, 4.0, 3.0, 6.0], Figure().subplots(), smooth=3)
        >>> ax.lines[1].get_ydata()
        array([7. , 5. , 4. , 4. , 4.5])
    """
    array = as_reals("losses", values)
    if array.ndim != 1 or not np.isfinite(array).any():
        raise ValueError(
            f"losses must be a list of numbers, not all NaN or infinite, got shape {array.shape}; keep what "
            "svi.step(...) returns"
        )
    width = max(1, len(array) // 50) if smooth is None else smooth
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"smooth must be an int of at least 1, got {smooth!r}")
    steps = np.flatnonzero(np.isfinite(array))
    known, ax = array[steps], axes(ax)
    at, medians = _running_median(known, width)
    ax.plot(steps, known, color=FAINT, label="each step")
    ax.plot(steps[at], medians, color=MAIN, label=f"median of {width}")
    late = known[len(known) // 20 :]
    margin = 0.05 * (np.ptp(late) or 1.0)
    ax.set(xlabel="step", ylabel="loss", ylim=(late.min() - margin, late.max() + margin))
    ax.legend(loc="upper right")  # the best place is slow to find among many steps
    return ax


def _running_median(values: Array, width: int) -> tuple[Array, Array]:
    """Medians of ``width`` values, fewer at the ends, and the indices that they are around."""
    at = np.unique(np.linspace(0, len(values) - 1, _MOST_MEDIANS).round().astype(int))
    first, last = at - (width - 1) // 2, at + width // 2 + 1
    return at, np.array([np.median(values[max(0, a) : b]) for a, b in zip(first, last, strict=True)])
