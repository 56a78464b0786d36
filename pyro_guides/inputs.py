"""Which tensor an encoder reads for a group of latents, and how its rows line up with the plates.

Inputs are found among the model's arguments - the float tensor whose leading dimensions are the group's
plates - or come from a function of the user's. Every call checks them: a wrong row must stop the training
with a sentence that says which one, not end up in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

import torch
from torch import Tensor

from pyro_guides.structure import Plate, Structure

__all__ = ["Source", "check_finite", "find_source", "match_plates", "with_observations"]


@final
@dataclass(frozen=True, eq=False)
class Source:
    """Where an encoder's inputs come from, as settled when the guide was set up.

    Attributes:
        label: how error messages call it.
        get: from the model's arguments to the tensor.
        plates: the plates its leading dimensions belong to, leftmost first.
        feature_shape: its other dimensions.
        dtype: its dtype.
        device: its device.
        argument: the model argument it is; None if it comes from a function of the user's.
    """

    label: str
    get: Callable[..., Any]
    plates: tuple[str, ...]
    feature_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    argument: int | str | None

    def rows(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        plates: Sequence[Plate],
        indices: Mapping[str, Tensor],
        *,
        missing: Callable[[], bool],
        simulated: bool = False,
    ) -> Tensor:
        """The inputs of this call, ``(*batch of the plates, *feature_shape)``, checked.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.
            plates: this call's plates, in the order of ``self.plates``.
            indices: the elements that subsampled plates take.
            missing: whether NaN marks a missing value; only asked if there is one.
            simulated: whether the model has drawn them itself, for particles side by side perhaps; then
                they are laid out as its plates are.
        """
        x = as_float_tensor(self.get(*args, **kwargs), self.label)
        self._check_kind(x)
        row_dim = x.dim() - len(self.feature_shape)
        # A data set taken as a whole may have any number of rows: what it is made of must stay the same.
        fixed = slice(row_dim, None) if self.plates else slice(row_dim + 1, None)
        if x.shape[fixed] != self.feature_shape[fixed.start - row_dim :]:
            raise ValueError(
                f"{self.label} has features of shape {tuple(x.shape[row_dim:])}, but the guide was set "
                f"up with {tuple(self.feature_shape)}; give it the same features, or make a new guide"
            )
        if row_dim > len(plates) and not simulated:
            raise self._wrong_shape(x)
        if row_dim == len(plates):
            x = _take_rows(x, plates, indices, self.label)
        check_finite(x, self.label, missing=missing)
        return x

    def as_rows(self, x: Tensor) -> Tensor:
        """Inputs as an encoder takes them: ``(B, *features)``; a bare number is a row of one feature."""
        return x.reshape(-1, *(self.feature_shape or (1,)))

    def _wrong_shape(self, x: Tensor) -> ValueError:
        return ValueError(
            f"{self.label} has shape {tuple(x.shape)}, expected the plates {list(self.plates)} and then "
            f"features of shape {tuple(self.feature_shape)}; give one row the shape (1, ...)"
        )

    def _check_kind(self, x: Tensor) -> None:
        if x.dim() < len(self.plates) + len(self.feature_shape):
            raise self._wrong_shape(x)
        if x.dtype != self.dtype or x.device != self.device:
            raise TypeError(
                f"{self.label} is {x.dtype} on {x.device}, but the guide was set up with {self.dtype} "
                f"on {self.device}; convert it with .to({self.device.type!r}, {self.dtype})"
            )


def find_source(
    inputs: Callable[..., Any] | None,
    plates: Sequence[Plate],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    group: str,
    whole: bool,
) -> Source | None:
    """The inputs of one group; None if the arguments hold nothing that lines up with its plates.

    Args:
        inputs: the user's function of the model's arguments, if there is one.
        plates: the group's plates, leftmost dimension first.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        group: how error messages call the group.
        whole: whether inputs without plates will do (one data set in, one posterior out).

    Raises:
        ValueError: several arguments fit, or the same dimension fits several plates.
        TypeError: the only argument that fits is not floating point.
    """
    if inputs is not None:
        tensor = as_float_tensor(inputs(*args, **kwargs), f"inputs(...) for {group}")
        matched = match_plates(tensor, plates, f"inputs(...) for {group}")
        if not matched and not whole:
            return None
        return _source(f"inputs(...) for {group}", inputs, tensor, matched, None)
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    fits = {
        key: match_plates(tensor, plates, _label(key)) if plates else () for key, tensor in tensors.items()
    }
    most = max(map(len, fits.values()), default=0)
    if most == 0 and not whole:
        return None
    candidates = {key: tensors[key] for key, matched in fits.items() if len(matched) == most}
    floating = {key: tensor for key, tensor in candidates.items() if tensor.is_floating_point()}
    if not floating and candidates:
        key, tensor = next(iter(candidates.items()))
        raise TypeError(
            f"{_label(key)} lines up with the plates of {group}, but it is {tensor.dtype} and "
            f"encoders read floating point; write inputs=lambda *args: args[...].float(), or "
            "amortize=() for learned parameters"
        )
    if len(floating) > 1:
        _refuse_ambiguous(floating, group)
    if not floating:
        return None
    key, tensor = next(iter(floating.items()))
    return _source(_label(key), _getter(key), tensor, fits[key], key)


def with_observations(
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observations: Mapping[str, Tensor] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with simulated observations in the place of real ones."""
    if observations is None:
        return args, kwargs
    positional, named = list(args), dict(kwargs)
    for name, value in observations.items():
        if name not in structure.observed:
            raise ValueError(
                f"observations hold '{name}', but the model's observed sites are {list(structure.observed)}"
            )
        argument = structure.observed[name].argument
        if argument is None:
            raise ValueError(
                f"observed site '{name}' is not one of the model's arguments but computed from them, so "
                "simulated data cannot take its place; pass it to the model as obs= unchanged"
            )
        if isinstance(argument, int):
            positional[argument] = value
        else:
            named[argument] = value
    return tuple(positional), named


def match_plates(tensor: Tensor, plates: Sequence[Plate], label: str) -> tuple[Plate, ...]:
    """The plates that the leading dimensions of ``tensor`` are, as many as possible.

    A dimension fits a plate if it has the plate's full size or the size of its batch.

    Raises:
        ValueError: different plates fit equally well.
    """
    for count in range(min(len(plates), tensor.dim()), 0, -1):
        fitting = [
            chosen
            for chosen in combinations(plates, count)
            if all(n in (p.size, p.batch) for n, p in zip(tensor.shape, chosen, strict=False))
        ]
        if len(fitting) > 1:
            options = " or ".join(str([plate.name for plate in chosen]) for chosen in fitting)
            raise ValueError(
                f"{label} has shape {tuple(tensor.shape)}, whose leading dimensions may be the plates "
                f"{options}; name them with amortize=[...], or give the plates different sizes"
            )
        if fitting:
            return fitting[0]
    return ()


def as_float_tensor(value: Any, label: str) -> Tensor:
    """``value``, once it is known to be a tensor that an encoder can read.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{label} is a {type(value).__name__}, expected a torch.Tensor; convert it with "
            "torch.as_tensor(...)"
        )
    if not value.is_floating_point():
        raise TypeError(f"{label} is {value.dtype}, expected floating point; convert it with .float()")
    return value


def check_finite(x: Tensor, label: str, *, missing: Callable[[], bool]) -> None:
    """Raise a ValueError that names the first bad rows if ``x`` holds NaN or infinity.

    One sum settles the good case; only a bad one is searched.
    """
    if math.isfinite(x.detach().sum().item()):
        return
    allowed = missing()
    fine = ~x.isinf() if allowed else x.isfinite()
    if bool(fine.all()):
        return
    bad = (~fine).reshape(x.shape[0] if x.dim() else 1, -1).any(-1).nonzero().flatten()
    kind = "NaN" if not allowed and bool(x.isnan().any()) else "infinite values"
    advice = "remove them" if allowed else "remove them, or declare NaN missing with MLP(missing=True)"
    raise ValueError(
        f"{label} holds {kind} in {len(bad)} of {x.shape[0] if x.dim() else 1} rows, the first ones "
        f"{bad[:5].tolist()}; {advice}"
    )


def _take_rows(x: Tensor, plates: Sequence[Plate], indices: Mapping[str, Tensor], label: str) -> Tensor:
    for dim, plate in enumerate(plates):
        count = x.shape[dim]
        if plate.subsampled and count == plate.size:
            x = x.index_select(dim, indices[plate.name].to(x.device))
        elif count != plate.batch:
            whole = f" of {plate.size}" if plate.subsampled else ""
            raise ValueError(
                f"{label} has {count} rows in dimension {dim}, but plate '{plate.name}' has "
                f"{plate.batch}{whole}; pass the plate's rows, or all of them"
            )
    return x


def _source(
    label: str,
    get: Callable[..., Any],
    tensor: Tensor,
    plates: Sequence[Plate],
    argument: int | str | None,
) -> Source:
    names = tuple(plate.name for plate in plates)
    features = tensor.shape[len(names) :]
    return Source(label, get, names, features, tensor.dtype, tensor.device, argument)


def _refuse_ambiguous(tensors: Mapping[int | str, Tensor], group: str) -> None:
    names = [f"{_label(key)} {tuple(tensor.shape)}" for key, tensor in tensors.items()]
    most = max(tensor.dim() for tensor in tensors.values())
    picks = ", ".join(
        (f"kwargs[{key!r}]" if isinstance(key, str) else f"args[{key}]")
        + ("" if tensor.dim() == most else "[" + ", ".join(["...", *["None"] * (most - tensor.dim())]) + "]")
        for key, tensor in tensors.items()
    )
    raise ValueError(
        f"several arguments line up with the plates of {group}: {'; '.join(names)}. Say what the "
        f"encoder reads: inputs=lambda *args, **kwargs: torch.cat([{picks}], dim=-1), or one of them"
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
