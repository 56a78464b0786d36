"""Tests and bands for uniform ranks: how often they are wrong, and what they find."""

import numpy as np
import pytest
from scipy import stats

from pyro_guides.statistics.uniformity import (
    band,
    coverage,
    ecdf_band,
    holm,
    p_value,
    ranks_to_pit,
    tarp,
)

SIMULATIONS, DRAWS = 1000, 1000


def uniforms(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def pit_of(scale, shift, repeats, *, draws=DRAWS, simulations=SIMULATIONS, seed=0):
    """Spread ranks of N(0, 1) truths among draws of N(shift, scale²), which are binomial: (n, repeats)."""
    rng = np.random.default_rng(seed)
    below = stats.norm.cdf((rng.normal(size=(simulations, repeats)) - shift) / scale)
    return ranks_to_pit(rng.binomial(draws, below), draws, rng)


# --- ranks


def test_ranks_are_spread_within_their_steps():
    ranks = np.repeat(np.arange(5), 2000)
    pit = ranks_to_pit(ranks, 4, np.random.default_rng(1))
    np.testing.assert_array_equal(np.floor(5.0 * pit), ranks)
    assert p_value(pit) > 0.5  # as even as can be
    assert p_value(ranks / 4.0) < 1e-6  # the control: steps are not uniform
    assert ranks_to_pit(np.zeros((3, 2), int), 4).shape == (3, 2)


def test_a_generator_makes_the_spread_repeatable():
    ranks = np.arange(10)
    np.testing.assert_array_equal(ranks_to_pit(ranks, 9), ranks_to_pit(ranks, 9))
    np.testing.assert_array_equal(
        ranks_to_pit(ranks, 9), ranks_to_pit(ranks, 9, rng=np.random.default_rng(0))
    )
    assert (ranks_to_pit(ranks, 9) != ranks_to_pit(ranks, 9, np.random.default_rng(1))).all()


# --- p-values


@pytest.mark.parametrize("n", [20, 100, 1000, 3000])
def test_p_values_are_those_of_scipy(n):
    pit = uniforms(n, 30, seed=n) ** np.linspace(0.8, 1.2, 30)
    exact = [
        min(1.0, 2.0 * min(stats.kstest(u, "uniform").pvalue, stats.kstest(abs(2 * u - 1), "uniform").pvalue))
        for u in pit.T
    ]
    np.testing.assert_allclose(p_value(pit), exact, rtol=0, atol=0.002)
    assert min(exact) < 0.05 < 0.9 < max(exact)


def test_the_tail_of_p_values_is_that_of_scipy():
    """Where verdicts fall: shifts of all sizes, to p-values far below 1e-6."""
    pit = np.clip(((np.arange(400) + 0.5) / 400.0)[:, None] + np.linspace(0.05, 0.3, 50), 0.0, 1.0)
    exact = np.array([2.0 * stats.kstest(u, "uniform").pvalue for u in pit.T])
    ours = p_value(pit)
    assert ours.min() < 1e-12
    likely = (exact > 1e-6) & (exact < 0.5)
    np.testing.assert_allclose(ours[likely], exact[likely], rtol=0.05)


def test_false_alarms():
    """2000 repeats of n = 1000: Monte-Carlo error 0.0022 at 0.01, 0.0049 at 0.05."""
    p = p_value(pit_of(1.0, 0.0, 2000))
    assert (p < 0.01).mean() <= 0.015
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert p.max() <= 1.0


@pytest.mark.parametrize(("scale", "shift"), [(0.7, 0.0), (1.4, 0.0), (1.0, 0.5), (0.85, 0.0), (1.2, 0.0)])
def test_wrong_scales_and_shifts_are_found(scale, shift):
    """100 repeats of n = 1000 ranks among 1000 draws."""
    assert (p_value(pit_of(scale, shift, 100)) < 0.01).sum() >= 95


def test_scale_is_found_by_folding():
    """What the plain test alone would miss: the control of the one above."""
    pit = pit_of(0.9, 0.0, 100)
    plain = np.array([stats.kstest(u, "uniform").pvalue for u in pit.T])
    assert (p_value(pit) < 0.01).mean() > 0.3 + (plain < 0.01).mean()


def test_holm_takes_the_smallest_of_many():
    np.testing.assert_allclose(holm([[0.02, 0.9], [0.5, 0.8], [0.7, 0.95]]), [0.06, 1.0])
    p = holm(uniforms(20, 4000))
    # 1 - (1 - 0.05/20)^20 = 0.0488; Monte-Carlo error 0.0034.
    assert (p < 0.05).mean() == pytest.approx(0.0488, abs=0.0105)
    assert (uniforms(20, 4000).min(0) < 0.05).mean() > 0.5  # the control: as they are


# --- bands


def inside(pit, grid, lower, upper):
    ecdf = np.stack([(pit <= z).mean(0) for z in grid])
    return ((ecdf >= lower[:, None] - 1e-12) & (ecdf <= upper[:, None] + 1e-12)).all(0)


@pytest.mark.parametrize(("n", "probability"), [(100, 0.95), (400, 0.8)])
def test_the_band_holds_whole_ecdfs_with_its_probability(n, probability):
    """4000 ECDFs: Monte-Carlo error 0.0034 and 0.0063, and 0.002 and 0.004 of the band's own simulation."""
    grid, lower, upper = ecdf_band(n, probability=probability, rng=np.random.default_rng(1))
    held = inside(uniforms(n, 4000, seed=2), grid, lower, upper).mean()
    error = np.hypot(*np.sqrt(probability * (1.0 - probability) / np.array([4000, 10_000])))
    assert held == pytest.approx(probability, abs=3.0 * error)


def test_a_pointwise_band_holds_fewer():
    """The control: bounds made for one point each."""
    grid = np.linspace(0.01, 0.99, 99)
    bounds = band(grid, 100)
    pit = uniforms(100, 2000)
    assert inside(pit, grid, bounds.pointwise_lower, bounds.pointwise_upper).mean() < 0.75
    assert inside(pit, grid, bounds.lower, bounds.upper).mean() > 0.93


def test_a_wrong_scale_leaves_the_band():
    grid, lower, upper = ecdf_band(SIMULATIONS)
    assert not inside(pit_of(0.8, 0.0, 20), grid, lower, upper).any()


def test_bands_are_symmetric_and_begin_and_end_at_certainty():
    grid, lower, upper = ecdf_band(57)
    np.testing.assert_allclose(lower, 1.0 - upper[::-1], atol=1e-12)
    np.testing.assert_array_equal(grid, np.linspace(0.0, 1.0, 101))
    assert (lower[0], upper[0], lower[-1], upper[-1]) == (0.0, 0.0, 1.0, 1.0)


def test_a_band_of_one_point_is_the_interval_of_a_binomial():
    for n, z in ((50, 0.3), (2000, 0.5)):
        bounds = band([z], n)
        exact = stats.binom.ppf([0.025, 0.975], n, z) / n
        np.testing.assert_allclose([bounds.pointwise_lower[0], bounds.pointwise_upper[0]], exact)
        # One point's joint band is that interval, but for the simulation's error.
        np.testing.assert_allclose([bounds.lower[0], bounds.upper[0]], exact, atol=1.01 / n + 1e-3)


def test_coverage_counts_central_intervals():
    """A q of scale s covers 2 Φ(s Φ⁻¹((1 + c)/2)) - 1; Monte-Carlo error of 200 000: 0.001."""
    levels = np.array([0.5, 0.8, 0.95])
    for scale in (0.7, 1.0, 1.4):
        pit = pit_of(scale, 0.0, 200)
        exact = 2.0 * stats.norm.cdf(scale * stats.norm.ppf(0.5 + levels / 2.0)) - 1.0
        found = coverage(pit, levels)
        assert found.shape == (3, 200)
        np.testing.assert_allclose(found.mean(1), exact, atol=0.005)


def test_coverage_stays_in_its_band():
    """500 repeats of n = 200: Monte-Carlo error 0.0097 around at least 0.95, more as counts are whole."""
    levels = np.linspace(0.1, 0.9, 9)
    bounds = band(levels, 200)
    for scale, holds in ((1.0, True), (0.7, False)):
        found = coverage(pit_of(scale, 0.0, 500, simulations=200), levels)
        held = ((found >= bounds.lower[:, None] - 1e-12) & (found <= bounds.upper[:, None] + 1e-12)).all(0)
        assert (held.mean() > 0.92) == holds
    assert (bounds.lower <= bounds.pointwise_lower).all()
    assert (bounds.upper >= bounds.pointwise_upper).all()


# --- tests of accuracy with random points


def regression(q_scale=1.0, correlated=True, seed=0):
    """Two parameters with posterior N(m, C) of correlation 0.9, given 500 data; draws of a q.

    References are to one side of m: all around it, wrong correlations would cancel.
    """
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(np.array([[1.0, 0.9], [0.9, 1.0]]))
    mean = 3.0 * rng.normal(size=(500, 2))
    truth = mean + rng.normal(size=(500, 2)) @ root.T
    spread = rng.normal(size=(200, 500, 2)) @ (root.T if correlated else np.eye(2))
    references = mean + rng.normal(3.0, 1.0, size=(500, 2))
    return mean + q_scale * spread, truth, references


def test_tarp_is_uniform_for_the_right_q():
    p = [p_value(tarp(*regression(seed=seed))) for seed in range(20)]
    assert holm(p) > 0.01
    assert p_value(np.array(p)) > 0.001


@pytest.mark.parametrize("wrong", [{"q_scale": 0.7}, {"q_scale": 1.4}, {"correlated": False}])
def test_tarp_finds_a_wrong_q(wrong):
    """Wrong correlations leave each marginal's ranks uniform."""
    draws, truth, references = regression(**wrong)
    assert p_value(tarp(draws, truth, references)) < 1e-3
    if "correlated" in wrong:
        assert p_value(ranks_to_pit((draws < truth).sum(0), len(draws))).min() > 0.01


def test_tarp_does_not_depend_on_units_and_shares_ties():
    draws, truth, references = regression()
    units = np.array([1e-3, 1e5])
    np.testing.assert_allclose(
        tarp(draws * units, truth * units, references * units), tarp(draws, truth, references)
    )
    rng = np.random.default_rng(0)
    draws, truth = rng.integers(0, 2, (50, 1000, 1)), rng.integers(0, 2, (1000, 1))
    assert p_value(tarp(draws, truth, np.zeros((1000, 1)))) > 0.01
    assert 0.0 < tarp(np.ones((5, 1, 1)), np.ones((1, 1)), np.ones((1, 1)))[0] < 1.0


# --- errors

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks_to_pit([0, 11], 10), r"ranks must be in 0, \.\.\., 10 for 10 draws, got 11"),
        (lambda: ranks_to_pit([-1], 10), r"ranks must be in 0, \.\.\., 10 for 10 draws, got -1"),
        (lambda: ranks_to_pit([0], 0), "num_draws must be at least 1, got 0"),
        (lambda: p_value([]), r"pit must hold values on axis 0, got shape \(0,\)"),
        (lambda: p_value(0.5), r"pit must hold values on axis 0, got shape \(\)"),
        (lambda: p_value([0.5, 1.1, -1.0]), r"pit must be in \[0, 1\], got 1\.1 and 1 more"),
        (lambda: p_value([0.5, NAN]), r"pit must be in \[0, 1\], got nan and 0 more"),
        (lambda: holm([1.5]), r"p_values must be in \[0, 1\], got 1\.5"),
        (lambda: ecdf_band(0), "n must be at least 1, got 0"),
        (lambda: ecdf_band(9, probability=95), "probability must be between 0 and 1, got 95"),
        (lambda: ecdf_band(9, grid=[0.5, 0.2]), "grid must be a vector of increasing values"),
        (lambda: ecdf_band(9, grid=[[0.5]]), "grid must be a vector of increasing values"),
        (lambda: coverage([0.5], [95.0]), r"levels must be in \[0, 1\], got 95\.0"),
        (lambda: band([0.9, 0.9], 9), "levels must be a vector of increasing values"),
        (lambda: band([0.9], 9, NAN), "probability must be between 0 and 1, got nan"),
        (
            lambda: tarp(np.zeros((5, 4)), np.zeros((4, 1)), np.zeros((4, 1))),
            r"\(S, M, D\), \(M, D\) and \(M, D\), got \(5, 4\), \(4, 1\), \(4, 1\); a scalar has D = 1",
        ),
        (
            lambda: tarp(np.zeros((5, 4, 1)), np.zeros((4, 1)), np.full((4, 1), NAN)),
            "references must be finite, got 4 NaN",
        ),
        (lambda: tarp(np.zeros((0, 4, 1)), np.zeros((4, 1)), np.zeros((4, 1))), "draws must not be empty"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks_to_pit([0.5], 10), "ranks must be ints, got dtype float64"),
        (lambda: ranks_to_pit([1], 10.0), r"num_draws must be an int, got 10\.0"),
        (lambda: ranks_to_pit([1], 10, 0), "rng must be a NumPy generator, got 0"),
        (lambda: p_value(["a"]), "pit must be an array of real numbers"),
        (lambda: ecdf_band(True), "n must be an int, got True"),
        (lambda: ecdf_band(9, probability="high"), "probability must be a number, got 'high'"),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
