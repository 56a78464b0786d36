"""What is known of the latents of given rows: draws, densities, predictions, and repairs."""

from pyro_guides.posterior.batches import posteriors
from pyro_guides.posterior.loo import Loo
from pyro_guides.posterior.posterior import Posterior
from pyro_guides.posterior.prediction import Prediction
from pyro_guides.posterior.query import Query

__all__ = ["Loo", "Posterior", "Prediction", "Query", "posteriors"]
