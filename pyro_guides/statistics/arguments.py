"""Arguments of diagnostics as NumPy arrays and numbers, or an error that says what is wrong with them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Array",
    "as_reals",
    "count",
    "flag",
    "generator",
    "increasing",
    "points",
    "probability",
    "unit_values",
    "whole",
]

Array = NDArray[np.float64]


def as_reals(name: str, values: ArrayLike) -> Array:
    """An array in float64; NaN and infinities pass."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return array.astype(np.float64, copy=False)


def unit_values(name: str, values: ArrayLike) -> Array:
    """Values in [0, 1], ``(n, ...)`` with n of at least 1."""
    array = as_reals(name, values)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(f"{name} must hold values on axis 0, got shape {array.shape}; pass (n, ...)")
    outside = ~((array >= 0.0) & (array <= 1.0))
    if outside.any():
        raise ValueError(
            f"{name} must be in [0, 1], got {array[outside][0]} and {outside.sum() - 1} more outside of it; "
            "ranks become such values by ranks_to_pit"
        )
    return array


def increasing(name: str, values: ArrayLike) -> Array:
    """Increasing values in [0, 1], ``(K,)``."""
    array = unit_values(name, values)
    if array.ndim != 1 or not (np.diff(array) > 0.0).all():
        raise ValueError(f"{name} must be a vector of increasing values, got {array}; sort them, each once")
    return array


def count(name: str, value: Any, least: int = 1) -> int:
    """An int, at least ``least``."""
    if whole(name, value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    """An int of any sign."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def probability(name: str, value: Any) -> float:
    """A number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 < float(value) < 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}; 0.95 is usual")
    return float(value)


def generator(rng: Generator | None) -> Generator:
    """A generator; without one, that of seed 0."""
    if rng is None:
        return np.random.default_rng(0)
    if not isinstance(rng, Generator):
        raise TypeError(f"rng must be a NumPy generator, got {rng!r}; numpy.random.default_rng(0) makes one")
    return rng


def points(draws: ArrayLike, truth: ArrayLike, references: ArrayLike) -> tuple[Array, Array, Array]:
    """Finite arrays ``(S, M, D)``, ``(M, D)`` and ``(M, D)``."""
    arrays = {"draws": draws, "truth": truth, "references": references}
    reals = {name: as_reals(name, values) for name, values in arrays.items()}
    shape = reals["truth"].shape
    if len(shape) != 2 or reals["references"].shape != shape or reals["draws"].shape[1:] != shape:
        raise ValueError(
            "draws, truth and references must have shapes (S, M, D), (M, D) and (M, D), got "
            f"{', '.join(str(array.shape) for array in reals.values())}; a scalar has D = 1"
        )
    for name, array in reals.items():
        if not array.size:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite, got {np.sum(~np.isfinite(array))} NaN or infinite values; "
                "leave out simulations that failed"
            )
    return reals["draws"], reals["truth"], reals["references"]
