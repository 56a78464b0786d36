"""Builds a guide's network from what the user asked for and what the model turned out to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, final

import torch
from torch import Tensor, nn

from pyro_guides.amortizing import Amortizer, Choice
from pyro_guides.arguments import check_flags
from pyro_guides.controls import add_control, local_dims
from pyro_guides.distributions import Alphabet
from pyro_guides.encoding import Encoding, encode, standardize
from pyro_guides.families import SMALLEST_SCALE, BoundFamily, Discrete, Family, FullRankNormal
from pyro_guides.groups import Group, check_keys, group_latents, lookup
from pyro_guides.heads import AmortizedHead, Head, LearnedHead
from pyro_guides.inputs import Source
from pyro_guides.links import Links, Wishes, in_order, link_groups
from pyro_guides.network import Network, Part, fold, step_names
from pyro_guides.structure import Structure, dependencies, read
from pyro_guides.turns import Turn, take_turns

__all__ = ["Plan", "bind", "build", "family_for"]


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What the user asked for; see :class:`~pyro_guides.AmortizedGuide`."""

    encoder: nn.Module | Mapping[str, nn.Module] | None
    family: Family | Mapping[str, Family]
    inputs: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None
    amortize: Collection[str] | None
    condition_on_upstream: bool
    order: Sequence[str] | None
    given: Mapping[str, Collection[str]] | None
    init_loc_fn: Callable[..., Any]
    init_scale: float

    def __post_init__(self) -> None:
        _check_kinds(self.encoder, nn.Module, "encoder", "a torch.nn.Module")
        _check_kinds(self.family, Family, "family", "a family such as FullRankNormal()")
        for inputs in _items(self.inputs):
            if not callable(inputs):
                raise TypeError(f"inputs must be a function of the model's arguments, got {inputs!r}")
        if self.amortize is not None and not _is_names(self.amortize):
            raise TypeError(
                f"amortize must be a list of plate names (or None for all that line up with the inputs), "
                f"got {self.amortize!r}"
            )
        if not callable(self.init_loc_fn):
            raise TypeError(
                f"init_loc_fn must be a function such as init_to_median, got {self.init_loc_fn!r}"
            )
        check_flags("AmortizedGuide", condition_on_upstream=self.condition_on_upstream)
        scale = self.init_scale
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"init_scale must be a number, got {scale!r}")
        if not SMALLEST_SCALE < float(scale) < float("inf"):
            raise ValueError(f"init_scale must be positive, above {SMALLEST_SCALE}, got {scale!r}")
        if self.order is not None and (not isinstance(self.order, Sequence) or not _is_names(self.order)):
            raise TypeError(f"order must be a list of names of latents, got {self.order!r}")
        if self.given is not None and not (
            isinstance(self.given, Mapping)
            and _is_names(self.given)
            and all(map(_is_names, self.given.values()))
        ):
            raise TypeError(
                f"given must be a dict from names of latents to lists of names of latents, got {self.given!r}"
            )

    @property
    def choice(self) -> Choice:
        """What the user chose about encoders."""
        return Choice(self.encoder, self.inputs, self.amortize)

    @property
    def wishes(self) -> Wishes:
        """What the user wants of the order of drawing."""
        return Wishes(self.order, self.given or {}, self.condition_on_upstream)


def build(
    plan: Plan, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Network, Structure]:
    """Read the model and build the network; returns it with the structure that was read."""
    read_structure = read(model, args, kwargs, init=plan.init_loc_fn)
    if not read_structure.latents:
        group_latents(read_structure)  # says what is missing
    structure = in_order(read_structure, plan.wishes)
    graph = dependencies(model, args, kwargs)
    amortizer = Amortizer(plan.choice, structure, args, kwargs)
    alone = [*_keys(plan.family), *plan.wishes.given]
    groups = group_latents(structure, alone, amortizer.stems(graph, alone))
    _check_names(plan, groups)
    encodings = amortizer.encodings(groups)
    data_plates = {name for encoding in encodings if encoding for name in encoding.source.plates}
    links = link_groups(groups, structure, graph, plan.wishes, data_plates)
    turns = take_turns(groups, structure)
    sites = [
        [name for turn in turns if turn.part == i for name in turn.group.sites] for i in range(len(groups))
    ]
    parts = []
    for index, group in enumerate(groups):
        first = next(turn.group for turn in turns if turn.part == index)
        family = family_for(group, plan.family, Discrete() if group.discrete else FullRankNormal())
        alphabet = structure.latents[first.sites[0]].alphabet
        local = local_dims(index, sites, [link.upstream + link.previous for link in links], structure, graph)
        seen = _encodings_of(index, groups, encodings, links)
        parts.append(Part(group, links[index], seen, family, alphabet, local))
    network = Network(parts, amortizer.encoders, structure.depth)
    locs = [_initial_loc(next(t.group for t in turns if t.part == i), structure) for i in range(len(groups))]
    # A rehearsal on copies: lazy layers of the user's encoders must not keep what a bad input left there.
    contexts = _contexts(parts, turns, copy.deepcopy(amortizer.encoders), structure, args, kwargs)
    for part, loc in zip(parts, locs, strict=True):
        _add_head(network, part, loc, _origin(network, part, locs, structure), contexts, structure, plan)
    for index in range(len(parts)):
        add_control(network, index)
    _contexts(parts, turns, amortizer.encoders, structure, args, kwargs)
    return network, read_structure


def _encodings_of(
    index: int,
    groups: Sequence[Group],
    encodings: Sequence[Encoding | None],
    links: Sequence[Links],
) -> tuple[Encoding, ...]:
    """A group's own encoding, and those of upper levels whose values it depends on but does not see."""
    own = encodings[index]
    if own is None:
        return ()
    found = [own]
    for other in sorted(links[index].relevant):
        upper = encodings[other]
        if (
            upper is not None
            and upper not in found
            and upper.offset is None
            and set(groups[other].plates) < set(groups[index].plates)
        ):
            found.append(upper)
    return tuple(found)


def _origin(network: Network, part: Part, locs: Sequence[Tensor], structure: Structure) -> Tensor:
    """Where what a group depends on starts, ``(V,)``; zero for what is seen in units of its own q."""
    pieces = []
    for other in part.links.upstream:
        plates = structure.plates_of(part.links.folds.get(other, ()))
        start = _mean(fold(locs[other], plates))
        in_own_units = not plates and network.frame(other, {}) is not None
        pieces.append(torch.zeros_like(start) if in_own_units else start)
    pieces += [_mean(locs[other]) for other in part.links.previous]
    if part.links.previous:
        pieces.append(locs[0].new_zeros(1))
    return torch.cat(pieces) if pieces else locs[0].new_zeros(0)


def _add_head(
    network: Network,
    part: Part,
    loc: Tensor,
    origin: Tensor,
    contexts: Mapping[tuple[Encoding, bool], Tensor],
    structure: Structure,
    plan: Plan,
) -> None:
    family = bind(part.family, part.group, part.alphabet).to(loc.device, loc.dtype)
    plates = structure.plates_of(part.group.plates)
    head: Head
    if not part.encodings:
        initial = family.initial(_to_full_size(loc, part.group, structure), plan.init_scale)
        head = LearnedHead(initial, origin.to(initial), {plate.name: plate.dim for plate in plates})
    else:
        own = [contexts[encoding, part.group.running] for encoding in part.encodings]
        for encoding, context in zip(part.encodings, own, strict=True):
            _check_dtype(part, encoding.source, loc, context)
        lacking = {
            plate.name: (plate.batch if plate.size == -1 else plate.size, plate.dim)
            for plate in plates
            if plate.name not in part.encodings[0].plates
        }
        initial = family.initial(_mean(loc), plan.init_scale)
        size = sum(context.shape[-1] for context in own)
        head = AmortizedHead(size, initial, origin.to(initial), lacking)
    network.heads.append(head)
    network.families.append(family)


def family_for(group: Group, choice: Family | Mapping[str, Family], otherwise: Family) -> Family:
    """The family that a user's choice gives a group; one for all, or for a plate, skips discrete groups."""
    named = isinstance(choice, Mapping) and any(name in choice for name in group.names)
    family = lookup(choice, group)
    if group.discrete and not named and not isinstance(family, Discrete):
        return otherwise
    return otherwise if family is None else family


def bind(family: Family, group: Group, alphabet: Alphabet | None) -> BoundFamily:
    """The family for one group, whose latent is discrete if it has an alphabet.

    Raises:
        ValueError: the family is not for latents of this kind.
    """
    if alphabet is None:
        return family.bind(group.size)
    if not isinstance(family, Discrete):
        raise ValueError(
            f"latent '{group.sites[0]}' is discrete, but its family is {family}; give it Discrete(), or none"
        )
    return family.bind_to(alphabet)


def _contexts(
    parts: Sequence[Part],
    turns: Sequence[Turn],
    encoders: Sequence[nn.Module],
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[tuple[Encoding, bool], Tensor]:
    """One pass of every encoder, which also lets lazy layers find their sizes and statistics."""
    indices = {n: p.indices for n, p in structure.plates.items() if p.indices is not None}
    contexts: dict[tuple[Encoding, bool], Tensor] = {}
    for encoding in dict.fromkeys(encoding for part in parts for encoding in part.encodings):
        encoder = encoders[encoding.encoder]
        with torch.no_grad():
            standardize(encoding, encoder, structure, args, kwargs)
            steps = step_names(encoding, parts, turns)
            encoded = encode(encoding, encoder, structure, args, kwargs, indices, steps=steps)
            for running in {part.group.running for part in parts if encoding in part.encodings}:
                contexts[encoding, running] = encoded.at(0 if running else None)
    return contexts


def _initial_loc(group: Group, structure: Structure) -> Tensor:
    """Where u starts, ``(*batch, D)``."""
    batch = structure.batch_shape(group.plates)
    parts = []
    for name in group.sites:
        latent = structure.latents[name]
        if latent.alphabet is not None:
            count = 2 if latent.alphabet.kind == "boolean" else latent.alphabet.count
            equal = torch.full((*batch, latent.size), 1.0 / count, dtype=latent.alphabet.precision)
            parts.append(equal.to(structure.values[name].device))
            continue
        u = latent.unconstrain(structure.values[name])
        if not bool(u.isfinite().all()):
            raise ValueError(
                f"init_loc_fn starts site '{name}' at a value on the edge of its support "
                f"{latent.support}; start it inside"
            )
        u = u.reshape(u.shape[-1 - len(batch) :]) if u.dim() > len(batch) else u
        parts.append(u.expand(*batch, latent.size))
    return torch.cat(parts, dim=-1)


def _to_full_size(loc: Tensor, group: Group, structure: Structure) -> Tensor:
    """Repeat the start of a subsample until it fills the plates."""
    for plate in structure.plates_of(group.plates):
        if plate.subsampled:
            index = torch.arange(plate.size, device=loc.device) % plate.batch
            loc = loc.index_select(plate.dim - 1, index)
    return loc


def _mean(loc: Tensor) -> Tensor:
    return loc.reshape(-1, loc.shape[-1]).mean(0)


def _check_dtype(part: Part, source: Source, loc: Tensor, context: Tensor) -> None:
    kinds = {field.label: (field.dtype, field.device) for field in source.fields.values()}
    kinds["the encoder's context"] = (context.dtype, context.device)
    for what, (dtype, device) in kinds.items():
        if dtype != loc.dtype or device != loc.device:
            raise TypeError(
                f"{what} is {dtype} on {device}, but {part.group} are {loc.dtype} on {loc.device}; "
                f"convert one of them, for instance with .to({loc.device.type!r}, {loc.dtype})"
            )


def _check_names(plan: Plan, groups: Sequence[Group]) -> None:
    for argument in ("family", "encoder", "inputs"):
        check_keys(getattr(plan, argument), groups, f"{argument}={{...}}")
    check_keys(plan.wishes.mentioned, groups, "given={...}", plates=False)
    if plan.amortize is not None:
        plates = {name for group in groups for name in group.plates}
        if unknown := [name for name in plan.amortize if name not in plates]:
            raise ValueError(
                f"amortize={list(plan.amortize)} names {unknown}, but the latents' plates are "
                f"{sorted(plates)}"
            )


def _check_kinds(choice: Any, kind: type, argument: str, expected: str) -> None:
    for item in _items(choice):
        if not isinstance(item, kind):
            raise TypeError(f"{argument} must be {expected}, got {item!r}")


def _is_names(names: Any) -> bool:
    return (
        isinstance(names, Collection)
        and not isinstance(names, str)
        and all(isinstance(name, str) for name in names)
    )


def _items(choice: Any) -> list[Any]:
    if choice is None:
        return []
    return list(choice.values()) if isinstance(choice, Mapping) else [choice]


def _keys(choice: Any) -> list[str]:
    return list(choice) if isinstance(choice, Mapping) else []
