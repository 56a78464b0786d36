"""Bad exports, files and promotions."""

from functools import cache

from pyro_guides import (
    MLP,
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    NormalMixture,
    UnreadableFileError,
    to_arviz,
    to_netcdf,
)

from .case import table
from .models import X, folder, guide, levels, new_guide, posterior, whole_rows


def exported(*parts, **options):
    return lambda: to_arviz(posterior(), *[part() for part in parts], **options)


def written(parts=None, name="draws.nc", along="data", **options):
    def call():
        given = [posterior()] if parts is None else parts()
        return to_netcdf(given, folder() / name, along=along, **options)

    return call


@cache
def saved(name, change=lambda data: data):
    """A file of the guide, changed."""
    path = folder() / name
    guide().save(path)
    path.write_bytes(change(path.read_bytes()))
    return path


def flipped(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def half(data):
    return data[: len(data) // 2]


def other(data):
    return b"not a guide at all"


def loaded(file="good", change=lambda data: data, model=whole_rows, **options):
    return lambda: AmortizedGuide.load(saved(file, change), model, **options)


def promoted(*args, **options):
    return lambda: guide().promote(*args, **options)


# fmt: off
EXPORTS = {
    "nothing": (to_arviz, ValueError, "there is nothing to export"),
    "string": (lambda: to_arviz("p"), TypeError, "'str' cannot be exported ... guide.posterior(...)"),
    "guide": (lambda: to_arviz(guide()), TypeError, "'AmortizedGuide' cannot be exported"),
    "twice": (exported(posterior), ValueError, "two parts have ['s', 'z'] in group 'posterior'"),
    "coords: unknown": (exported(coords={"rows": [1]}), ValueError, "coords names 'rows' ... 'data'"),
    "coords: length": (exported(coords={"data": [1]}), ValueError, "coords['data'] ... got 1 ... 8"),
    "coords: number": (exported(coords={"data": 3}), ValueError, "coords['data'] must be one label for each"),
    "coords: string": (exported(coords="data"), TypeError, "coords must be a dict by name, got a str"),
    "dims: unknown": (exported(dims={"q": ["a"]}), ValueError, "dims names 'q' ... 'z'"),
    "dims: too many": (exported(dims={"z": ["a"]}), ValueError, "'z' ... 'a'"),
    "dims: string": (exported(dims="z"), TypeError, "dims must be a dict by name, got a str"),
    "dims: string inside": (exported(dims={"x": "a"}), TypeError,
        "dims['x'] must be a list of names, got 'a'"),
    "dims: numbers": (exported(dims={"x": [3]}), TypeError, "dims['x'] must be a list of names, got [3]"),
    "dims: taken": (exported(dims={"x": ["data"]}), ValueError, "'x' would be ['data', 'data']"),
    "netCDF: nothing": (written(list), ValueError, "there is nothing to export: parts is empty"),
    "netCDF: no list": (written(posterior), TypeError, "parts must be an iterable ... Posterior ... a list"),
    "netCDF: strings": (written(lambda: ["p"]), TypeError, "'str' cannot be exported"),
    "netCDF: guides": (written(lambda: [guide()]), TypeError, "'AmortizedGuide' cannot be exported"),
    "netCDF, along: unknown": (written(along="rows"), ValueError, "along must be a dimension ... got 'rows'"),
    "netCDF, along: number": (written(along=3), ValueError, "along must be a dimension ... got '3'"),
    "netCDF: folder": (written(name=""), IsADirectoryError,
        "path must name the file to write, got the folder"),
    "netCDF: nowhere": (written(name="no/draws.nc"), FileNotFoundError, "does not exist; create it"),
    "netCDF: number": (lambda: to_netcdf([posterior()], 3, along="data"), TypeError,
        "path must name ... got 3"),
    "netCDF, coords": (written(coords={"rows": [1]}), ValueError, "coords names 'rows'"),
}
FILES = {
    "save: not set up": (lambda: new_guide().save(folder() / "x"), RuntimeError, "no parameters yet"),
    "save: none": (lambda: guide().save(None), TypeError, "path must name a file, got None"),
    "save: folder": (lambda: guide().save(folder()), IsADirectoryError,
        "no ordinary file; nothing was written"),
    "save: nowhere": (lambda: guide().save(folder() / "no" / "x"), FileNotFoundError, "nothing was written"),
    "load: none": (lambda: AmortizedGuide.load(None, whole_rows), TypeError,
        "path must name a file, got None"),
    "load: missing": (lambda: AmortizedGuide.load(folder() / "no", whole_rows), FileNotFoundError,
        "No such file"),
    "load: folder": (lambda: AmortizedGuide.load(folder(), whole_rows), IsADirectoryError, "Is a directory"),
    "load: other file": (loaded("other", other), UnreadableFileError, "is damaged, cut short, or no file of"),
    "load: one bit": (loaded("flipped", flipped), UnreadableFileError, "is damaged ... checksum"),
    "load: half": (loaded("half", half), UnreadableFileError, "is damaged, cut short"),
    "load, model: none": (loaded(model=None), TypeError, "model must be a function, got None"),
    "load, model: string": (loaded(model="rows"), TypeError, "model must be a function, got 'rows'"),
    "load, model: another": (lambda: loaded(model=levels)()(X), ValueError,
        "not the model that the guide was saved for ... 's' is missing; 'mean' is new"),
    "load, encoder": (loaded(encoder=MLP()), TypeError, "got encoder, but ... leave it out"),
    "load, inputs": (loaded(inputs=len), TypeError, "got inputs, but ... leave it out"),
    "load, create_plates": (loaded(create_plates=len), TypeError, "got create_plates, but ... leave it out"),
    "load, name": (loaded(name=3), TypeError, "name must be a string, got 3"),
    "load, device": (loaded(device="abacus"), RuntimeError, "device string: abacus"),
    "promote: string": (promoted("x"), TypeError, "promote() takes a family such as ... got str"),
    "promote: class": (promoted(NormalMixture), TypeError, "promote() takes a family such as"),
    "promote: the same": (promoted(DiagonalNormal()), ValueError, "changes nothing"),
    "promote: unknown": (promoted({"q": FullRankNormal()}), ValueError, "names ['q'] ... ['data', 's', 'z']"),
    "promote: empty": (promoted({}), ValueError, "promote({}) changes nothing"),
    "promote: not set up": (lambda: new_guide().promote(FullRankNormal()), RuntimeError, "no parameters yet"),
    "promote, only_new": (promoted(FullRankNormal(), only_new="yes"), TypeError, "only_new must be True or"),
}
# fmt: on
CASES = [*table("export", EXPORTS), *table("file", FILES)]
