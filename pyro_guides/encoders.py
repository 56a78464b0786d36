"""Networks from a datum to its context, and the standardization of what they read.

Any ``nn.Module`` that maps rows ``(B, ...)`` to contexts ``(B, C)`` is an encoder; the guide sizes the
heads behind it, so nobody computes an output size. :class:`MLP` is the default for flat features.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from pyro_guides.layers import ScaledLinear

__all__ = ["MLP", "Standardize"]

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


@final
class _ResidualBlock(nn.Module):
    """h + W₂ silu(W₁ norm(h)), starting as the identity."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, **options)
        self.inner = ScaledLinear(width, width, **options)
        self.outer = ScaledLinear(width, width, zero=True, **options)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(silu(self.inner(self.norm(h))))


@final
class MLP(nn.Module):
    r"""A residual network on standardized features: the default encoder.

    .. math:: h_0 = W \tilde x, \qquad h_{l+1} = h_l + W_2\, \mathrm{silu}(W_1\, \mathrm{norm}(h_l))

    The blocks start as the identity and the last layer is not normalized, so the context always holds a
    linear view of the datum: posterior means that are linear in x are represented exactly. No batch
    norm (it would couple the rows) and no dropout (it would add noise to the ELBO).

    Layers are created on the first call, when the number of features is known, in the dtype and on the
    device of the data.

    Args:
        width: C, the width of the layers and of the context.
        depth: how many residual blocks; 0 leaves a linear encoder.
        missing: NaN marks a missing value, see :class:`Standardize`. Without it, NaN is an error.

    Shapes: ``(B, ...) -> (B, C)``; trailing dimensions are flattened.

    Raises:
        ValueError: ``width`` is less than 1 or ``depth`` is negative.

    Source: Kaiming He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.

    Example:
        >>> import torch
        >>> MLP(width=32)(torch.randn(7, 5)).shape
        torch.Size([7, 32])
    """

    def __init__(self, width: int = 128, depth: int = 2, *, missing: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"MLP: width must be at least 1, got {width}")
        if depth < 0:
            raise ValueError(f"MLP: depth must not be negative, got {depth}")
        self.width = width
        self.depth = depth
        self.standardize = Standardize(missing=missing)
        self.linear: nn.Module | None = None
        self.blocks = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardize(x.flatten(1))
        linear = self.linear or self._build(x)
        return cast("Tensor", self.blocks(linear(x)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Layers that were never built here may still be loaded; children are loaded after this.
        weight = state_dict.get(prefix + "linear.weight")
        if self.linear is None and weight is not None:
            self._build(weight.new_empty(0, weight.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _build(self, x: Tensor) -> nn.Module:
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        self.linear = ScaledLinear(x.shape[-1], self.width, **options)
        for _ in range(self.depth):
            self.blocks.append(_ResidualBlock(self.width, **options))
        return self.linear
