"""To ArviZ: named NumPy arrays become an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["to_arviz"]

Array = np.ndarray[Any, Any]


class HasGroups(Protocol):
    """What can be exported: NumPy arrays by group and variable, with the names of their dimensions."""

    def to_numpy(self) -> tuple[dict[str, dict[str, Array]], dict[str, list[str]], dict[str, Any]]:
        """Arrays by group and variable, dimension names by variable, and attributes."""
        ...


def to_arviz(
    posterior: HasGroups,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Turn a posterior into ArviZ's data structure.

    Draws become one chain: dimensions ``(chain=1, draw=S, *plates, *event)``. Plates give the dimensions
    their names. The groups are ``posterior``, ``sample_stats`` with ``lp`` (log p) and ``log_q`` of every
    draw, ``log_likelihood`` and ``observed_data``.

    Draws from q are not draws from the posterior: plain ``arviz.loo`` on them is silently biased. Weight them
    by ``lp - log_q`` (``arviz.psislw``, or ``arviz.loo_approximate_posterior`` in ArviZ 1.x).

    Args:
        posterior: a :class:`~pyro_guides.Posterior`.
        coords: labels of dimensions, by dimension name.
        dims: names of the event dimensions of variables, in place of the default ones.

    Returns:
        An ``arviz.InferenceData``, or an ``xarray.DataTree`` where ArviZ 1.x is installed.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: ``dims`` names a variable that is not there, or too many dimensions.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, to_arviz
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(5)
        >>> idata = to_arviz(AmortizedGuide(model).posterior(x, num_draws=10))
        >>> dict(idata.posterior["z"].sizes)
        {'chain': 1, 'draw': 10, 'row': 5}
    """
    import arviz

    groups: dict[str, Any]
    groups, found_dims, attrs = posterior.to_numpy()
    groups = {g: {_safe(n): x for n, x in group.items()} for g, group in groups.items()}
    all_dims = _named_dims(groups, found_dims, dims or {})
    attrs = {"arviz_note": "draws from q; weight by exp(lp - log_q)", **attrs}
    options: dict[str, Any] = {"coords": dict(coords or {}), "dims": all_dims, "attrs": attrs}
    if hasattr(arviz, "convert_to_datatree"):
        return arviz.from_dict(groups, **options)  # type: ignore[arg-type,unused-ignore]
    return arviz.from_dict(**groups, **options)


def _named_dims(
    groups: Mapping[str, Mapping[str, Array]],
    found: Mapping[str, Sequence[str]],
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    """Dimension names that collide with no variable: ArviZ drops variables named like a dimension."""
    variables = {name for group in groups.values() for name in group}
    if unknown := set(map(_safe, chosen)) - variables:
        raise ValueError(f"dims names {sorted(unknown)}, but the variables are {sorted(variables)}")
    dims: dict[str, list[str]] = {}
    for name, plates in found.items():
        own = list(chosen.get(name, ()))
        names = [*plates, *own]
        dims[_safe(name)] = [f"{n}_dim" if n in variables else n for n in map(_safe, names)]
    for group, arrays in groups.items():
        sample_dims = 0 if group.endswith("data") else 2
        for name, array in arrays.items():
            if len(dims.get(name, ())) > array.ndim - sample_dims:
                raise ValueError(
                    f"dims gives '{name}' the dimensions {dims[name]}, but it has only "
                    f"{array.ndim - sample_dims} besides chain and draw"
                )
    return dims


def _safe(name: str) -> str:
    """Site names may hold '/', which group paths in files use."""
    return name.replace("/", ".")
