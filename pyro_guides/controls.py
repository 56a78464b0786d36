"""Decides what takes the noise out of a group's score function, from the model's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro_guides.distributions import ControlVariate
from pyro_guides.families import BoundFamily
from pyro_guides.groups import Group
from pyro_guides.network import Part
from pyro_guides.structure import Graph, Structure

__all__ = ["control_variate", "is_amortized"]


def control_variate(
    family: BoundFamily,
    index: int,
    parts: Sequence[Part],
    structure: Structure,
    graph: Callable[[], Graph],
) -> ControlVariate | None:
    """The control variate of one group; None if it needs none, or the user wants none.

    Costs may be averaged over other elements of a plate only if no such cost depends on the element's own
    draw: all that depends on the group must lie in the plate.

    Raises:
        ValueError: "leave_one_out" was asked for where no plate allows it.
    """
    if family.baseline is None:
        return None
    group = parts[index].group
    dims: tuple[int, ...] = ()
    if family.baseline in ("auto", "leave_one_out"):
        affected = _affected(index, parts, graph())
        local = _common_plates(group, affected, structure)
        dims = tuple(plate.dim for plate in structure.plates_of(local))
        if family.baseline == "leave_one_out" and not dims:
            outside = sorted(affected - set(group.sites)) or list(group.sites)
            raise ValueError(
                f"baseline='leave_one_out' averages over the other elements of a plate, but {group} lie in "
                f"{list(group.plates) or 'no plate'} and decide about sites outside of it (among {outside}), "
                "so that every element's cost depends on all of them; take baseline='running_mean' or 'auto'"
            )
    return ControlVariate(structure.depth, dims)


def is_amortized(family: BoundFamily, group: Group) -> bool:
    """Whether a network predicts the costs."""
    return family.baseline == "amortized" or (family.baseline == "auto" and group.discrete)


def _affected(index: int, parts: Sequence[Part], graph: Graph) -> set[str]:
    """The sites whose densities depend on a group's draw, through the model or through the guide."""
    drawn = {index}
    for other, part in enumerate(parts):  # in the order of drawing
        if drawn & set(part.upstream):
            drawn.add(other)
    return graph.descendants([name for i in drawn for name in parts[i].group.sites])


def _common_plates(group: Group, names: set[str], structure: Structure) -> set[str]:
    common = set(group.plates)
    for name in names:
        site = structure.latents.get(name) or structure.observed.get(name)
        common &= set(site.plates) if site is not None else set()  # what the model itself draws: unknown
    return common
