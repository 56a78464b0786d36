"""Opens the model's plates on the guide's side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
from torch import Tensor

from pyro_guides.structure import Plate, Structure, random_subset

__all__ = ["differ", "open_plates", "subsample_indices", "user_plates"]


def subsample_indices(plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
    """The elements that subsampled plates take; those of the trace, if the guide is replayed."""
    return {
        name: plate.indices
        for name, plate in plates.items()
        if plate.size != -1 and plate.subsample_size < plate.size
    }


def open_plates(
    structure: Structure, names: Collection[str], users: dict[str, pyro.plate], *, fresh: bool
) -> dict[str, pyro.plate]:
    """The named plates as the model opens them, besides those that the user has opened.

    Args:
        structure: the model's structure.
        names: the plates that the guide needs; those that this call lacks are left out.
        users: plates that the user has opened.
        fresh: whether to subsample anew where the model asks for any rows.
    """
    needed = structure.plates_of((set(names) & structure.plates.keys()) - users.keys())
    return {**users, **{plate.name: _open(plate, fresh=fresh) for plate in needed}}


def _open(plate: Plate, *, fresh: bool) -> pyro.plate:
    if plate.size == -1:
        return pyro.plate(plate.name, dim=plate.dim)
    if not plate.subsampled:
        return pyro.plate(plate.name, plate.size, dim=plate.dim)
    indices = random_subset(plate.size, plate.batch) if fresh else plate.indices
    return pyro.plate(plate.name, plate.size, subsample=indices, dim=plate.dim)


def differ(structure: Structure, indices: Mapping[str, Tensor]) -> bool:
    """Whether plates were opened for other elements than those the structure was read for."""
    return any(
        name in structure.plates and structure.plates[name].indices is not index
        for name, index in indices.items()
    )


def user_plates(
    create_plates: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, pyro.plate]:
    """What a user's ``create_plates`` returns, by name.

    Raises:
        TypeError: it returns something else than plates.
    """
    if create_plates is None:
        return {}
    plates = create_plates(*args, **kwargs)
    plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            raise TypeError(f"create_plates must return pyro.plate objects, got {plate!r}")
    return {plate.name: plate for plate in plates}
