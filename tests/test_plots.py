"""Figures of training and trust: the numbers that are drawn. All figures: nothing else is changed."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pyro_guides import AmortizedGuide, plots
from pyro_guides.diagnostics import Calibration, Check
from pyro_guides.statistics import uniformity

mpl.use("agg")  # what pyplot takes where there is no screen, too


def make_check(rows=("row",), **columns):
    tensors = {name: torch.as_tensor(values) for name, values in columns.items()}
    tensors.setdefault("k_hat", torch.zeros(()))
    return Check(
        columns=tensors,
        rows=rows,
        num_draws=1000,
        shared={},
        held=(),
        trained=True,
        families=("FullRankNormal",),
        settled=True,
        notes=(),
    )


def make_calibration(pit, n=400):
    """Ranks that are uniform, but for what is asked."""
    rng = np.random.default_rng(0)
    return Calibration(
        ranks={name: (1000 * u).astype(int) for name, u in pit.items()},
        pit=pit,
        hpd=rng.random(n),
        tarp=rng.random(n),
        num_draws=999,
        plates=dict.fromkeys(pit, ()),
        levels=np.linspace(0.1, 0.9, 9),
        probability=0.95,
    )


def rows(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def posterior_of(model, *shape, num_draws=200):
    return AmortizedGuide(model).posterior(torch.randn(shape).abs().round(), num_draws=num_draws)


@pytest.fixture
def ax():
    return Figure().subplots()


def named(ax):
    """Lines by their labels."""
    return {line.get_label().lstrip("_"): line for line in ax.lines}


def heights(ax):
    return [patch.get_height() for patch in ax.patches]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- losses


def test_losses_are_drawn_with_their_running_median(ax):
    values = np.random.default_rng(0).normal(size=300)
    raw, median = plots.losses(list(values), ax, smooth=5).lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_array_equal(
        median.get_ydata()[2:-2], [np.median(values[i : i + 5]) for i in range(296)]
    )
    assert median.get_ydata()[0] == np.median(values[:3])


def test_losses_that_are_not_finite_are_left_out(ax):
    raw, _ = plots.losses([np.nan, 3.0, np.inf, 1.0], ax).lines
    assert raw.get_xydata().tolist() == [[1, 3], [3, 1]]


def test_early_losses_do_not_squeeze_the_rest(ax):
    low, high = plots.losses([1e6, 1e5] + [2.0, 1.0] * 50, ax).get_ylim()
    assert (low, high) == pytest.approx((0.95, 2.05))


def test_medians_of_many_losses_are_few(ax):
    raw, median = plots.losses(np.arange(100_000.0), ax).lines
    assert (len(raw.get_xdata()), len(median.get_xdata())) == (100_000, 500)
    assert median.get_ydata()[250] == pytest.approx(median.get_xdata()[250], abs=1)


@pytest.mark.parametrize(
    ("values", "smooth", "message"),
    [
        ([], None, "not all NaN"),
        ([np.nan, np.inf], None, "not all NaN or infinite"),
        ([[1.0], [2.0]], None, r"shape \(2, 1\)"),
        ([1.0], 0, "smooth must be an int of at least 1, got 0"),
        ([1.0], 2.5, "smooth must be an int"),
    ],
)
def test_losses_refuse(ax, values, smooth, message):
    with pytest.raises(ValueError, match=message):
        plots.losses(values, ax, smooth=smooth)


# --- checks


def test_k_hat_of_each_row_is_colored_by_trust(ax):
    check = make_check(k_hat=[0.1, 0.9, -np.inf, 0.3, np.inf], missing=[0.0, 0.0, 0.0, 0.5, 0.0])
    lines = named(plots.k_hat(check, ax))
    low, high = -0.2, 1.1
    np.testing.assert_allclose(lines["trusted: 2"].get_xydata(), [[0, 0.1], [2, low]], rtol=1e-6)
    np.testing.assert_allclose(lines["too large: 2"].get_xydata(), [[1, 0.9], [4, high]], rtol=1e-6)
    strange = lines["low, but not trusted: 1"]
    np.testing.assert_allclose(strange.get_xydata(), [[3, 0.3]], rtol=1e-6)
    assert {text.get_text(): text.get_position()[1] for text in ax.texts} == pytest.approx(
        {"as good as exact": low, "beyond any fit": high}
    )
    assert ax.get_ylim()[0] == low
    assert ax.get_xlabel() == "row"


def test_k_hat_has_the_threshold_of_its_number_of_draws(ax):
    check = make_check(k_hat=[0.1])
    lines = named(plots.k_hat(check, ax))
    assert lines["threshold 0.67"].get_ydata()[0] == check.threshold == pytest.approx(2 / 3)
    assert lines["0.5, finite variance"].get_ydata()[0] == 0.5


@pytest.mark.parametrize(("shape", "plates"), [((), ()), ((2, 3), ("a", "b"))])
def test_k_hat_of_all_kinds_of_rows(ax, shape, plates):
    plots.k_hat(make_check(plates, k_hat=torch.full(shape, -np.inf)), ax)
    assert ax.get_xlabel() == (" × ".join(plates) or "posterior")
    assert len(ax.lines[0].get_xdata()) == np.prod(shape)


def test_gaps_of_few_rows_have_a_bar_each(ax):
    check = make_check(amortization_gap=[0.1, 0.0, 0.5], family_gap=[1.0, 2.0, 0.2])
    plots.gaps(check, ax)
    assert heights(ax) == pytest.approx([2.0, 1.0, 0.2, 0.0, 0.1, 0.5])
    assert [patch.get_y() for patch in ax.patches[3:]] == pytest.approx([2.0, 1.0, 0.2])
    assert legend(ax) == ["family gap, mean 1.067", "amortization gap, mean 0.200"]


def test_gaps_of_many_rows_are_means(ax):
    check = make_check(amortization_gap=torch.arange(101.0), family_gap=torch.ones(101))
    plots.gaps(check, ax)
    assert heights(ax) == pytest.approx([1.0, 50.0])
    assert [text.get_text() for text in ax.texts] == ["51.000"]


def test_gaps_of_several_guides_are_compared(ax):
    first = make_check(amortization_gap=[0.1, 0.3], family_gap=[2.0, 3.0])
    refined = make_check(family_gap=[0.5])  # without amortization
    plots.gaps({"diagonal": first, "refined": refined}, ax)
    assert heights(ax) == pytest.approx([2.5, 0.5, 0.2, 0.0])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["diagonal", "refined"]


def test_gaps_refuse_what_has_none(ax):
    with pytest.raises(ValueError, match="without gaps=False"):
        plots.gaps(make_check(k_hat=[0.1]), ax)
    with pytest.raises(ValueError, match="empty dict"):
        plots.gaps({}, ax)


# --- calibration


def test_ranks_are_the_ecdf_within_its_band(ax):
    u = np.random.default_rng(1).random((400, 2))
    calibration = make_calibration({"z": np.stack([u[:, 0], u[:, 1] ** 1.5], axis=1)})
    lines = named(plots.ranks(calibration, ax))
    grid, lower, upper = uniformity.ecdf_band(400, probability=0.975)
    for i in range(2):
        ecdf = (calibration.pit["z"][:, i, None] <= grid).mean(0)
        np.testing.assert_allclose(lines[f"z[{i}]"].get_ydata(), ecdf - grid, atol=1e-12)
    drawn = ax.collections[0].get_paths()[0].vertices
    assert drawn[:, 1].min() == pytest.approx((lower - grid).min())
    assert drawn[:, 1].max() == pytest.approx((upper - grid).max())
    assert legend(ax) == ["band of 95% for all", "z[1]"]  # the one that leaves the band
    assert ax.get_title() == "2 scalars: 1 outside the band"


def test_coverage_is_that_of_the_calibration(ax):
    u = np.random.default_rng(2).random((400, 2))
    calibration = make_calibration({"z": u[:, 0], "w": 0.25 + u[:, 1:] / 2})
    found, lines = calibration.coverage(), named(plots.coverage(calibration, ax))
    np.testing.assert_array_equal(lines["z"].get_ydata(), found.central["z"])
    np.testing.assert_array_equal(lines["w[0]"].get_ydata(), found.central["w"][:, 0])
    np.testing.assert_array_equal(lines["highest density"].get_ydata(), found.density)
    np.testing.assert_array_equal(lines["z"].get_xdata(), calibration.levels)
    band = uniformity.band(calibration.levels, 400, 1 - 0.05 / 3)
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == band.upper.max()
    assert legend(ax) == ["band of 95% for all", "w[0]", "highest density"]


@pytest.mark.parametrize("draw", [plots.ranks, plots.coverage])
def test_of_many_scalars_the_worst_are_drawn(ax, draw):
    pit = np.random.default_rng(3).random((400, 5, 6))
    pit[:, 4, 5] **= 2
    labels = [label for label in named(draw(make_calibration({"z": pit}), ax)) if label.startswith("z")]
    assert len(labels) == 20
    assert labels[0] == "z[4, 5]"
    assert ax.get_title().startswith("the worst 20 of 30 scalars")


def test_a_legend_names_six_lines_at_most(ax):
    plots.ranks(make_calibration({"z": np.random.default_rng(4).random((400, 9)) ** 2}), ax)
    assert len(legend(ax)) == 7


# --- all of them

FIGURES = {
    "losses": lambda ax: plots.losses([2.0, 1.0], ax),
    "k_hat": lambda ax: plots.k_hat(make_check(k_hat=[0.1]), ax),
    "gaps": lambda ax: plots.gaps(make_check(family_gap=[0.1]), ax),
    "ranks": lambda ax: plots.ranks(make_calibration({"z": np.linspace(0, 1, 400)}), ax),
    "coverage": lambda ax: plots.coverage(make_calibration({"z": np.linspace(0, 1, 400)}), ax),
    "predictive": lambda ax: plots.predictive(posterior_of(rows, 4, 2), ax=ax),
    "prior_posterior": lambda figure: plots.prior_posterior(posterior_of(rows, 4, 2), figure=figure),
}


@pytest.mark.parametrize("name", FIGURES)
def test_given_axes_are_returned_and_nothing_else_is_changed(name):
    target = Figure() if name == "prior_posterior" else Figure().subplots()
    settings, backend, open_figures = dict(mpl.rcParams), mpl.get_backend(), plt.get_fignums()
    assert FIGURES[name](target) is target
    assert (dict(mpl.rcParams), mpl.get_backend(), plt.get_fignums()) == (settings, backend, open_figures)
    (target if name == "prior_posterior" else target.figure).draw_without_rendering()


@pytest.mark.parametrize("name", ["losses", "prior_posterior"])
def test_without_axes_a_new_figure_is_opened(name):
    before = plt.get_fignums()
    drawn = FIGURES[name](None)
    opened = drawn if name == "prior_posterior" else drawn.figure
    assert len(plt.get_fignums()) == len(before) + 1
    assert plt.gcf() is opened
    plt.close(opened)


@pytest.mark.parametrize("name", FIGURES)
def test_a_wrong_target_is_refused(name):
    with pytest.raises(TypeError, match=r"must be a Matplotlib (Axes|Figure or SubFigure), got a list"):
        FIGURES[name]([])


@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (plots.k_hat, "Check"),
        (plots.gaps, "Check"),
        (lambda x: plots.gaps({"a": x}), "Check"),
        (plots.ranks, "Calibration"),
        (plots.coverage, "Calibration"),
        (plots.prior_posterior, "Posterior"),
        (plots.predictive, "Posterior"),
    ],
)
def test_what_is_no_result_is_refused(draw, kind):
    with pytest.raises(TypeError, match=f"a {kind}, not of a list"):
        draw([1.0])


WITHOUT_MATPLOTLIB = """
import sys
from pyro_guides import plots
print(*{"matplotlib", "arviz", "scipy"} & set(sys.modules))
sys.modules["matplotlib"] = None
plots.losses([1.0])
"""


def test_matplotlib_is_imported_late_and_asked_for():
    run = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB], capture_output=True, text=True)
    assert run.stdout.strip() == ""
    assert run.stderr.endswith("ImportError: figures need matplotlib: pip install 'pyro-guides[arviz]'\n")
