"""Training as one call."""

from pyro_guides.training.fitting import fit as fit
from pyro_guides.training.judging import Look as Look
from pyro_guides.training.ladder import Rung as Rung
from pyro_guides.training.noise import GradientNoise as GradientNoise
from pyro_guides.training.noise import gradient_noise as gradient_noise
from pyro_guides.training.result import FitResult as FitResult
from pyro_guides.training.schedule import warmup_cosine as warmup_cosine

__all__ = ["FitResult", "GradientNoise", "Look", "Rung", "fit", "gradient_noise", "warmup_cosine"]
