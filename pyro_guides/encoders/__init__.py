"""Networks from data to contexts, and the standardization of what they read.

Any ``nn.Module`` that maps rows ``(B, ...)`` to contexts ``(B, C)`` is an encoder; the guide sizes the
heads behind it, so nobody computes an output size. :class:`MLP` is the default for flat features,
:class:`DeepSet` for sets of elements, :class:`GRUEncoder` for sequences.
"""

from pyro_guides.encoders.attention import SetTransformer as SetTransformer
from pyro_guides.encoders.mlp import MLP as MLP
from pyro_guides.encoders.sequences import GRUEncoder as GRUEncoder
from pyro_guides.encoders.sequences import SequenceEncoder as SequenceEncoder
from pyro_guides.encoders.sets import DeepSet as DeepSet
from pyro_guides.encoders.sets import SetEncoder as SetEncoder
from pyro_guides.encoders.standardize import Standardize as Standardize

__all__ = ["MLP", "DeepSet", "GRUEncoder", "SequenceEncoder", "SetEncoder", "SetTransformer", "Standardize"]
