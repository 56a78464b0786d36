"""Pareto-smoothed importance sampling: weights p/q of many rows at once, and how far to trust them.

Everything is NumPy in float64, with the S draws on axis 0 and rows on the axes after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_guides.statistics import arguments
from pyro_guides.statistics.arguments import Array

__all__ = ["Smoothed", "effective_size", "log_mean", "smooth", "threshold"]

_MIN_DRAWS = 25  # a fifth of them is a tail of five, the shortest one that is fitted
_MIN_TAIL = 5
_SAME = 1e-5  # log weights no further apart are rounding: q is exact
_SMALLEST_LOG = math.log(np.finfo(float).tiny)  # below it, weights have no digits left
_LARGEST_LOG = 709.0  # above it, weights overflow
_SMALLEST_EXCESS = 1e-306  # what a slope can be divided by without overflow
_EPS = float(np.finfo(float).eps)
_VALUES_AT_ONCE = 250_000  # what fits into a processor's cache


@final
@dataclass(frozen=True, eq=False)
class Smoothed:
    """Smoothed weights and their diagnostic.

    Args:
        log_weights: ``(S, ...)``, normalized: their ``exp`` sums to one over axis 0.
        k_hat: ``(...)``, the shape k of each row's generalized Pareto tail; weights have moments of order
            below 1/k. -inf where no tail matters, as for an exact q; +inf is not to be trusted.
    """

    log_weights: Array
    k_hat: Array


def smooth(log_weights: ArrayLike, *, r_eff: float = 1.0) -> Smoothed:
    r"""Replace each row's largest weights by what a generalized Pareto distribution expects them to be.

    The :math:`M = \lceil\min(S/5, 3\sqrt{S/r})\rceil` largest weights become the order statistics
    :math:`F^{-1}((i - 1/2)/M)` of the distribution fitted to them, at most the largest raw weight. This is
    less noisy than raw weights, and the fitted shape k tells whether they can be trusted: compare it with
    :func:`threshold`.

    Rows that leave nothing to fit keep their weights. Where all log weights are within 1e-5 of each other,
    q is exact and ``k_hat`` is -inf. Where fewer than five weights stand out from the rest, which ties in
    discrete models bring about, ``k_hat`` is -inf if they add less than :math:`1/\sqrt S` to the mean
    weight, the noise of S equal weights, and +inf otherwise: they matter, and no shape can be had.

    A low k says that weights have no heavy tail, not that they are equal: see :func:`effective_size`.

    Args:
        log_weights: log p - log q of each draw, ``(S, ...)``; -inf is a weight of zero.
        r_eff: r, the effective share of draws where they are correlated, as those of a Markov chain are.

    Raises:
        TypeError: ``log_weights`` are no real numbers, or ``r_eff`` is none.
        ValueError: fewer than 25 draws, a log weight that is NaN or +inf, a row without a finite one, or
            ``r_eff`` is not positive.

    Source: Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, "Pareto Smoothed
    Importance Sampling", 2024, JMLR 25, arXiv:1507.02646; Jin Zhang, Michael A. Stephens, "A New and
    Efficient Estimation Method for the Generalized Pareto Distribution", 2009, Technometrics 51.

    Example:
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=(1000, 3))
        >>> smoothed = smooth(z * [0.0, 0.5, 4.0])  # exact, close, far off
        >>> smoothed.k_hat < threshold(1000)
        array([ True,  True, False])
        >>> np.exp(smoothed.log_weights).sum(0).round(6)
        array([1., 1., 1.])
    """
    raw = _checked(log_weights)
    tail = _tail_length(len(raw), r_eff)
    rows = raw.reshape(len(raw), math.prod(raw.shape[1:])).T
    smoothed, k_hat = np.empty(rows.shape), np.empty(len(rows))
    step = max(1, _VALUES_AT_ONCE // len(raw))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        smoothed[block], k_hat[block] = _smooth_rows(np.array(rows[block], order="C"), tail)
    return Smoothed(smoothed.T.reshape(raw.shape), k_hat.reshape(raw.shape[1:]))


def threshold(num_draws: int) -> float:
    r"""The k up to which S draws are enough: :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    Raises:
        TypeError: ``num_draws`` is no int.
        ValueError: ``num_draws`` is less than 2.

    Source: Vehtari et al., as in :func:`smooth`.

    Example:
        >>> round(threshold(100), 3), threshold(4000)
        (0.5, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(arguments.count("num_draws", num_draws, least=2)), 0.7)


def effective_size(log_weights: ArrayLike) -> Array:
    r"""How many equal weights are as good: :math:`(\sum_s w_s)^2 / \sum_s w_s^2`, for each row.

    Args:
        log_weights: ``(S, ...)``, normalized or not.

    Raises:
        TypeError: ``log_weights`` are no real numbers.
        ValueError: a log weight is NaN or +inf, or a row has no finite one.

    Source: Augustine Kong, "A Note on Importance Sampling using Standardized Weights", 1992, University of
    Chicago, Technical Report 348.

    Example:
        >>> effective_size([[0.0, 900.0], [0.0, -900.0]])
        array([2., 1.])
    """
    checked = _checked(log_weights)
    return np.exp(2.0 * _log_sum(checked, 0) - _log_sum(2.0 * checked, 0))[0]


def log_mean(log_weights: ArrayLike) -> tuple[Array, Array]:
    r"""The log of each row's mean weight, an estimate of log p(x), and its standard error.

    By the delta method, the standard error is the mean's relative one, :math:`\sqrt{1/ESS - 1/S}`.

    Args:
        log_weights: ``(S, ...)``, as they are: not normalized.

    Raises:
        TypeError: ``log_weights`` are no real numbers.
        ValueError: a log weight is NaN or +inf, or a row has no finite one.

    Source: Art B. Owen, "Monte Carlo Theory, Methods and Examples", 2013, chapter 9.

    Example:
        >>> import numpy as np
        >>> value, error = log_mean(np.log([1.0, 3.0]))
        >>> print(np.exp(value).round(6), error.round(6))
        2.0 0.353553
    """
    checked = _checked(log_weights)
    value = _log_sum(checked, 0)[0] - math.log(len(checked))
    variance = 1.0 / effective_size(checked) - 1.0 / len(checked)
    return value, np.sqrt(np.maximum(variance, 0.0))  # rounding makes it negative for equal weights


def _checked(log_weights: ArrayLike) -> Array:
    weights = arguments.as_reals("log_weights", log_weights)
    if weights.ndim == 0 or len(weights) == 0:
        raise ValueError(f"log_weights must hold draws on axis 0, got shape {weights.shape}; pass (S, ...)")
    bad = ~(weights < math.inf)
    if bad.any():
        raise ValueError(
            f"log_weights: {bad.sum()} of {bad.size} are NaN or +inf, {_places(bad)}; log weights must be "
            "finite, or -inf for zero: look at log p and log q of these draws"
        )
    empty = np.asarray(np.isneginf(weights.max(0)))
    if empty.any():
        where = f" in {empty.sum()} of {empty.size} rows, {_rows(empty)}" if empty.ndim else ""
        raise ValueError(
            f"log_weights: every draw has weight zero{where}; one per row must be finite: q misses the "
            "posterior there, so leave them out, or look for an observation the model cannot make"
        )
    return weights


def _places(bad: NDArray[np.bool_]) -> str:
    draw = f"first at draw {int(np.argwhere(bad)[0, 0])}"
    return f"{_rows(np.logical_or.reduce(bad))}, {draw}" if bad.ndim > 1 else draw


def _rows(bad: NDArray[np.bool_]) -> str:
    """The first few rows where ``bad`` is true, as they would be indexed."""
    places = np.argwhere(bad)
    first = [str(row[0]) if len(row) == 1 else str(tuple(row.tolist())) for row in places[:3]]
    return f"{'row' if len(places) == 1 else 'rows'} {', '.join(first)}{', ...' * (len(places) > 3)}"


def _tail_length(num_draws: int, r_eff: float) -> int:
    if num_draws < _MIN_DRAWS:
        raise ValueError(
            f"log_weights must hold at least {_MIN_DRAWS} draws on axis 0 to fit a tail, got {num_draws}; "
            "take more draws"
        )
    if isinstance(r_eff, bool) or not isinstance(r_eff, Real):
        raise TypeError(f"r_eff must be a number, got {r_eff!r}")
    if not 0.0 < r_eff < math.inf:
        raise ValueError(f"r_eff must be a positive number, got {r_eff!r}; independent draws have 1.0")
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws / r_eff)))


def _smooth_rows(rows: Array, tail: int) -> tuple[Array, Array]:
    """Smoothed log weights and k of ``(R, S)`` raw ones, which are overwritten."""
    rows -= rows.max(1, keepdims=True)
    places, values = _largest(rows, tail + 1)
    cutoff = np.exp(np.maximum(values[:, :1], _SMALLEST_LOG))
    # Zero for what ties with the cutoff: not in the tail, and nothing to the sums of the fit.
    excess = np.maximum(np.exp(values[:, 1:]) - cutoff, 0.0)
    k_hat = _without_fit(rows, excess)
    fitted = (np.count_nonzero(excess, axis=1) >= _MIN_TAIL) & (rows.min(1) < -_SAME)
    k_hat[fitted], scale = _fit(excess[fitted])
    expected = cutoff[fitted] + _order_statistics(excess[fitted], k_hat[fitted], scale)
    changed = np.where(excess[fitted] > 0.0, np.minimum(np.log(expected), 0.0), values[fitted, 1:])
    values[fitted, 1:] = changed
    np.put_along_axis(rows, places, values, axis=1)
    return rows - _log_sum(rows, 1), k_hat


def _largest(rows: Array, count: int) -> tuple[NDArray[np.intp], Array]:
    """Where each row's largest values are, and these values, in ascending order."""
    places = np.argpartition(rows, -count, axis=1)[:, -count:]
    values = np.take_along_axis(rows, places, axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(values, order, axis=1)


def _without_fit(rows: Array, excess: Array) -> Array:
    """The k of a row whose tail is too short to fit: does it matter for the mean weight?"""
    share = excess.sum(1) / np.exp(rows).sum(1)
    matters = (share >= rows.shape[1] ** -0.5) & (rows.min(1) < -_SAME)
    return np.where(matters, math.inf, -math.inf)


def _fit(excess: Array) -> tuple[Array, Array]:
    """k, pulled to 1/2 with the weight of ten draws, and scale of each row's ``(R, M)`` excess."""
    count = np.count_nonzero(excess, axis=1)
    slopes, log_likelihood = _profile(excess, count)
    weights = np.exp(log_likelihood - log_likelihood.max(0))
    weights /= weights.sum(0)
    weights[weights < 10.0 * _EPS] = 0.0
    slope = _nonzero((slopes * weights).sum(0) / weights.sum(0), excess)
    k = _shape(slope, excess, count)
    return (count * k + 10 * 0.5) / (count + 10), -k / slope


def _profile(excess: Array, count: NDArray[np.intp]) -> tuple[Array, Array]:
    """Candidates for the slope -k/scale, ``(G, R)``, and the log likelihood of each with its best k."""
    quartile = excess.shape[1] - count + np.floor(count / 4 + 0.5).astype(int) - 1
    width = np.maximum(np.take_along_axis(excess, quartile[:, None], axis=1)[:, 0], _SMALLEST_EXCESS)
    grid = 30 + np.sqrt(count).astype(int)
    # Rows with fewer candidates than others repeat their last one, which counts once.
    index = np.arange(1, grid.max(initial=1) + 1)[:, None]
    slopes = 1.0 / excess[:, -1] + (1.0 - np.sqrt(grid / (np.minimum(index, grid) - 0.5))) / (3.0 * width)
    slopes = _nonzero(slopes, excess)
    k = np.stack([_shape(slope, excess, count) for slope in slopes])
    log_likelihood = count * (np.log(-slopes / k) - k - 1.0)
    return slopes, np.where(index <= grid, log_likelihood, -math.inf)


def _shape(slope: Array, excess: Array, count: NDArray[np.intp]) -> Array:
    return np.log1p(-slope[:, None] * excess).sum(1) / count


def _nonzero(slopes: Array, excess: Array) -> Array:
    """An exponential tail has slope zero, where k/slope is 0/0: a slope next to it has its limit."""
    return np.where(slopes == 0.0, _EPS / excess[:, -1], slopes)


def _order_statistics(excess: Array, k: Array, scale: Array) -> Array:
    """What the fitted distribution expects of the sorted excess."""
    count = np.count_nonzero(excess, axis=1)[:, None]
    place = np.arange(excess.shape[1]) - (excess.shape[1] - count)
    k = np.where(np.abs(k) < _EPS, _EPS, k)[:, None]
    stretched = -k * np.log1p(-np.maximum(place + 0.5, 0.0) / count)
    return scale[:, None] * np.expm1(np.minimum(stretched, _LARGEST_LOG)) / k


def _log_sum(values: Array, axis: int) -> Array:
    """Log of the sum of exp along an axis, which stays with length one; not all of it may be -inf."""
    largest = values.max(axis, keepdims=True)
    return np.log(np.exp(values - largest).sum(axis, keepdims=True)) + largest
