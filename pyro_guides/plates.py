"""Opens the model's plates on the guide's side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from torch import Tensor

from pyro_guides.structure import Plate, Structure, random_subset

__all__ = ["differ", "open_plate", "subsample_indices", "user_plates"]


def subsample_indices(plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
    """The elements that subsampled plates take; those of the trace, if the guide is replayed."""
    return {
        name: plate.indices
        for name, plate in plates.items()
        if plate.size != -1 and plate.subsample_size < plate.size
    }


def open_plate(plate: Plate, *, fresh: bool) -> pyro.plate:
    """Open a plate as the model does; a ``fresh`` subsample where the model asks for any rows."""
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
