"""Which plates the leading dimensions of a tensor are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from torch import Tensor

from pyro_guides.structure import Observed, Plate, Structure

__all__ = ["leading_plates"]

Plates = tuple[Plate, ...]


def leading_plates(
    tensor: Tensor,
    structure: Structure,
    label: str,
    *,
    wanted: Collection[str],
    allowed: Collection[str] | None = None,
    preferred: str | None = None,
    argument: int | str | None = None,
) -> Plates:
    """The plates that the leading dimensions of ``tensor`` are, as many as possible.

    A tensor that the model observes has the plates of its site. Any other lines up with plates that some
    site shares, in the order of their dimensions: a dimension fits a plate if it has the plate's full size
    or the size of its batch.

    Args:
        tensor: the tensor.
        structure: the model's structure.
        label: how error messages call the tensor.
        wanted: the plates that matter; about others there is no need to decide.
        allowed: no other plates than these; any if None.
        preferred: the plate that decides if several fit.
        argument: the model's argument that the tensor is, if it is one.

    Raises:
        ValueError: different plates fit equally well.
    """
    site = _observed_as(argument, structure)
    if site is not None and allowed is None:
        exact = _plates_of_value(tensor, site, structure)
        if exact is not None:
            return exact
    options = list(_options(tensor, structure, allowed))
    for better in (len, lambda option: any(plate.name == preferred for plate in option)):
        best = max(map(better, options), default=0)
        options = [option for option in options if better(option) == best]
    if len(options) > 1 and any(plate.name in wanted for option in options for plate in option):
        names = " or ".join(str([plate.name for plate in option]) for option in options)
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}, whose leading dimensions may be the plates {names}; "
            f"name it with amortize=['{options[0][0].name}'], or say what each plate's encoder reads: "
            f"inputs={{'{options[0][0].name}': lambda *args: ..., ...}}"
        )
    return options[0] if options else ()


def _observed_as(argument: int | str | None, structure: Structure) -> Observed | None:
    if argument is None:
        return None
    sites = [site for site in structure.observed.values() if site.argument == argument]
    return sites[0] if len(sites) == 1 else None


def _plates_of_value(tensor: Tensor, site: Observed, structure: Structure) -> Plates | None:
    """The plates of an observed value, where its dimensions are one plate each."""
    plates = tuple(structure.plates_of(site.plates))
    batch = tensor.shape[: tensor.dim() - site.event_dim]
    dense = len(batch) == len(plates) and [plate.dim for plate in plates] == list(range(-len(plates), 0))
    return plates if dense and _fits(batch, plates) else None


def _options(tensor: Tensor, structure: Structure, allowed: Collection[str] | None) -> Iterator[Plates]:
    stacks = {latent.plates for latent in structure.latents.values()}
    stacks |= {site.plates for site in structure.observed.values()}
    seen = set()
    for stack in sorted(stacks):
        names = [name for name in stack if allowed is None or name in allowed]
        plates = structure.plates_of(names)
        for count in range(1, min(len(plates), tensor.dim()) + 1):
            for option in combinations(plates, count):
                key = tuple(plate.name for plate in option)
                if key not in seen and _fits(tensor.shape, option):
                    seen.add(key)
                    yield option


def _fits(shape: Sequence[int], plates: Plates) -> bool:
    return all(n in (plate.size, plate.batch) for n, plate in zip(shape, plates, strict=False))
