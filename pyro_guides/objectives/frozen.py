"""Keeps some groups of a guide from learning for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro_guides.guide import AmortizedGuide
from pyro_guides.objectives.rows import Guide

__all__ = ["frozen"]


@contextmanager
def frozen(guide: Guide, chosen: Callable[[Any], bool]) -> Iterator[None]:
    """Let no gradient reach λ of the chosen groups; λ of groups below depends on it by their units.

    Args:
        guide: the guide; any but an ``AmortizedGuide`` is left as it is.
        chosen: whether a part of its network is meant.
    """
    parameters = []
    if isinstance(guide, AmortizedGuide):
        network = guide.network
        for index, part in enumerate(network.parts):
            if chosen(part):
                parameters += [*network.head(index).parameters(), *network.family(index).parameters()]
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
