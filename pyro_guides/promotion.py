"""From one guide to a richer one with the same q: what was learned stays, what is new starts at nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from torch import Tensor, nn

from pyro_guides.controls import add_control
from pyro_guides.families import BoundFamily, Family
from pyro_guides.heads import Head, PromotedHead, WhitenedHead
from pyro_guides.network import Network
from pyro_guides.planning import bind, family_for

__all__ = ["promote"]


def promote(network: Network, choice: Family | Mapping[str, Family], *, only_new: bool) -> None:
    """Give the groups of a network richer families at the same q.

    Args:
        network: the network; a copy, for an error may leave it half changed.
        choice: one family for all continuous groups, or a dict by plate or site.
        only_new: whether all that the old network knew is frozen.

    Raises:
        TypeError: the choice holds something that is no family.
        ValueError: a family cannot be the old q, nothing would change, or a site is named that shares
            its group.
    """
    _check(network, choice)
    if not isinstance(only_new, bool):
        raise TypeError(f"promote(): only_new must be True or False, got {only_new!r}")
    if only_new:
        network.requires_grad_(requires_grad=False)
    chosen = [family_for(part.group, choice, part.family) for part in network.parts]
    if all(family == part.family for family, part in zip(chosen, network.parts, strict=True)):
        raise ValueError(f"promote({choice!r}) changes nothing: the families are {chosen} already")
    for index, family in enumerate(chosen):
        if family != network.parts[index].family:
            _promote(network, index, family)


def _promote(network: Network, index: int, family: Family) -> None:
    part, head = network.parts[index], network.head(index)
    old = network.family(index)
    bias = next(head.parameters())
    new = bind(family, part.group, part.alphabet).to(bias.device, bias.dtype)
    try:
        new.adopt(old, head.example())
    except ValueError as error:
        raise ValueError(f"{part.group} cannot be promoted from {part.family} to {family}: {error}") from None
    network.heads[index] = _promoted(head, old, new)
    network.families[index] = new
    network.parts = tuple(
        replace(other, family=family) if other is part else other for other in network.parts
    )
    add_control(network, index)


def _promoted(head: Head, old: BoundFamily, new: BoundFamily) -> Head:
    """A head for the new family's λ; in the coordinates that the old one is learned in, if that can be."""
    if isinstance(head, WhitenedHead) and head.suits(new.closed_under):
        return head.around(_promoted(head.inner, old, new), new.moving)
    return PromotedHead(head, _Conversion(old, new), head.like(new.width))


@final
class _Conversion(nn.Module):
    """From the old family's λ to λ of the new family at which q is the same."""

    def __init__(self, old: BoundFamily, new: BoundFamily) -> None:
        super().__init__()
        self.old = old
        self.new = new

    def forward(self, parameters: Tensor) -> Tensor:
        return self.new.adopt(self.old, parameters)


def _check(network: Network, choice: object) -> None:
    items = list(choice.values()) if isinstance(choice, Mapping) else [choice]
    for item in items:
        if not isinstance(item, Family):
            raise TypeError(
                f"promote() takes a family such as NormalMixture(4), or a dict of them by plate or site; got "
                f"{type(item).__name__}"
            )
    if not isinstance(choice, Mapping):
        return
    groups = [part.group for part in network.parts]
    known = {name for group in groups for name in (*group.names, *group.plates)}
    if unknown := [name for name in choice if name not in known]:
        raise ValueError(
            f"promote({{...}}) names {unknown}; the latents and their plates are {sorted(known)}"
        )
    for group in groups:
        if 0 < sum(name in choice for name in group.names) < len(group.names):
            raise ValueError(f"{group} are drawn jointly: name all of them, or their plate")
