"""Bad questions to check, calibrate, find_modes, Familiarity, and bad figures."""

from pyro_guides import Familiarity, calibrate, check, find_modes, plots

from .case import table
from .models import X, calibration, guide, new_guide, posterior, report, whole_rows, with_a_flag

QUIET = {"gaps": False, "modes": False, "show": False}


def checked(draws=30, **options):
    return lambda: check(posterior(draws), **QUIET | options)


def calibrated(**options):
    return lambda: calibrate(posterior(), **{"num_simulations": 100, "num_draws": 20} | options)


# fmt: off
JUDGING = {
    "check: string": (lambda: check("p"), TypeError,
        "check takes what guide.posterior(...) returns, got a str"),
    "check, gaps": (checked(gaps="no"), TypeError, "gaps must be True or False, got 'no'"),
    "check, modes": (checked(modes=3), TypeError, "modes must be True or False, got 3"),
    "check, show": (checked(show="x"), TypeError, "show must be True or False, got 'x'"),
    "check, training": (checked(training=3), TypeError, "training must be a Familiarity ... a int"),
    "check, draws": (checked(3), ValueError, "a check needs at least 25 draws ... has 3"),
    "check, resampled": (lambda: check(posterior().resample()), ValueError,
        "resampled ... weights are spent"),
    "calibrate: string": (lambda: calibrate("p"), TypeError, "calibrate takes what ... got a str"),
    "calibrate, simulations: 0": (calibrated(num_simulations=0), ValueError,
        "num_simulations must be at least"),
    "calibrate, simulations: 1e3": (calibrated(num_simulations=1e3), TypeError,
        "num_simulations must be an int"),
    "calibrate, draws": (calibrated(num_draws=0), ValueError, "num_draws must be at least 20, got 0"),
    "calibrate, levels: 2": (calibrated(levels=[2.0]), ValueError, "levels must be in [0, 1], got 2.0"),
    "calibrate, levels: string": (calibrated(levels="a"), TypeError,
        "levels must be an array of real numbers"),
    "calibrate, levels: unsorted": (calibrated(levels=[0.5, 0.1]), ValueError,
        "levels must be ... increasing"),
    "calibrate, probability": (calibrated(probability=1.5), ValueError,
        "probability must be between 0 and 1"),
    "calibrate, seed": (calibrated(seed="a"), TypeError, "seed must be an int, got 'a'"),
    "is_calibrated: 2": (lambda: calibration().is_calibrated(2.0), ValueError,
        "level must be between 0 and 1"),
    "is_calibrated: string": (lambda: calibration().is_calibrated("a"), TypeError, "level must be a number"),
    "coverage": (lambda: calibration().coverage([2.0]), ValueError, "levels must be in [0, 1], got 2.0"),
    "familiarity: function": (lambda: Familiarity(whole_rows, X), TypeError,
        "takes an AmortizedGuide, got a function"),
    "familiarity: not set up": (lambda: Familiarity(new_guide(), X), RuntimeError, "no parameters yet"),
    "familiarity: no data": (lambda: Familiarity(guide()), TypeError, "positional argument: 'x'"),
    "familiarity: learned": (lambda: Familiarity(new_guide(amortize=()).setup(X), X), ValueError,
        "the guide has no encoder ... amortize it"),
    "familiarity: few rows": (lambda: Familiarity(guide(), X), ValueError, "at least 50 training rows ... 8"),
    "modes: string": (lambda: find_modes("p"), TypeError, "find_modes takes what ... got a str"),
    "modes, starts: 0": (lambda: find_modes(posterior(), starts=0), ValueError, "starts must be at least 6"),
    "modes, starts: string": (lambda: find_modes(posterior(), starts="9"), TypeError,
        "starts must be an int"),
    "modes: discrete": (lambda: find_modes(posterior(30, with_a_flag)), ValueError, "['k'] are discrete"),
}
FIGURES = {
    "coverage": (lambda: plots.coverage(3), TypeError, "a Calibration, not of a int"),
    "ranks": (lambda: plots.ranks(posterior()), TypeError, "a Calibration, not of a Posterior"),
    "axes": (lambda: plots.ranks(calibration(), ax=3), TypeError, "ax must be a Matplotlib Axes, got a int"),
    "gaps": (lambda: plots.gaps(3), TypeError, "a Check, not of a int"),
    "gaps, left out": (lambda: plots.gaps(report()), ValueError, "without gaps=False"),
    "k_hat": (lambda: plots.k_hat(posterior()), TypeError, "a Check, not of a Posterior"),
    "losses: string": (lambda: plots.losses("a"), TypeError, "losses must be an array of real numbers"),
    "losses: none": (lambda: plots.losses([]), ValueError, "losses must be a list of numbers ... (0,)"),
    "losses, smooth": (lambda: plots.losses([1.0, 2.0], smooth=0), ValueError, "smooth must be ... got 0"),
    "predictive": (lambda: plots.predictive(3), TypeError, "a Posterior, not of a int"),
    "predictive, name": (lambda: plots.predictive(posterior(), "q"), ValueError,
        "no observed site 'q' ... ['x']"),
    "marginals": (lambda: plots.prior_posterior(guide()), TypeError, "a Posterior, not of a AmortizedGuide"),
    "marginals, names": (lambda: plots.prior_posterior(posterior(), ["q"]), ValueError, "no latents ['q']"),
    "marginals, row": (lambda: plots.prior_posterior(posterior(), row=99), ValueError,
        "0, ..., 7 ... got 99"),
    "marginals, row: string": (lambda: plots.prior_posterior(posterior(), row="a"), ValueError,
        "row ... 'a'"),
}
# fmt: on
CASES = [*table("judge", JUDGING), *table("figure", FIGURES)]
