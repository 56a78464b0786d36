"""Where learned groups start, and the units they are learned in: from the model itself, before training."""

from pyro_guides.starting.density import Repeats as Repeats
from pyro_guides.starting.start import Start as Start
from pyro_guides.starting.start import find_start as find_start
from pyro_guides.starting.start import start_from as start_from
from pyro_guides.starting.target import rows_at_once as rows_at_once

__all__ = ["Repeats", "Start", "find_start", "rows_at_once", "start_from"]
