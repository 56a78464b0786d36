"""Distributions and bijections that guides are made of (torch and pyro only)."""

from pyro_guides.distributions import kl as kl
from pyro_guides.distributions.control import ControlVariate as ControlVariate
from pyro_guides.distributions.discrete import Alphabet as Alphabet
from pyro_guides.distributions.discrete import DiscreteSite as DiscreteSite
from pyro_guides.distributions.mixture import VectorMixture as VectorMixture
from pyro_guides.distributions.normal import VectorNormal as VectorNormal
from pyro_guides.distributions.scales import CholeskyScale as CholeskyScale
from pyro_guides.distributions.scales import DiagonalScale as DiagonalScale
from pyro_guides.distributions.scales import LowRankScale as LowRankScale
from pyro_guides.distributions.scales import Scale as Scale
from pyro_guides.distributions.scales import triangular_root as triangular_root
from pyro_guides.distributions.sites import Joint as Joint
from pyro_guides.distributions.sites import SiteDistribution as SiteDistribution
from pyro_guides.distributions.transforms import bijection as bijection
from pyro_guides.distributions.vector import VectorDistribution as VectorDistribution

__all__ = [
    "Alphabet",
    "CholeskyScale",
    "ControlVariate",
    "DiagonalScale",
    "DiscreteSite",
    "Joint",
    "LowRankScale",
    "Scale",
    "SiteDistribution",
    "VectorDistribution",
    "VectorMixture",
    "VectorNormal",
    "bijection",
    "triangular_root",
]
