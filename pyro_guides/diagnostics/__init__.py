"""What tells a good q from a bad one."""

from pyro_guides.diagnostics.calibration import Calibration, calibrate
from pyro_guides.diagnostics.check import Check, check
from pyro_guides.diagnostics.familiarity import Familiarity
from pyro_guides.diagnostics.modes import Modes, find_modes

__all__ = ["Calibration", "Check", "Familiarity", "Modes", "calibrate", "check", "find_modes"]
