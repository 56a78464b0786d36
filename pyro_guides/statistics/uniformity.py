"""Are ranks of true values among draws uniform, as they are under a right q? Tests and bands.

Everything is NumPy, with the n simulations or rows on axis 0. What is random takes a generator, by default
one with seed 0, so that the same values get the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from pyro_guides.statistics import arguments
from pyro_guides.statistics.arguments import Array

__all__ = ["Band", "band", "coverage", "ecdf_band", "holm", "p_value", "ranks_to_pit", "tarp"]

_SIMULATIONS = 10_000  # a band's probability is met within 0.002
_TERMS = np.arange(1, 6)  # of Kolmogorov's series, whose next term is below 1e-15


def ranks_to_pit(ranks: ArrayLike, num_draws: int, rng: Generator | None = None) -> Array:
    r"""Spread ranks over the unit interval: :math:`(r + v)/(S + 1)` with uniform v.

    Where ranks are uniform on 0, ..., S, these values are exactly uniform, for any S.

    Args:
        ranks: how many of the S draws are below the true value, ``(n, ...)``.
        num_draws: S, how many draws that is.
        rng: where v comes from.

    Raises:
        TypeError: ranks or ``num_draws`` are no ints, or ``rng`` is no generator.
        ValueError: ranks outside 0, ..., S.

    Source: Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman, "Validating Bayesian
    Inference Algorithms with Simulation-Based Calibration", 2018, arXiv:1804.06788.

    Example:
        >>> (5 * ranks_to_pit([0, 4, 2], 4)).astype(int)
        array([0, 4, 2])
    """
    integers, count = np.asarray(ranks), arguments.count("num_draws", num_draws)
    if integers.dtype.kind not in "iu":
        raise TypeError(f"ranks must be ints, got dtype {integers.dtype}; pass counts, not fractions")
    outside = (integers < 0) | (integers > count)
    if outside.any():
        raise ValueError(
            f"ranks must be in 0, ..., {count} for {count} draws, got {integers[outside][0]}; count the "
            "draws below the true value"
        )
    return (integers + arguments.generator(rng).random(integers.shape)) / (count + 1)


def p_value(pit: ArrayLike) -> Array:
    r"""How likely uniform values are to look this little uniform, for each row's axis 0.

    The smaller of two Kolmogorov-Smirnov p-values, times two (Bonferroni): of the values u, which a shifted
    q moves, and of :math:`|2u - 1|`, which one too wide or too narrow moves. Within 0.001 of the exact
    Kolmogorov-Smirnov p-value for n of 20 or more.

    Args:
        pit: values in [0, 1], ``(n, ...)``.

    Raises:
        TypeError: ``pit`` are no numbers.
        ValueError: no values, or some that are NaN or outside [0, 1].

    Source: Jan Vrbik, "Small-Sample Corrections to Kolmogorov-Smirnov Test Statistic", 2018, Pioneer Journal
    of Theoretical and Applied Statistics 15.

    Example:
        >>> import numpy as np
        >>> u = np.random.default_rng(0).random(500)
        >>> p_value(np.stack([u, u**1.5, 0.25 + u / 2], axis=1)) < 0.01  # right, shifted, q too wide
        array([False,  True,  True])
    """
    values = arguments.unit_values("pit", pit)
    smaller = np.minimum(_kolmogorov_smirnov(values), _kolmogorov_smirnov(_folded(values)))
    return np.minimum(1.0, 2.0 * smaller)


def holm(p_values: ArrayLike) -> Array:
    r"""One p-value that any of m tests on axis 0 finds something: :math:`\min(1, m \min_i p_i)`.

    This is Holm's adjusted value of the smallest one; it needs no independence between the tests.

    Raises:
        TypeError: ``p_values`` are no numbers.
        ValueError: no values, or some that are NaN or outside [0, 1].

    Source: Sture Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979, Scandinavian Journal
    of Statistics 6.

    Example:
        >>> float(holm([0.5, 0.004, 0.3]))
        0.012
    """
    values = arguments.unit_values("p_values", p_values)
    return np.minimum(1.0, len(values) * values.min(0))


def ecdf_band(
    n: int, *, probability: float = 0.95, grid: ArrayLike | None = None, rng: Generator | None = None
) -> tuple[Array, Array, Array]:
    r"""Where the ECDF of n uniform values stays at all grid points at once, with given probability.

    At each point z, the bounds are the :math:`\gamma/2` quantiles of a Binomial(n, z) count from below and
    above; γ is found by simulation.

    Args:
        n: how many values.
        probability: of staying inside.
        grid: increasing points in [0, 1], ``(K,)``; by default 0, 0.01, ..., 1.
        rng: for the simulation.

    Returns:
        grid, lower and upper bound, ``(K,)`` each.

    Raises:
        TypeError: ``n`` is no int, ``probability`` or ``grid`` no numbers, or ``rng`` no generator.
        ValueError: ``n`` is less than 1, ``probability`` not within (0, 1), or ``grid`` not increasing in
            [0, 1].

    Source: Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, "Graphical Test for Discrete Uniformity and
    Its Applications in Goodness of Fit Evaluation and Multiple Sample Comparison", 2022, arXiv:2103.10522.

    Example:
        >>> grid, lower, upper = ecdf_band(100, grid=[0.1, 0.5])
        >>> lower, upper
        (array([0.04, 0.39]), array([0.17, 0.61]))
    """
    count = arguments.count("n", n)
    points = arguments.increasing("grid", np.linspace(0.0, 1.0, 101) if grid is None else grid)
    alpha = 1.0 - arguments.probability("probability", probability)
    quantile = _joint_quantile(count, points, alpha, arguments.generator(rng))
    return points, *_central(count, points, quantile)


def coverage(pit: ArrayLike, levels: ArrayLike) -> Array:
    r"""The share of true values inside each central interval: ``(L, ...)``.

    It is the ECDF of :math:`|2u - 1|`: the interval of level c holds those with :math:`|2u - 1| \le c`.

    Args:
        pit: values in [0, 1], ``(n, ...)``.
        levels: increasing, in [0, 1], ``(L,)``.

    Raises:
        TypeError: ``pit`` or ``levels`` are no numbers.
        ValueError: no values, some of ``pit`` outside [0, 1], or ``levels`` not increasing in [0, 1].

    Example:
        >>> coverage([0.05, 0.3, 0.5, 0.6], levels=[0.5, 0.95])
        array([0.75, 1.  ])
    """
    folded, points = _folded(arguments.unit_values("pit", pit)), arguments.increasing("levels", levels)
    return np.stack([(folded <= level).mean(0) for level in points])


@final
@dataclass(frozen=True, eq=False)
class Band:
    """Bounds of :func:`coverage`, ``(L,)`` each: for all levels at once, and for any one level."""

    lower: Array
    upper: Array
    pointwise_lower: Array
    pointwise_upper: Array


def band(levels: ArrayLike, n: int, probability: float = 0.95, *, rng: Generator | None = None) -> Band:
    """Where the coverage of n true values under a right q stays, with given probability.

    For one level, these are quantiles of a binomial; for all at once, :func:`ecdf_band`, as it is an ECDF.

    Args:
        levels: increasing, in [0, 1], ``(L,)``.
        n: how many true values.
        probability: of staying inside.
        rng: for the simulation.

    Raises:
        TypeError, ValueError: as :func:`ecdf_band`.

    Source: Säilynoja et al., as in :func:`ecdf_band`.

    Example:
        >>> bounds = band([0.5, 0.9], n=100)
        >>> bounds.lower, bounds.pointwise_lower
        (array([0.39, 0.83]), array([0.4 , 0.84]))
    """
    points = arguments.increasing("levels", levels)
    _, lower, upper = ecdf_band(n, probability=probability, grid=points, rng=rng)
    return Band(lower, upper, *_central(n, points, (1.0 - probability) / 2.0))


def tarp(draws: ArrayLike, truth: ArrayLike, references: ArrayLike, *, rng: Generator | None = None) -> Array:
    """The share of draws nearer to a reference than the truth is: uniform under a right q, in any dimension.

    Distances are Euclidean, in standard deviations of the truths. Only references that depend on the data
    find a q that ignores it. References to one side of the posterior find wrong correlations, which can
    cancel over those all around it.

    Args:
        draws: S draws for each of M simulations, ``(S, M, D)``.
        truth: what the simulations were made from, ``(M, D)``.
        references: a point for each simulation, ``(M, D)``, chosen without looking at the truth.
        rng: for ties, and to spread the shares as :func:`ranks_to_pit` does.

    Returns:
        Values in (0, 1), ``(M,)``, for :func:`p_value`.

    Raises:
        TypeError: arrays of something else than numbers, or ``rng`` is no generator.
        ValueError: shapes that do not fit, or values that are not finite.

    Source: Pablo Lemos, Adam Coogan, Yashar Hezaveh, Laurence Perreault-Levasseur, "Sampling-Based Accuracy
    Testing of Posterior Estimators for General Inference", 2023, arXiv:2302.03026.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> truth, references = rng.normal(size=(2, 400, 3))
        >>> draws = rng.normal(size=(100, 400, 3))
        >>> bool(p_value(tarp(draws, truth, references)) < 0.01)
        False
        >>> bool(p_value(tarp(1.5 * draws, truth, references)) < 0.01)
        True
    """
    points, true, near = arguments.points(draws, truth, references)
    scale = true.std(0)
    scale = np.where(scale > 0.0, scale, 1.0)
    distance, limit = _squared((points - near) / scale), _squared((true - near) / scale)
    generator = arguments.generator(rng)
    ties = generator.integers(0, (distance == limit).sum(0), endpoint=True)
    return ranks_to_pit((distance < limit).sum(0) + ties, len(points), generator)


def _kolmogorov_smirnov(values: Array) -> Array:
    n = len(values)
    edges = (np.arange(n + 1) / n).reshape(n + 1, *[1] * (values.ndim - 1))
    ordered = np.sort(values, axis=0)
    distance = np.maximum((edges[1:] - ordered).max(0), (ordered - edges[:-1]).max(0))
    root = math.sqrt(n)
    # Vrbik's correction. Stephens' is made for small p-values, and 0.01 off for others at n = 100.
    return _kolmogorov(root * distance + 1.0 / (6.0 * root) + (root * distance - 1.0) / (4.0 * n))


def _kolmogorov(statistic: Array) -> Array:
    """The tail of Kolmogorov's distribution, by the series that converges fast on either side of one."""
    x = statistic[..., None]
    wide, narrow = np.maximum(x, 1.0), np.minimum(x, 1.0)
    above = -2.0 * ((-1.0) ** _TERMS * np.exp(-2.0 * (_TERMS * wide) ** 2)).sum(-1)
    below = np.exp(-(((2 * _TERMS - 1) * math.pi / narrow) ** 2) / 8.0).sum(-1)
    return np.where(statistic > 1.0, above, 1.0 - math.sqrt(2.0 * math.pi) / narrow[..., 0] * below)


def _folded(pit: Array) -> Array:
    return np.abs(2.0 * pit - 1.0)


def _joint_quantile(n: int, points: Array, alpha: float, rng: Generator) -> float:
    """The largest tail probability at each point whose bounds are left by a share alpha of ECDFs."""
    steps = np.diff(points, prepend=0.0, append=1.0)
    counts = rng.multinomial(n, steps, size=_SIMULATIONS)[:, :-1].cumsum(1)
    rarest = np.ones(_SIMULATIONS)
    for count, (at_most, at_least) in zip(counts.T, _binomials(n, points), strict=True):
        rarest = np.minimum(rarest, np.minimum(at_most[count], at_least[count]))
    # Slightly less, for equal tails on both sides differ by rounding.
    return float(np.quantile(rarest, alpha, method="lower")) * (1.0 - 1e-9)


def _central(n: int, points: Array, quantile: float) -> tuple[Array, Array]:
    """The fractions between which neither tail of the binomial is below a quantile."""
    bounds = [
        (np.argmax(at_most >= quantile), n - np.argmax(at_least[::-1] >= quantile))
        for at_most, at_least in _binomials(n, points)
    ]
    lower, upper = np.array(bounds).T / n
    return lower, upper


def _binomials(n: int, points: Array) -> Iterator[tuple[Array, Array]]:
    """P(at most k) and P(at least k) of a Binomial(n, z) for k = 0, ..., n, for each point z."""
    k = np.arange(n + 1)
    log_factorial = np.cumsum(np.log(np.maximum(k, 1)))
    log_ways = log_factorial[-1] - log_factorial - log_factorial[::-1]
    for z in np.clip(points, 1e-300, 1.0 - 1e-16):  # the ends have no logarithm
        p = np.exp(log_ways + k * math.log(z) + (n - k) * math.log1p(-z))
        yield np.cumsum(p), np.cumsum(p[::-1])[::-1]


def _squared(vectors: Array) -> Array:
    return np.einsum("...d,...d->...", vectors, vectors)
