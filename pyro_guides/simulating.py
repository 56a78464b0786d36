"""What a model has simulated, in the place of the arguments that it observes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_guides.inputs import with_observations
from pyro_guides.inputs.given import unpack
from pyro_guides.structure import Structure

__all__ = ["as_argument", "check_reach"]


def as_argument(
    structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, value: Tensor | None
) -> Tensor:
    """What an observed site has drawn, in the dtype of the argument whose place it takes.

    Args:
        structure: the model's structure.
        args: the model's arguments.
        kwargs: its keyword arguments.
        name: the observed site.
        value: what it has drawn in M simulations, ``(M, *natural shape)``; None if it draws nothing.

    Raises:
        ValueError: simulated data cannot take the place of the real ones.
    """
    argument = structure.observed[name].argument
    if value is None:
        raise ValueError(
            f"the factor '{name}' weighs latents but draws nothing, so the model cannot simulate what it "
            "describes; write the factor as a prior or as an observed site"
        )
    if argument is None:
        raise ValueError(
            f"observed site '{name}' is computed from the model's arguments, so simulated data cannot take "
            "its place; pass its value to the model and on to obs= unchanged"
        )
    real = args[argument] if isinstance(argument, int) else kwargs[argument]
    if value.shape[1:] != real.shape:
        raise ValueError(
            f"the model draws '{name}' in shape {tuple(value.shape[1:])}, but is given it in shape "
            f"{tuple(real.shape)}; give it in the shape of the site"
        )
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).reshape(len(value), -1).any(1).sum())
        raise ValueError(
            f"'{name}' holds NaN or infinity in {bad} of {len(value)} simulated data sets; take priors with "
            "lighter tails"
        )
    return value.to(real.dtype)


def check_reach(
    sources: Collection[Any],
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    data: Mapping[str, Tensor],
) -> None:
    """Raise a ValueError if encoders read the same whatever is simulated.

    Args:
        sources: where encoders find what they read.
        structure: the model's structure.
        args: the model's arguments.
        kwargs: its keyword arguments.
        data: one simulated data set, by observed site.
    """
    simulated = with_observations(structure, args, kwargs, data)
    for source in sources:
        now = unpack(source.get(*simulated[0], **simulated[1]), source.label).tensors
        before = unpack(source.get(*args, **kwargs), source.label).tensors
        if any(not torch.equal(now[key], before[key]) for key in before):
            return
    labels = sorted({source.label for source in sources})
    raise ValueError(
        f"the encoders read {', '.join(labels)}, which simulated values of {sorted(data)} do not reach; let "
        "inputs=... compute what they read from the observed arguments"
    )
