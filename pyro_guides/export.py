"""To ArviZ: named NumPy arrays become an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["to_arviz"]

_ARVIZ_DIMS = ("chain", "draw")

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
        ValueError: ``dims`` or ``coords`` name what is not there, or too many dimensions; or two sites would
            get the same name.

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

    found, plates, attrs = posterior.to_numpy()
    names = _safe_names({name for group in found.values() for name in group})
    groups: dict[str, Any] = {
        group: {names[name]: array for name, array in arrays.items()} for group, arrays in found.items()
    }
    chosen = {name: list(own) for name, own in (dims or {}).items()}
    if unknown := sorted(set(chosen) - set(names)):
        raise ValueError(f"dims names {unknown}, but the variables are {sorted(names)}")
    taken = {*names.values(), *_ARVIZ_DIMS}
    all_dims = {
        names[name]: [_free(dim, taken) for dim in [*plates.get(name, ()), *chosen.get(name, ())]]
        for name in names
    }
    _check_dims(groups, all_dims, coords or {})
    attrs = {"arviz_note": "draws from q; weight by exp(lp - log_q)", **attrs}
    options: dict[str, Any] = {"coords": dict(coords or {}), "dims": all_dims}
    if hasattr(arviz, "convert_to_datatree"):
        return arviz.from_dict(groups, attrs=attrs, **options)  # type: ignore[arg-type,unused-ignore]
    idata = arviz.from_dict(**groups, **options)
    for group in groups:  # ArviZ 0.x has attributes of groups only
        idata[group].attrs.update(attrs)
    return idata


def _safe_names(names: set[str]) -> dict[str, str]:
    """Names that ArviZ keeps: no '/', which paths in files use, and none of its own dimensions.

    Raises:
        ValueError: two sites would get the same name.
    """
    safe = {name: _free(name.replace("/", "."), set(_ARVIZ_DIMS), "_site") for name in sorted(names)}
    for name, other in itertools.combinations(safe, 2):
        if safe[name] == safe[other]:
            raise ValueError(
                f"sites '{name}' and '{other}' would both be called '{safe[name]}' in ArviZ, which allows "
                "no '/'; rename one of them"
            )
    return safe


def _free(name: str, taken: set[str], suffix: str = "_dim") -> str:
    """The name itself, or with a suffix if it is taken: ArviZ drops variables named like a dimension."""
    name = name.replace("/", ".")
    return name + suffix if name in taken else name


def _check_dims(
    groups: Mapping[str, Mapping[str, Array]],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> None:
    known = {dim for names in dims.values() for dim in names}
    for group, arrays in groups.items():
        sample_dims = 0 if group == "observed_data" else len(_ARVIZ_DIMS)
        for name, array in arrays.items():
            size = array.ndim - sample_dims
            known |= {f"{name}_dim_{i}" for i in range(size)}
            if len(dims[name]) > size or len(set(dims[name])) < len(dims[name]):
                raise ValueError(
                    f"'{name}' has {size} dimensions besides chain and draw, but would get {dims[name]}; "
                    "name each of its event dimensions once in dims={...}"
                )
    if unknown := sorted(set(coords) - known):
        raise ValueError(f"coords names {unknown}, but the dimensions are {sorted(known)}")
