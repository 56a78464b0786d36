"""What one call of a model looks like: its latents, plates and observations, immutable."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_guides.distributions import Alphabet
from pyro_guides.distributions.transforms import is_fixed

__all__ = ["Latent", "Observed", "Plate", "Structure", "is_one"]


@final
@dataclass(frozen=True, eq=False)
class Plate:
    """A vectorized plate as one call of the model opened it.

    Attributes:
        name: its name.
        dim: its dimension, negative.
        size: its full size; -1 for a plate without one.
        batch: how many elements this call uses.
        indices: which ones, where it uses some only.
        chosen: whether the model itself names these, rather than asking for any.
    """

    name: str
    dim: int
    size: int
    batch: int
    indices: Tensor | None = None
    chosen: bool = False

    @property
    def subsampled(self) -> bool:
        """Whether this call uses some of the elements only."""
        return self.size not in (-1, self.batch)

    @property
    def scale(self) -> float:
        """How many elements each element of this call stands for."""
        return self.size / self.batch if self.subsampled else 1.0


@final
@dataclass(frozen=True, eq=False)
class Latent:
    """A latent site.

    Attributes:
        name: its name.
        plates: the names of its plates, leftmost dimension first.
        support: its constrained support.
        transform: the bijection from unconstrained values to the support; None for a discrete site.
        alphabet: the values of a discrete site; None for a continuous one.
        event_shape: the shape of one constrained value.
        unconstrained_shape: the shape of one unconstrained value; of the encoding of a discrete one.
        mask: the model's mask on it, broadcast over the plates; None if there is none.
        inner_mask: a mask inside its distribution, below ``to_event``, and
        inner_mask_dim: how many of that mask's dimensions belong to the event.
        scale: the model's scale on it, plates left out.
    """

    name: str
    plates: tuple[str, ...]
    support: Constraint
    transform: Transform | None
    alphabet: Alphabet | None
    event_shape: torch.Size
    unconstrained_shape: torch.Size
    mask: Tensor | bool | None
    inner_mask: Tensor | None
    inner_mask_dim: int
    scale: float | Tensor

    @property
    def size(self) -> int:
        """How many unconstrained values one plate element has."""
        return self.unconstrained_shape.numel()

    @property
    def discrete(self) -> bool:
        """Whether the site is discrete."""
        return self.alphabet is not None

    def unconstrain(self, value: Tensor) -> Tensor:
        """The unconstrained value, or the encoding, of a value: ``(*batch, size)``."""
        if self.alphabet is not None:
            return self.alphabet.encode(value)
        u: Tensor = self.require_transform().inv(value)
        return u.reshape(*u.shape[: u.dim() - len(self.unconstrained_shape)], self.size)

    def require_transform(self) -> Transform:
        """The bijection of a continuous site.

        Raises:
            TypeError: the site is discrete.
        """
        if self.transform is None:
            raise TypeError(f"site '{self.name}' is discrete")
        return self.transform

    @property
    def fixed(self) -> bool:
        """Whether nothing about the site holds a tensor that another call may change."""
        plain = self.mask is None and self.inner_mask is None and is_one(self.scale)
        return plain and is_fixed(self.support)

    @property
    def even(self) -> bool:
        """Whether nothing about the site can differ between the elements of its plates."""
        masked = self.mask is not None or self.inner_mask is not None
        return not masked and not isinstance(self.scale, Tensor) and is_fixed(self.support)


@final
@dataclass(frozen=True, eq=False)
class Observed:
    """An observed site.

    Attributes:
        name: its name.
        plates: the names of its plates, leftmost dimension first.
        argument: the model argument that is its value; None if its value is computed.
        event_dim: how many dimensions one value has.
        mask: the model's mask on it; None if there is none.
        latent: what the site is in calls that do not observe it; None if all do.
        value: its value, if it is computed and the site is latent in other calls.
    """

    name: str
    plates: tuple[str, ...]
    argument: int | str | None
    event_dim: int = 0
    mask: Tensor | bool | None = None
    latent: Latent | None = None
    value: Tensor | None = None

    def unconstrained(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The unconstrained value of a site that is latent in other calls, ``(*batch, size)``."""
        value = self.value
        if isinstance(self.argument, int):
            value = args[self.argument]
        elif self.argument is not None:
            value = kwargs[self.argument]
        if value is None or self.latent is None:
            raise TypeError(f"site '{self.name}' is observed in every call")
        return self.latent.unconstrain(value)


@final
@dataclass(frozen=True, eq=False)
class Structure:
    """What one call of a model looks like.

    Attributes:
        latents: the latents, in the model's order, by name.
        plates: the plates of latent and observed sites, by name.
        observed: the observed sites, by name.
        values: the values the latents had while the model was read, constrained.
        static: whether a call with arguments of the same signature has the same structure.
    """

    latents: Mapping[str, Latent]
    plates: Mapping[str, Plate]
    observed: Mapping[str, Observed]
    values: Mapping[str, Tensor]
    static: bool

    @property
    def depth(self) -> int:
        """How many dimensions on the left of events the plates take."""
        return max((-plate.dim for plate in self.plates.values()), default=0)

    def plates_of(self, names: Collection[str]) -> list[Plate]:
        """The named plates, leftmost dimension first."""
        return sorted((self.plates[name] for name in names), key=lambda plate: plate.dim)

    def batch_shape(self, names: Collection[str], *, full: bool = False) -> torch.Size:
        """The batch shape inside the named plates; of their full sizes if ``full``."""
        plates = self.plates_of(names)
        shape = [1] * max((-plate.dim for plate in plates), default=0)
        for plate in plates:
            shape[plate.dim] = plate.size if full and plate.size != -1 else plate.batch
        return torch.Size(shape)

    def with_full_plates(self, names: Collection[str]) -> Structure:
        """The same structure with all elements of the named plates."""
        full = {
            name: replace(self.plates[name], batch=self.plates[name].size, indices=None) for name in names
        }
        return replace(self, plates={**self.plates, **full}) if full else self

    def completed_by(self, other: Structure) -> Structure:
        """The same structure with what another reading of the model found behind the last latent."""
        return replace(self, observed=other.observed, plates={**other.plates, **self.plates})

    def with_latents(self, latents: Mapping[str, Latent]) -> Structure:
        """The same structure with other descriptions of its latents."""
        return replace(self, latents=latents)

    def without_values(self) -> Structure:
        """The structure alone, to be kept without the tensors it was read with."""
        observed = {name: replace(site, mask=None, value=None) for name, site in self.observed.items()}
        return replace(self, values={}, observed=observed)


def is_one(scale: float | Tensor) -> bool:
    """Whether a scale is the number one."""
    return not isinstance(scale, Tensor) and scale == 1.0
