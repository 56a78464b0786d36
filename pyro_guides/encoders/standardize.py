"""Standardization: what every encoder does first to what it reads."""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.arguments import check_flags

__all__ = ["Standardize"]

# Inputs larger than this are outliers or come from a feature that hardly varied before; from here on they
# grow like a logarithm, so that one wild value cannot drown a row.
_LARGEST_INPUT = 10.0


@final
class Standardize(nn.Module):
    r"""Centres and scales every feature with the mean and spread of the first rows it sees.

    .. math:: x \mapsto (x - m) / s, \qquad s = \max(\mathrm{sd},\ \tfrac1{10} \max |x - m|)

    The second term keeps a feature that is almost always constant from being blown up. All rows behind
    the statistics land within ±10; beyond that, values grow like a logarithm. The statistics are taken
    once, when the guide is set up, and then frozen: q must not change with the number of calls.
    ``guide.setup(all_rows)`` takes them from all rows; :meth:`fit` resets them.

    Args:
        missing: whether NaN marks a missing value. If so, NaN becomes zero (the mean) and a second
            block of channels says which values are there: F features become 2F.

    Shapes: ``(..., F) -> (..., F)``, or ``(..., 2F)`` with ``missing``.

    Example:
        >>> import torch
        >>> layer = Standardize()
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """

    def __init__(self, *, missing: bool = False) -> None:
        super().__init__()
        check_flags("Standardize", missing=missing)
        self.missing = missing
        self.register_buffer("mean", None)
        self.register_buffer("inverse_scale", None)
        self.mean: Tensor | None
        self.inverse_scale: Tensor | None

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardize:
        """Take the statistics of ``x`` ``(..., F)``, over all dimensions but the last."""
        rows = x.detach().reshape(-1, x.shape[-1])
        there = rows.isfinite()
        count = there.sum(0)
        values = torch.where(there, rows, torch.zeros_like(rows))
        mean = values.sum(0) / count.clamp(min=1)
        deviation = torch.where(there, rows - mean, torch.zeros_like(rows))
        scale = (deviation.square().sum(0) / count.clamp(min=1)).sqrt()
        scale = torch.maximum(scale, deviation.abs().amax(0) / _LARGEST_INPUT)
        # One row says nothing about where a feature is centred or how far it spreads.
        mean = torch.where(count > 1, mean, torch.zeros_like(mean))
        constant = scale <= 8.0 * torch.finfo(x.dtype).eps * mean.abs()  # no more than rounding
        self.mean = mean
        self.inverse_scale = torch.where(constant, torch.ones_like(scale), 1.0 / scale)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.fit(x)
        scaled = (x - cast("Tensor", self.mean)) * cast("Tensor", self.inverse_scale)
        clamped = scaled.clamp(-_LARGEST_INPUT, _LARGEST_INPUT)
        excess = scaled - clamped
        scaled = clamped + excess.abs().log1p().copysign(excess)
        if not self.missing:
            return scaled
        there = scaled.isfinite()
        filled = torch.where(there, scaled, torch.zeros_like(scaled))
        return torch.cat([filled, there.to(x.dtype)], dim=-1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Statistics that were never taken here may still be loaded.
        for name in ("mean", "inverse_scale"):
            if getattr(self, name) is None and prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
