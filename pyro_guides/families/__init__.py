"""What kind of distribution q(u; λ) is."""

from pyro_guides.families.base import BoundFamily as BoundFamily
from pyro_guides.families.base import Family as Family
from pyro_guides.families.discrete import BoundDiscrete as BoundDiscrete
from pyro_guides.families.discrete import Discrete as Discrete
from pyro_guides.families.flow import NormalizingFlow as NormalizingFlow
from pyro_guides.families.mixture import BoundMixture as BoundMixture
from pyro_guides.families.mixture import NormalMixture as NormalMixture
from pyro_guides.families.normal import SMALLEST_SCALE as SMALLEST_SCALE
from pyro_guides.families.normal import DiagonalNormal as DiagonalNormal
from pyro_guides.families.normal import FullRankNormal as FullRankNormal
from pyro_guides.families.normal import LowRankNormal as LowRankNormal
from pyro_guides.families.zuko import ZukoFlow as ZukoFlow

__all__ = [
    "SMALLEST_SCALE",
    "BoundDiscrete",
    "BoundFamily",
    "BoundMixture",
    "DiagonalNormal",
    "Discrete",
    "Family",
    "FullRankNormal",
    "LowRankNormal",
    "NormalMixture",
    "NormalizingFlow",
    "ZukoFlow",
]
