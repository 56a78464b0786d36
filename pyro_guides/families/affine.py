"""Shifting and scaling, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST_LOG_SCALE", "Mapped", "affine", "affine_backward"]

# A layer stretches by at most e³ either way.
LARGEST_LOG_SCALE = 3.0

Mapped = tuple[Tensor, Tensor, Tensor]  # the value before scaling, tanh of the raw scale, the scale


def affine(parameters: Tensor, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor, Mapped]:
    """Map x, or map it back.

    Args:
        parameters: shifts and raw scales, ``(2, ...)``; zeros give the identity.
        x: what is mapped, ``(...)``.
        inverse: whether to map back.

    Returns:
        The mapped values, the log-scale of the map in both directions, and what the gradient needs.
    """
    shift, raw = parameters.unbind()
    share = torch.tanh(raw / LARGEST_LOG_SCALE)
    log_scale = share * LARGEST_LOG_SCALE
    scale = log_scale.exp()
    if inverse:
        x = (x - shift) / scale
        return x, log_scale, (x, share, scale)
    return torch.addcmul(shift, x, scale), log_scale, (x, share, scale)


def affine_backward(
    mapped: Mapped, in_value: Tensor, in_log_slope: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """From the gradients in the results of :func:`affine` to those in its parameters and in x."""
    x, share, scale = mapped
    if inverse:
        in_x = in_value / scale
        in_shift = -in_x
        in_log_scale = torch.addcmul(in_log_slope, in_value, x, value=-1.0)
    else:
        in_shift, in_x = in_value, in_value * scale
        in_log_scale = torch.addcmul(in_log_slope, in_x, x)
    in_raw = torch.addcmul(in_log_scale, in_log_scale * share, share, value=-1.0)
    return torch.stack([in_shift, in_raw]), in_x
