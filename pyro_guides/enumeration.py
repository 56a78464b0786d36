"""Whether a guide is being run by an ELBO that enumerates."""

from __future__ import annotations

from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK

__all__ = ["is_enumerating"]


def is_enumerating(depth: int) -> bool:
    """Whether sites marked for enumeration are enumerated in this call.

    Args:
        depth: how many dimensions the model's plates take.

    Raises:
        ValueError: enumeration would use dimensions of the plates, or was never told where they end.
    """
    if not any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK):
        return False
    free = getattr(_ENUM_ALLOCATOR, "next_available_dim", None)
    if free is None or not -float("inf") < free < -depth:
        raise ValueError(
            f"the model's plates take {depth} dimension(s), but enumeration starts at dimension {free}: say "
            f"TraceEnum_ELBO(max_plate_nesting={depth}), or one more for vectorized particles"
        )
    return True
