"""What goes to ArviZ arrives: every value, under names that can be found again."""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pytest
import xarray

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("torch") is None:  # as it may be where ArviZ 1.x is; the export needs none
    package = types.ModuleType("pyro_guides")
    package.__path__ = [str(ROOT / "pyro_guides")]
    sys.modules["pyro_guides"] = package

from pyro_guides.export import to_arviz  # noqa: E402
from pyro_guides.variables import Variable  # noqa: E402

ARVIZ_1 = hasattr(az, "convert_to_datatree")
DRAWS = ("chain", "draw")


class Part:
    """Anything that can be exported."""

    def __init__(self, groups, **attrs):
        self.groups = groups
        self.attrs = attrs

    def to_groups(self):
        return self.groups


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


def drawn(*shape, plates=(), dtype=np.float32):
    """Thirty draws of something."""
    return Variable(normal(1, 30, *shape, dtype=dtype), (*DRAWS, *plates))


def rows(count=6):
    """All that a posterior of rows has to say."""
    return Part(
        {
            "posterior": {"z": drawn(count, 2, plates=["row"]), "scale": drawn(dtype=np.float64)},
            "sample_stats": {
                "lp": drawn(count, plates=["row"]),
                "log_q": drawn(count, plates=["row"]),
                "khat": Variable(np.linspace(-0.5, 1.0, count), ("row",)),
            },
            "log_likelihood": {"x": drawn(count, plates=["row"])},
            "posterior_predictive": {"x": drawn(count, 3, plates=["row"])},
            "observed_data": {
                "x": Variable(normal(count, 3), ("row",)),
                "n": Variable(np.arange(count), ("row",)),
            },
            "constant_data": {
                "used": Variable(np.arange(count) % 2 == 0, ("row",)),
                "label": Variable(np.array(["a", "bcd"] * count)[:count], ("row",)),
            },
        },
        family="FullRankNormal",
    )


def prior():
    return Part(
        {
            "prior": {"z": drawn(6, 2, plates=["row"])},
            "prior_predictive": {"x": drawn(6, 3, plates=["row"])},
            "prior_sbc": {"z": Variable(np.arange(16).reshape(1, 8, 2), DRAWS)},
            "unconstrained_posterior": {"scale": drawn()},
            "anything_else": {"k": Variable(np.array([1.0, np.nan, np.inf]), ())},
        }
    )


def group_names(idata):
    return set(idata.children if isinstance(idata, xarray.DataTree) else idata.groups())


def table_of(idata, group):
    table = idata[group]
    return table.to_dataset() if isinstance(table, xarray.DataTree) else table


def same_values(idata, *parts, rename=lambda name: name):
    """Every array is there bit by bit, and nothing else."""
    assert group_names(idata) == {group for part in parts for group in part.groups}
    for part in parts:
        for group, variables in part.groups.items():
            for name, variable in variables.items():
                stored = idata[group][rename(name)].values
                assert stored.dtype.kind == variable.values.dtype.kind
                assert stored.dtype == variable.values.dtype or stored.dtype.kind == "U"
                np.testing.assert_array_equal(stored, variable.values)
    for group in group_names(idata):
        expected = {rename(name) for part in parts for name in part.groups.get(group, ())}
        assert set(idata[group].data_vars) == expected


def through_file(idata, folder):
    path = str(folder / "posterior.nc")
    with warnings.catch_warnings():  # xarray leaves a filter behind
        idata.to_netcdf(path, engine="h5netcdf")
        return az.from_netcdf(path)


# --- values, names and dimensions


def test_values_names_and_dimensions(tmp_path):
    idata = to_arviz(rows())
    for found in (idata, through_file(idata, tmp_path)):
        same_values(found, rows())
        assert found["posterior"]["z"].dims == ("chain", "draw", "row", "z_dim_1")
        assert found["posterior"]["scale"].dims == ("chain", "draw")
        assert found["sample_stats"]["khat"].dims == ("row",)
        assert found["observed_data"]["x"].dims == ("row", "x_dim_1")
        assert found["posterior"]["draw"].values.tolist() == list(range(30))
        assert found["posterior"]["chain"].values.tolist() == [0]
        assert found["posterior"]["z_dim_1"].values.tolist() == [0, 1]
        assert found["observed_data"]["row"].values.tolist() == list(range(6))


@pytest.mark.parametrize("dims", [[], ["row", "z_dim_1"]] if ARVIZ_1 else [[], ["row"]])
def test_default_names_and_labels_are_those_of_arviz(dims):
    """Plates count, as in ArviZ 0.x, so that names do not depend on its version."""
    values = normal(1, 30, 4, 2)
    groups, options = {"posterior": {"z": values}}, {"dims": {"z": dims}}
    theirs = az.from_dict(groups, **options) if ARVIZ_1 else az.from_dict(**groups, **options)
    ours = to_arviz(Part({"posterior": {"z": Variable(values, (*DRAWS, *dims[:1]))}}))
    assert ours["posterior"]["z"].equals(theirs["posterior"]["z"])


def test_groups_of_parts_are_merged(tmp_path):
    extra = Part({"sample_stats": {"log_weight": drawn(6, plates=["row"])}, "posterior": {}})
    idata = to_arviz(rows(), prior(), extra)
    for found in (idata, through_file(idata, tmp_path)):
        assert {"lp", "log_q", "khat", "log_weight"} == set(found["sample_stats"].data_vars)
        assert group_names(found) == {*rows().groups, *prior().groups}
    same_values(to_arviz(rows(), prior()), rows(), prior())


def test_coords_and_dims():
    coords = {"row": list("abcdef"), "pixel": [10, 20, 30]}
    idata = to_arviz(rows(), coords=coords, dims={"x": ["pixel"], "z": ["axis"]})
    same_values(idata, rows())
    assert idata["posterior"]["z"].dims == ("chain", "draw", "row", "axis")
    assert idata["posterior_predictive"]["x"].dims == ("chain", "draw", "row", "pixel")
    assert idata["log_likelihood"]["x"].dims == ("chain", "draw", "row")
    assert idata["observed_data"]["x"].sel(row="b", pixel=30).item() == normal(6, 3)[1, 2]
    for group in rows().groups:
        assert idata[group]["row"].values.tolist() == list("abcdef")


def test_fewer_names_than_event_dimensions():
    idata = to_arviz(Part({"posterior": {"z": drawn(4, 3, 2)}}), dims={"z": ["axis"]})
    assert idata["posterior"]["z"].dims == ("chain", "draw", "axis", "z_dim_1", "z_dim_2")


def test_groups_may_have_different_rows():
    other = Part({"predictions": {"x": drawn(2, plates=["row"])}})
    idata = to_arviz(rows(), other, coords={"row": list("abcdef")})
    same_values(idata, rows(), other)
    assert idata["posterior"]["row"].values.tolist() == list("abcdef")
    assert idata["predictions"]["row"].values.tolist() == [0, 1]


def test_attributes():
    notes = {"exact": True, "levels": [0.5, 0.9], "family": "NormalMixture", "seed": 3}
    other = Part({"prior": {"z": drawn()}, "posterior": {"w": drawn()}}, **notes)
    third = Part({"posterior": {"v": drawn()}}, family="FullRankNormal")  # two of three agree: still not all
    idata = to_arviz(rows(), other, third)
    library = {"inference_library", "inference_library_version"} & set(idata.attrs)
    assert idata["prior"].attrs["inference_library"] == "pyro_guides"
    assert idata["sample_stats"].attrs["family"] == "FullRankNormal"
    assert idata["prior"].attrs["family"] == "NormalMixture"
    assert idata["prior"].attrs["exact"] == 1
    assert set(idata["posterior"].attrs) == {"exact", "levels", "seed", *library}
    assert set(idata.attrs) == {"exact", "levels", "seed", *library}


def test_two_exports_are_identical():
    """Nothing such as the time of day gets in."""
    one, other = to_arviz(rows(), prior()), to_arviz(rows(), prior())
    for group in group_names(one):
        xarray.testing.assert_identical(table_of(one, group), table_of(other, group))


def test_values_are_not_copied():
    part = rows()
    stored = to_arviz(part)["posterior"]["z"].values
    assert np.shares_memory(stored, part.groups["posterior"]["z"].values)


# --- names that ArviZ has no room for


def test_slashes_become_dots(tmp_path):
    part = Part(
        {
            "posterior": {
                "net/layer.0/bias": drawn(4, 2, plates=["deep/row"]),
                "z": drawn(4, plates=["deep/row"]),
            }
        }
    )
    idata = to_arviz(part, dims={"net/layer.0/bias": ["z"]}, coords={"deep/row": list("abcd")})
    for found in (idata, through_file(idata, tmp_path)):
        same_values(found, part, rename=lambda name: name.replace("/", "."))
        bias = found["posterior"]["net.layer.0.bias"]
        assert bias.dims == ("chain", "draw", "deep.row", "z_dim")
        assert bias.attrs["original_name"] == "net/layer.0/bias"
        assert bias["deep.row"].attrs["original_name"] == "deep/row"
        assert bias["deep.row"].values.tolist() == list("abcd")
        assert "original_name" not in found["posterior"]["z"].attrs


def test_site_and_plate_of_one_name(tmp_path):
    part = Part(
        {
            "posterior": {"z": drawn(5, 2, plates=["z"])},
            "log_likelihood": {"x": drawn(5, plates=["z"])},
        }
    )
    idata = to_arviz(part, coords={"z": list("abcde")})
    for found in (idata, through_file(idata, tmp_path)):
        same_values(found, part)
        assert found["posterior"]["z"].dims == ("chain", "draw", "z_dim", "z_dim_1")
        assert found["log_likelihood"]["x"].dims == ("chain", "draw", "z_dim")
        assert found["posterior"]["z_dim"].values.tolist() == list("abcde")


def test_sites_and_plates_called_chain_and_draw(tmp_path):
    part = Part(
        {
            "posterior": {"chain": drawn(4, plates=["draw"]), "draw": drawn(3, plates=["chain"])},
            "observed_data": {"x": Variable(normal(4, 3), ("draw", "chain"))},
        }
    )
    idata = to_arviz(part)
    renamed = {"chain": "chain_site", "draw": "draw_site", "x": "x"}
    for found in (idata, through_file(idata, tmp_path)):
        same_values(found, part, rename=renamed.get)
        assert found["posterior"]["chain_site"].dims == ("chain", "draw", "draw_dim")
        assert found["observed_data"]["x"].dims == ("draw_dim", "chain_dim")


TRICKY = ["z", "z_dim", "z_dim_1", "chain", "chain_site", "draw", "a/b", "a.b"]


def test_no_pair_of_names_loses_anything():
    """Either all is there, in dimensions of its own, or an error tells the two that collide."""
    refused = 0
    pairs = itertools.combinations_with_replacement(TRICKY, 2)
    for (one, other), plate in itertools.product(pairs, TRICKY):
        values = {one: normal(1, 2, 3, 4), other: normal(1, 2, 3, 5)}
        part = Part({"posterior": {name: Variable(x, (*DRAWS, plate)) for name, x in values.items()}})
        try:
            table = to_arviz(part)["posterior"]
        except ValueError as error:
            refused += 1
            assert "would both be called" in str(error)  # noqa: PT017
            continue
        found = {array.attrs.get("original_name", name): array for name, array in table.data_vars.items()}
        assert set(found) == set(values)
        for name, array in found.items():
            np.testing.assert_array_equal(array.values, values[name])
            assert array.dims[:2] == DRAWS
            assert len(set(array.dims)) == 4
            assert not set(array.dims) & set(table.data_vars)
    assert 0 < refused < 80


# --- what is refused


def named(*names, plate="row", size=4):
    return Part({"posterior": {name: drawn(size, 2, plates=[plate]) for name in names}})


@pytest.mark.parametrize(
    ("parts", "options", "culprit"),
    [
        ([], {}, "nothing to export"),
        ([Part({})], {}, "nothing to export"),
        ([named("a/b", "a.b")], {}, "'a.b' and 'a/b' would both be called 'a.b'"),
        ([named("chain", "chain_site")], {}, "'chain' and 'chain_site'"),
        ([named("z", plate="p/q"), named("w", plate="p.q")], {}, "dimensions 'p.q' and 'p/q'"),
        ([named("z"), named("y", "z")], {}, r"two parts have \['z'\] in group 'posterior'"),
        ([named("z"), named("w", size=7)], {}, "'row' of group 'posterior' has size 4 in 'z', but size 7 in"),
        ([Part({"a/b": {"z": drawn()}})], {}, "group 'a/b'"),
        ([named("z")], {"dims": {"z": ["row"]}}, "dimensions of 'z'"),
        ([named("z")], {"dims": {"z": ["k", "l"]}}, "'z' has 1 event dimensions"),
        ([Part({"prior": {"z": drawn(2, 3)}})], {"dims": {"z": ["k", "k"]}}, "dimensions of 'z'"),
        ([named("z")], {"dims": {"y": ["k"]}}, r"'y', but the variables are \['z'\]"),
        ([named("z")], {"coords": {"raw": [1, 2]}}, "'raw', but the dimensions are .*'row'"),
        ([named("z")], {"coords": {"row": [1, 2]}}, "got 2, but its sizes are {'posterior': 4}"),
        ([named("z")], {"coords": {"row": "abcd"}}, r"got an array of shape \(\)"),
        ([named("z")], {"coords": {"row": [[1], [2], [3], [4]]}}, r"got an array of shape \(4, 1\)"),
    ],
)
def test_refuses_what_would_lose_data(parts, options, culprit):
    with pytest.raises(ValueError, match=culprit):
        to_arviz(*parts, **options)


def test_draws_of_one_group_must_be_as_many():
    fewer = Part({"posterior": {"w": Variable(normal(1, 20), DRAWS)}})
    with pytest.raises(ValueError, match=r"'draw' .* size 30 in 'z', but size 20 in 'w'; export them"):
        to_arviz(named("z"), fewer)


@pytest.mark.parametrize(
    ("part", "options", "culprit"),
    [
        ([named("z")], {}, "'list' cannot be exported: pass what guide.posterior"),
        (Part, {}, "'Part' cannot be exported"),
        (types.SimpleNamespace(to_groups=dict), {}, "to_groups.. and attrs"),
        (Part({"posterior": {"z": normal(1, 3)}}), {}, "'z' of group 'posterior' must be a Variable"),
        (Part({"posterior": {"z": drawn()}}, note=None), {}, "attribute 'note' .* None"),
        (Part({"posterior": {"z": drawn()}}, note=["a", 1]), {}, "attribute 'note'"),
        (named("z"), {"dims": {"z": "axis"}}, "must be a list of names, got 'axis'"),
    ],
)
def test_refuses_what_it_does_not_know(part, options, culprit):
    with pytest.raises(TypeError, match=culprit):
        to_arviz(part, **options)


@pytest.mark.skipif(ARVIZ_1, reason="groups of a DataTree have names of their own")
@pytest.mark.parametrize("group", ["attrs", "groups", "mean"])
def test_groups_called_like_what_arviz_uses(group):
    with pytest.raises(ValueError, match=group):
        to_arviz(Part({group: {"z": drawn()}}))


@pytest.mark.parametrize(
    ("values", "dims", "error", "culprit"),
    [
        ([1.0], ("a",), TypeError, "must be a NumPy array, got list"),
        (normal(2), ["a"], TypeError, "must be a tuple of strings"),
        (normal(2), "a", TypeError, "must be a tuple of strings"),
        (normal(2), ("a", "b"), ValueError, r"got \('a', 'b'\) for an array of shape \(2,\)"),
        (normal(2, 2), ("a", "a"), ValueError, "once each"),
        (normal(2), DRAWS, ValueError, "once each"),
    ],
)
def test_variables_check_themselves(values, dims, error, culprit):
    with pytest.raises(error, match=culprit):
        Variable(values, dims)


@pytest.mark.parametrize("missing", ["arviz", "xarray"])
def test_says_how_to_install_arviz(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'pyro-guides\[arviz\]'"):
        to_arviz(rows())


# --- ArviZ at work


def test_statistics_of_arviz_run():
    idata = to_arviz(rows(), prior(), coords={"row": list("abcdef")})
    summary = az.summary(idata, kind="stats", round_to="none")
    assert len(summary) == 6 * 2 + 1
    scale = rows().groups["posterior"]["scale"].values
    assert float(summary.loc["scale", "mean"]) == pytest.approx(scale.mean())
    assert az.extract(idata)["z"].sizes["sample"] == 30
    assert az.hdi(idata["posterior"])["z"].shape == (6, 2, 2)
    assert np.isfinite(az.ess(idata["posterior"])["z"].values).all()


def test_loo_of_arviz_runs():
    likelihood = Variable(normal(1, 400, 6) / 10, (*DRAWS, "row"))
    posterior = Variable(normal(1, 400), DRAWS)
    idata = to_arviz(Part({"posterior": {"z": posterior}, "log_likelihood": {"x": likelihood}}))
    loo = az.loo(idata, pointwise=True)
    assert loo.pareto_k.dims == ("row",)
    elpd = loo.elpd if ARVIZ_1 else loo.elpd_loo
    plain = np.log(np.exp(likelihood.values.astype(float)).mean((0, 1))).sum()
    assert elpd == pytest.approx(plain, abs=0.2)


def test_arviz_1_gets_a_tree(monkeypatch):
    """ArviZ 1.x is known by ``convert_to_datatree``; a ``DataTree`` is xarray's own."""
    arviz_1 = types.ModuleType("arviz")
    arviz_1.convert_to_datatree = None
    monkeypatch.setitem(sys.modules, "arviz", arviz_1)
    tree = to_arviz(rows(), prior(), coords={"row": list("abcdef")})
    assert isinstance(tree, xarray.DataTree)
    same_values(tree, rows(), prior())
    assert tree.attrs["inference_library"] == "pyro_guides"
    assert tree["sample_stats"].attrs["family"] == "FullRankNormal"
    assert tree["posterior"]["row"].values.tolist() == list("abcdef")
    monkeypatch.undo()
    installed = to_arviz(rows(), prior(), coords={"row": list("abcdef")})
    for group in group_names(tree):
        xarray.testing.assert_identical(table_of(tree, group), table_of(installed, group))


def python_with_arviz_1():
    """An interpreter of its own: ArviZ 1.x needs Python 3.12, for which torch may not be installed."""
    probe = "import arviz, pytest; assert hasattr(arviz, 'convert_to_datatree')"
    known = [os.environ.get("ARVIZ_1_PYTHON"), *map(shutil.which, ("python3.12", "python3.13", "python3.14"))]
    for python in filter(None, known):
        if subprocess.run([python, "-c", probe], capture_output=True).returncode == 0:
            return python
    return pytest.skip(
        "no Python 3.12 or later with ArviZ 1.x and pytest is on PATH, nor is one named by ARVIZ_1_PYTHON"
    )


@pytest.mark.skipif(ARVIZ_1, reason="the tests run under ArviZ 1.x as it is")
def test_all_of_this_holds_under_arviz_1():
    options = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]  # conftest.py needs torch
    command = [python_with_arviz_1(), *options, "tests/test_export.py", "tests/test_netcdf.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
