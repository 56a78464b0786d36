"""Encoders of sets whose elements see each other, and are weighed by learned attention."""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.arguments import check_flags, check_sizes
from pyro_guides.encoders.late import Late
from pyro_guides.encoders.mlp import MLP, ResidualBlock
from pyro_guides.encoders.sets import SetEncoder, check_sets, initial_log_pseudo_counts
from pyro_guides.layers import ScaledLinear

__all__ = ["SetTransformer"]


@final
class _Attention(nn.Module):
    r"""Learned queries that attend to the elements of each set, and to nothing.

    .. math::
        o = \frac{\sum_m e^{s_m} v_m}{k + \sum_m e^{s_m}}, \qquad
        \ell = \log\Big(1 + \tfrac1k \sum_m e^{s_m}\Big)

    Ordinary attention forgets how many elements there are. The weight k of nothing, learned for every query
    and head, shrinks o as the prior shrinks a posterior mean; ℓ is the log-count, if some elements count
    more than others. Without elements both are zero.

    Args:
        width: C, the number of features of an element.
        queries: Q, the number of learned queries.
        heads: H, the number of heads.
        options: dtype and device.

    Shapes: ``(M, C), (M,) -> (count, Q, C), (count, Q, H)``.
    """

    def __init__(self, width: int, queries: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, heads, width // heads, **options))
        log_weights = initial_log_pseudo_counts(queries * heads, **options)
        self.log_weight_of_nothing = nn.Parameter(log_weights.reshape(queries, heads))
        self.norm = nn.LayerNorm(width, **options)
        self.keys = ScaledLinear(width, width, **options)
        self.values = ScaledLinear(width, width, **options)

    def forward(self, features: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        heads, size = self.queries.shape[1:]
        keys = self.keys(self.norm(features)).reshape(-1, heads, size)
        # The values are not normalized: what is linear in the elements stays so.
        values = self.values(features).reshape(-1, 1, heads, size)
        scores = torch.einsum("mhd,qhd->mqh", keys, self.queries) / math.sqrt(size)  # (M, Q, H)
        largest = self._largest(scores, index, count)
        weights = (scores - largest[index]).exp()
        log_nothing = self.log_weight_of_nothing - largest
        totals = log_nothing.exp().index_add(0, index, weights)
        sums = values.new_zeros(*totals.shape, size).index_add(0, index, weights.unsqueeze(-1) * values)
        return (sums / totals.unsqueeze(-1)).flatten(2), totals.log() - log_nothing

    @torch.no_grad()
    def _largest(self, scores: Tensor, index: Tensor, count: int) -> Tensor:
        """The largest log weight in each set: relative to it, no weight overflows."""
        largest = self.log_weight_of_nothing.repeat(count, 1, 1)
        return largest.scatter_reduce(0, index.reshape(-1, 1, 1).expand_as(scores), scores, "amax")


@final
class _InducedAttention(nn.Module):
    """Elements learn of their set through a few induced points; starts as the identity."""

    def __init__(self, width: int, heads: int, inducing: int, **options: Any) -> None:
        super().__init__()
        self.heads = heads
        self.induce = _Attention(width, inducing, heads, **options)
        self.norm = nn.LayerNorm(width, **options)
        self.queries = ScaledLinear(width, width, **options)
        self.keys = ScaledLinear(width, width, **options)
        self.output = ScaledLinear(width, width, zero=True, **options)
        self.block = ResidualBlock(width, **options)

    def forward(self, features: Tensor, index: Tensor, count: int) -> Tensor:
        induced, _ = self.induce(features, index, count)  # (count, Q, C)
        keys = self.keys(induced).unflatten(-1, (self.heads, -1))[index]
        queries = self.queries(self.norm(features)).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("mhd,mqhd->mqh", queries, keys) / math.sqrt(queries.shape[-1])
        values = induced.unflatten(-1, (self.heads, -1))[index]
        seen = torch.einsum("mqh,mqhd->mhd", scores.softmax(1), values).flatten(1)
        return cast("Tensor", self.block(features + self.output(seen)))


@final
class _Transformer(nn.Module):
    """From features of elements to contexts of sets."""

    def __init__(
        self, width: int, heads: int, seeds: int, inducing: int, blocks: int, **options: Any
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _InducedAttention(width, heads, inducing, **options) for _ in range(blocks)
        )
        self.pool = _Attention(width, seeds, heads, **options)
        self.linear = ScaledLinear(seeds * (width + heads), width, **options)
        self.mix = nn.Sequential(*(ResidualBlock(width, **options) for _ in range(2)))

    def forward(self, features: Tensor, index: Tensor, count: int) -> Tensor:
        for block in self.blocks:
            features = block(features, index, count)
        means, precisions = self.pool(features, index, count)
        pooled = torch.cat([means.flatten(1), precisions.flatten(1)], dim=-1)
        return cast("Tensor", self.mix(self.linear(pooled)))


@final
class SetTransformer(SetEncoder):
    r"""Attention among the elements of each set, and from learned seeds to them.

    Blocks of induced attention let every element see its set; then seeds, learned queries, pool it. Where
    :class:`DeepSet` counts every element alike, attention weighs them: with scores :math:`s_m`, values
    :math:`v_m` and a learned weight k of nothing,

    .. math::
        o = \frac{\sum_m e^{s_m} v_m}{k + \sum_m e^{s_m}}, \qquad
        \ell = \log\Big(1 + \tfrac1k \sum_m e^{s_m}\Big).

    With elements as precise as :math:`e^{s_m}` and a prior as precise as k, these are the posterior mean and,
    up to a factor of -2 and a constant, its log standard deviation. The weight of nothing is what attention
    by itself lacks: without it, it cannot count. The empty set has o = 0 and ℓ = 0, and a learned context.

    The cost is linear in the number of elements. Blocks start as the identity and values are not normalized,
    so the context always holds a linear view of the weighed elements. Layers are created on the first call,
    in the dtype and on the device of the elements, whose statistics standardize them.

    Args:
        width: C, the width of the layers and of the context.
        heads: how many heads attend side by side; ``width`` is a multiple of it.
        seeds: how many queries pool the set.
        inducing: how many points the elements see their set through.
        blocks: how many blocks of induced attention there are.
        missing: NaN marks a missing value within an element, see :class:`Standardize`.

    Shapes: ``(M, ...), (M,) -> (count, C)``; trailing dimensions are flattened.

    Raises:
        ValueError: a size is less than 1, ``blocks`` is negative, or ``width`` is not a multiple of
            ``heads``; elements and index do not fit.

    Source: Juho Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural
    Networks", 2019, arXiv:1810.00825.

    Example:
        >>> import torch
        >>> index = torch.tensor([0, 2, 2, 0, 2])  # two elements in set 0, none in set 1, three in set 2
        >>> SetTransformer(width=32)(torch.randn(5, 4), index, 3).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        width: int = 128,
        heads: int = 4,
        seeds: int = 4,
        inducing: int = 16,
        blocks: int = 1,
        *,
        missing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("SetTransformer", width=width, heads=heads, seeds=seeds, inducing=inducing)
        check_sizes("SetTransformer", 0, blocks=blocks)
        check_flags("SetTransformer", missing=missing)
        if width % heads:
            raise ValueError(
                f"SetTransformer: width must be a multiple of heads, got width={width} and heads={heads}"
            )
        self.elements = MLP(width, 1, missing=missing)
        self.transformer = Late(_Transformer, width, heads, seeds, inducing, blocks)

    def forward(self, elements: Tensor, index: Tensor, count: int) -> Tensor:
        elements = check_sets(self, elements, index, count, fitted=self.elements.standardize.mean is not None)
        return self.transformer(self.elements(elements), index, count)
