"""Whether true values lie where q says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyro_guides.diagnostics.calibration import Calibration
from pyro_guides.plots.drawing import FAINT, axes, labels, needed
from pyro_guides.statistics import uniformity
from pyro_guides.statistics.arguments import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["coverage", "ranks"]

_MOST_LINES, _MOST_NAMES = 20, 6  # that can be told apart


def ranks(calibration: Calibration, ax: Axes | None = None) -> Axes:
    """How the ECDF of the ranks of true values differs from a uniform one, and how much it may.

    A line for each scalar, or for the 20 with the smallest p-values. If q is right, all stay inside the band
    as often as the legend says; those that do not are colored, and the first six are named.

    Args:
        calibration: what ``calibrate(posterior)`` returned.
        ax: where to draw.

    Raises:
        TypeError: ``calibration`` is something else.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, calibrate, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> found = calibrate(AmortizedGuide(model).posterior(torch.randn(9)), num_simulations=100)
        >>> [line.get_label() for line in plots.ranks(found, Figure().subplots()).lines]
        ['z']
    """
    scalars = _worst(needed(calibration, Calibration, "calibrate(posterior)"))
    count, probability = calibration.num_simulations, _of_each(calibration, _count(calibration))
    grid, lower, upper = uniformity.ecdf_band(count, probability=probability)
    pit = {scalar.label: np.sort(scalar.of(calibration.pit)) for scalar in scalars}
    lines = {label: np.searchsorted(u, grid, side="right") / count - grid for label, u in pit.items()}
    ax = axes(ax)
    _draw(ax, grid, lines, (lower - grid, upper - grid), calibration)
    ax.set(xlabel="rank of the true value, as a share", ylabel="ECDF − uniform")
    ax.legend()
    return ax


def coverage(calibration: Calibration, ax: Axes | None = None) -> Axes:
    """How often regions of q hold the true values, and how often they should.

    Central intervals of each scalar, drawn as by :func:`ranks`, and regions of highest density of all latents
    of a row.

    Args:
        calibration: what ``calibrate(posterior)`` returned.
        ax: where to draw.

    Raises:
        TypeError: ``calibration`` is something else.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, calibrate, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> found = calibrate(AmortizedGuide(model).posterior(torch.randn(9)), num_simulations=100)
        >>> [line.get_label() for line in plots.coverage(found, Figure().subplots()).lines]
        ['z', 'highest density']
    """
    scalars = _worst(needed(calibration, Calibration, "calibrate(posterior)"))
    found, ax = calibration.coverage(), axes(ax)
    lines = {scalar.label: scalar.of(found.central) for scalar in scalars}
    probability = _of_each(calibration, _count(calibration) + 1)
    band = uniformity.band(found.levels, calibration.num_simulations, probability)
    _draw(ax, found.levels, lines, (band.lower, band.upper), calibration)
    ax.plot(found.levels, found.density, color="k", label="highest density")
    ax.set(xlabel="level", ylabel="share of true values inside")
    ax.legend()
    return ax


class _Scalar(NamedTuple):
    """One value of a latent of a row.

    Args:
        p_value: of its ranks.
        label: what it is called.
        site: the latent.
        place: where it is in the latent.
    """

    p_value: float
    label: str
    site: str
    place: tuple[int, ...]

    def of(self, values: Mapping[str, Array]) -> Array:
        """Its part of values by site, ``(n, *shape of a row)``."""
        return np.moveaxis(values[self.site], 0, -1)[self.place]


def _worst(calibration: Calibration) -> list[_Scalar]:
    """The scalars with the smallest p-values, the smallest first."""
    p_values = calibration.p_values()
    found = [
        _Scalar(float(p_values[site][index]), label, site, index)
        for site in calibration.pit
        for label, index in zip(
            labels(site, p_values[site].shape), np.ndindex(p_values[site].shape), strict=True
        )
    ]
    return sorted(found)[:_MOST_LINES]


def _count(calibration: Calibration) -> int:
    return sum(math.prod(pit.shape[1:]) for pit in calibration.pit.values())


def _of_each(calibration: Calibration, lines: int) -> float:
    """With which probability each line must stay inside a band if all are to (Bonferroni)."""
    return 1.0 - (1.0 - calibration.probability) / lines


def _draw(
    ax: Axes, x: Array, lines: Mapping[str, Array], band: tuple[Array, Array], calibration: Calibration
) -> None:
    """A band and lines, of which those that leave it stand out."""
    lower, upper = band
    ax.fill_between(x, lower, upper, color=FAINT, label=f"band of {calibration.probability:.0%} for all")
    outside = [label for label, line in lines.items() if ((line < lower) | (line > upper)).any()]
    for label, line in lines.items():
        if label in outside:
            at = outside.index(label)
            ax.plot(x, line, color=f"C{at}", label=label if at < _MOST_NAMES else f"_{label}")
        else:
            ax.plot(x, line, color="0.5", linewidth=0.8, label=f"_{label}")  # a legend leaves _names out
    total = _count(calibration)
    shown = f"the worst {len(lines)} of {total} scalars" if total > len(lines) else f"{total} scalars"
    ax.set_title(f"{shown}: {len(outside)} outside the band", fontsize="medium")
