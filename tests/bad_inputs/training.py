"""Bad arguments of fit, find_start and gradient_noise."""

from pyro.infer import Trace_ELBO
from torch.utils.data import IterableDataset

from pyro_guides import DiagonalNormal, FullRankNormal, find_start, fit, gradient_noise, optim
from pyro_guides.objectives import LinearWarmup

from .case import table
from .models import NAN, X, folder, guide, levels, new_guide, whole_rows

PLAIN = {"max_steps": 2, "batch_size": None, "validation": None, "progress": False}


def fitted(**options):
    return lambda: fit(whole_rows, new_guide(), X, **PLAIN | options)


def of(data, **options):
    return lambda: fit(whole_rows, new_guide(), data, max_steps=2, progress=False, **options)


def noise(elbo=None, model=whole_rows, of_guide=..., **options):
    made = (lambda: guide()) if of_guide is ... else (lambda: of_guide)
    return lambda: gradient_noise(elbo or Trace_ELBO(), model, made(), X, **options)


def file(name):
    return lambda: fit(whole_rows, new_guide(), X, **PLAIN, checkpoint=folder() / name)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


# fmt: off
FIT = {
    "model": (lambda: fit(None, new_guide(), X), TypeError, "model must be a function or module, got None"),
    "guide": (lambda: fit(whole_rows, None, X), TypeError, "guide must be a function or module, got None"),
    "another model's guide": (lambda: fit(levels, new_guide(), X, **PLAIN, whiten=False), UserWarning,
        "Found non-auxiliary vars in guide but not model ... {'s'}"),
    "data: none": (of(None), TypeError, "data hold no tensor but ['NoneType'] ... batch_size=None"),
    "data: numbers": (of([1, 2]), TypeError, "data hold no tensor but ['int', 'int']"),
    "data: string": (of("x"), TypeError, "data hold no tensor but ['str']"),
    "data: no rows": (of(X[:0]), ValueError, "data have 0 rows ... at least two"),
    "data: lengths": (of((X, X[:5])), ValueError, "rows"),
    "data: endless": (of(Endless()), TypeError, "without a length needs a DataLoader"),
    "data: NaN": (of(X * NAN, batch_size=4), ValueError, "NaN"),
    "max_steps: 0": (fitted(max_steps=0), ValueError, "max_steps must be at least 1, got 0"),
    "max_steps: -1": (fitted(max_steps=-1), ValueError, "max_steps must be at least 1, got -1"),
    "max_steps: 1.5": (fitted(max_steps=1.5), TypeError, "max_steps must be an int, got 1.5"),
    "max_steps: string": (fitted(max_steps="10"), TypeError, "max_steps must be an int, got '10'"),
    "max_epochs: 0": (fitted(max_steps=None, max_epochs=0), ValueError, "max_epochs must be at least 1"),
    "both": (fitted(max_epochs=2), ValueError, "give max_steps or max_epochs, not both: got 2 and 2"),
    "batch_size: 0": (fitted(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "batch_size: -3": (fitted(batch_size=-3), ValueError, "batch_size must be at least 1, got -3"),
    "batch_size: 2.5": (fitted(batch_size=2.5), TypeError, "batch_size must be an int, got 2.5"),
    "learning_rate: 0": (fitted(learning_rate=0), ValueError, "learning_rate must be a positive number"),
    "learning_rate: -1": (fitted(learning_rate=-1.0), ValueError, "learning_rate must be ... -1.0"),
    "learning_rate: NaN": (fitted(learning_rate=NAN), ValueError, "learning_rate must be ... nan"),
    "learning_rate: string": (fitted(learning_rate="0.1"), TypeError, "learning_rate must be ... '0.1'"),
    "loss: class": (fitted(loss=Trace_ELBO), TypeError, "got the class Trace_ELBO; write Trace_ELBO()"),
    "loss: string": (fitted(loss="Trace_ELBO"), TypeError, "loss must be one of Pyro's ELBOs"),
    "validation: 2": (fitted(validation=2.0), ValueError, "validation must be a share ... 2.0"),
    "validation: -0.1": (fitted(validation=-0.1), ValueError, "validation must be a share ... -0.1"),
    "validation: string": (fitted(validation="some"), TypeError, "validation must be a share ... a str"),
    "validation: numbers": (of(X, validation=[1], batch_size=4), TypeError, "validation hold no tensor"),
    "patience": (fitted(patience=0), ValueError, "patience must be at least 1, got 0"),
    "clip: 0": (fitted(clip=0.0), ValueError, "clip must be a positive norm ... 0.0"),
    "clip: string": (fitted(clip="no"), ValueError, "clip must be a positive norm ... 'no'"),
    "schedule: number": (fitted(schedule=3.0), TypeError, "schedule must be a function or None, got 3.0"),
    "schedule: negative": (fitted(schedule=lambda t: -1.0), ValueError, "a factor of at least 0, got -1.0"),
    "schedule: nothing": (fitted(schedule=lambda t: None), TypeError,
        "schedule must return a number, got None at step 0"),
    "optimizer: Pyro's": (fitted(optimizer=optim.Adam({})), TypeError, "must make a torch optimizer"),
    "optimizer: number": (fitted(optimizer=3), TypeError, "optimizer must be a function or None, got 3"),
    "optimizer: returns": (fitted(optimizer=lambda p: 3), TypeError, "must return a torch optimizer, got 3"),
    "tempering: number": (fitted(tempering=0.5), TypeError, "tempering must be an object ... 0.5"),
    "tempering: class": (fitted(tempering=LinearWarmup), TypeError, "tempering must be an object"),
    "whiten": (fitted(whiten="no"), TypeError, "whiten must be True or False, got 'no'"),
    "restarts: 0": (fitted(restarts=0), ValueError, "restarts must be at least 1, got 0"),
    "restarts: string": (fitted(restarts="2"), TypeError, "restarts must be an int, got '2'"),
    "ladder: string": (fitted(ladder="full"), TypeError, "ladder must be a list of families ... 'full'"),
    "ladder: family": (fitted(ladder=FullRankNormal()), TypeError, "ladder must be a list of families"),
    "ladder: class": (fitted(ladder=[FullRankNormal]), TypeError, "ladder must be a list ... <class"),
    "ladder: downwards": (fitted(ladder=[DiagonalNormal()]), ValueError,
        "cannot be climbed to DiagonalNormal ... upwards"),
    "max_skips": (fitted(max_skips=0), ValueError, "max_skips must be at least 1, got 0"),
    "checkpoint: number": (fitted(checkpoint=3), TypeError, "checkpoint must be a path or None, got 3"),
    "checkpoint: folder": (file(""), IsADirectoryError, "checkpoint must be a file, and this is a folder"),
    "checkpoint: nowhere": (file("no/run.ckpt"), FileNotFoundError,
        "checkpoint lies in a folder that is not"),
    "checkpoint_every": (fitted(checkpoint_every=0), ValueError, "checkpoint_every must be at least 1"),
    "resume: string": (fitted(resume="yes"), TypeError, "resume must be True or False, got 'yes'"),
    "resume: no file": (fitted(resume=True), ValueError, "resume=True needs a file ... checkpoint=path"),
    "seed: string": (fitted(seed="a"), TypeError, "seed must be an int, got 'a'"),
    "seed: 1.5": (fitted(seed=1.5), TypeError, "seed must be an int, got 1.5"),
    "logger: function": (fitted(logger=print), TypeError, "logger must be one of Lightning's"),
    "logger: list": (fitted(logger=[3]), TypeError, "logger must be one of Lightning's ... [3]"),
    "progress": (fitted(progress="yes"), TypeError, "progress must be True or False, got 'yes'"),
    "accelerator": (fitted(accelerator="abacus"), ValueError, "accelerator='abacus' ... Available names"),
    "devices": (fitted(devices=0), ValueError, "devices must be at least 1, got 0"),
    "num_nodes": (fitted(num_nodes=0), ValueError, "num_nodes` must be a positive integer, but got 0"),
}
START = {
    "function": (lambda: find_start(whole_rows, X), TypeError, "takes an AmortizedGuide, got a function"),
    "nothing": (lambda: find_start(None), TypeError, "takes an AmortizedGuide, got a NoneType"),
    "again": (lambda: find_start(new_guide(), X, again="yes"), TypeError, "again must be True or False"),
    "no data": (lambda: find_start(new_guide()), TypeError, "missing 1 required positional argument: 'x'"),
}
NOISE = {
    "elbo: string": (noise("e"), TypeError, "elbo must be one of Pyro's ELBOs ... 'e'"),
    "elbo: class": (noise(Trace_ELBO), TypeError, "elbo must be an ELBO, got the class Trace_ELBO"),
    "model": (noise(model=None), TypeError, "model must be a function or module, got None"),
    "guide": (noise(of_guide=None), TypeError, "guide must be a function or module, got None"),
    "repeats: 1": (noise(repeats=1), ValueError, "repeats must be at least 2"),
    "repeats: string": (noise(repeats="2"), TypeError, "repeats must be an int, got '2'"),
    "seed": (noise(seed="a"), TypeError, "seed must be an int, got 'a'"),
    "nothing to train": (noise(model=lambda x: None, of_guide=lambda x: None), ValueError,
        "nothing to train"),
}
# fmt: on
CASES = [*table("fit", FIT), *table("find_start", START), *table("gradient_noise", NOISE)]
