"""Twelve models in the shapes of Pyro's own examples, as users write them, and a guide for each."""

from . import counts, discrete, hierarchies, images, sequences
from .example import Data, Example

__all__ = ["EXAMPLES", "Data", "Example"]

MODULES = images, counts, sequences, hierarchies, discrete
EXAMPLES = tuple(example for module in MODULES for example in module.EXAMPLES)
