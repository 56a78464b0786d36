"""In what order one call draws its groups, and which earlier draws each one sees.

An ordinary group has one turn. A sequence has one per step; sequences that step together take turns, each
seeing what was drawn in this step and in the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import final

from pyro_guides.groups import Group
from pyro_guides.structure import Structure, runs, title

__all__ = ["Turn", "take_turns"]


@final
@dataclass(frozen=True, eq=False)
class Turn:
    """One group of one call.

    Attributes:
        part: the position of the group, or of the sequence that it is a step of.
        group: the latents.
        step: the position of the step in its sequence; None if it is not in one.
        before: the turn of each part in this step, or of all, by part; and
        previous: the turn of each part in the step before.
    """

    part: int
    group: Group
    step: int | None
    before: dict[int, int]
    previous: dict[int, int]


def take_turns(groups: Sequence[Group], structure: Structure) -> list[Turn]:
    """All turns of one call, in order.

    Raises:
        ValueError: a sequence has no steps, or gaps in its numbers; or its sites have different numbers.
    """
    if not any(group.running for group in groups):
        return [Turn(i, group, None, {j: j for j in range(i)}, {}) for i, group in enumerate(groups)]
    turns: list[Turn] = []
    single: dict[int, int] = {}
    alone = {name for group in groups if not group.running for name in group.sites}
    numbers = runs(name for name in (*structure.latents, *structure.observed) if name not in alone)
    steps = [_steps(group, numbers) for group in groups]
    for length, block in groupby(enumerate(groups), key=lambda item: len(steps[item[0]])):
        chain, previous = list(block), dict[int, int]()
        if not length:
            for index, group in chain:
                turns.append(Turn(index, group, None, dict(single), {}))
                single[index] = len(turns) - 1
        for step in range(length):
            now: dict[int, int] = {}
            for index, group in chain:
                turns.append(Turn(index, group.at(steps[index][step]), step, {**single, **now}, previous))
                now[index] = len(turns) - 1
            previous = now
    return turns


def _steps(group: Group, numbers: Mapping[str, Mapping[int, str]]) -> list[list[str]]:
    """The names of a sequence's sites at each step; none if it is no sequence."""
    if not group.running:
        return []
    first = group.sites[0]
    for stem in group.sites:
        check_numbers(stem, list(numbers.get(stem, ())))
        if numbers[stem].keys() != numbers[first].keys():
            raise ValueError(
                f"{group} are drawn jointly step by step, but this call has {len(numbers[first])} steps of "
                f"'{title(first)}' and {len(numbers[stem])} of '{title(stem)}'"
            )
    return [[numbers[stem][number] for stem in group.sites] for number in numbers[first]]


def check_numbers(stem: str, numbers: Sequence[int]) -> None:
    """Raise a ValueError if a sequence has no steps, or gaps in its numbers."""
    if not numbers:
        raise ValueError(f"the sequence '{title(stem)}' has no steps in this call; pass at least one")
    whole = range(numbers[0], numbers[-1] + 1)
    if missing := sorted(set(whole) - set(numbers)):
        raise ValueError(
            f"the sequence '{title(stem)}' has gaps in its numbers: {stem}{missing[0]} is missing between "
            f"{stem}{numbers[0]} and {stem}{numbers[-1]}; number its sites without gaps"
        )
