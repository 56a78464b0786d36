"""To ArviZ: named NumPy arrays become an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x)."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from pyro_guides.variables import SAMPLE_DIMS, Array, Attributes, Exportable, Names, Variable, agreed, merge

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["to_arviz"]

# Dimensions, values and attributes: what xarray makes a variable of.
Column: TypeAlias = tuple[tuple[str, ...], Array, dict[str, str]]


def to_arviz(
    *parts: Exportable,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Put a posterior, and what was computed from it, into ArviZ's data structure.

    Draws become one chain: dimensions ``(chain=1, draw=S, *plates, *event)``. Plates give the dimensions
    their names. All groups of all parts are kept, whether ArviZ has a use for them or not. A name that ArviZ
    cannot keep is changed (``net/bias`` to ``net.bias``, a plate ``z`` beside a site ``z`` to ``z_dim``) and
    stays in the attribute ``original_name``.

    Draws from q are not draws from the posterior: plain ``arviz.loo`` on them is silently biased. Weight them
    by ``lp - log_q`` (``arviz.psislw``, or ``arviz.loo_approximate_posterior`` in ArviZ 1.x).

    Args:
        parts: what ``guide.posterior(...)`` returns, or any objects with ``to_groups()`` and ``attrs``; the
            attributes of a group are those in which the parts that fill it do not contradict each other.
        coords: labels of dimensions, by dimension name. Where groups have different sizes of a dimension,
            the labels are for those that they fit; the others are numbered.
        dims: names of the event dimensions of variables, in place of the default ``{name}_dim_{i}``.

    Returns:
        An ``arviz.InferenceData``, or an ``xarray.DataTree`` where ArviZ 1.x is installed.

    Raises:
        ImportError: ArviZ is not installed.
        TypeError: a part cannot be exported.
        ValueError: there is nothing to export; two parts have the same variable; ``dims`` or ``coords`` name
            what is not there, or too much of it; a dimension has two sizes in a group; or two variables or
            two dimensions would get the same name.

    Example:
        >>> import numpy as np
        >>> from types import SimpleNamespace
        >>> from pyro_guides import to_arviz
        >>> from pyro_guides.variables import Variable
        >>> z = Variable(np.zeros((1, 10, 5, 2)), ("chain", "draw", "row"))
        >>> part = SimpleNamespace(to_groups=lambda: {"posterior": {"z": z}}, attrs={})
        >>> idata = to_arviz(part, dims={"z": ["axis"]})
        >>> dict(idata.posterior["z"].sizes)
        {'chain': 1, 'draw': 10, 'row': 5, 'axis': 2}
    """
    arviz = needed("arviz")
    tables = tabulate(parts, coords or {}, dims or {})
    if hasattr(arviz, "convert_to_datatree"):
        xarray = needed("xarray")
        nodes = {f"/{group}": table for group, table in tables.groups.items()}
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=tables.attrs), **nodes})
    if clash := sorted(group for group in tables.groups if hasattr(arviz.InferenceData, group)):
        raise ValueError(f"InferenceData has no room for groups called {clash}; rename them")
    return arviz.InferenceData(attrs=tables.attrs, **tables.groups)


class Tables(NamedTuple):
    """What is exported: a dataset for each group, attributes of the whole, and how names were chosen."""

    groups: dict[str, Dataset]
    attrs: Attributes
    names: Names


def tabulate(
    parts: Sequence[Exportable], coords: Mapping[str, Sequence[Any]], dims: Mapping[str, Sequence[str]]
) -> Tables:
    """Put all variables of a group into one dataset; see :func:`to_arviz` for arguments and errors."""
    xarray = needed("xarray")
    for argument, given in (("coords", coords), ("dims", dims)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a dict by name, got a {type(given).__name__}")
    groups, attrs = merge(parts)
    names = Names(groups, dims)
    columns = {group: _columns(variables, names) for group, variables in groups.items()}
    sizes = {group: _sizes(group, found) for group, found in columns.items()}
    labels = labelled(sizes, coords, names)
    library = _library()
    datasets = {
        group: xarray.Dataset(found, coords=labels[group], attrs=library | attrs[group])
        for group, found in columns.items()
    }
    return Tables(datasets, library | agreed(attrs.values()), names)


def labelled(
    sizes: Mapping[str, Mapping[str, int]], coords: Mapping[str, Sequence[Any]], names: Names
) -> dict[str, dict[str, Column]]:
    """Labels of every dimension of every group: those given where they fit, numbers elsewhere.

    Raises:
        ValueError: a dimension that no group has, or labels that fit no group.
    """
    given = {names.dim(name): np.asarray(labels) for name, labels in coords.items()}
    for dim, labels in given.items():
        _check_labels(dim, labels, sizes)
    return {
        group: {
            dim: ((dim,), _fitting(given.get(dim), size), names.attrs_of(dim)) for dim, size in found.items()
        }
        for group, found in sizes.items()
    }


def needed(module: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(f"this export needs {module}: pip install 'pyro-guides[arviz]'") from error


def _library() -> Attributes:
    attrs = {"inference_library": "pyro_guides"}
    try:
        return attrs | {"inference_library_version": importlib.metadata.version("pyro-guides")}
    except importlib.metadata.PackageNotFoundError:  # run from its folder, without being installed
        return attrs


def _columns(variables: Mapping[str, Variable], names: Names) -> dict[str, Column]:
    found = {names.variables[name]: (names.dims_of(name, x), x.values) for name, x in variables.items()}
    return {name: (dims, values, names.attrs_of(name)) for name, (dims, values) in found.items()}


def _sizes(group: str, columns: Mapping[str, Column]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, (dims, values, _) in columns.items():
        for dim, size in zip(dims, values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                drawn = dim in SAMPLE_DIMS
                advice = "export them one by one" if drawn else "give one of the two another name"
                raise ValueError(
                    f"dimension '{dim}' of group '{group}' has size {sizes[dim]} in '{first[dim]}', but size "
                    f"{size} in '{name}'; {advice}"
                )
            first.setdefault(dim, name)
    return sizes


def _check_labels(dim: str, labels: Array, sizes: Mapping[str, Mapping[str, int]]) -> None:
    found = {group: own[dim] for group, own in sizes.items() if dim in own}
    if not found:
        known = sorted({dim for own in sizes.values() for dim in own})
        raise ValueError(f"coords names '{dim}', but the dimensions are {known}")
    if labels.ndim != 1 or len(labels) not in found.values():
        got = len(labels) if labels.ndim == 1 else f"an array of shape {labels.shape}"
        raise ValueError(
            f"coords['{dim}'] must be one label for each element, got {got}, but its sizes are {found}"
        )


def _fitting(labels: Array | None, size: int) -> Array:
    return np.arange(size) if labels is None or len(labels) != size else labels
