"""How many times each row counts, taken apart from what scales sites within rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_guides.objectives.rows import Rows, Site, scale_of

__all__ = ["split_scales"]

_SAME = 1e-9  # relative difference between factors that are one number


def split_scales(sites: Iterable[Site], rows: Rows) -> float | Tensor:
    """Take out of the sites of rows what scales a whole row, and return it.

    That is the factor of subsampled row plates, and any scale that all of these sites have in common.

    Raises:
        ValueError: a row sees a part of its own data.
    """
    inside = [site for site in sites if rows.hold(site)]
    if not inside:
        return 1.0
    _check_not_subsampled(inside, rows)
    own = [site["scale"] / rows.scale(site) for site in inside]
    common = (
        own[0] if all(_same(scale, own[0]) for scale in own) and _by_row(own[0], inside[0], rows) else 1.0
    )
    for site, scale in zip(inside, own, strict=True):
        site["scale"] = 1.0 if scale is common or _same(scale, common) else scale
    return common * rows.scale(inside[0])


def _check_not_subsampled(sites: Iterable[Site], rows: Rows) -> None:
    row = f"rows are the elements of {sorted(rows.plates)}"
    if not rows.plates:
        row = "no plate holds all latents, so that the posterior is a joint one"
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.name not in rows.plates and abs(scale_of(frame) - 1.0) > _SAME:
                raise ValueError(
                    f"{row}, but '{site['name']}' sees {frame.size} of the {frame.full_size} elements of "
                    f"plate '{frame.name}': weights of part of a row's data, raised to the power of N/B, are "
                    "no importance weights. Pass all data, take Trace_ELBO, or name the plates of the "
                    "independent rows with plates=[...]"
                )


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    if a is b:
        return True
    x, y = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return x.shape == y.shape and bool((x - y).abs().le(_SAME * y.abs()).all())


def _by_row(scale: float | Tensor, site: Site, rows: Rows) -> bool:
    """Whether a scale is one number per row."""
    shape = scale.shape if isinstance(scale, Tensor) else ()
    return all(size == 1 or at - len(shape) in rows.dims(site) for at, size in enumerate(shape))
