"""Bounds and schedules that Pyro lacks, for plain ``SVI``."""

from pyro_guides.objectives.importance import IWELBO as IWELBO
from pyro_guides.objectives.simulation import ForwardKL as ForwardKL
from pyro_guides.objectives.surrogate import differentiable_loss as differentiable_loss
from pyro_guides.objectives.tempering import Tempering as Tempering
from pyro_guides.objectives.warmup import CyclicalWarmup as CyclicalWarmup
from pyro_guides.objectives.warmup import FreeBits as FreeBits
from pyro_guides.objectives.warmup import LinearWarmup as LinearWarmup
from pyro_guides.objectives.warmup import kl_weight as kl_weight
from pyro_guides.objectives.weighted import WeightedSum as WeightedSum
