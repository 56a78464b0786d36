"""Builds a guide's network from what the user asked for and what the model turned out to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.controls import add_control, local_dims
from pyro_guides.distributions import Alphabet
from pyro_guides.encoders import MLP
from pyro_guides.families import SMALLEST_SCALE, BoundFamily, Discrete, Family, FullRankNormal
from pyro_guides.groups import Group, check_keys, group_latents, lookup
from pyro_guides.heads import AmortizedHead, Head, LearnedHead
from pyro_guides.inputs import Source, check_finite, find_source
from pyro_guides.network import Network, Part, encode
from pyro_guides.structure import Graph, Structure, dependencies, read, upstream

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
        scale = self.init_scale
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"init_scale must be a number, got {scale!r}")
        if not SMALLEST_SCALE < float(scale) < float("inf"):
            raise ValueError(f"init_scale must be positive, above {SMALLEST_SCALE}, got {scale!r}")


def build(
    plan: Plan, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Network, Structure]:
    """Read the model and build the network; returns it with the structure that was read."""
    structure = read(model, args, kwargs, init=plan.init_loc_fn)
    _check_names(plan, structure)
    alone = [name for name in _keys(plan.family) if name in structure.latents]
    groups = group_latents(structure, alone)

    @cache
    def graph() -> Graph:
        return dependencies(model, args, kwargs)

    links = _links(plan, groups, graph)
    sources = _sources(plan, groups, structure, args, kwargs)
    encoders: list[nn.Module] = []
    parts: list[Part] = []
    for index, (group, source) in enumerate(zip(groups, sources, strict=True)):
        encoder = None if source is None else _encoder(plan, group, source, encoders, parts)
        family = family_for(group, plan.family, Discrete() if group.discrete else FullRankNormal())
        alphabet = structure.latents[group.sites[0]].alphabet
        local = local_dims(index, groups, links, structure, graph())
        parts.append(Part(group, links[index], source, encoder, family, alphabet, local))
    network = Network(parts, encoders, structure.depth)
    locs = [_initial_loc(group, structure) for group in groups]
    # A rehearsal on copies: lazy layers of the user's encoders must not keep what a bad input left there.
    contexts = _contexts(parts, copy.deepcopy(encoders), structure, args, kwargs)
    for part, loc in zip(parts, locs, strict=True):
        _add_head(network, part, loc, [locs[i] for i in part.upstream], contexts, structure, plan)
    for index in range(len(parts)):
        add_control(network, index)
    _contexts(parts, encoders, structure, args, kwargs)
    return network, structure


def _add_head(
    network: Network,
    part: Part,
    loc: Tensor,
    upstream_locs: list[Tensor],
    contexts: Mapping[tuple[int, int], Tensor],
    structure: Structure,
    plan: Plan,
) -> None:
    family = bind(part.family, part.group, part.alphabet).to(loc.device, loc.dtype)
    origin = torch.cat([_mean(x) for x in upstream_locs]) if upstream_locs else loc.new_zeros(0)
    plates = structure.plates_of(part.group.plates)
    head: Head
    if part.source is None or part.encoder is None:
        initial = family.initial(_to_full_size(loc, part.group, structure), plan.init_scale)
        head = LearnedHead(initial, origin, {plate.name: plate.dim for plate in plates})
    else:
        context = contexts[part.encoder, id(part.source)]
        _check_dtype(part, loc, context)
        lacking = {
            plate.name: (plate.batch if plate.size == -1 else plate.size, plate.dim)
            for plate in plates
            if plate.name not in part.source.plates
        }
        initial = family.initial(_mean(loc), plan.init_scale)
        head = AmortizedHead(context.shape[-1], initial, origin, lacking)
    network.heads.append(head)
    network.families.append(family)


def family_for(group: Group, choice: Family | Mapping[str, Family], otherwise: Family) -> Family:
    """The family that a user's choice gives a group; one for all, or for a plate, skips discrete groups."""
    named = isinstance(choice, Mapping) and any(name in choice for name in group.sites)
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
    encoders: Sequence[nn.Module],
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[tuple[int, int], Tensor]:
    """One pass of every encoder, which also lets lazy layers find their sizes and statistics."""
    indices = {n: p.indices for n, p in structure.plates.items() if p.indices is not None}
    contexts: dict[tuple[int, int], Tensor] = {}
    for part in parts:
        if part.source is None or part.encoder is None:
            continue
        key = (part.encoder, id(part.source))
        if key not in contexts:
            encoder = encoders[part.encoder]
            with torch.no_grad():
                _standardize_with_all_rows(encoder, part.source, args, kwargs)
                contexts[key] = encode(encoder, part.source, structure, args, kwargs, indices)
    return contexts


def _standardize_with_all_rows(
    encoder: nn.Module, source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Statistics come from every row at hand, even if the model subsamples them."""
    if isinstance(encoder, MLP) and encoder.standardize.mean is None and source.plates:
        x: Tensor = source.get(*args, **kwargs)
        check_finite(x, source.label, missing=lambda: encoder.standardize.missing)
        encoder.standardize.fit(source.as_rows(x).flatten(1))


def _sources(
    plan: Plan,
    groups: list[Group],
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Source | None]:
    found = [_source(plan, group, structure, args, kwargs, whole=False) for group in groups]
    if not any(found) and plan.amortize is None and plan.encoder is not None:
        # Nothing lines up with a plate: the data set as a whole is the datum.
        found = [_source(plan, group, structure, args, kwargs, whole=True) for group in groups]
        if not any(found):
            raise ValueError(
                "an encoder was given, but the model's arguments hold no float tensor for it to read; "
                "write inputs=lambda *args, **kwargs: ..."
            )
    if not any(found) and plan.inputs is not None:
        shapes = [tuple(function(*args, **kwargs).shape) for function in _items(plan.inputs)]
        raise ValueError(
            f"inputs(...) of shape {', '.join(map(str, shapes))} line up with none of the latents' plates "
            f"{[(plate.name, plate.batch) for plate in structure.plates.values()]}; return one row per plate "
            "element, or give an encoder of whole data sets, too"
        )
    shared: dict[Any, Source] = {}
    for index, source in enumerate(found):
        if source is not None:
            origin = source.get if source.argument is None else source.argument
            found[index] = shared.setdefault((origin, source.plates), source)
    return found


def _source(
    plan: Plan,
    group: Group,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    whole: bool,
) -> Source | None:
    named = plan.amortize is not None and any(name in plan.amortize for name in group.plates)
    if plan.amortize is not None and not named:
        return None
    plates = structure.plates_of(group.plates)
    if plan.amortize is not None:
        plates = [plate for plate in plates if plate.name in plan.amortize]
    inputs = lookup(plan.inputs, group)
    source = find_source(inputs, plates, args, kwargs, group=str(group), whole=whole)
    if source is None and (named or (isinstance(plan.inputs, Mapping) and inputs is not None)):
        raise ValueError(
            f"{group} are to be amortized, but no float tensor lines up with their plates "
            f"{[(plate.name, plate.batch) for plate in plates]}; write inputs=lambda *args, **kwargs: "
            "..., returning one row per plate element"
        )
    return source


def _encoder(plan: Plan, group: Group, source: Source, encoders: list[nn.Module], parts: list[Part]) -> int:
    """The position of the group's encoder; the default one is shared by groups of one source."""
    encoder = lookup(plan.encoder, group)
    if encoder is None:
        for part in parts:
            if part.source is source and lookup(plan.encoder, part.group) is None:
                return cast("int", part.encoder)
        encoder = MLP()
    for index, other in enumerate(encoders):
        if other is encoder:
            return index
    encoders.append(encoder)
    return len(encoders) - 1


def _links(
    plan: Plan,
    groups: list[Group],
    graph: Callable[[], Graph],
) -> list[tuple[int, ...]]:
    """For each group, the earlier groups its λ depends on: relevant ones, in plates it shares."""
    if len(groups) == 1 or not plan.condition_on_upstream:
        return [()] * len(groups)
    relevant = upstream([group.sites for group in groups], graph().neighbours)
    return [
        tuple(i for i in sorted(links) if set(groups[i].plates) <= set(group.plates))
        for group, links in zip(groups, relevant, strict=True)
    ]


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


def _check_dtype(part: Part, loc: Tensor, context: Tensor) -> None:
    source = cast("Source", part.source)  # only amortized parts come here
    kinds = {
        source.label: (source.dtype, source.device),
        "the encoder's context": (context.dtype, context.device),
    }
    for what, (dtype, device) in kinds.items():
        if dtype != loc.dtype or device != loc.device:
            raise TypeError(
                f"{what} is {dtype} on {device}, but {part.group} are {loc.dtype} on {loc.device}; "
                f"convert one of them, for instance with .to({loc.device.type!r}, {loc.dtype})"
            )


def _check_names(plan: Plan, structure: Structure) -> None:
    check_keys(plan.family, structure, "family")
    check_keys(plan.encoder, structure, "encoder")
    check_keys(plan.inputs, structure, "inputs")
    if plan.amortize is not None:
        plates = {name for latent in structure.latents.values() for name in latent.plates}
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
