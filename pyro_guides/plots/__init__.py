"""Figures of training, trust, calibration and prediction: ``from pyro_guides import plots``.

Each function draws into the axes or figure that it is given, or into a new one of pyplot, and returns it; it
changes nothing else. Matplotlib is imported by the first figure, not before.
"""

from pyro_guides.plots.calibrations import coverage, ranks
from pyro_guides.plots.checks import gaps, k_hat
from pyro_guides.plots.training import losses
from pyro_guides.plots.values import predictive, prior_posterior

__all__ = ["coverage", "gaps", "k_hat", "losses", "predictive", "prior_posterior", "ranks"]
