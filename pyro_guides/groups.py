"""Sorts latents into groups that are drawn jointly, and settles what each group gets.

Continuous latents that share their plates form one group. A user who names a site in
``family={"site": ...}`` gives it a group of its own; a plate's name addresses all groups inside that plate.
A discrete latent is a group of its own, too, and continuous ones behind it start a new group, so that they
can depend on its value. Names that run on with a number may form a *sequence*: one group per step, of which
one template stands for all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor

from pyro_guides.distributions.sites import Piece
from pyro_guides.structure import Latent, Structure, numbered, runs, title

__all__ = ["Group", "Masks", "check_keys", "group_latents", "lookup", "masks", "piece"]

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Group:
    """Latents drawn jointly.

    Attributes:
        sites: their names, in the model's order.
        plates: the plates they share, leftmost dimension first.
        bounds: where each site lies in u: its first element and the one behind its last.
        discrete: whether it is one discrete latent, whose encoding takes the place of u.
        running: whether it is the template of a sequence; its sites are the stems of names, then.
    """

    sites: tuple[str, ...]
    plates: tuple[str, ...]
    bounds: Mapping[str, tuple[int, int]]
    discrete: bool = False
    running: bool = False

    @property
    def size(self) -> int:
        """D: how many unconstrained values one plate element has."""
        return max(stop for _, stop in self.bounds.values())

    @property
    def names(self) -> tuple[str, ...]:
        """What users may call its sites."""
        return tuple(map(title, self.sites)) if self.running else self.sites

    def at(self, names: Sequence[str]) -> Group:
        """The group of one step of a sequence, whose sites have these names."""
        bounds = {name: self.bounds[stem] for stem, name in zip(self.sites, names, strict=True)}
        return Group(tuple(names), self.plates, bounds, self.discrete)

    def __str__(self) -> str:
        return ("sequences " if self.running else "latents ") + ", ".join(f"'{n}'" for n in self.names)


def group_latents(
    structure: Structure, alone: Collection[str] = (), stems: Collection[str] = ()
) -> list[Group]:
    """Group latents by their plates.

    Args:
        structure: the model's structure.
        alone: latents and titles of sequences that keep to themselves.
        stems: beginnings of names that form a sequence.

    Raises:
        RuntimeError: the model has no latents.
    """
    if not structure.latents:
        raise RuntimeError(
            "the model has no latent variables for a guide: check that some pyro.sample site has no "
            "obs= and is not hidden or enumerated"
        )
    members: dict[Any, list[Latent]] = {}
    discrete_before, seen = 0, set()
    for latent in structure.latents.values():
        run = numbered(latent.name)
        stem = run[0] if run is not None and run[0] in stems and latent.name not in alone else None
        if stem in seen and stem is not None:
            continue
        seen.add(stem)
        discrete_before += latent.discrete
        name = latent.name if stem is None else title(stem)
        single = name if latent.discrete or name in alone else None
        steps = None if stem is None else tuple(runs(structure.latents)[stem])
        members.setdefault((latent.plates, discrete_before, single, steps), []).append(latent)
    return [_group(latents, running=key[-1] is not None) for key, latents in members.items()]


def _group(latents: Sequence[Latent], *, running: bool) -> Group:
    bounds, start = {}, 0
    for latent in latents:
        name = cast("tuple[str, int]", numbered(latent.name))[0] if running else latent.name
        bounds[name] = (start, start + latent.size)
        start += latent.size
    return Group(tuple(bounds), latents[0].plates, bounds, latents[0].discrete, running)


def lookup(choice: Mapping[str, T] | T | None, group: Group) -> T | None:
    """What a user's ``choice`` - one object for all groups, or a dict by site or plate - gives a group.

    Raises:
        ValueError: the dict gives the group's sites or plates different objects.
    """
    if not isinstance(choice, Mapping):
        return choice
    for names, reason in ((group.names, "are drawn jointly"), (group.plates, "lie in several plates")):
        found = [choice[name] for name in names if name in choice]
        if any(other is not found[0] for other in found):
            raise ValueError(
                f"{group} {reason}, and {[name for name in names if name in choice]} name different "
                "choices for them; give them the same, or name the site itself"
            )
        if found:
            return found[0]
    return None


def check_keys(choice: Any, groups: Sequence[Group], argument: str, *, plates: bool = True) -> None:
    """Raise a ValueError if ``choice`` names something that is no latent, sequence or latent's plate."""
    if not isinstance(choice, (Mapping, Sequence)) or isinstance(choice, str):
        return
    latents = [name for group in groups for name in group.names]
    known = {*latents, *(name for group in groups for name in group.plates if plates)}
    if unknown := [key for key in choice if key not in known]:
        hint = f" and their plates {sorted(known - set(latents))}" if plates else ""
        raise ValueError(f"{argument} names {unknown}, but the model's latents are {latents}{hint}")


@final
@dataclass(frozen=True, eq=False)
class Masks:
    """How a group's masks are applied in one call.

    Attributes:
        shared: one mask of whole plate elements, for ``poutine.mask``; None if there is none.
        scored: which elements of u count, ``(*batch, D)``; None if all do.
        inner: for each site that needs one, its mask and how many of its dimensions are the event's.
    """

    shared: Tensor | bool | None
    scored: Tensor | None
    inner: Mapping[str, tuple[Tensor, int]]


def masks(latents: Sequence[Latent]) -> Masks:
    """Share one mask where all sites have the same; otherwise mask element by element."""
    first = latents[0].mask
    if all(latent.mask is first and latent.inner_mask is None for latent in latents):
        return Masks(first, None, {})
    inner = {latent.name: _combined(latent) for latent in latents}
    elements = [_spread(latent, *inner[latent.name]) for latent in latents]
    batch = torch.broadcast_shapes(*(mask.shape[:-1] for mask in elements))
    scored = torch.cat([mask.expand(*batch, mask.shape[-1]) for mask in elements], dim=-1)
    return Masks(None, scored, inner)


def _combined(latent: Latent) -> tuple[Tensor, int]:
    mask = torch.as_tensor(True if latent.mask is None else latent.mask)
    if latent.inner_mask is None:
        return mask, 0
    outer = mask.reshape(mask.shape + (1,) * latent.inner_mask_dim)
    return latent.inner_mask & outer, latent.inner_mask_dim


def _spread(latent: Latent, mask: Tensor, event_dim: int) -> Tensor:
    """The mask of one site over its unconstrained elements, ``(*batch, size)``."""
    shape = latent.unconstrained_shape
    batch = mask.shape[: mask.dim() - event_dim]
    mask = mask.reshape(mask.shape + (1,) * (len(shape) - event_dim))
    return mask.expand(batch + shape).reshape(*batch, latent.size)


def lone_piece(latent: Latent) -> Piece:
    """How a latent gets to its support by itself, its mask included: what is masked has no Jacobian."""
    return piece(latent, Masks(None, None, {latent.name: _combined(latent)}))


def piece(latent: Latent, masks: Masks) -> Piece:
    """How a latent gets from its slice of u to its support in this call."""
    mask, mask_event_dim = masks.inner.get(latent.name, (None, 0))
    return Piece(
        transform=latent.require_transform(),
        unconstrained_shape=latent.unconstrained_shape,
        support=latent.support,
        event_shape=latent.event_shape,
        mask=mask,
        mask_event_dim=mask_event_dim,
    )
