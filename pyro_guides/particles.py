"""Particles of rows: several draws of what lies inside some plates, and a single one of all else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, final

import pyro
from pyro.poutine.runtime import _PYRO_STACK

__all__ = ["RowParticles", "are_drawn_once", "are_weighed"]


@final
class RowParticles(pyro.plate):
    """A plate of particles around those sites only that lie in some plates; around all if there are none.

    Args:
        name: the plate's name.
        count: K, how many particles.
        plates: the plates of the rows.
        dim: the dimension, left of all plates.
    """

    def __init__(self, name: str, count: int, plates: Collection[str], dim: int) -> None:
        super().__init__(name, count, dim=dim)
        self.plates = frozenset(plates)

    def covers(self, plates: Collection[str]) -> bool:
        """Whether a site in these plates has particles."""
        return self.plates <= set(plates)

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and self.covers([frame.name for frame in msg["cond_indep_stack"]]):
            super()._process_message(msg)


def are_drawn_once(plates: Collection[str]) -> bool:
    """Whether rows have particles, but sites in these plates do not."""
    return any(not particles.covers(plates) for particles in _open())


def are_weighed(plates: Collection[str]) -> bool:
    """Whether sites in these plates have particles, which weigh against each other."""
    return any(particles.covers(plates) for particles in _open())


def _open() -> list[RowParticles]:
    return [handler for handler in _PYRO_STACK if isinstance(handler, RowParticles)]
