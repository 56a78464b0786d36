"""Encoders of sets: contexts of groups that differ in how many elements they have.

All sets of a batch lie flat in one tensor, with an index that says which set each element belongs to:
nothing is padded, and a set may be empty.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.arguments import check_flags, check_sizes
from pyro_guides.encoders.late import Late
from pyro_guides.encoders.mlp import MLP, ResidualBlock
from pyro_guides.layers import ScaledLinear

__all__ = ["DeepSet", "Pooling", "SetEncoder", "check_sets", "initial_log_pseudo_counts"]

_SMALLEST_PSEUDO_COUNT, _LARGEST_PSEUDO_COUNT = 0.1, 100.0


class SetEncoder(nn.Module, ABC):
    """From sets of elements to one context per set.

    To write one, implement ``forward`` so that it depends neither on the order of the elements nor on
    the other sets, and so that a set without elements has a context like any other. Elements that a mask
    takes out have been removed before.
    """

    @abstractmethod
    def forward(self, elements: Tensor, index: Tensor, count: int) -> Tensor:
        """One context per set.

        Args:
            elements: the elements of all sets, ``(M, *features)``.
            index: which set each element belongs to, integers ``(M,)`` from 0 to ``count`` - 1, in any
                order.
            count: how many sets there are.

        Returns:
            ``(count, C)``.
        """


@final
class Pooling(nn.Module):
    r"""From features of elements to a context per set; see :class:`DeepSet`.

    Args:
        width: C, the number of features and of values in the context.
        depth: how many residual blocks follow.
        options: dtype and device.

    Shapes: ``(M, C), (M,) -> (count, C)``.
    """

    def __init__(self, width: int, depth: int, **options: Any) -> None:
        super().__init__()
        self.log_pseudo_counts = nn.Parameter(initial_log_pseudo_counts(width, **options))
        self.linear = ScaledLinear(2 * width, width, **options)
        self.blocks = nn.Sequential(*(ResidualBlock(width, **options) for _ in range(depth)))

    def forward(self, features: Tensor, index: Tensor, count: int) -> Tensor:
        pseudo_counts = self.log_pseudo_counts.exp()
        sizes = features.new_zeros(count).index_add(0, index, features.new_ones(len(index))).unsqueeze(-1)
        sums = features.new_zeros(count, features.shape[-1]).index_add(0, index, features)
        means = sums / (sizes + pseudo_counts)
        precisions = (sizes / pseudo_counts).log1p()
        return cast("Tensor", self.blocks(self.linear(torch.cat([means, precisions], dim=-1))))


@final
class DeepSet(SetEncoder):
    r"""Sums of a residual network's features over each set, shrunk by the size of the set.

    .. math::
        h_m = \phi(x_m), \qquad
        p_c = \Big( \frac{\sum_m h_{mc}}{n + k_c},\ \log\big(1 + \tfrac{n}{k_c}\big) \Big), \qquad
        \text{context} = \rho(p)

    A posterior mean shrinks the mean of a group by n / (n + k) for some k, and its log standard deviation
    is linear in log(n + k). With learned pseudo-counts k, one per feature and spread over orders of magnitude
    at the start, both are linear in p; and as φ and ρ start linear (:class:`MLP`), the context always holds
    such a view of the elements. The empty set has p = 0, and a learned context.

    Layers are created on the first call, in the dtype and on the device of the elements, whose statistics
    standardize them.

    Args:
        width: C, the width of the layers and of the context.
        depth: how many residual blocks φ has, and how many ρ has.
        missing: NaN marks a missing value within an element, see :class:`Standardize`.

    Shapes: ``(M, ...), (M,) -> (count, C)``; trailing dimensions are flattened.

    Raises:
        ValueError: ``width`` is less than 1 or ``depth`` is negative; elements and index do not fit.

    Source: Manzil Zaheer et al., "Deep Sets", 2017, arXiv:1703.06114.

    Example:
        >>> import torch
        >>> index = torch.tensor([0, 2, 2, 0, 2])  # two elements in set 0, none in set 1, three in set 2
        >>> DeepSet(width=32)(torch.randn(5, 4), index, 3).shape
        torch.Size([3, 32])
    """

    def __init__(self, width: int = 128, depth: int = 2, *, missing: bool = False) -> None:
        super().__init__()
        check_sizes("DeepSet", width=width)
        check_sizes("DeepSet", 0, depth=depth)
        check_flags("DeepSet", missing=missing)
        self.elements = MLP(width, depth, missing=missing)
        self.pooling = Late(Pooling, width, depth)

    def forward(self, elements: Tensor, index: Tensor, count: int) -> Tensor:
        elements = check_sets(self, elements, index, count, fitted=self.elements.standardize.mean is not None)
        return self.pooling(self.elements(elements), index, count)


def initial_log_pseudo_counts(size: int, **options: Any) -> Tensor:
    """Logarithms of pseudo-counts over the orders of magnitude that set sizes come in."""
    smallest, largest = math.log(_SMALLEST_PSEUDO_COUNT), math.log(_LARGEST_PSEUDO_COUNT)
    return torch.linspace(smallest, largest, size, **options)


def check_sets(encoder: SetEncoder, elements: Tensor, index: Tensor, count: int, *, fitted: bool) -> Tensor:
    """The elements as rows ``(M, F)``, once it is known that the index fits them.

    Raises:
        ValueError: the index has another shape or dtype, or names a set that is not there; or there is
            no element on the first call, which takes the statistics.
    """
    name = type(encoder).__name__
    if elements.dim() < 1 or index.shape != elements.shape[:1] or index.dtype != torch.long:
        raise ValueError(
            f"{name}: expected elements (M, ...) and an index of dtype torch.int64 and shape (M,), got "
            f"{tuple(elements.shape)} and an index of {index.dtype} and shape {tuple(index.shape)}"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(
            f"{name}: the index must lie between 0 and {count - 1}, as there are {count} sets, got "
            f"{int(index.min())} to {int(index.max())}"
        )
    if not fitted and not len(index):
        raise ValueError(f"{name}: the first call needs at least one element, got {tuple(elements.shape)}")
    return elements.unsqueeze(-1) if elements.dim() == 1 else elements.flatten(1)
