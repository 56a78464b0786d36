"""The linear layer that encoders and heads are made of, and modules in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["ScaledLinear", "evaluated"]

_GAIN = 4.0


@final
class ScaledLinear(nn.Module):
    r"""A linear layer whose output moves little when an optimizer moves all weights by a small step.

    .. math:: y = g\, W x + b, \qquad g = \min(1,\ 4 / \sqrt{F})

    Adam moves every weight by about the learning rate, and so moves y by F times that. The gain g turns
    this into :math:`4 \sqrt F`; the weights start 1/g times larger, so that y starts as that of an ordinary
    layer. With it the default encoder trains stably on real images at a learning rate of 0.03, at which
    ordinary layers of the same width diverge (``tests/test_digits.py``).

    Args:
        inputs: F, the number of inputs.
        outputs: the number of outputs.
        zero: whether the weights start at zero.
        options: dtype and device.

    Source: Greg Yang, Edward J. Hu, "Feature Learning in Infinite-Width Neural Networks", 2021,
    arXiv:2011.14522 (the idea of width-dependent multipliers).
    """

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False, **options: Any) -> None:
        super().__init__()
        self.gain = min(1.0, _GAIN / math.sqrt(inputs))
        self.bound = 0.0 if zero else 1.0 / (math.sqrt(inputs) * self.gain)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **options))
        self.bias = nn.Parameter(torch.empty(outputs, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, and the bias zero, as torch's layers do."""
        self.weight.uniform_(-self.bound, self.bound)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        # The gain goes where there is less to multiply; inputs often need no gradient, weights always do.
        if x.numel() <= self.weight.numel():
            return linear(x * self.gain, self.weight, self.bias)
        return linear(x, self.weight * self.gain, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for the module's repr."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, gain={self.gain:.3g}"


@contextmanager
def evaluated(modules: Iterable[nn.Module]) -> Iterator[None]:
    """All of these modules, and those inside, in evaluation mode, and back as each was."""
    training = [inner for module in modules for inner in module.modules() if inner.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
