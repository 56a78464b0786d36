"""What data say about latents, and whether the model could have drawn such data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_guides.plots.drawing import BAD, FAINT, MAIN, axes, bins, canvas, density, flat, labels, needed
from pyro_guides.posterior import Posterior
from pyro_guides.posterior.contents import variable
from pyro_guides.statistics.arguments import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["predictive", "prior_posterior"]

_MOST_PANELS = 25
_MOST_INTERVALS = 100  # that can be told apart
_MOST_HISTOGRAMS = 200
_TAIL = 0.05  # on both sides of an interval


def prior_posterior(
    posterior: Posterior,
    names: Sequence[str] | None = None,
    row: int = 0,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws of each scalar of one row before and after its data were seen, a panel each.

    Latents that rows share have panels, too.

    Args:
        posterior: what ``guide.posterior(...)`` returned.
        names: of latents, ``z``, or of their scalars, ``z[0]``; the first 25 scalars if None.
        row: which one.
        figure: where to draw.

    Raises:
        TypeError: ``posterior`` is something else.
        ValueError: there is no such row, or no such latent.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> posterior = AmortizedGuide(model).posterior(torch.randn(5, 2))
        >>> figure = plots.prior_posterior(posterior, row=3, figure=Figure())
        >>> [ax.get_title() for ax in figure.axes]
        ['z[0]', 'z[1]']
    """
    index = _row_index(needed(posterior, Posterior, "guide.posterior(...)"), row)
    after = _scalars(posterior, posterior.draws, index)
    before = _scalars(posterior, posterior.prior().draws, index)
    chosen = _chosen(list(after), names)
    columns = math.ceil(math.sqrt(len(chosen)))
    lines = math.ceil(len(chosen) / columns)
    figure = canvas(figure, 2.4 * columns, 0.5 + 1.6 * lines)
    for place, name in enumerate(chosen):
        ax = figure.add_subplot(lines, columns, place + 1, title=name, yticks=[])
        for label, draws, color in (("prior", before, FAINT), ("posterior", after, MAIN)):
            own = draws[name][np.isfinite(draws[name])]
            edges = bins(own)
            ax.stairs(density(own, edges), edges, fill=True, color=color, alpha=0.7, label=label)
        ax.tick_params(labelsize="small")
        ax.locator_params(axis="x", nbins=3)
    ax.legend(fontsize="x-small")
    return figure


def predictive(posterior: Posterior, name: str | None = None, ax: Axes | None = None) -> Axes:
    """Observed values beside what the model predicts for them: could it have drawn them?

    Up to 100 values have an interval each; of more, all together have densities: the one observed, and those
    of data sets that are drawn from the posterior predictive. Masked values are left out, and so is NaN.

    Args:
        posterior: what ``guide.posterior(...)`` returned.
        name: an observed site; the first if None.
        ax: where to draw.

    Raises:
        TypeError: ``posterior`` is something else.
        ValueError: there is no such site, or nothing is observed in it.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> posterior = AmortizedGuide(model).posterior(torch.tensor([0.0, 0.1, 0.2, 9.0]))
        >>> plots.predictive(posterior, ax=Figure().subplots()).get_title()
        'x: 75% of 4 values in their intervals of 90%'
    """
    site = _observed_site(needed(posterior, Posterior, "guide.posterior(...)"), name)
    drawn = posterior.predict()[site]
    observed = flat(posterior.observed[site].expand(drawn.shape[1:])).astype(float)
    known = np.isfinite(observed) & _unmasked(posterior, site, drawn.shape[1:])
    if not known.any():
        raise ValueError(f"no value of '{site}' is observed, so there is nothing to compare predictions with")
    draws, observed = drawn.flatten(1).numpy(force=True)[:, known], observed[known]
    inside = ((draws <= observed).mean(0) >= _TAIL) & ((draws >= observed).mean(0) >= _TAIL)
    ax = axes(ax)
    if len(observed) <= _MOST_INTERVALS:
        _intervals(ax, draws, observed, inside)
    else:
        _densities(ax, draws, observed)
    share = f"{inside.mean():.0%} of {len(observed):,} values in their intervals of {1 - 2 * _TAIL:.0%}"
    ax.set_title(f"{site}: {share}", fontsize="medium")
    ax.legend()
    return ax


# --- what is drawn


def _row_index(posterior: Posterior, row: int) -> dict[str, int]:
    """The index of a row in each of the plates that rows are in."""
    query = posterior.query
    sizes = {name: query.structure.plates[name].batch for name in query.inner_plates}
    count = math.prod(sizes.values())
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < count:
        raise ValueError(f"row must be an int in 0, ..., {count - 1}, as there are {count} rows, got {row!r}")
    return dict(zip(sizes, map(int, np.unravel_index(row, tuple(sizes.values()))), strict=True))


def _scalars(
    posterior: Posterior, values: Mapping[str, Tensor], index: Mapping[str, int]
) -> dict[str, Array]:
    """Draws of each scalar of one row, and of those that rows share, by name."""
    structure = posterior.structure
    found: dict[str, Array] = {}
    for name, latent in posterior.query.latents.items():
        dims = {plate: structure.plates[plate].dim for plate in latent.plates}
        named = variable(values[name], dims, len(latent.event_shape))
        own = named.values[0][(slice(None), *(index.get(plate, slice(None)) for plate in named.plates))]
        columns = own.reshape(len(own), -1).T.astype(float)
        found |= zip(labels(name, own.shape[1:]), columns, strict=True)
    return found


def _chosen(scalars: list[str], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return scalars[:_MOST_PANELS]
    wanted = [names] if isinstance(names, str) else list(names)
    found = {name: [x for x in scalars if x == name or x.startswith(f"{name}[")] for name in wanted}
    if not wanted or (unknown := [name for name, own in found.items() if not own]):
        what = f"there are no latents {unknown}" if wanted else "names is empty"
        raise ValueError(f"{what}; pass some of {', '.join(scalars[:_MOST_PANELS])}")
    return [scalar for own in found.values() for scalar in own]


def _observed_site(posterior: Posterior, name: str | None) -> str:
    sites = list(posterior.observed)
    if not sites or (name is not None and name not in sites):
        what = f"there is no observed site '{name}'" if sites else "the model observes nothing"
        raise ValueError(f"{what}; the observed sites are {sites}")
    return sites[0] if name is None else name


def _unmasked(posterior: Posterior, site: str, shape: torch.Size) -> NDArray[np.bool_]:
    """Which values of an observed site count, in one dimension."""
    counted = posterior.counted.get(site)
    return np.ones(shape.numel(), dtype=bool) if counted is None else flat(counted.expand(shape))


# --- how it is drawn


def _intervals(ax: Axes, draws: Array, observed: Array, inside: NDArray[np.bool_]) -> None:
    """An interval for each value, ordered by what is predicted."""
    low, middle, high = np.quantile(draws, [_TAIL, 0.5, 1 - _TAIL], axis=0)
    order = np.argsort(middle, kind="stable")
    places = np.empty(len(order), dtype=int)
    places[order] = np.arange(len(order))
    ax.vlines(places, low, high, color=FAINT, linewidth=3, label=f"predicted, {1 - 2 * _TAIL:.0%}")
    for label, color, some in (("observed", MAIN, inside), ("observed, outside", BAD, ~inside)):
        if some.any():
            ax.plot(places[some], observed[some], ".", color=color, label=label)
    ax.set(xlabel="observations, by median prediction", ylabel="value")


def _densities(ax: Axes, draws: Array, observed: Array) -> None:
    """The density of all values, and where those of predicted data sets lie."""
    some = draws[:_MOST_HISTOGRAMS]
    edges = bins(observed if _is_discrete(observed) else np.append(observed, some))
    heights = np.stack([density(data, edges) for data in some])
    low, high = np.quantile(heights, [_TAIL, 1 - _TAIL], axis=0)
    label = f"predicted, {1 - 2 * _TAIL:.0%}"
    ax.stairs(high, edges, baseline=low, fill=True, color=FAINT, label=label)
    ax.stairs(density(observed, edges), edges, color=MAIN, label="observed")
    ax.set(xlabel="value", ylabel="density")


def _is_discrete(values: Array) -> bool:
    return bool((values == values.round()).all())
