"""What a guide knows about a model."""

from pyro_guides.structure.changes import outer_dims as outer_dims
from pyro_guides.structure.changes import signature as signature
from pyro_guides.structure.dependencies import Graph as Graph
from pyro_guides.structure.dependencies import dependencies as dependencies
from pyro_guides.structure.dependencies import live_sites as live_sites
from pyro_guides.structure.dependencies import upstream as upstream
from pyro_guides.structure.description import Latent as Latent
from pyro_guides.structure.description import Observed as Observed
from pyro_guides.structure.description import Plate as Plate
from pyro_guides.structure.description import Structure as Structure
from pyro_guides.structure.description import is_one as is_one
from pyro_guides.structure.memory import Memory as Memory
from pyro_guides.structure.numbering import numbered as numbered
from pyro_guides.structure.numbering import runs as runs
from pyro_guides.structure.numbering import title as title
from pyro_guides.structure.reading import random_subset as random_subset
from pyro_guides.structure.reading import read as read

__all__ = [
    "Graph",
    "Latent",
    "Memory",
    "Observed",
    "Plate",
    "Structure",
    "dependencies",
    "is_one",
    "live_sites",
    "numbered",
    "outer_dims",
    "random_subset",
    "read",
    "runs",
    "signature",
    "title",
    "upstream",
]
