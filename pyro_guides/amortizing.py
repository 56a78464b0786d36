"""Which groups are amortized, what their encoders read, and which encoder it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import nn

from pyro_guides.encoders import MLP, DeepSet, GRUEncoder, SequenceEncoder, SetEncoder
from pyro_guides.encoding import Encoding
from pyro_guides.groups import Group, lookup
from pyro_guides.inputs import Source, find_source
from pyro_guides.structure import Graph, Latent, Structure, runs
from pyro_guides.turns import check_numbers

__all__ = ["Amortizer", "Choice"]

_FEWEST_STEPS = 3  # fewer numbered latents, next to inputs of as many features, may be a coincidence


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """What the user chose about encoders; see :class:`~pyro_guides.AmortizedGuide`."""

    encoder: nn.Module | Mapping[str, nn.Module] | None
    inputs: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None
    amortize: Collection[str] | None

    def names(self, group: Group) -> bool:
        """Whether the user speaks of this very group."""
        own = {*group.names, *group.plates}
        choices = [c for c in (self.encoder, self.inputs) if isinstance(c, Mapping)]
        return bool(own & set(self.amortize or ())) or any(own & set(choice) for choice in choices)


@final
class Amortizer:
    """Finds the encoding of each group.

    Args:
        choice: what the user chose.
        structure: the model's structure.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Attributes:
        encoders: the encoders that were chosen or made so far.
    """

    def __init__(
        self, choice: Choice, structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.choice = choice
        self.structure = structure
        self.args = args
        self.kwargs = kwargs
        self.encoders: list[nn.Module] = []
        self._sources: dict[Any, Source] = {}
        self._defaults: dict[Any, nn.Module] = {}
        self._encodings: dict[Any, Encoding] = {}
        self._offsets: dict[str, int] = {}

    def stems(self, graph: Graph, alone: Collection[str]) -> list[str]:
        """The beginnings of names that form a sequence.

        The user's sequence encoder decides; without one, latents with running numbers form a sequence if each
        depends on the one before, and the inputs have as many steps.

        Raises:
            ValueError: a sequence encoder was given for latents that form none.
        """
        for stem, numbers in runs(self.structure.latents).items():
            names = {number: name for number, name in numbers.items() if name not in alone}
            members = [self.structure.latents[name] for name in names.values()]
            if len(members) > 1 and _alike(members):
                spare = len(numbers) - len(names)
                offset = self._offset(stem, list(names), members, graph, spare)
                if offset is not None:
                    self._offsets[stem] = offset
        return list(self._offsets)

    def encodings(self, groups: Sequence[Group]) -> list[Encoding | None]:
        """The encoding of each group; None if its λ is learned.

        Raises:
            ValueError: what the user asked to be amortized cannot be.
        """
        ordered = sorted(range(len(groups)), key=lambda i: not groups[i].running)  # they lend their encoders
        found: dict[int, Encoding | None] = {i: self._encoding(groups[i]) for i in ordered}
        if not any(found.values()) and self.choice.amortize is None:
            found = {i: self._encoding(groups[i], whole=True) for i in ordered}
        self._check_used(groups, found)
        return [found[i] for i in range(len(groups))]

    # --- sequences

    def _offset(
        self, stem: str, numbers: list[int], members: list[Latent], graph: Graph, spare: int
    ) -> int | None:
        """How many more steps the inputs have than the latents; None if the latents form no sequence.

        There may be one less, for a latent that starts the sequence before the first of the data; and as many
        more as there are ``spare`` latents that the user has given groups of their own.
        """
        first = members[0]
        group = Group((stem,), first.plates, {stem: (0, first.size)}, first.discrete, running=True)
        encoder = lookup(self.choice.encoder, group)
        amortize = self.choice.amortize
        if (encoder is not None and not isinstance(encoder, SequenceEncoder)) or (
            amortize is not None and not set(first.plates) & set(amortize)
        ):
            return None
        source = self._find(group, whole=encoder is not None)
        if source is None:
            return None
        shape = source.cut(_kept(source, group)).field.feature_shape
        steps = shape[0] if shape else 0
        if encoder is None and not (
            _is_chain(members, graph) and len(members) >= _FEWEST_STEPS and _kept(source, group)
        ):
            return None
        for count in (len(members), numbers[-1] - numbers[0] + 1):
            if -1 <= steps - count <= spare:
                check_numbers(stem, numbers)
                return steps - count
        if encoder is None:
            return None
        raise ValueError(
            f"{group} have {len(members)} steps, but {source.label} has {steps} in the first dimension "
            f"behind its plates {list(source.plates)}; return one row per step from inputs=..."
        )

    # --- sources

    def _find(self, group: Group, *, whole: bool) -> Source | None:
        inputs = lookup(self.choice.inputs, group)
        preferred = None
        if isinstance(self.choice.inputs, Mapping):
            preferred = next((name for name in group.plates if name in self.choice.inputs), None)
        source = find_source(
            inputs,
            group.plates,
            self.structure,
            self.args,
            self.kwargs,
            group=str(group),
            allowed=self.choice.amortize,
            preferred=preferred,
            whole=whole,
        )
        stacks = {latent.plates for latent in self.structure.latents.values() if latent.plates}
        if source is not None and source.ragged and preferred is None and len(stacks) > 1:
            raise ValueError(
                f"{source.label} comes with an index, which may count the elements of any of the plates "
                f"{sorted({name for stack in stacks for name in stack})}; say which ones: "
                f"inputs={{'{source.plates[0]}': lambda *args: ...}}"
            )
        return source

    def _encoding(self, group: Group, *, whole: bool = False) -> Encoding | None:
        amortize = self.choice.amortize
        if amortize is not None and not set(amortize) & set(group.plates):
            return None
        encoder = lookup(self.choice.encoder, group)
        if whole and encoder is None:
            return None
        named = self.choice.names(group)
        source = self._find(group, whole=whole or self._names_site(group))
        kept = () if source is None or whole else _kept(source, group)
        if source is None or not self._is_amortized(group, source, kept, whole=whole):
            if named and (amortize is not None or isinstance(self.choice.inputs, Mapping)):
                self._refuse(group)
            return None
        if encoder is not None and not _suits(encoder, group, source, kept, named=named or whole):
            encoder = None
        source = self._settled(source, group, encoder, kept)
        encoder = self._default(group, source, kept) if encoder is None else encoder
        if source.ragged and not isinstance(encoder, SetEncoder):
            raise ValueError(
                f"{source.label} comes with an index, so that each element of plate '{source.plates[0]}' has "
                f"a set of rows; {type(encoder).__name__} takes one row each: take a DeepSet()"
            )
        position = self._position(encoder)
        offset = self._offsets[group.sites[0]] if group.running else None
        return self._encodings.setdefault(
            (id(source), position, kept), Encoding(source, position, kept, offset)
        )

    def _is_amortized(self, group: Group, source: Source, kept: tuple[str, ...], *, whole: bool) -> bool:
        if whole or source.ragged:
            return True
        if kept:
            return source.plates[0] in kept or self.choice.names(group)
        return self._names_site(group)

    def _names_site(self, group: Group) -> bool:
        encoders = self.choice.encoder
        return isinstance(encoders, Mapping) and any(name in encoders for name in group.names)

    def _settled(
        self, source: Source, group: Group, encoder: nn.Module | None, kept: tuple[str, ...]
    ) -> Source:
        """The source as this encoder reads it; one object for all groups that read the same."""
        if not isinstance(encoder, SetEncoder):
            nested = () if encoder is not None else self._nested(source, kept)
            source = source.cut({*kept, *nested})
        origin = source.get if source.argument is None else source.argument
        as_steps = (origin, source.plates, True, False)
        steps = group.running or isinstance(encoder, SequenceEncoder)
        steps = steps or (encoder is None and as_steps in self._sources)  # a sequence reads it, too
        varies = steps or not source.plates
        key = (origin, source.plates, varies, source.ragged)
        return self._sources.setdefault(key, replace(source, varies=varies))

    def _nested(self, source: Source, kept: tuple[str, ...]) -> list[str]:
        """Plates whose elements are exchangeable: other latents lie in them and in all that is kept."""
        stacks = [set(latent.plates) for latent in self.structure.latents.values()]
        return [
            name
            for name in source.plates
            if name not in kept and any({name, *kept} <= stack for stack in stacks)
        ]

    # --- encoders

    def _default(self, group: Group, source: Source, kept: tuple[str, ...]) -> nn.Module:
        kind: Callable[..., nn.Module] = MLP
        if source.varies and source.plates:
            kind = GRUEncoder
        elif source.ragged or set(source.plates) - set(kept):
            kind = DeepSet
        # Sets and sequences leave out what is not there; features are marked as missing.
        return self._defaults.setdefault((id(source), kept), kind(missing=source.masked and kind is MLP))

    def _position(self, encoder: nn.Module) -> int:
        for index, other in enumerate(self.encoders):
            if other is encoder:
                return index
        self.encoders.append(encoder)
        return len(self.encoders) - 1

    # --- errors

    def _refuse(self, group: Group) -> None:
        plates = self.structure.plates_of(group.plates)
        raise ValueError(
            f"{group} are to be amortized, but no float tensor lines up with their plates "
            f"{[(plate.name, plate.batch) for plate in plates]}; write inputs=lambda *args, **kwargs: "
            "..., returning one row per plate element"
        )

    def _check_used(self, groups: Sequence[Group], found: Mapping[int, Encoding | None]) -> None:
        if any(found.values()) or self.choice.amortize is not None:
            return
        if self.choice.encoder is not None:
            raise ValueError(
                "an encoder was given, but the model's arguments hold no float tensor for it to read; "
                "write inputs=lambda *args, **kwargs: ..."
            )
        if self.choice.inputs is not None:
            sources = [self._find(group, whole=True) for group in groups]
            shapes = [tuple(s.field.shape) for s in sources if s is not None]
            raise ValueError(
                f"inputs(...) of shape {', '.join(map(str, dict.fromkeys(shapes)))} line up with none of the "
                f"latents' plates {[(plate.name, plate.batch) for plate in self.structure.plates.values()]}; "
                "return one row per plate element, or give an encoder of whole data sets, too"
            )


def _kept(source: Source, group: Group) -> tuple[str, ...]:
    return tuple(name for name in source.plates if name in group.plates)


def _suits(encoder: nn.Module, group: Group, source: Source, kept: tuple[str, ...], *, named: bool) -> bool:
    """Whether an encoder given for all groups can read this one's inputs; one that is named must."""
    if named:
        return True
    features = len(source.field.feature_shape)
    if isinstance(encoder, SetEncoder):
        return source.ragged or len(source.plates) > len(kept) or features > 0
    if isinstance(encoder, SequenceEncoder):
        return group.running or features > 1
    return not source.ragged


def _alike(members: Sequence[Latent]) -> bool:
    first = members[0]
    return all(
        latent.plates == first.plates
        and latent.unconstrained_shape == first.unconstrained_shape
        and latent.discrete == first.discrete
        for latent in members
    )


def _is_chain(members: Sequence[Latent], graph: Graph) -> bool:
    """Whether each latent decides about the next one."""
    return all(b.name in graph.descendants([a.name]) for a, b in itertools.pairwise(members))
