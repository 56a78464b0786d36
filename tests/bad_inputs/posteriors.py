"""Bad questions to a posterior."""

import torch

from .case import table
from .models import NAN, ONES, ZEROS, X, guide, levels, posterior, with_a_flag

ZERO = torch.tensor(0.0)


def ask(name, *args, draws=30, model=None, **options):
    made = (draws,) if model is None else (draws, model)
    return lambda: getattr(posterior(*made), name)(*args, **options)


def value(name, draws=30):
    return lambda: getattr(posterior(draws), name)


def resampled(name):
    return lambda: getattr(posterior().resample(), name)()


# fmt: off
MAKING = {
    "num_draws: 0": (lambda: guide().posterior(X, num_draws=0), ValueError, "num_draws must be at least 1"),
    "num_draws: -1": (lambda: guide().posterior(X, num_draws=-1), ValueError, "num_draws ... got -1"),
    "num_draws: string": (lambda: guide().posterior(X, num_draws="5"), TypeError, "num_draws must be an int"),
    "num_draws: bool": (lambda: guide().posterior(X, num_draws=True), TypeError, "num_draws must be an int"),
    "no arguments": (lambda: guide().posterior(), TypeError, "missing 1 required positional argument: 'x'"),
    "too many": (lambda: guide().posterior(X, 3), TypeError, "takes 1 positional argument but 2 were given"),
    "keyword": (lambda: guide().posterior(X, draws=3), TypeError, "unexpected keyword argument 'draws'"),
    "numbers": (lambda: guide().posterior([1, 2]).draws, TypeError,
        "argument 0 is a list, expected a torch.T"),
    "array": (lambda: guide().posterior(X.numpy()).draws, TypeError,
        "argument 0 is a ndarray, expected a tor"),
    "meta device": (lambda: guide()(X.to("meta")), TypeError, "on meta ... on cpu"),
    "half": (lambda: guide()(X.half()), TypeError, "argument 0 is torch.float16 ... torch.float32"),
    "complex": (lambda: guide()(X.cfloat()), TypeError, "argument 0 is torch.complex64"),
    "batches: none": (lambda: next(guide().posteriors(None)), TypeError, "batches must be a DataLoader"),
    "batches: string": (lambda: next(guide().posteriors("ab")), TypeError, "batches must be ... got a str"),
    "batches, num_draws": (lambda: next(guide().posteriors([X], num_draws=0)), ValueError,
        "num_draws must be"),
}
ASKING = {
    "log_prob: list": (ask("log_prob", [1]), TypeError, "a dict of tensors by name, got a list"),
    "log_prob: none": (ask("log_prob", None), TypeError, "a dict of tensors by name, got a NoneType"),
    "log_prob: empty": (ask("log_prob", {}), ValueError, "all latents are needed, but 'z' is missing"),
    "log_prob: NaN": (ask("log_prob", {"z": ZEROS * NAN, "s": ONES}), ValueError,
        "'z' lies outside its support"),
    "log_prob: negative": (ask("log_prob", {"z": ZEROS, "s": -ONES}), ValueError,
        "'s' lies outside its suppo"),
    "local: string": (ask("local", "mean", model=levels), TypeError, "a dict of tensors by name, got a str"),
    "local: list": (ask("local", [1], model=levels), TypeError, "a dict of tensors by name, got a list"),
    "local: number": (ask("local", {"mean": 0.0}, model=levels), TypeError,
        "'mean' must be a tensor ... float"),
    "local: shape": (ask("local", {"mean": torch.zeros(3)}, model=levels), ValueError, "3 draws of 'mean'"),
    "local: missing": (ask("local", {"z": ZEROS}, model=levels), ValueError, "'mean' is missing"),
    "local: unknown": (ask("local", {"mean": ZERO, "q": ZERO}, model=levels), ValueError,
        "given names ['q']"),
    "local: rows": (ask("local", {"z": ZEROS}), ValueError, "given names ['z']"),
    "sd": (ask("sd", draws=1), ValueError, "a standard deviation needs at least 2 draws"),
    "quantiles: string": (ask("quantiles", "0.5"), TypeError, "quantiles must be an array of real numbers"),
    "quantiles: none": (ask("quantiles", None), TypeError, "quantiles must be an array of real numbers"),
    "quantiles: strings": (ask("quantiles", ["a"]), TypeError, "quantiles must be an array of real numbers"),
    "quantiles: number": (ask("quantiles", 0.5), ValueError, "quantiles must be a list of numbers ... 0.5"),
    "quantiles: -0.1": (ask("quantiles", [-0.1]), ValueError,
        "quantiles must be ... from 0 to 1, got [-0.1]"),
    "bound: 0": (ask("bound", 0), ValueError, "num_draws must be at least 1, got 0"),
    "bound: 31": (ask("bound", 31), ValueError, "a bound at 31 draws needs as many; the posterior has 30"),
    "bound: string": (ask("bound", "3"), TypeError, "num_draws must be an int, got '3'"),
    "k_hat": (value("k_hat", 3), ValueError, "at least 25 draws ... got 3; take more draws"),
    "loo": (ask("loo", draws=1), ValueError, "at least 25 draws ... got 1; take more draws"),
    "loo, resampled": (resampled("loo"), ValueError, "resampled already ... weights are spent"),
    "predict: too many": (ask("predict", X, 3), TypeError, "takes 1 positional argument but 2 were given"),
    "predict: keyword": (ask("predict", noise=3), TypeError, "unexpected keyword argument 'noise'"),
    "predict: rows": (ask("predict", X[:3]), ValueError, "draws of 'z' have shape (8,) ... expects (3,)"),
    "predict: name": (lambda: posterior().predict()["q"], KeyError, "there is no site 'q'; there are ['x']"),
    "prior: 0": (ask("prior", 0), ValueError, "num_draws must be at least 1, got 0"),
    "prior: string": (ask("prior", "5"), TypeError, "num_draws must be an int, got '5'"),
    "resample: 0": (ask("resample", 0), ValueError, "num_draws must be at least 1, got 0"),
    "resample: string": (ask("resample", "3"), TypeError, "num_draws must be an int, got '3'"),
    "resample: twice": (resampled("resample"), ValueError, "resampled already ... weights are spent"),
    "refine, particles: 0": (ask("refine", particles=0), ValueError, "particles must be at least 1, got 0"),
    "refine, particles: string": (ask("refine", particles="3"), TypeError,
        "particles must be an int, got '3'"),
    "refine, max_steps": (ask("refine", max_steps=0), ValueError, "max_steps must be at least 1, got 0"),
    "nuts, full_mass": (ask("nuts", full_mass="x"), TypeError, "full_mass must be True or False, got 'x'"),
    "nuts, num_chains": (ask("nuts", num_chains=0), ValueError, "num_chains must be at least 1, got 0"),
    "nuts, option": (ask("nuts", bogus=3), TypeError, "unexpected keyword argument 'bogus'"),
    "nuts, draws": (ask("nuts", draws=1), ValueError, "a mass matrix needs at least 2 draws"),
    "nuts, discrete": (ask("nuts", model=with_a_flag), ValueError, "continuous latents only, but ['k']"),
}
# fmt: on
CASES = [*table("posterior", MAKING), *table("ask", ASKING)]
