"""Which rows can be trusted, and what holds q back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_guides.diagnostics.check import Check
from pyro_guides.plots.drawing import BAD, MAIN, OTHER, axes, flat, needed
from pyro_guides.statistics.arguments import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gaps", "k_hat"]

_MOST_BARS = 100
_KINDS = {"family": MAIN, "amortization": OTHER}


def k_hat(check: Check, ax: Axes | None = None) -> Axes:
    """Pareto k̂ of each row, and what it must stay below; infinite ones lie at the edges.

    A row may be low, but not trusted: q has lost a mode there, or it is unlike the rows of training.

    Args:
        check: what ``check(posterior)`` returned.
        ax: where to draw.

    Raises:
        TypeError: ``check`` is something else.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, check, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = AmortizedGuide(model).posterior(torch.randn(5))
        >>> found = check(posterior, gaps=False, modes=False, show=False)
        >>> plots.k_hat(found, Figure().subplots()).get_xlabel()
        'row'
    """
    values = flat(needed(check, Check, "check(posterior)").columns["k_hat"])
    ax, (bottom, top) = axes(ax), _edges(values, check.threshold)
    for rows, color, label in _groups(check, values):
        heights = values[rows].clip(bottom, top)
        ax.plot(rows, heights, ".", color=color, clip_on=False, label=f"{label}: {len(rows)}")
    for infinite, height, text in ((-np.inf, bottom, "as good as exact"), (np.inf, top, "beyond any fit")):
        if infinite in values:
            ax.text(0.01, height, text, transform=ax.get_yaxis_transform(), va="bottom")
    ax.axhline(check.threshold, color=BAD, linewidth=1, label=f"threshold {check.threshold:.2f}")
    ax.axhline(0.5, color="0.5", linewidth=1, linestyle=":", label="0.5, finite variance")
    ax.set(xlabel=" × ".join(check.rows) or "posterior", ylabel="k_hat")
    ax.set_ylim(bottom, top + 0.4 * (top - bottom))  # with room for the legend
    ax.legend(loc="upper right", ncols=2, fontsize="small", handlelength=1.0, columnspacing=1.0)
    return ax


def _edges(values: Array, threshold: float) -> tuple[float, float]:
    """Where infinite values are drawn."""
    inner = np.append(values[np.isfinite(values)], [0.0, threshold])
    return float(inner.min()) - 0.2, float(inner.max()) + 0.2


def _groups(check: Check, values: Array) -> Iterator[tuple[NDArray[np.int_], str, str]]:
    """Which rows belong together, in which color, and what is said of them."""
    trusted, low = flat(check.trusted), values < check.threshold
    for label, color, some in (
        ("trusted", MAIN, trusted),
        ("too large", BAD, ~trusted & ~low),
        ("low, but not trusted", OTHER, ~trusted & low),
    ):
        if some.any():
            yield np.flatnonzero(some), color, label


def gaps(check: Check | Mapping[str, Check], ax: Axes | None = None) -> Axes:
    """What keeps the ELBO below log p(x): the family, and the encoder on top of it.

    A bar for each row, the largest first; a bar of means if there are more than 100 rows, and for each of
    several checks.

    Args:
        check: what ``check(posterior)`` returned, or several by name.
        ax: where to draw.

    Raises:
        TypeError: ``check`` is something else.
        ValueError: there are none, or one has not split the gap.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro_guides import AmortizedGuide, check, plots
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> refined = AmortizedGuide(model).posterior(torch.randn(5), num_draws=100).refine(max_steps=50)
        >>> ax = plots.gaps(check(refined, modes=False, show=False), Figure().subplots())
        >>> len(ax.patches)  # two parts of five bars
        10
    """
    if isinstance(check, Mapping):
        if not check:
            raise ValueError("gaps got an empty dict; pass what check(posterior) returns, by name")
        means = [_parts(one).mean(1) for one in check.values()]
        return _stack(axes(ax), np.stack(means, axis=1), [f"{kind} gap" for kind in _KINDS], list(check))
    parts = _parts(check)
    titles = [f"{kind} gap, mean {part.mean():.3f}" for kind, part in zip(_KINDS, parts, strict=True)]
    if parts.shape[1] > _MOST_BARS:
        return _stack(axes(ax), parts.mean(1, keepdims=True), titles, [f"{parts.shape[1]} rows"])
    ax = _stack(axes(ax), parts[:, np.argsort(-parts.sum(0))], titles)
    ax.set(xlabel="rows, largest gap first", xticks=[])
    return ax


def _parts(check: Check) -> Array:
    """The family gap and the amortization gap of each row, ``(2, rows)``."""
    columns = needed(check, Check, "check(posterior)").columns
    if "family_gap" not in columns:
        raise ValueError("this check did not split the gap; call check(posterior) without gaps=False")
    family = columns["family_gap"]
    amortization = columns.get("amortization_gap", torch.zeros_like(family))  # a refined q costs none
    return np.stack([flat(family), flat(amortization)])


def _stack(ax: Axes, parts: Array, titles: list[str], names: list[str] | None = None) -> Axes:
    """Bars with one part upon the other, ``(2, bars)``; those with names say how high they are."""
    places, height = np.arange(parts.shape[1]), np.zeros(parts.shape[1])
    for part, title, color in zip(parts, titles, _KINDS.values(), strict=True):
        bars = ax.bar(places, part, bottom=height, color=color, label=title)
        height = height + part
    if names is not None:
        ax.bar_label(bars, [f"{total:.3f}" for total in height])
        ax.set_xticks(places, names)
        ax.margins(y=0.15)  # room for the labels
    ax.set_ylabel("nats per row")
    ax.legend()
    return ax
