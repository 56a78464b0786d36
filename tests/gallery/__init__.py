"""Twelve models in the shapes of Pyro's own examples, as users write them, and a guide for each."""

from . import counts, groups, images, sequences
from .example import Data, Example

__all__ = ["EXAMPLES", "Data", "Example"]

EXAMPLES = (*images.EXAMPLES, *counts.EXAMPLES, *sequences.EXAMPLES, *groups.EXAMPLES)
