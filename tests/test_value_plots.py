"""Figures of latents and predictions: the numbers that are drawn."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro import poutine

from pyro_guides import AmortizedGuide, plots


def rows(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def shared(x):
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def counted(x):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def posterior_of(model, *shape, num_draws=200):
    return AmortizedGuide(model).posterior(torch.randn(shape).abs().round(), num_draws=num_draws)


@pytest.fixture
def ax():
    return Figure().subplots()


def named(ax):
    """Lines by their labels."""
    return {line.get_label().lstrip("_"): line for line in ax.lines}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- prior and posterior


def bars(ax):
    """Values and edges of the prior's and the posterior's histogram."""
    return [(patch.get_data().values, patch.get_data().edges) for patch in ax.patches]


def test_prior_and_posterior_are_those_of_the_row(ax):
    posterior = posterior_of(rows, 4, 2)
    figure = plots.prior_posterior(posterior, row=2, figure=Figure())
    assert [panel.get_title() for panel in figure.axes] == ["z[0]", "z[1]"]
    for panel, draws in zip(figure.axes, posterior.draws["z"][:, 2].T.double().numpy(), strict=True):
        _, (values, edges) = bars(panel)
        expected = np.histogram(draws, edges)[0] / len(draws)
        np.testing.assert_allclose(values * np.diff(edges), expected)
        assert 0.98 <= expected.sum() <= 1.0  # but for the tails


def test_the_prior_is_wider_where_data_say_something():
    figure = plots.prior_posterior(posterior_of(rows, 4, 2, num_draws=1000), figure=Figure())
    (_, prior), (_, posterior) = bars(figure.axes[0])
    assert prior[0] == pytest.approx(-2.6, abs=0.5)
    assert np.ptp(prior) > 3 * np.ptp(posterior)  # an encoder starts narrow


def test_latents_that_rows_share_are_panels_of_any_row():
    posterior = posterior_of(shared, 4)
    figure = plots.prior_posterior(posterior, row=3, figure=Figure())
    assert [panel.get_title() for panel in figure.axes] == ["noise", "z"]
    _, (values, edges) = bars(figure.axes[1])
    expected = np.histogram(posterior.draws["z"][:, 3].double(), edges)[0] / 200
    np.testing.assert_allclose(values * np.diff(edges), expected)


@pytest.mark.parametrize(
    ("names", "titles"),
    [(["noise"], ["noise"]), (["b[1]", "noise"], ["b[1]", "noise"]), ("b", ["b[0]", "b[1]", "b[2]"])],
)
def test_panels_are_chosen_by_name(names, titles):
    def model(x):
        pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    figure = plots.prior_posterior(posterior_of(model, 3), names, figure=Figure())
    assert [panel.get_title() for panel in figure.axes] == titles


def test_discrete_latents_have_a_bar_for_each_value():
    def model(x):
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    posterior = posterior_of(model, 4)
    (_, edges), (values, own) = bars(plots.prior_posterior(posterior, figure=Figure()).axes[0])
    assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5]
    counts = torch.bincount(posterior.draws["k"][:, 0].long()) / 200
    np.testing.assert_allclose(values, counts[counts.nonzero()[0, 0] :][: len(own) - 1])


def test_panels_fit_into_part_of_a_figure():
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    right.subplots()
    assert plots.prior_posterior(posterior_of(rows, 4, 2), figure=left) is left
    assert (len(left.axes), len(figure.axes)) == (2, 3)


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        (["y"], 0, r"no latents \['y'\]; pass some of z\[0\], z\[1\]"),
        (["z[2]"], 0, "no latents"),
        ([], 0, "names is empty"),
        (None, 4, r"row must be an int in 0, \.\.\., 3, as there are 4 rows, got 4"),
        (None, -1, "got -1"),
        (None, 0.0, "got 0.0"),
    ],
)
def test_prior_posterior_refuses(names, row, message):
    with pytest.raises(ValueError, match=message):
        plots.prior_posterior(posterior_of(rows, 4, 2), names, row, Figure())


# --- predictions


def test_few_values_have_an_interval_each(ax):
    posterior = posterior_of(rows, 4, 2)
    assert posterior.draws  # before the seed is set
    pyro.set_rng_seed(1)
    draws = posterior.predict()["x"].flatten(1).double().numpy()
    pyro.set_rng_seed(1)
    plots.predictive(posterior, ax=ax)
    order = np.argsort(np.median(draws, axis=0))
    drawn = np.array([segment[:, 1] for segment in ax.collections[0].get_segments()])
    places = [segment[0, 0] for segment in ax.collections[0].get_segments()]
    low, high = np.quantile(draws[:, order], [0.05, 0.95], axis=0)
    np.testing.assert_allclose(drawn[np.argsort(places)], np.stack([low, high], 1), rtol=1e-6)
    points = {x: y for line in ax.lines for x, y in line.get_xydata().tolist()}
    observed = posterior.observed["x"].flatten()[order.tolist()]
    np.testing.assert_allclose([points[i] for i in range(8)], observed)


def test_values_outside_of_their_intervals_are_counted(ax):
    posterior = AmortizedGuide(rows).posterior(torch.tensor([[0.0, 0.0], [0.0, 40.0]]), num_draws=200)
    plots.predictive(posterior, ax=ax)
    assert ax.get_title() == "x: 75% of 4 values in their intervals of 90%"
    assert named(ax)["observed, outside"].get_ydata().tolist() == [40.0]


def test_many_values_have_a_density(ax):
    x = torch.randn(60, 2)
    posterior = AmortizedGuide(rows).posterior(x, num_draws=50)
    plots.predictive(posterior, ax=ax)
    predicted, observed = (patch.get_data() for patch in ax.patches)
    expected = np.histogram(x.double(), observed.edges)[0] / 120
    np.testing.assert_allclose(observed.values * np.diff(observed.edges), expected)
    assert (predicted.values >= predicted.baseline).all()
    assert legend(ax) == ["predicted, 90%", "observed"]


def test_counts_have_a_bar_for_each_value(ax):
    posterior = posterior_of(counted, 150, num_draws=50)
    plots.predictive(posterior, "x", ax)
    values, edges, _ = ax.patches[1].get_data()
    assert edges.tolist() == [i - 0.5 for i in range(len(edges))]
    np.testing.assert_allclose(values, torch.bincount(posterior.observed["x"].long()) / 150)


def crossed(x, mask):
    with pyro.plate("row", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 3, dim=-1), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def vectors(x, mask):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0).expand([4, 3]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "mask", "count"),
    [
        (vectors, [False, True, True, True], 9),
        (crossed, [[False], [True], [True], [True]], 9),
        (crossed, [[False, True, True]] * 4, 8),
    ],
)
def test_masked_values_are_left_out(ax, model, mask, count):
    posterior = AmortizedGuide(model).posterior(torch.randn(4, 3), torch.tensor(mask), num_draws=50)
    plots.predictive(posterior, ax=ax)
    assert f"of {count} values" in ax.get_title()


def test_predictive_refuses_data_without_values(ax):
    posterior = AmortizedGuide(crossed).posterior(torch.randn(4, 3), torch.tensor(False), num_draws=50)
    with pytest.raises(ValueError, match="no value of 'x' is observed"):
        plots.predictive(posterior, ax=ax)


def test_predictive_refuses_other_sites(ax):
    with pytest.raises(ValueError, match=r"no observed site 'z'; the observed sites are \['x'\]"):
        plots.predictive(posterior_of(rows, 4, 2), "z", ax)

    def prior_only(x):
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        plots.predictive(posterior_of(prior_only, 4), ax=ax)
