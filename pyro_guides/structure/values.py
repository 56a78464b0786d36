"""Values of latents to read a model at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_guides.distributions.discrete import alphabet
from pyro_guides.distributions.transforms import bijection

__all__ = ["Init", "feasible_value", "started"]

Init = Callable[[dict[str, Any]], Tensor]


def feasible_value(site: dict[str, Any]) -> Tensor:
    """A value inside the support that costs no random number: the image of zero, or the first value."""
    fn = site["fn"]
    values = alphabet(fn)
    if values is not None:
        first = torch.zeros(fn.batch_shape + fn.event_shape, dtype=values.dtype, device=_device(fn))
        if values.kind == "one_hot":
            first[..., 0] = 1
        return first
    try:
        transform = bijection(fn.support)
    except NotImplementedError:
        return fn.sample()
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
    like = next(_parameters(fn), torch.zeros(()))
    return transform(torch.zeros(shape, dtype=like.dtype, device=like.device))


def _device(fn: Distribution) -> torch.device:
    return next(_parameters(fn), torch.zeros(())).device


def _parameters(fn: Distribution) -> Iterator[Tensor]:
    """The floating-point tensors of a distribution and of those it is made from."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, Distribution):
            yield from _parameters(value)


def started(init: Init, msg: dict[str, Any]) -> Any:
    """Where ``init`` starts a latent; None leaves that to the model.

    Raises:
        NotImplementedError: it can start the site nowhere.
        TypeError, ValueError: this is no value of the site.
    """
    name, shape = msg["name"], msg["fn"].shape()
    try:
        value: Any = init(msg)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"init_loc_fn has no value for latent site '{name}' ({error}); take Pyro's init_to_feasible, or "
            "init_to_value with values of your own"
        ) from error
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"init_loc_fn must return a tensor for '{name}', got {value!r}")
    fits = all(a in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False))
    if not fits or value.dim() > len(shape):
        raise ValueError(
            f"init_loc_fn starts latent site '{name}' at a value of shape {tuple(value.shape)}, expected "
            f"{tuple(shape)}"
        )
    return value
