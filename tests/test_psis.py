"""Pareto-smoothed weights against ArviZ, theory and counting."""

import arviz as az
import numpy as np
import pytest

from pyro_guides.statistics import psis


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def wide_target(draws, columns, s, seed=0):
    """Log weights of N(0, s²) over draws from N(0, 1), up to a constant: their tail has k = 1 - 1/s²."""
    return 0.5 * (1.0 - s**-2) * normals(draws, columns, seed=seed) ** 2


# --- against ArviZ

WEIGHTS = {
    "bounded": lambda z: -(z**2),
    "log-normal": lambda z: z,
    "heavy": lambda z: 4.0 * z,
    "hopeless": lambda z: 100.0 * z,
    "beyond float64": lambda z: 600.0 * z,
    "chi-square": lambda z: 0.4 * z**2,
    "shifted far": lambda z: z - 1e6,
    "with zeros": lambda z: np.where(z < 0.3, -np.inf, z),
    "mixed": lambda z: z * np.linspace(0.1, 6.0, z.shape[1]),
    "in steps": lambda z: np.round(4.0 * z),
}


@pytest.mark.skipif(not hasattr(az, "psislw"), reason="ArviZ 1.x keeps psislw elsewhere")
@pytest.mark.parametrize("r_eff", [1.0, 0.3])
@pytest.mark.parametrize("draws", [100, 1300, 4000])
@pytest.mark.parametrize("name", WEIGHTS)
def test_k_and_weights_are_those_of_arviz(name, draws, r_eff):
    log_weights = WEIGHTS[name](normals(draws, 12))
    with np.errstate(all="ignore"):  # its own overflows
        theirs, k = az.psislw(log_weights.T.copy(), reff=r_eff)
    ours = psis.smooth(log_weights, r_eff=r_eff)
    np.testing.assert_allclose(ours.k_hat, k, rtol=1e-9, atol=1e-9)
    mine, theirs = np.exp(ours.log_weights), np.exp(theirs.T)
    np.testing.assert_allclose(np.sort(mine, axis=0), np.sort(theirs, axis=0), rtol=0, atol=1e-12)
    if name != "in steps":  # which of two equal weights gets the larger smoothed one is a matter of sorting
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


def test_rows_do_not_see_each_other():
    log_weights = normals(400, 2, 3) * np.array([0.0, 1.0, 30.0])  # no tail, a light one, a heavy one
    together = psis.smooth(log_weights)
    assert together.log_weights.shape == (400, 2, 3)
    assert together.k_hat.shape == (2, 3)
    for index in np.ndindex(2, 3):
        alone = psis.smooth(log_weights[(slice(None), *index)])
        assert alone.k_hat.shape == ()
        np.testing.assert_allclose(together.k_hat[index], alone.k_hat, rtol=1e-12)
        np.testing.assert_allclose(together.log_weights[(slice(None), *index)], alone.log_weights, rtol=1e-12)


def test_many_rows_are_smoothed_in_blocks(monkeypatch):
    log_weights = normals(100, 50)
    whole = psis.smooth(log_weights)
    monkeypatch.setattr(psis, "_VALUES_AT_ONCE", 700)  # seven rows each, and one left over
    blocks = psis.smooth(log_weights)
    np.testing.assert_allclose(whole.k_hat, blocks.k_hat, rtol=1e-12)
    np.testing.assert_allclose(whole.log_weights, blocks.log_weights, rtol=1e-12)


# --- against theory

# s -> theory's k, and the bias measured over 1000 seeds at S = 4000 (standard deviation of one k: 0.09 to
# 0.12). The logarithm in the tail of these weights fades slowly, so the bias of large k is still -0.07 at
# S = 16000; it is the estimator's own, and ArviZ has it, too.
THEORY = {1.2: (0.306, 0.008), 1.5: (0.556, -0.034), 2.0: (0.750, -0.068), 3.0: (0.889, -0.092)}


@pytest.mark.parametrize("s", THEORY)
def test_k_of_a_target_too_wide_is_what_theory_says(s):
    theory, bias = THEORY[s]
    assert theory == pytest.approx(1.0 - s**-2, abs=1e-3)
    k = psis.smooth(wide_target(4000, 200, s, seed=7)).k_hat
    assert abs(k.mean() - theory) < 3.0 * k.std()
    # Monte-Carlo error of the mean of 200: 0.009.
    assert k.mean() - theory == pytest.approx(bias, abs=0.03)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9, 1.5])
def test_k_of_exact_pareto_weights(k):
    uniform = np.random.default_rng(3).random((4000, 200))
    found = psis.smooth(-k * np.log(uniform)).k_hat
    tail = 190  # 3 √4000
    pulled = (tail * k + 5.0) / (tail + 10.0)
    # Of a mean of 200, each with standard deviation (1 + k)/√190, and the estimator's bias of up to 0.02.
    assert found.mean() == pytest.approx(pulled, abs=4.0 * (1.0 + k) / np.sqrt(190 * 200) + 0.02)


def test_bounded_weights_have_the_k_of_their_end_point_and_the_sign_matters():
    log_weights = wide_target(4000, 100, 2.0)
    too_wide = psis.smooth(-log_weights).k_hat
    # P(1 - w < ε) goes as √ε, so k = -2: -1.875 when pulled to 1/2, and -1.69 by an estimator that is not
    # consistent below -1. Monte-Carlo error: 0.01.
    assert -1.9 < too_wide.mean() < -1.6
    assert np.abs(psis.smooth(log_weights).k_hat - too_wide).min() > 1.0


def test_smoothed_weights_estimate_better_than_raw_ones():
    """The mean of z² under N(0, 1.5²), from draws of N(0, 1): the variance of 2.25."""
    z = normals(1000, 300, seed=5)
    raw = 0.5 * (1.0 - 1.5**-2) * z**2
    smoothed = psis.smooth(raw).log_weights
    weights = np.exp(raw - raw.max(0))
    error = [
        np.sqrt((((w * z**2).sum(0) - 2.25) ** 2).mean())
        for w in (weights / weights.sum(0), np.exp(smoothed))
    ]
    assert error[1] < error[0]


def test_an_exponential_tail_is_the_limit_of_k_zero():
    excess, quantiles = np.arange(1.0, 11.0)[None], (np.arange(10) + 0.5) / 10.0
    for k in (0.0, 1e-12):
        expected = psis._order_statistics(excess, np.array([k]), np.array([2.0]))
        np.testing.assert_allclose(expected, [-2.0 * np.log1p(-quantiles)], rtol=1e-10)


# --- edges


@pytest.mark.parametrize("spread", [0.0, 9e-6])
def test_constant_weights_are_as_good_as_exact(spread):
    smoothed = psis.smooth(-1e4 + spread * np.random.default_rng(0).random((200, 3)))
    assert (smoothed.k_hat == -np.inf).all()
    np.testing.assert_allclose(np.exp(smoothed.log_weights), 1.0 / 200.0, rtol=1e-5)


def test_weights_that_differ_are_fitted():
    assert np.isfinite(psis.smooth(2e-5 * normals(200)).k_hat)


def counted(draws, above, weight):
    """Weights of one, but for a few draws."""
    return np.where(np.arange(draws) < above, np.log(weight), 0.0)


@pytest.mark.parametrize(
    ("log_weights", "k"),
    [
        (counted(1000, 3, 5.0), -np.inf),  # 0.012 of the mean, whose noise is 0.032
        (counted(1000, 3, 20.0), np.inf),  # 0.054 of the mean
        (counted(1000, 500, 2.0), -np.inf),  # the largest weight is shared: bounded
        (np.where(np.arange(1000) < 500, 0.0, -np.inf), -np.inf),
        (np.where(np.arange(1000) < 1, 0.0, -np.inf), np.inf),  # one draw has it all
        (1e5 * normals(1000), np.inf),
    ],
)
def test_a_tail_too_short_to_fit_counts_if_it_matters(log_weights, k):
    smoothed = psis.smooth(log_weights)
    assert smoothed.k_hat == k
    weights = np.exp(log_weights - log_weights.max())
    np.testing.assert_allclose(np.exp(smoothed.log_weights), weights / weights.sum(), rtol=1e-9)


@pytest.mark.parametrize("above", range(5, 190, 5))
def test_tied_tails_are_bounded(above):
    """With 100 to 120 of them, one candidate of the fit is exactly exponential: 0/0."""
    smoothed = psis.smooth(counted(4000, above, 2.0))
    assert -10.0 < smoothed.k_hat < 0.0
    assert np.isfinite(smoothed.log_weights).all()


@pytest.mark.parametrize("most", [-660.0, -708.3])
def test_the_largest_tails_do_not_overflow(most):
    log_weights = np.full(4000, -800.0)
    log_weights[:190] = np.concatenate([most + 0.01 * normals(100) ** 2, np.linspace(most, 0.0, 90)])
    smoothed = psis.smooth(log_weights)
    assert 50.0 < smoothed.k_hat < 700.0
    np.testing.assert_allclose(np.exp(smoothed.log_weights).sum(), 1.0, rtol=1e-12)


def test_the_order_of_weights_stays_and_none_exceeds_the_largest():
    raw = 5.0 * normals(1000, 20)
    smoothed = psis.smooth(raw).log_weights
    order = np.argsort(raw, axis=0)
    assert (np.diff(np.take_along_axis(smoothed, order, 0), axis=0) >= 0.0).all()
    body = np.take_along_axis(raw, order[:1], 0) - np.take_along_axis(smoothed, order[:1], 0)
    assert (smoothed <= raw.max(0) - body + 1e-9).all()
    np.testing.assert_allclose(np.exp(smoothed).sum(0), 1.0, rtol=1e-12)


def test_inputs_stay_as_they_are_and_may_be_ints_or_lists():
    raw = 2.0 * normals(50, 1)
    kept = raw.copy()
    psis.smooth(raw)
    np.testing.assert_array_equal(raw, kept)
    whole = np.arange(50) // 3
    np.testing.assert_array_equal(
        psis.smooth(whole).log_weights, psis.smooth([float(x) for x in whole]).log_weights
    )
    assert psis.smooth(np.zeros((30, 0))).k_hat.shape == (0,)


def test_float32_is_computed_in_float64():
    raw = (2.0 * normals(500)).astype(np.float32)
    smoothed = psis.smooth(raw)
    assert smoothed.log_weights.dtype == np.float64
    np.testing.assert_array_equal(smoothed.log_weights, psis.smooth(raw.astype(np.float64)).log_weights)


# --- threshold, effective size, mean


def test_threshold():
    assert psis.threshold(100) == pytest.approx(0.5)
    assert psis.threshold(1000) == pytest.approx(2.0 / 3.0)
    assert psis.threshold(2200) == pytest.approx(0.7, abs=1e-3)
    assert psis.threshold(10**6) == 0.7


def test_effective_size_counts_equal_weights():
    log_weights = np.array([[0.0, 0.0, 800.0], [0.0, -np.inf, -800.0], [0.0, 0.0, 0.0], [0.0, -np.inf, 0.0]])
    np.testing.assert_allclose(psis.effective_size(log_weights), [4.0, 2.0, 1.0], rtol=1e-12)
    np.testing.assert_allclose(psis.effective_size(log_weights + 1e5), [4.0, 2.0, 1.0], rtol=1e-9)


def test_log_mean_and_its_error():
    """Weights exp(σ z - σ²/2) have mean 1 and variance exp(σ²) - 1; 4000 repeats of 500 draws."""
    sigma = 0.4
    value, error = psis.log_mean(sigma * normals(500, 4000, seed=2) - 0.5 * sigma**2)
    exact = np.sqrt(np.expm1(sigma**2) / 500.0)
    # log is concave: its mean is below zero by half the variance. Monte-Carlo errors: 0.0003 and 1 %.
    assert value.mean() == pytest.approx(-0.5 * exact**2, abs=4.0 * exact / np.sqrt(4000))
    assert value.std() == pytest.approx(exact, rel=0.05)
    assert error.mean() == pytest.approx(exact, rel=0.02)
    assert psis.log_mean(np.full(30, 700.5)) == (pytest.approx(700.5), pytest.approx(0.0, abs=1e-7))


# --- errors


def with_bad(value, *places, shape=(40, 3, 5)):
    log_weights = np.zeros(shape)
    for place in places:
        log_weights[place] = value
    return log_weights


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (np.zeros(24), "at least 25 draws on axis 0 to fit a tail, got 24; take more draws"),
        (0.0, r"draws on axis 0, got shape \(\)"),
        (np.zeros((0, 3)), r"draws on axis 0, got shape \(0, 3\)"),
        (with_bad(np.nan, 7, shape=(40,)), "1 of 40 are NaN or [+]inf, first at draw 7;"),
        (
            with_bad(np.inf, (9, 2, 4), (3, 2, 4)),
            r"2 of 600 are NaN or [+]inf, row \(2, 4\), first at draw 3;",
        ),
        (with_bad(np.nan, (5, 1), (2, 2), shape=(40, 4)), "rows 1, 2, first at draw 2;"),
        (with_bad(np.nan, 0, shape=(40, 9)), r"9 of 360 .* rows 0, 1, 2, \.\.\., first at draw 0;"),
        (np.full(40, -np.inf), "every draw has weight zero;"),
        (
            with_bad(-np.inf, (slice(None), 1, 2)),
            r"every draw has weight zero in 1 of 15 rows, row \(1, 2\);",
        ),
    ],
)
def test_weights_that_cannot_be_smoothed(log_weights, message):
    with pytest.raises(ValueError, match=message):
        psis.smooth(log_weights)


@pytest.mark.parametrize("function", [psis.smooth, psis.effective_size, psis.log_mean])
def test_every_function_checks_its_weights(function):
    with pytest.raises(ValueError, match="1 of 40 are NaN"):
        function(with_bad(np.nan, 7, shape=(40,)))
    for wrong in (["a"] * 40, np.zeros(40, complex), np.zeros(40, bool)):
        with pytest.raises(TypeError, match="log_weights must be an array of real numbers, got dtype"):
            function(wrong)


def test_options_are_checked():
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="r_eff must be a positive number"):
            psis.smooth(np.zeros(40), r_eff=wrong)
    for wrong in ("1", True, None):
        with pytest.raises(TypeError, match="r_eff must be a number"):
            psis.smooth(np.zeros(40), r_eff=wrong)
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        psis.threshold(1)
    with pytest.raises(TypeError, match=r"num_draws must be an int, got 100\.0"):
        psis.threshold(100.0)
