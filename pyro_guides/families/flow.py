"""Normalizing flows: normals that a conditional flow bends to any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from pyro_guides.arguments import check_choice, check_count, check_flags
from pyro_guides.distributions.flow import VectorFlow
from pyro_guides.distributions.normal import VectorNormal
from pyro_guides.families.base import BoundFamily, Family, Moving
from pyro_guides.families.couplings import KINDS, CouplingFlow
from pyro_guides.families.normal import DiagonalNormal, FullRankNormal, LowRankNormal

__all__ = ["BoundAround", "NormalizingFlow", "check_base"]


@final
@dataclass(frozen=True)
class NormalizingFlow(Family):
    r"""A normal bent by coupling layers: :math:`u = \mu + S f(\varepsilon; h)`, f a conditional flow.

    For posteriors that are skewed, curved, heavy-tailed or have several modes. λ = (λ of the normal, h): the
    normal is amortized as such, and the context h steers f, whose weights all plate elements share. f starts
    as the identity, so that the family starts as the normal it contains. Sampling and scoring cost the same.

    Args:
        transforms: the number of coupling layers; two bend each value once.
        kind: ``"spline"``, or ``"affine"``: half the cost, but it needs more layers to bend as much.
        hidden: the widths of the hidden layers of each coupling's network.
        bins: the number of bins of each spline.
        context_size: the size of h.
        base: the normal family that is bent.
        stick_the_landing: see :class:`DiagonalNormal`. For a flow it makes each step about 1.5 times as
            long and is less forgiving of high learning rates, for about the same result in the same
            time; for the last digits, where q is nearly exact.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is too small, or the kind is unknown.

    Sources: Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio, "Density estimation using Real NVP", 2017,
    arXiv:1605.08803; Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios, "Neural Spline Flows",
    2019, arXiv:1906.04032.

    Example:
        >>> import torch
        >>> q = NormalizingFlow(context_size=16).bind(3)
        >>> q.width  # 9 of the normal, 16 of the context
        25
        >>> q(q.initial(torch.zeros(7, 3), 0.1)).rsample((5,)).shape
        torch.Size([5, 7, 3])
    """

    transforms: int = 4
    kind: str = "spline"
    hidden: Sequence[int] = (64, 64)
    bins: int = 8
    context_size: int = 32
    base: Family = FullRankNormal()  # noqa: RUF009 - immutable
    stick_the_landing: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, "transforms", self.transforms, 1, "without any, take FullRankNormal()")
        check_count(name, "bins", self.bins, 2, "8 are plenty for most posteriors")
        check_count(name, "context_size", self.context_size, 1, "take 16 or more")
        check_base(name, self.base)
        check_flags(name, stick_the_landing=self.stick_the_landing)
        check_choice(name, "kind", self.kind, KINDS)
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Sequence):
            raise TypeError(
                f"{name}: hidden must be a sequence of layer widths such as (64, 64), got {self.hidden!r}"
            )
        if not self.hidden:
            raise ValueError(f"{name}: hidden must name at least one layer width, such as (64,); got none")
        for width in self.hidden:
            check_count(name, "each width in hidden", width, 1, "take 16 or more")
        object.__setattr__(self, "hidden", tuple(self.hidden))  # hashable, and nobody else's

    def bind(self, size: int) -> BoundFamily:
        flow = CouplingFlow(
            size, self.context_size, self.transforms, self.kind, hidden=self.hidden, bins=self.bins
        )
        return _BoundFlow(self.base.bind(size), flow, self.context_size, self.stick_the_landing)


class BoundAround(BoundFamily):
    """A flow around a normal: λ = (λ of the base, h)."""

    def __init__(self, base: BoundFamily, context_size: int, stick_the_landing: bool) -> None:
        super().__init__()
        self.size = base.size
        self.width = base.width + context_size
        self.stick_the_landing = stick_the_landing
        self.base = base
        self.closed_under = base.closed_under

    @property
    def moving(self) -> Moving:
        return self.base.moving  # the flow bends the noise, which does not move

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        context = loc.new_zeros(*loc.shape[:-1], self.width - self.base.width)
        return torch.cat([self.base.initial(loc, scale), context], dim=-1)

    def frame(self, parameters: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.base.frame(parameters[..., : self.base.width])

    def parts(self, parameters: Tensor, scored: Tensor | None = None) -> tuple[VectorNormal, Tensor]:
        """The normal and the context h that λ holds."""
        inner, context = parameters.split([self.base.width, self.width - self.base.width], dim=-1)
        return cast("VectorNormal", self.base(inner, scored)), context


@final
class _BoundFlow(BoundAround):
    def __init__(
        self, base: BoundFamily, flow: CouplingFlow, context_size: int, stick_the_landing: bool
    ) -> None:
        super().__init__(base, context_size, stick_the_landing)
        self.flow = flow

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        adopted = self.base.adopt(other, parameters)  # the flow is the identity
        context = adopted.new_zeros(*adopted.shape[:-1], self.width - self.base.width)
        return torch.cat([adopted, context], dim=-1)

    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> VectorFlow:
        normal, context = self.parts(parameters, scored)
        return VectorFlow(
            normal.loc,
            normal.scale,
            self.flow.condition(context, scored),
            stick_the_landing=self.stick_the_landing,
        )


def check_base(owner: str, base: object) -> None:
    """Raise unless ``base`` is one of the normal families."""
    if not isinstance(base, DiagonalNormal | FullRankNormal | LowRankNormal):
        raise TypeError(
            f"{owner}: base must be a normal family, DiagonalNormal(), FullRankNormal() or "
            f"LowRankNormal(rank), got {base!r}"
        )
