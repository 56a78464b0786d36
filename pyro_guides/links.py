"""In what order groups are drawn, and which earlier ones each depends on.

Without a wish of the user's, groups are drawn in the model's order, and each depends on those earlier ones
that the model's graph makes relevant. The values of a group that lies in other plates can be taken in whole
where these plates are the same in every call; they are laid side by side, then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from pyro_guides.groups import Group
from pyro_guides.structure import Graph, Structure, runs, title, upstream
from pyro_guides.turns import take_turns

__all__ = ["Links", "Wishes", "in_order", "link_groups"]

_LARGEST_FOLD = 1024


@final
@dataclass(frozen=True, eq=False)
class Wishes:
    """What the user wants of the order of drawing.

    Attributes:
        order: all latents and sequences by name, first one first; the model's order if None.
        given: for some of them, those that they are to depend on.
        automatic: whether the others depend on what is relevant, rather than on nothing.
    """

    order: Sequence[str] | None
    given: Mapping[str, Collection[str]]
    automatic: bool

    @property
    def mentioned(self) -> list[str]:
        """All names in ``given``."""
        return [name for key, names in self.given.items() for name in (key, *names)]


@final
@dataclass(frozen=True, eq=False)
class Links:
    """What one group depends on.

    Attributes:
        upstream: groups drawn before it, by position.
        previous: groups whose previous step it sees, by position.
        folds: for upstream groups in other plates, the plates that are laid side by side.
        relevant: other groups it would depend on if it could.
    """

    upstream: tuple[int, ...]
    previous: tuple[int, ...]
    folds: Mapping[int, tuple[str, ...]]
    relevant: frozenset[int]


def in_order(structure: Structure, wishes: Wishes) -> Structure:
    """The same structure with its latents in the order in which they are to be drawn.

    Raises:
        ValueError: a name is unknown, or missing from ``order``; the wishes contradict each other.
    """
    for argument, names in (("order", wishes.order or ()), ("given", wishes.mentioned)):
        if unknown := [name for name in names if not _members(name, structure)]:
            raise ValueError(
                f"{argument} names {unknown}, but the latents of this call of the model are "
                f"{list(structure.latents)}; set the guide up with arguments for which all latents are drawn"
            )
    names = _wished_order(structure, wishes)
    ordered = _parents_first(names, _parents(structure, wishes.given))
    if wishes.order is not None and ordered != names:
        raise ValueError(
            f"order={list(wishes.order)} draws a latent before one that given={{...}} makes it depend on"
        )
    return structure.with_latents({name: structure.latents[name] for name in ordered})


def link_groups(
    groups: Sequence[Group],
    structure: Structure,
    graph: Graph,
    wishes: Wishes,
    data_plates: Collection[str],
) -> list[Links]:
    """What each group depends on.

    Args:
        groups: the groups, in the order of drawing.
        structure: the model's structure.
        graph: the model's graph.
        wishes: what the user wants.
        data_plates: plates whose elements may differ from call to call.

    Raises:
        ValueError: a group cannot depend on what it is to depend on.
    """
    turns = take_turns(groups, structure)
    reached = upstream([turn.group.sites for turn in turns], graph.neighbours)
    links = []
    for index, group in enumerate(groups):
        own = [(turn, seen) for turn, seen in zip(turns, reached, strict=True) if turn.part == index]
        before = {part for turn, seen in own for part, at in turn.before.items() if at in seen}
        previous = {part for turn, seen in own for part, at in turn.previous.items() if at in seen}
        relevant = {turns[at].part for _, seen in own for at in seen} - {index}
        wanted = _wanted(group, groups, wishes)
        if wanted is not None:
            before = {part for turn, _ in own for part in turn.before if part in wanted}
            previous = {part for turn, _ in own for part in turn.previous if part in wanted} - before
            _check_possible(group, groups, wanted - before - previous)
        elif not wishes.automatic:
            before = previous = set()
        folds = _folds(group, groups, before, structure, data_plates, required=wanted is not None)
        upstream_groups = tuple(i for i in sorted(before) if i in folds or not _foreign(groups[i], group))
        seen_groups = {*upstream_groups, *previous}
        links.append(
            Links(upstream_groups, tuple(sorted(previous)), folds, frozenset(relevant - seen_groups))
        )
    return links


def _folds(
    group: Group,
    groups: Sequence[Group],
    before: Collection[int],
    structure: Structure,
    data_plates: Collection[str],
    *,
    required: bool,
) -> dict[int, tuple[str, ...]]:
    """For groups in other plates whose values can be taken in whole, these plates."""
    folds = {}
    for index in sorted(before):
        plates = _foreign(groups[index], group)
        reason = _unfoldable(groups[index], plates, structure, data_plates)
        if plates and reason and required:
            raise ValueError(f"given={{...}} makes {group} depend on {groups[index]}, {reason}")
        if plates and not reason:
            folds[index] = plates
    return folds


def _wanted(group: Group, groups: Sequence[Group], wishes: Wishes) -> set[int] | None:
    keys = [name for name in wishes.given if name in group.names]
    if not keys:
        return None
    names = {name for key in keys for name in wishes.given[key]}
    return {index for index, other in enumerate(groups) if names & {*other.names, *other.sites}}


def _check_possible(group: Group, groups: Sequence[Group], impossible: set[int]) -> None:
    for index in impossible:
        raise ValueError(
            f"given={{...}} makes {group} depend on {groups[index]}, whose number of steps may differ from "
            "call to call; only a sequence that steps along with it can depend on a sequence"
        )


def _foreign(other: Group, group: Group) -> tuple[str, ...]:
    return tuple(name for name in other.plates if name not in group.plates)


def _unfoldable(
    other: Group, names: tuple[str, ...], structure: Structure, data_plates: Collection[str]
) -> str:
    """Why a group's values cannot be taken in over these plates; empty if they can."""
    plates = structure.plates_of(names)
    if any(plate.name in data_plates or plate.size == -1 or plate.subsampled for plate in plates):
        return f"but the elements of their plates {list(names)} may differ from call to call"
    total = other.size
    for plate in plates:
        total *= plate.size
    if total > _LARGEST_FOLD:
        return f"which are {total} values, more than the {_LARGEST_FOLD} that can be taken in"
    return ""


def _wished_order(structure: Structure, wishes: Wishes) -> list[str]:
    if wishes.order is None:
        return list(structure.latents)
    names = [member for name in wishes.order for member in _members(name, structure)]
    if missing := [name for name in structure.latents if name not in names]:
        raise ValueError(f"order must name every latent, but {missing} are missing")
    if len(set(names)) < len(names):
        raise ValueError(f"order={list(wishes.order)} names a latent twice")
    return names


def _parents(structure: Structure, given: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """The latents that each latent is to be drawn behind; the steps of a sequence follow by themselves."""
    parents: dict[str, set[str]] = {}
    for name, others in given.items():
        members = _members(name, structure)
        if members == [name] and name in others:
            raise ValueError(f"given={{...}} makes '{name}' depend on itself")
        behind = {member for other in others for member in _members(other, structure)}
        parents |= {member: behind - set(members) for member in members}
    return parents


def _parents_first(names: Sequence[str], parents: Mapping[str, set[str]]) -> list[str]:
    """The names in their order, but none before its parents."""
    waiting, placed = list(names), list[str]()
    while waiting:
        ready = next((n for n in waiting if not parents.get(n, set()) - set(placed)), None)
        if ready is None:
            raise ValueError(f"given={{...}} makes a cycle among {waiting}: none of them can be drawn first")
        placed.append(ready)
        waiting.remove(ready)
    return placed


def _members(name: str, structure: Structure) -> list[str]:
    if name in structure.latents:
        return [name]
    members = (list(run.values()) for stem, run in runs(structure.latents).items() if title(stem) == name)
    return next(members, [])
