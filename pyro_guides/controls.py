"""Decides what takes the noise out of a group's score function."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_guides.distributions import ControlVariate
from pyro_guides.network import Network
from pyro_guides.structure import Graph, Structure

__all__ = ["add_control", "local_dims"]


def add_control(network: Network, index: int) -> None:
    """Give a group the control variate that its family asks for, in place of any it has.

    Raises:
        ValueError: "leave_one_out" was asked for where no plate allows it.
    """
    part, family, head = network.parts[index], network.family(index), network.head(index)
    key = str(index)
    for modules in (network.controls, network.predictors):
        if key in modules:
            del modules[key]
    if family.baseline is None:
        return
    if family.baseline == "leave_one_out" and not part.local:
        raise ValueError(
            f"baseline='leave_one_out' averages costs over the other elements of a plate, but {part.group} "
            f"decide about sites outside of their plates {list(part.group.plates)}, so that each element's "
            "cost depends on all of them; take baseline='running_mean' or 'auto'"
        )
    averages = family.baseline in ("auto", "leave_one_out")
    bias = next(head.parameters())
    control = ControlVariate(network.depth, part.local if averages else ())
    network.controls[key] = control.to(bias.device)
    if family.baseline == "amortized" or (family.baseline == "auto" and part.group.discrete):
        network.predictors[key] = head.like(1)


def local_dims(
    index: int,
    sites: Sequence[Sequence[str]],
    links: Sequence[Sequence[int]],
    structure: Structure,
    graph: Graph,
) -> tuple[int, ...]:
    """The plate dimensions over which elements of a group do not share any cost.

    All sites that depend on the group's draw, through the model or through the guide, lie in such a plate.

    Args:
        index: the group's position.
        sites: the latents of each group, in the order of drawing.
        links: the upstream groups of each, by position.
        structure: the model's structure.
        graph: the model's graph.
    """
    drawn = {index}
    for other, upstream in enumerate(links):
        if drawn & set(upstream):
            drawn.add(other)
    local = set(structure.latents[sites[index][0]].plates)
    for name in graph.descendants([name for i in drawn for name in sites[i]]):
        site = structure.latents.get(name) or structure.observed.get(name)
        local &= set(site.plates) if site is not None else set()  # what the model itself draws: unknown
    return tuple(plate.dim for plate in structure.plates_of(local))
