"""What encoders read: which tensors, how they line up with the plates, and this call's rows of them."""

from pyro_guides.inputs.layout import Layout as Layout
from pyro_guides.inputs.rows import check_finite as check_finite
from pyro_guides.inputs.rows import read_rows as read_rows
from pyro_guides.inputs.simulated import accepts as accepts
from pyro_guides.inputs.simulated import with_observations as with_observations
from pyro_guides.inputs.sources import Source as Source
from pyro_guides.inputs.sources import find_source as find_source

__all__ = ["Layout", "Source", "accepts", "check_finite", "find_source", "read_rows", "with_observations"]
