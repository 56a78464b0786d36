"""The default encoder: a residual network from the features of a datum to its context."""

from __future__ import annotations

from typing import Any, cast, final

from torch import Tensor, nn
from torch.nn.functional import silu

from pyro_guides.arguments import check_flags, check_sizes
from pyro_guides.encoders.standardize import Standardize
from pyro_guides.layers import ScaledLinear

__all__ = ["MLP", "ResidualBlock"]


@final
class ResidualBlock(nn.Module):
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
        TypeError, ValueError: ``width`` is no int of at least 1, or ``depth`` is negative.

    Source: Kaiming He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.

    Example:
        >>> import torch
        >>> MLP(width=32)(torch.randn(7, 5)).shape
        torch.Size([7, 32])
    """

    def __init__(self, width: int = 128, depth: int = 2, *, missing: bool = False) -> None:
        super().__init__()
        check_sizes("MLP", width=width)
        check_sizes("MLP", 0, depth=depth)
        check_flags("MLP", missing=missing)
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
            self.blocks.append(ResidualBlock(self.width, **options))
        return self.linear
