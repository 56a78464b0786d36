"""The trainable part of a guide: encoders, heads and families, and what each group gets of them.

Nothing here knows Pyro's handlers: a :class:`Network` maps inputs and upstream values to q(u; λ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from pyro_guides.conditional import Conditional
from pyro_guides.distributions import Alphabet, ControlVariate
from pyro_guides.distributions.sites import joined
from pyro_guides.encoding import Encoding
from pyro_guides.families import BoundFamily, Family
from pyro_guides.groups import Group
from pyro_guides.heads import Head, held_fixed
from pyro_guides.layers import evaluated
from pyro_guides.links import Links
from pyro_guides.refinement import Refined
from pyro_guides.structure import Plate, Structure
from pyro_guides.turns import Turn

__all__ = ["Frame", "Network", "Part", "fold", "step_names"]

Frame = tuple[Tensor, Tensor]  # location and spread


@final
@dataclass(frozen=True, eq=False)
class Part:
    """What one group of latents was given when the guide was set up.

    Attributes:
        group: the latents, or the template of a sequence.
        links: the groups whose values λ depends on.
        encodings: what λ sees of the data: the group's own encoding first, then those of upper levels; none
            if λ is learned.
        family: the family the user chose.
        alphabet: the values of a discrete latent.
        local: dimensions of the plates over which elements share no cost.
    """

    group: Group
    links: Links
    encodings: tuple[Encoding, ...]
    family: Family
    alphabet: Alphabet | None
    local: tuple[int, ...]

    @property
    def upstream(self) -> tuple[int, ...]:
        """The groups, by position, whose values λ depends on."""
        return self.links.upstream + self.links.previous

    @property
    def encoder(self) -> int | None:
        """Which encoder λ comes from, by position; None if λ is learned."""
        return self.encodings[0].encoder if self.encodings else None


@final
@dataclass(frozen=True, eq=False)
class Upstream:
    """What λ of a group sees of earlier groups.

    Attributes:
        values: ``(..., V)``; None if it sees none.
        paths: the same with a gradient through the draws only.
    """

    values: Tensor | None
    paths: Tensor | None


@final
class Network(nn.Module):
    """Encoders, one head and one bound family per group.

    Args:
        parts: what each group gets.
        encoders: the encoders.
        depth: how many dimensions the model's plates take.
    """

    def __init__(self, parts: Sequence[Part], encoders: Sequence[nn.Module], depth: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.depth = depth
        self.encoders = nn.ModuleList(encoders)
        self.heads = nn.ModuleList()
        self.families = nn.ModuleList()
        # For groups with a score function, by position: its control, and the head that predicts costs.
        self.controls = nn.ModuleDict()
        self.predictors = nn.ModuleDict()

    def head(self, index: int) -> Head:
        """Where λ of one group comes from."""
        return cast("Head", self.heads[index])

    def family(self, index: int) -> BoundFamily:
        """The family of one group."""
        return cast("BoundFamily", self.families[index])

    @property
    def stems(self) -> list[str]:
        """The beginnings of names that form a sequence."""
        return [stem for part in self.parts if part.group.running for stem in part.group.sites]

    @property
    def masked(self) -> list[str]:
        """The observed sites whose masks the encoders need, if they have some."""
        sites = [encoding.source.mask_site for part in self.parts for encoding in part.encodings]
        return [site for site in sites if site is not None]

    def evaluated(self) -> AbstractContextManager[None]:
        """All modules in evaluation mode, and back as each was."""
        return evaluated([self])

    @torch.no_grad()
    def fingerprint(self) -> float:
        """A number that changes when parameters move."""
        return sum(float(parameter.double().sum()) for parameter in self.parameters())

    def check_learned(self, structure: Structure) -> None:
        """Raise a ValueError if a group learned per element meets other elements than it knows."""
        for index, part in enumerate(self.parts):
            head = self.head(index)
            if not all(name in structure.plates for name in part.group.plates):
                continue  # this call does not sample the group
            got = tuple(structure.batch_shape(part.group.plates, full=True))
            if head.learned_shape is not None and head.learned_shape != got:
                raise ValueError(
                    f"{part.group} are learned per element of the plates {list(part.group.plates)}: the "
                    f"guide was set up with shape {head.learned_shape}, this call has {got}. Amortize them "
                    "(pass an encoder's input as a float argument, or inputs=...) to serve other rows"
                )
            for name, size in head.known_sizes.items():
                plate = structure.plates[name]
                now = plate.batch if plate.size == -1 else plate.size
                if now != size:
                    raise ValueError(
                        f"{part.group} are learned per element of plate '{name}', which the encoder's inputs "
                        f"lack: the guide was set up with {size} elements, this call has {now}"
                    )

    def conditional(
        self,
        turn: Turn,
        context: Tensor | None,
        upstream: Upstream,
        indices: Mapping[str, Tensor],
        change: nn.Module | None = None,
    ) -> Conditional:
        """What one group's q depends on, given its context and upstream values, and a change of λ."""
        index = turn.part
        head: nn.Module = self.head(index) if change is None else Refined(self.head(index), change)
        inputs = (upstream.values, indices) if context is None else (context, upstream.values, indices)
        parameters: Tensor = head(*inputs)
        blocked = self.parts[index].group.discrete or not torch.is_grad_enabled()
        twin = None if blocked else _twin(head, parameters, context, upstream, indices)
        key, prediction, control = str(index), None, None
        if change is None and key in self.controls:  # a refinement teaches them nothing
            control = cast("ControlVariate", self.controls[key])
            if key in self.predictors and torch.is_grad_enabled():
                blind = (x.detach() if isinstance(x, Tensor) else x for x in inputs)  # to what it could teach
                prediction = self.predictors[key](*blind).squeeze(-1)
        return Conditional(self.family(index), turn.group.bounds, parameters, twin, control, prediction)

    def upstream(
        self,
        index: int,
        values: Sequence[Tensor | None],
        plates: Mapping[str, Plate],
        frame: Callable[[int], Frame | None],
        shared: Sequence[bool] = (),
    ) -> Upstream:
        """What λ of one group sees of earlier groups.

        A learned group that depends on nothing is seen in units of its own q: its values less their location,
        over their spread. Globals narrow as data come in, and a head would not see them vary otherwise.

        Args:
            index: the group's position.
            values: u of each group in ``links.upstream``, then of each in ``links.previous`` one step ago;
                None for what this call does not have, which is taken at its origin.
            plates: this call's plates.
            frame: the location and spread of a group, by position, if it is to be seen in these units.
            shared: whether each of the values is one that many particles share; λ of these is a parameter
                like any other, so that there is no path through the shared draw.
        """
        if not values:
            return Upstream(None, None)
        links, origin = self.parts[index].links, self.head(index).start
        pieces: list[Tensor] = []
        paths: list[Tensor] = []
        start = 0
        for other, u in zip((*links.upstream, *links.previous), values, strict=True):
            folded = [plates[name] for name in links.folds.get(other, ())]
            width = self.parts[other].group.size * math.prod(plate.size for plate in folded)
            units = None if folded or u is None else frame(other)
            if u is None:
                pieces.append(origin[start : start + width])
                paths.append(pieces[-1])
            elif units is None:
                pieces.append(fold(u, folded))
                paths.append(pieces[-1])
            else:
                location, spread = units
                pieces.append((u - location) / spread)
                paths.append((u - location.detach()) / spread.detach())
            if shared and shared[len(paths) - 1]:
                paths[-1] = paths[-1].detach()
            start += width
        if links.previous:  # says whether this is the first step
            first = all(u is None for u in values[len(links.upstream) :])
            pieces.append(origin.new_full((1,), float(first)))
            paths.append(pieces[-1])
        seen = joined(pieces)
        same = all(piece is path for piece, path in zip(pieces, paths, strict=True))
        return Upstream(seen, seen if same else joined(paths))

    def frame(self, index: int, indices: Mapping[str, Tensor]) -> Frame | None:
        """Location and spread of a learned group that depends on nothing; None for any other."""
        part = self.parts[index]
        if part.encodings or part.upstream or part.group.discrete:
            return None
        return self.family(index).frame(self.heads[index](None, indices))


def _twin(
    head: nn.Module,
    parameters: Tensor,
    context: Tensor | None,
    upstream: Upstream,
    indices: Mapping[str, Tensor],
) -> Tensor | None:
    """λ with a gradient path through upstream values only; None without them."""
    if upstream.values is None:
        return None
    if torch._C._get_tracing_state():  # functional calls cannot be traced: the ordinary estimator, then
        return parameters
    fixed = () if context is None else (context.detach(),)
    return held_fixed(head, *fixed, upstream.paths, indices)


def step_names(encoding: Encoding, parts: Sequence[Part], turns: Sequence[Turn]) -> list[str]:
    """Of a sequence's encoding, one latent of each step."""
    if encoding.offset is None:
        return []
    own = [turn for turn in turns if turn.step is not None and encoding in parts[turn.part].encodings]
    return [turn.group.sites[0] for turn in own if turn.part == own[0].part]


def fold(u: Tensor, plates: Sequence[Plate]) -> Tensor:
    """Lay the elements of some plates side by side in the last dimension; a 1, or nothing, takes their place.

    Without ones on the left, a group outside of all plates keeps the shape that the model gives it.
    """
    for plate in plates:
        dim = plate.dim - 1
        if -dim > u.dim():
            u = u.reshape(*[1] * (-dim - u.dim()), *u.shape)
        shape = list(u.shape)
        shape[dim] = plate.batch
        u = u.expand(shape).movedim(dim, -2)
        shape[dim], shape[-1] = 1, shape[-1] * plate.batch
        u = u.reshape(shape)
    while plates and u.dim() > 1 and u.shape[0] == 1:
        u = u.squeeze(0)
    return u
