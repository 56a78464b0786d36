"""Distributions and bijections that guides are made of (torch and pyro only)."""

from pyro_guides.distributions import kl as kl
from pyro_guides.distributions.normal import VectorNormal as VectorNormal
from pyro_guides.distributions.scales import CholeskyScale as CholeskyScale
from pyro_guides.distributions.scales import DiagonalScale as DiagonalScale
from pyro_guides.distributions.scales import LowRankScale as LowRankScale
from pyro_guides.distributions.scales import Scale as Scale
from pyro_guides.distributions.sites import Joint as Joint
from pyro_guides.distributions.sites import SiteDistribution as SiteDistribution
from pyro_guides.distributions.transforms import bijection as bijection
from pyro_guides.distributions.vector import VectorDistribution as VectorDistribution

__all__ = [
    "CholeskyScale",
    "DiagonalScale",
    "Joint",
    "LowRankScale",
    "Scale",
    "SiteDistribution",
    "VectorDistribution",
    "VectorNormal",
    "bijection",
]
