"""To a netCDF file, part by part: for more rows than fit into memory with all their draws."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from pyro_guides.export import Tables, labelled, needed, tabulate
from pyro_guides.variables import Array, Attributes, Exportable

if TYPE_CHECKING:
    from xarray import DataArray, Dataset

__all__ = ["to_netcdf"]

_ENGINE: Any = "h5netcdf"
_CONSTANTS = "constant_data"
_CHUNK_BYTES = 4 * 2**20  # large enough to read fast, small enough to read a few rows without many others
_KINDS = "biufU"  # what netCDF has a type for: booleans, numbers, text


def to_netcdf(
    parts: Iterable[Exportable | tuple[Exportable, ...]],
    path: str | PathLike[str],
    *,
    along: str,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write parts that follow each other in a plate, such as the posteriors of batches of rows, to one file.

    The file is what :func:`~pyro_guides.to_arviz` would give for all rows at once. One part is in memory at a
    time. ``arviz.from_netcdf`` and ``xarray.open_datatree`` read it, and load no variable before it is used
    (ArviZ 0.x: unless ``arviz.rcParams["data.load"]`` is ``"eager"``).

    Nothing appears at ``path`` before all is written; a file that is there stays if anything fails.

    Args:
        parts: objects that :func:`~pyro_guides.to_arviz` takes; a generator makes them one by one. A tuple
            of them is merged, as by :func:`~pyro_guides.to_arviz`. All have the same groups and variables.
            Attributes in which they differ are left out.
        path: the file to write; its folder must exist.
        along: the plate whose elements are divided among the parts. Variables outside of it must be the same
            in every part.
        coords: labels of dimensions, by dimension name; for ``along``, those of all parts together.
        dims: names of the event dimensions of variables, see :func:`~pyro_guides.to_arviz`.

    Returns:
        The path.

    Raises:
        ImportError: xarray or h5netcdf is not installed.
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        TypeError: a part cannot be exported, or has values that netCDF has no type for.
        ValueError: there are no parts; no variable has the dimension ``along``; a part has other variables,
            draws, sizes, types or values outside of ``along`` than those before; or what
            :func:`~pyro_guides.to_arviz` raises it for.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import xarray
        >>> from types import SimpleNamespace
        >>> from pyro_guides.netcdf import to_netcdf
        >>> from pyro_guides.variables import Variable
        >>> def posterior_of(rows):
        ...     z = Variable(np.zeros((1, 10, rows)), ("chain", "draw", "row"))
        ...     return SimpleNamespace(to_groups=lambda: {"posterior": {"z": z}}, attrs={})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = to_netcdf(map(posterior_of, [4, 4, 2]), f"{folder}/all.nc", along="row")
        ...     dict(xarray.load_dataset(path, group="posterior").sizes)
        {'chain': 1, 'draw': 10, 'row': 10}
    """
    for module in ("xarray", "h5py", "h5netcdf"):
        needed(module)
    if not isinstance(parts, Iterable):
        raise TypeError(
            f"parts must be an iterable of what to export, got {type(parts).__name__}; put a single one into "
            "a list"
        )
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path must name the file to write, got {path!r}")
    labels = dict(coords or {})
    own = {along: labels.pop(along)} if along in labels else {}
    stream: _Stream | None = None
    with _replaced(Path(path)) as scratch:
        for part in parts:
            tables = tabulate(part if isinstance(part, tuple) else (part,), labels, dims or {})
            stream = stream or _Stream(scratch, tables, along)
            stream.append(tables)
            del part, tables  # before the next one is made
        if stream is None:
            raise ValueError("there is nothing to export: parts is empty")
        stream.finish(own)
    return Path(path)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write instead, which takes the place of the given one once all went well."""
    if path.is_dir():
        raise IsADirectoryError(f"path must name the file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it before the file in it")
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@final
class _Stream:
    """A file that grows along one dimension; the first part decides what is in it."""

    def __init__(self, path: Path, tables: Tables, along: str) -> None:
        self._path = path
        self._names = tables.names
        self._along = tables.names.dim(along)
        self._attrs = tables.attrs
        self._group_attrs = {group: table.attrs for group, table in tables.groups.items()}
        self._templates = {group: self._without_rows(table) for group, table in tables.groups.items()}
        self._rows = {group: 0 for group, table in tables.groups.items() if self._along in table.dims}
        self._parts = 0
        if not self._rows:
            known = sorted({str(dim) for table in tables.groups.values() for dim in table.dims})
            raise ValueError(
                f"along must be a dimension that parts follow each other in: {known}, got '{along}'"
            )
        for group, table in tables.groups.items():
            self._create(group, _chunks(table, self._along))

    def append(self, tables: Tables) -> None:
        """Write what comes next in the dimension."""
        self._parts += 1
        groups = {name: self._as_before(table, name) for name, table in tables.groups.items()}
        self._check(groups)
        self._attrs = _shared(self._attrs, tables.attrs)
        for group, table in groups.items():
            self._group_attrs[group] = _shared(self._group_attrs[group], table.attrs)
        with needed("h5netcdf").File(self._path, "a") as file:
            for group in self._rows:
                self._write(file[group], group, groups[group])

    def _as_before(self, table: Dataset, group: str) -> Dataset:
        """Arguments for a single row, which do not look like rows, with the dimensions of earlier parts."""
        for name, first in self._templates.get(group, table).data_vars.items():
            array = table.get(name)
            if group != _CONSTANTS or array is None or array.dims == first.dims or array.ndim != first.ndim:
                continue
            if self._along in first.dims and array.shape[first.dims.index(self._along)] == 1:
                renamed = {dim: own for dim, own in zip(array.dims, first.dims, strict=True) if dim != own}
                table = table.assign({name: array.drop_vars(renamed, errors="ignore").rename(renamed)})
        return table

    def finish(self, coords: Mapping[str, Sequence[Any]]) -> None:
        """Label the dimension, and write what all parts have in common."""
        sizes = {group: {self._along: rows} for group, rows in self._rows.items()}
        labels = labelled(sizes, coords, self._names)
        xarray = needed("xarray")
        for group, attrs in self._group_attrs.items():
            self._save(xarray.Dataset(coords=labels.get(group), attrs=attrs), group)
        self._save(xarray.Dataset(attrs=self._attrs), "/")

    def _without_rows(self, table: Dataset) -> Dataset:
        """A copy that keeps no part in memory."""
        table = table.drop_vars(self._along, errors="ignore")
        template = table.isel({self._along: slice(0)}, missing_dims="ignore").copy(deep=True)
        template.attrs = {}
        return template

    def _create(self, group: str, chunks: dict[str, Any]) -> None:
        template = self._templates[group]
        for name, array in template.data_vars.items():
            if array.dtype.kind not in _KINDS:
                raise TypeError(f"netCDF has no type for '{name}' of group '{group}', which is {array.dtype}")
        growing = [self._along] if group in self._rows else []
        self._save(template, group, unlimited_dims=growing, encoding=chunks)

    def _save(self, table: Dataset, group: str, **options: Any) -> None:
        table.to_netcdf(self._path, mode="a", group=group, engine=_ENGINE, **options)

    def _write(self, file: Any, group: str, table: Dataset) -> None:
        start = self._rows[group]
        self._rows[group] = start + table.sizes[self._along]
        file.resize_dimension(self._along, self._rows[group])
        rows = slice(start, self._rows[group])
        for name, array in table.data_vars.items():
            if self._along in array.dims:
                place = tuple(rows if dim == self._along else slice(None) for dim in array.dims)
                file.variables[name][place] = _storable(array.values)

    def _check(self, groups: Mapping[str, Dataset]) -> None:
        found, first = _arrays(groups), _arrays(self._templates)
        if differences := sorted(set(found) ^ set(first)):
            raise ValueError(
                f"part {self._parts} must have the same variables as part 1, but only one has {differences}"
            )
        for name, array in found.items():
            if problem := _misfit(array, first[name], self._along):
                raise ValueError(f"{name} of part {self._parts} {problem}")


def _arrays(groups: Mapping[str, Dataset]) -> dict[str, DataArray]:
    """All variables, by what messages call them."""
    return {
        f"'{name}' in group '{group}'": array
        for group, table in groups.items()
        for name, array in table.items()
    }


def _misfit(array: DataArray, first: DataArray, along: str) -> str:
    """What keeps an array from following the first one, if anything does."""
    if array.dims != first.dims:
        return f"has dimensions {array.dims}, but {first.dims} in part 1; give all parts the same"
    for dim in array.dims:
        if dim != along and array.sizes[dim] != first.sizes[dim]:
            what = "draws" if dim == "draw" else f"elements of '{dim}'"
            return f"has {array.sizes[dim]} {what}, but {first.sizes[dim]} in part 1; give all parts as many"
    if array.dtype != first.dtype and array.dtype.kind + first.dtype.kind != "UU":  # text has any length
        return f"is of type {array.dtype}, but {first.dtype} in part 1; convert one of the two"
    if along not in array.dims and not _equal(array.values, first.values):
        what = "draws" if "draw" in array.dims else "values"
        return (
            f"has other {what} than in part 1, and no dimension '{along}' to put them side by side in; leave "
            "it out, or write each part to a file of its own"
        )
    return ""


def _equal(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _shared(one: Attributes, other: Attributes) -> Attributes:
    """What both say."""
    return {key: value for key, value in one.items() if key in other and other[key] == value}


def _storable(values: Array) -> Array:
    return values.astype(object) if values.dtype.kind == "U" else values


def _chunks(table: Dataset, along: str) -> dict[Any, dict[str, Any]]:
    """Pieces in which variables are read and written: a part's rows, or an even division of them."""
    encoding: dict[Any, dict[str, Any]] = {}
    for name, array in table.data_vars.items():
        rows = array.sizes.get(along, 0)
        if 0 < array.nbytes <= rows * _CHUNK_BYTES:  # the library finds pieces where rows are larger
            size = math.ceil(rows / math.ceil(array.nbytes / _CHUNK_BYTES))
            encoding[name] = {
                "chunksizes": tuple(size if dim == along else array.sizes[dim] for dim in array.dims)
            }
    return encoding
