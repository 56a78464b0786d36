"""Amortized variational posteriors for any Pyro model."""

from pyro_guides import objectives as objectives
from pyro_guides import optim as optim
from pyro_guides import plots as plots
from pyro_guides.diagnostics import Calibration as Calibration
from pyro_guides.diagnostics import Check as Check
from pyro_guides.diagnostics import Familiarity as Familiarity
from pyro_guides.diagnostics import Modes as Modes
from pyro_guides.diagnostics import calibrate as calibrate
from pyro_guides.diagnostics import check as check
from pyro_guides.diagnostics import find_modes as find_modes
from pyro_guides.encoders import MLP as MLP
from pyro_guides.encoders import DeepSet as DeepSet
from pyro_guides.encoders import GRUEncoder as GRUEncoder
from pyro_guides.encoders import SequenceEncoder as SequenceEncoder
from pyro_guides.encoders import SetEncoder as SetEncoder
from pyro_guides.encoders import SetTransformer as SetTransformer
from pyro_guides.encoders import Standardize as Standardize
from pyro_guides.export import to_arviz as to_arviz
from pyro_guides.families import DiagonalNormal as DiagonalNormal
from pyro_guides.families import Discrete as Discrete
from pyro_guides.families import Family as Family
from pyro_guides.families import FullRankNormal as FullRankNormal
from pyro_guides.families import LowRankNormal as LowRankNormal
from pyro_guides.families import NormalizingFlow as NormalizingFlow
from pyro_guides.families import NormalMixture as NormalMixture
from pyro_guides.families import ZukoFlow as ZukoFlow
from pyro_guides.guide import AmortizedGuide as AmortizedGuide
from pyro_guides.netcdf import to_netcdf as to_netcdf
from pyro_guides.posterior import Loo as Loo
from pyro_guides.posterior import Posterior as Posterior
from pyro_guides.posterior import Prediction as Prediction
from pyro_guides.starting import Start as Start
from pyro_guides.starting import find_start as find_start
from pyro_guides.storage import UnreadableFileError as UnreadableFileError
from pyro_guides.training import FitResult as FitResult
from pyro_guides.training import GradientNoise as GradientNoise
from pyro_guides.training import fit as fit
from pyro_guides.training import gradient_noise as gradient_noise

__version__ = "0.1.0.dev0"
