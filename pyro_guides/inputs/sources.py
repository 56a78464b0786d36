"""What an encoder reads for a group of latents.

Inputs are found among the model's arguments - the float tensor whose leading dimensions are the group's
plates - or come from a function of the user's, which may return

* a tensor,
* a dict of tensors, which are lined up and joined into one; a boolean one says what is there at all,
* either of these and an integer tensor: the element of the group's plate that each row belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.inputs.given import Given, unpack
from pyro_guides.inputs.matching import leading_plates
from pyro_guides.structure import Plate, Structure

__all__ = ["Field", "Source", "find_source"]


@final
@dataclass(frozen=True, eq=False)
class Field:
    """One tensor of an encoder's inputs, as it was when the guide was set up.

    Attributes:
        label: how error messages call it.
        plates: the plates its leading dimensions belong to, leftmost first.
        shape: its shape.
        dtype: its dtype.
        device: its device.
    """

    label: str
    plates: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def feature_shape(self) -> torch.Size:
        """The dimensions that belong to no plate."""
        return self.shape[len(self.plates) :]


@final
@dataclass(frozen=True, eq=False)
class Source:
    """Where an encoder's inputs come from, as settled when the guide was set up.

    Attributes:
        label: how error messages call it.
        get: from the model's arguments to the inputs.
        fields: the tensors it returns, by name; the mask is not among them.
        plates: the plates of all of them, leftmost first.
        argument: the model argument it is; None if it comes from a function of the user's.
        site: the observed site whose value it is, if it is one; its mask says what is there.
        ragged: whether an index says which element of the plate each row belongs to.
        masked: whether a mask says what of it is there.
        varies: whether the first of the features is a number of rows or steps, which may differ.
    """

    label: str
    get: Callable[..., Any]
    fields: dict[str, Field]
    plates: tuple[str, ...]
    argument: int | str | None = None
    site: str | None = None
    ragged: bool = False
    masked: bool = False
    varies: bool = False

    @property
    def mask_site(self) -> str | None:
        """The observed site whose mask says what is there; steps are masked by their latents instead."""
        return None if self.varies else self.site

    @property
    def field(self) -> Field:
        """The first of its tensors, of whose kind all are."""
        return next(iter(self.fields.values()))

    def size(self, plate: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How many elements of one of its plates a call's inputs have."""
        tensors = unpack(self.get(*args, **kwargs), self.label).tensors
        sizes = [
            tensors[key].shape[f.plates.index(plate)] for key, f in self.fields.items() if plate in f.plates
        ]
        return sizes[0]

    def follow(self, move: Callable[[Tensor], Tensor]) -> None:
        """Expect inputs of the dtype and on the device that a guide has moved to."""
        for key, field in self.fields.items():
            moved = move(torch.empty((), dtype=field.dtype, device=field.device))
            self.fields[key] = replace(field, dtype=moved.dtype, device=moved.device)

    def cut(self, plates: Collection[str]) -> Source:
        """The same inputs, with trailing plates other than these taken for features."""
        names = list(self.plates)
        while names and names[-1] not in plates and not self.ragged:
            names.pop()
        fields = {
            key: replace(field, plates=tuple(name for name in field.plates if name in names))
            for key, field in self.fields.items()
        }
        return replace(self, plates=tuple(names), fields=fields)


def find_source(
    inputs: Callable[..., Any] | None,
    plates: Collection[str],
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    group: str,
    allowed: Collection[str] | None = None,
    preferred: str | None = None,
    whole: bool = False,
) -> Source | None:
    """The inputs of one group; None if the arguments hold no float tensor that has some of its plates.

    Args:
        inputs: the user's function of the model's arguments, if there is one.
        plates: the group's plates.
        structure: the model's structure.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        group: how error messages call the group.
        allowed: no other plates than these; any if None.
        preferred: the plate that decides if several fit.
        whole: whether inputs that have none of its plates will do.

    Raises:
        ValueError: several arguments fit, or the same dimension fits several plates.
        TypeError: the only argument that fits is not floating point.
    """

    def lined_up(tensor: Tensor, label: str, argument: int | str | None = None) -> tuple[Plate, ...]:
        return leading_plates(
            tensor,
            structure,
            label,
            wanted=plates,
            allowed=allowed,
            preferred=preferred,
            argument=argument,
        )

    if inputs is not None:
        label = f"inputs(...) for {group}"
        given = unpack(inputs(*args, **kwargs), label)
        if given.index is not None:
            return _ragged(label, inputs, given, plates, preferred, group)
        source = _joint(label, inputs, {k: (x, lined_up(x, label)) for k, x in given.tensors.items()})
        return replace(source, masked=given.mask is not None)
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    fits = {key: lined_up(x, _label(key), key) for key, x in tensors.items()}
    key = _best(tensors, fits, plates, group, whole=whole)
    if key is None:
        return None
    source = _joint(_label(key), _getter(key), {"": (tensors[key], fits[key])})
    site = next((site for site in structure.observed.values() if site.argument == key), None)
    if site is None:
        return replace(source, argument=key)
    return replace(source, argument=key, site=site.name, masked=site.mask is not None)


def _best(
    tensors: Mapping[int | str, Tensor],
    fits: Mapping[int | str, tuple[Plate, ...]],
    plates: Collection[str],
    group: str,
    *,
    whole: bool,
) -> int | str | None:
    """The argument that has most of the group's plates."""
    shared = {key: sum(plate.name in plates for plate in fit) for key, fit in fits.items()}
    most = max(shared.values(), default=0)
    if not most and not whole:
        return None
    candidates = {key: tensors[key] for key, count in shared.items() if count == most}
    floating = {key: tensor for key, tensor in candidates.items() if tensor.is_floating_point()}
    if not floating and candidates and most:
        key, tensor = next(iter(candidates.items()))
        raise TypeError(
            f"{_label(key)} lines up with the plates of {group}, but it is {tensor.dtype} and "
            f"encoders read floating point; write inputs=lambda *args: args[...].float(), or "
            "amortize=() for learned parameters"
        )
    if len(floating) > 1:
        _refuse_ambiguous(floating, group)
    return next(iter(floating), None)


def _joint(
    label: str, get: Callable[..., Any], tensors: Mapping[str, tuple[Tensor, tuple[Plate, ...]]]
) -> Source:
    fields, union = {}, {}
    for key, (tensor, plates) in tensors.items():
        names = tuple(plate.name for plate in plates)
        union.update({plate.name: plate for plate in plates})
        own = f"{label}[{key!r}]" if len(tensors) > 1 else label
        fields[key] = Field(own, names, tensor.shape, tensor.dtype, tensor.device)
    ordered = sorted(union.values(), key=lambda plate: plate.dim)
    return Source(label, get, fields, tuple(plate.name for plate in ordered))


def _ragged(
    label: str,
    get: Callable[..., Any],
    given: Given,
    plates: Collection[str],
    preferred: str | None,
    group: str,
) -> Source | None:
    if not plates:
        return None
    if preferred is None and len(plates) > 1:
        raise ValueError(
            f"{label} comes with an index, but {group} lie in the plates {list(plates)}; say which one the "
            f"index counts: inputs={{'{next(iter(plates))}': lambda *args: ...}}"
        )
    plate = next(iter(plates)) if preferred is None else preferred
    fields = {
        key: Field(label, (), x.shape[1:], x.dtype, x.device) for key, x in given.tensors.items() if x.dim()
    }
    return Source(label, get, fields, (plate,), ragged=True)


def _refuse_ambiguous(tensors: Mapping[int | str, Tensor], group: str) -> None:
    names = [f"{_label(key)} {tuple(tensor.shape)}" for key, tensor in tensors.items()]
    picks = ", ".join(
        f"{key!r}: kwargs[{key!r}]" if isinstance(key, str) else f"'{key}': args[{key}]" for key in tensors
    )
    raise ValueError(
        f"several arguments line up with the plates of {group}: {'; '.join(names)}. Say what the "
        f"encoder reads: inputs=lambda *args, **kwargs: {{{picks}}}, or one of them"
    )


def _label(key: int | str) -> str:
    return f"argument '{key}'" if isinstance(key, str) else f"argument {key}"


@final
@dataclass(frozen=True)
class _getter:
    """Picks one of the model's arguments; a class, so that guides can be pickled."""

    key: int | str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        except (IndexError, KeyError):
            raise TypeError(
                f"{_label(self.key)} is missing; the guide was set up with it as the encoder's input"
            ) from None
