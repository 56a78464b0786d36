"""A change of λ for the rows at hand: the third answer to where λ comes from.

λ of a row is what the guide's head says, plus a parameter of the row's own. The guide stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from pyro_guides.heads import Head

__all__ = ["Change", "Refined", "Refinement"]


@final
class Change(nn.Module):
    r"""What is added to λ, one per row: :math:`\delta_i = s_i \odot (b_i + W_i (v - v_0))`, zero at first.

    v are the upstream values. The units s are such that a change of one matters alike in each element of λ.

    Args:
        unit: s, ``(*batch, W)``.
        origin: v₀, ``(V,)``; empty without upstream values.
    """

    def __init__(self, unit: Tensor, origin: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", unit)
        self.register_buffer("origin", origin)
        self.unit: Tensor
        self.origin: Tensor
        self.bias = nn.Parameter(torch.zeros_like(unit))
        self.weight = nn.Parameter(unit.new_zeros(*unit.shape, len(origin))) if len(origin) else None

    def forward(self, parameters: Tensor, upstream: Tensor | None) -> Tensor:
        """The changed λ, ``(*batch, W)``, at upstream values ``(..., V)``."""
        change: Tensor = self.bias
        if self.weight is not None and upstream is not None:
            change = change + (self.weight @ (upstream - self.origin).unsqueeze(-1)).squeeze(-1)
        return parameters + self.unit * change

    @torch.no_grad()
    def measure_in(self, unit: Tensor) -> None:
        """Take other units, and leave the change what it is."""
        ratio = self.unit / unit
        self.bias.mul_(ratio)
        if self.weight is not None:
            self.weight.mul_(ratio.unsqueeze(-1))
        self.unit = unit

    @torch.no_grad()
    def keep(self, rows: Tensor, other: Change) -> None:
        """Be the change only in some rows, boolean ``(*batch)``, and another one in the others."""
        other.measure_in(self.unit)
        self.bias.copy_(torch.where(rows.unsqueeze(-1), self.bias, other.bias))
        if self.weight is not None and other.weight is not None:
            self.weight.copy_(torch.where(rows[..., None, None], self.weight, other.weight))


@final
class Refined(nn.Module):
    """A head and a change of what it returns.

    Args:
        head: the guide's head.
        change: from λ and upstream values to the λ of the rows at hand.
    """

    def __init__(self, head: Head, change: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.change = change

    def forward(self, *inputs: Any) -> Tensor:
        """λ, from what the head takes: upstream values stand last but one."""
        changed: Tensor = self.change(self.head(*inputs), inputs[-2])
        return changed


@final
class Refinement(nn.Module):
    """The changes of λ of some groups, for the rows at hand.

    Args:
        changes: by the group's position and its step, which is None outside of sequences.
    """

    def __init__(self, changes: Mapping[tuple[int, int | None], nn.Module]) -> None:
        super().__init__()
        self.position = {key: at for at, key in enumerate(changes)}
        self.changes = nn.ModuleList(changes.values())

    def get(self, part: int, step: int | None) -> nn.Module | None:
        """The change of one group at one step, if it has one."""
        at = self.position.get((part, step))
        return None if at is None else self.changes[at]
