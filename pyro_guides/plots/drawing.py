"""What all figures share: where to draw, in which colors, and how to name scalars."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_guides.statistics.arguments import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["BAD", "FAINT", "MAIN", "OTHER", "axes", "bins", "canvas", "density", "flat", "labels", "needed"]

MAIN, OTHER, BAD, FAINT = "C0", "C1", "C3", "0.8"
_BINS, _MOST_INTEGERS = 40, 200

_Needed = TypeVar("_Needed")


def axes(ax: Axes | None) -> Axes:
    """The given axes, or those of a new pyplot figure.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: something else is given.
    """
    if ax is None:
        new: Axes = _matplotlib("pyplot").subplots(layout="constrained")[1]
        return new
    if not isinstance(ax, _matplotlib("axes").Axes):
        raise TypeError(f"ax must be a Matplotlib Axes, got {_kind(ax)}; of an array of axes, pass one")
    return ax


def canvas(figure: Figure | SubFigure | None, width: float, height: float) -> Figure | SubFigure:
    """The given figure, or a new one of pyplot of some size.

    Args:
        figure: what is given.
        width: of a new one, in inches.
        height: of a new one, in inches.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: something else is given.
    """
    if figure is None:
        new: Figure = _matplotlib("pyplot").figure(figsize=(width, height), layout="constrained")
        return new
    if not isinstance(figure, _matplotlib("figure").FigureBase):
        raise TypeError(f"figure must be a Matplotlib Figure or SubFigure, got {_kind(figure)}")
    return figure


def needed(value: object, kind: type[_Needed], made_by: str) -> _Needed:
    """The value, if it is of a kind.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"this figure is of what {made_by} returns, a {kind.__name__}, not of {_kind(value)}")
    return value


def flat(values: Tensor) -> NDArray[Any]:
    """All values in one dimension, as NumPy."""
    return values.numpy(force=True).reshape(-1)


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """A name for each scalar of a site: ``z[0, 1]``, or ``z`` if it is one."""
    return [f"{name}[{', '.join(map(str, index))}]" if index else name for index in np.ndindex(shape)]


def bins(values: Array) -> Array:
    """Edges of a histogram's bins: one for each integer if there are few, else for all but the tails."""
    low, high = values.min(), values.max()
    if high - low < _MOST_INTEGERS and (values == values.round()).all():
        return np.arange(low, high + 2) - 0.5
    low, q1, q3, high = np.quantile(values, [0.005, 0.25, 0.75, 0.995])
    reach = 3.0 * (q3 - q1) or np.inf  # heavy tails are not to squeeze the rest
    low, high = max(low, q1 - reach), min(high, q3 + reach)
    return np.linspace(low, high, _BINS + 1) if low < high else low + np.array([-0.5, 0.5])


def density(values: Array, edges: Array) -> Array:
    """The height of each bar of a histogram, whose area is the share of values inside."""
    return np.histogram(values, edges)[0] / (len(values) * np.diff(edges))


def _matplotlib(module: str) -> ModuleType:
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError("figures need matplotlib: pip install 'pyro-guides[arviz]'") from error
    return importlib.import_module(f"matplotlib.{module}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
