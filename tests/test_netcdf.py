"""A file that is written part by part is the file of all rows at once, or there is none."""

import sys
import warnings
import weakref

import arviz as az
import numpy as np
import pytest
import xarray
from test_export import ARVIZ_1, DRAWS, Part, drawn, group_names, normal, prior, rows, table_of

import pyro_guides.netcdf as netcdf_module
from pyro_guides.export import to_arviz
from pyro_guides.netcdf import to_netcdf
from pyro_guides.variables import Variable


@pytest.fixture(autouse=True)
def filters():
    """Reading with xarray leaves a filter behind."""
    with warnings.catch_warnings():
        yield


def little(count=6):
    """Each kind of variable, in no more groups than needed: a file takes its time for each."""
    names = np.array(["a", "bcd"] * count)[:count]
    return Part(
        {
            "posterior": {"z": drawn(count, 2, plates=["row"]), "scale": drawn(dtype=np.float64)},
            "observed_data": {
                "x": Variable(normal(count, 3), ("row",)),
                "n": Variable(np.arange(count), ("row",)),
                "used": Variable(np.arange(count) % 2 == 0, ("row",)),
                "name": Variable(names, ("row",)),
            },
        },
        family="FullRankNormal",
    )


def taken(variable, along, where):
    """Some of the elements of a plate."""
    if along not in variable.plates:
        return variable
    axis = variable.dims.index(along, 2 if variable.has_draws else 0)
    return Variable(np.take(variable.values, where, axis), variable.dims)


def cut(part, *sizes, along="row"):
    """Parts of consecutive rows."""
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        where = range(stop - size, stop)
        groups = {
            group: {name: taken(variable, along, where) for name, variable in variables.items()}
            for group, variables in part.groups.items()
        }
        yield Part(groups, **part.attrs)


def same_file(path, whole, read=az.from_netcdf):
    """What is read back is the same in all: values, types, names, labels and attributes."""
    found = read(str(path))
    assert group_names(found) == group_names(whole)
    assert found.attrs == whole.attrs
    for group in group_names(whole):
        table = table_of(found, group).load()
        xarray.testing.assert_identical(table, table_of(whole, group))
        for name, array in table.variables.items():
            assert array.dtype == whole[group][name].dtype
        found[group].close()


# --- the same as in one piece


@pytest.mark.parametrize("read", [az.from_netcdf, xarray.open_datatree])
def test_parts_become_one_file(tmp_path, read):
    path = to_netcdf(cut(rows(), 4, 2), tmp_path / "all.nc", along="row")
    assert path == tmp_path / "all.nc"
    same_file(path, to_arviz(rows()), read)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (0, 1, 0, 5)])
def test_parts_of_any_size(tmp_path, sizes):
    same_file(to_netcdf(cut(little(), *sizes), tmp_path / "all.nc", along="row"), to_arviz(little()))


def test_names_and_labels(tmp_path):
    names = {"coords": {"row": list("abcdef"), "pixel": [10, 20, 30]}, "dims": {"x": ["pixel"]}}
    path = to_netcdf(cut(little(), 4, 2), tmp_path / "all.nc", along="row", **names)
    same_file(path, to_arviz(little(), **names))


def test_labels_may_be_dates(tmp_path):
    coords = {"row": np.arange("2026-01", "2026-07", dtype="datetime64[M]").astype("datetime64[ns]")}
    path = to_netcdf(cut(little(), 4, 2), tmp_path / "all.nc", along="row", coords=coords)
    same_file(path, to_arviz(little(), coords=coords))


@pytest.mark.parametrize("along", ["z", "deep/row"])
def test_plates_of_any_name(tmp_path, along):
    part = Part(
        {
            "posterior": {"z": drawn(3, 5, 2, plates=["unit", along]), "deep/mu": drawn(3, plates=["unit"])},
            "observed_data": {"x": Variable(normal(5, 3), (along,))},
        }
    )
    labels = {"coords": {along: list("abcde")}}
    path = to_netcdf(cut(part, 2, 2, 1, along=along), tmp_path / "all.nc", along=along, **labels)
    same_file(path, to_arviz(part, **labels))


def test_tuples_are_merged(tmp_path):
    """What belongs to all rows comes along with each part."""
    whole = Part({"prior_sbc": prior().groups["prior_sbc"]})
    parts = ((part, whole) for part in cut(little(), 3, 3))
    same_file(to_netcdf(parts, tmp_path / "all.nc", along="row"), to_arviz(little(), whole))


def test_groups_grow_on_their_own(tmp_path):
    new = Part({"predictions": {"x": drawn(3, plates=["row"])}})
    parts = zip(cut(little(), 4, 2), cut(new, 1, 2), strict=True)
    labels = {"coords": {"row": list("abcdef")}}
    same_file(to_netcdf(parts, tmp_path / "all.nc", along="row", **labels), to_arviz(little(), new, **labels))


def test_attributes_in_which_parts_differ_are_left_out(tmp_path):
    parts = list(cut(little(), 2, 2, 2))
    for part, seed in zip(parts, (1, 2, 1), strict=True):
        part.attrs = {**part.attrs, "seed": seed, "exact": True}
    whole = little()
    whole.attrs = {**whole.attrs, "exact": 1}
    same_file(to_netcdf(parts, tmp_path / "all.nc", along="row"), to_arviz(whole))


@pytest.mark.parametrize("limit", [1, 300])
def test_pieces_of_any_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(netcdf_module, "_CHUNK_BYTES", limit)
    same_file(to_netcdf(cut(little(), 4, 2), tmp_path / "all.nc", along="row"), to_arviz(little()))


@pytest.mark.skipif(ARVIZ_1, reason="ArviZ 1.x always waits")
@pytest.mark.parametrize("load", ["lazy", "eager"])
def test_variables_are_read_when_used(tmp_path, load):
    path = to_netcdf(cut(little(), 4, 2), tmp_path / "all.nc", along="row")
    with az.rc_context({"data.load": load}):
        table = az.from_netcdf(str(path)).posterior
    assert table["z"].variable._in_memory == (load == "eager")
    table.close()


def test_one_part_is_in_memory_at_a_time(tmp_path):
    made = []

    def parts():
        for _ in range(3):
            assert [array for array in made if array() is not None] == []
            values = normal(1, 30, 5)
            made.append(weakref.ref(values))
            part = Part({"posterior": {"z": Variable(values, (*DRAWS, "row"))}})
            del values
            yield part
            del part

    path = to_netcdf(parts(), tmp_path / "all.nc", along="row")
    assert xarray.load_dataset(path, group="posterior", engine="h5netcdf")["z"].shape == (1, 30, 15)


# --- nothing or all


def failing(error):
    yield from cut(little(), 4)
    raise error


@pytest.mark.parametrize("error", [RuntimeError("no more rows"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "all.nc"
    with pytest.raises(type(error)):
        to_netcdf(failing(error), path, along="row")
    assert list(tmp_path.iterdir()) == []
    path.write_text("precious")
    with pytest.raises(type(error)):
        to_netcdf(failing(error), path, along="row")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "precious"


def test_nothing_appears_before_all_is_there(tmp_path):
    path = tmp_path / "all.nc"

    def parts():
        for part in cut(little(), 4, 2):
            assert not path.exists()
            yield part

    to_netcdf(parts(), str(path), along="row")
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_is_replaced(tmp_path):
    path = to_netcdf([Part({"prior": prior().groups["prior"]})], tmp_path / "all.nc", along="row")
    before = az.from_netcdf(str(path))
    to_netcdf(cut(little(), 4, 2), path, along="row")
    same_file(path, to_arviz(little()))
    np.testing.assert_array_equal(before["prior"]["z"].values, prior().groups["prior"]["z"].values)
    for group in group_names(before):
        before[group].close()


# --- what is refused


def drawn_part(count):
    return Part({"posterior": {"z": Variable(normal(1, count, 2), (*DRAWS, "row"))}})


def changed(group, name, variable):
    """Three parts, the last of which has another variable in one place."""
    *parts, last = cut(little(), 2, 2, 2)
    last.groups[group] = {**last.groups[group], name: variable}
    return [*parts, last]


@pytest.mark.parametrize(
    ("parts", "culprit"),
    [
        ([], "parts is empty"),
        (
            [drawn_part(10), drawn_part(10), drawn_part(9)],
            "'z' in group 'posterior' of part 3 has 9 draws, but 10 in part 1; give all parts as many",
        ),
        (
            [little(), Part({"prior": {"z": drawn(6, plates=["row"])}})],
            r"part 2 must have the same variables .*'z' in group 'prior'",
        ),
        (
            changed("observed_data", "new", Variable(normal(2), ("row",))),
            "only one has .*'new' in group 'observed_data'",
        ),
        (
            changed("posterior", "scale", Variable(-normal(1, 30, dtype=np.float64), DRAWS)),
            "'scale' in group 'posterior' of part 3 has other draws than in part 1",
        ),
        (
            changed("observed_data", "x", Variable(normal(2, 4), ("row",))),
            "'x' in group 'observed_data' of part 3 has 4 elements of 'x_dim_1', but 3 in part 1",
        ),
        (
            changed("observed_data", "x", Variable(normal(2, 3, dtype=np.float64), ("row",))),
            "'x' in group 'observed_data' of part 3 is of type float64, but float32 in part 1",
        ),
        (
            changed("observed_data", "x", Variable(normal(2, 3), ())),
            r"'x' in group 'observed_data' of part 3 has dimensions \('x_dim_0', 'x_dim_1'\)",
        ),
    ],
)
def test_parts_must_fit_together(tmp_path, parts, culprit):
    with pytest.raises(ValueError, match=culprit):
        to_netcdf(parts, tmp_path / "all.nc", along="row")
    assert list(tmp_path.iterdir()) == []


def test_constants_must_stay(tmp_path):
    groups = {"observed_data": {"x": Variable(normal(3), ("row",))}}
    noise = {"constant_data": {"noise": Variable(np.array([0.5, np.nan]), ())}}
    same = [Part({**groups, **noise}), Part({**groups, **noise})]
    to_netcdf(same, tmp_path / "all.nc", along="row")
    same[1].groups["constant_data"] = {"noise": Variable(np.array([0.5, 0.0]), ())}
    with pytest.raises(ValueError, match="'noise' in group 'constant_data' of part 2 has other values"):
        to_netcdf(same, tmp_path / "all.nc", along="row")


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"along": "data"}, r"along must be a dimension .*'row'.*, got 'data'"),
        ({"along": "row", "coords": {"row": list("abcde")}}, "got 5, but its sizes are .*: 6"),
        ({"along": "row", "coords": {"raw": [1]}}, "coords names 'raw'"),
        ({"along": "row", "dims": {"y": ["k"]}}, "dims names 'y'"),
    ],
)
def test_names_must_be_known(tmp_path, options, culprit):
    with pytest.raises(ValueError, match=culprit):
        to_netcdf(cut(little(), 4, 2), tmp_path / "all.nc", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "culprit"),
    [
        (little(), "parts must be an iterable of what to export, got Part; put a single one into a list"),
        ([[little()]], "'list' cannot be exported"),
        (
            [Part({"posterior": {"z": Variable(normal(1, 3, 2) * 1j, (*DRAWS, "row"))}})],
            "netCDF has no type for 'z' of group 'posterior', which is complex64",
        ),
    ],
)
def test_refuses_what_a_file_cannot_hold(tmp_path, parts, culprit):
    with pytest.raises(TypeError, match=culprit):
        to_netcdf(parts, tmp_path / "all.nc", along="row")


def test_the_path_is_checked_first(tmp_path):
    def never():
        raise AssertionError("no part may be made")
        yield

    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        to_netcdf(never(), tmp_path / "missing" / "all.nc", along="row")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        to_netcdf(never(), tmp_path, along="row")


@pytest.mark.parametrize("missing", ["xarray", "h5netcdf", "h5py"])
def test_says_how_to_install_the_engine(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'pyro-guides\[arviz\]'"):
        to_netcdf(cut(little(), 6), tmp_path / "all.nc", along="row")
    assert list(tmp_path.iterdir()) == []
