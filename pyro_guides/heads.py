"""Where λ comes from: a parameter, or an encoder's context - and, in both cases, upstream values.

Heads know nothing of families: they map what is known when a group is drawn to a vector λ of a given
length. Both start at the initial λ for every datum and every upstream value, because what they multiply
with context and upstream values starts at zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import silu

from pyro_guides.layers import ScaledLinear

__all__ = ["AmortizedHead", "Head", "LearnedHead", "PromotedHead", "WhitenedHead", "held_fixed"]

_MIXING_WIDTH = 128
_EMBEDDING_SIZE = 16


class Head(nn.Module, ABC):
    """Where λ comes from.

    Attributes:
        learned_shape: the batch shape of λ if it is a parameter; None if it is a function of a context.
    """

    learned_shape: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def start(self) -> Tensor:
        """The initial location of the upstream values, ``(V,)``."""

    @property
    def known_sizes(self) -> Mapping[str, int]:
        """How many elements it knows of each plate that the inputs lack."""
        return {}

    @abstractmethod
    def like(self, width: int) -> Head:
        """A new head that sees what this one sees, and returns ``width`` zeros to begin with."""

    @abstractmethod
    def example(self) -> Tensor:
        """One λ, without a gradient: what the head knows without looking at anything."""


@final
class LearnedHead(Head):
    r"""λ as a parameter, one per plate element: :math:`\lambda_i = b_i + W_i (v - v_0)`.

    v are the upstream values and v₀ their initial location. Linear in v is what makes a hierarchy of
    normals exact.

    Args:
        initial: b at the start, ``(*batch of full size, W)``.
        origin: v₀, ``(V,)``; empty without upstream values.
        dims: the dimension of each plate, by name.
    """

    def __init__(self, initial: Tensor, origin: Tensor, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.dims = dict(dims)
        self.learned_shape = tuple(initial.shape[:-1])
        self.bias = nn.Parameter(initial.clone())
        self.register_buffer("origin", origin.clone())
        self.origin: Tensor
        self.weight: nn.Parameter | None = None
        if len(origin):
            self.weight = nn.Parameter(initial.new_zeros(*initial.shape, len(origin)))

    def forward(self, upstream: Tensor | None, indices: Mapping[str, Tensor]) -> Tensor:
        """λ, ``(*batch, W)``, from upstream values ``(..., V)``."""
        bias = _taken(self.bias, 1, self.dims, indices)
        if self.weight is None or upstream is None:
            return bias
        weight = _taken(self.weight, 2, self.dims, indices)
        return bias + (weight @ (upstream - self.origin).unsqueeze(-1)).squeeze(-1)

    @property
    def start(self) -> Tensor:
        return self.origin

    def like(self, width: int) -> LearnedHead:
        return LearnedHead(self.bias.new_zeros(*self.bias.shape[:-1], width), self.origin, self.dims)

    def example(self) -> Tensor:
        return self.bias.detach()


@final
class AmortizedHead(Head):
    r"""λ from an encoder's context: a linear map, starting at zero around the initial λ.

    What else is known - upstream values, and an embedding per element of plates that the inputs lack - is
    mixed into the context by a residual block before the map, and joins it. Elements i of plates that the
    inputs lack also have an offset of their own:

    .. math:: \lambda = b + b_i + W [h, e], \qquad h = c + W_2\, \mathrm{silu}(W_1 [c, e])

    Args:
        context_size: C.
        initial: b at the start, ``(W,)``.
        origin: the initial location of the upstream values, ``(V,)``.
        lacking: size and dimension of each plate that the inputs lack, by name.
    """

    def __init__(
        self,
        context_size: int,
        initial: Tensor,
        origin: Tensor,
        lacking: Mapping[str, tuple[int, int]],
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": initial.dtype, "device": initial.device}
        self.register_buffer("origin", origin.clone())
        self.origin: Tensor
        self.context_size = context_size
        self.lacking = {name: dim for name, (_, dim) in lacking.items()}
        # Indexed by position: plate names may hold dots, which parameter names may not.
        self.embeddings = nn.ParameterList(
            torch.randn(size, _EMBEDDING_SIZE, **options) for size, _ in lacking.values()
        )
        side = len(origin) + _EMBEDDING_SIZE * len(lacking)
        self.inner: nn.Module | None = None
        self.outer: nn.Module | None = None
        if side:
            self.inner = ScaledLinear(context_size + side, _MIXING_WIDTH, **options)
            self.outer = ScaledLinear(_MIXING_WIDTH, context_size, zero=True, **options)
        self.output = ScaledLinear(context_size + side, len(initial), zero=True, **options)
        with torch.no_grad():
            self.output.bias.copy_(initial)
        shape = [1] * max((-dim for _, dim in lacking.values()), default=0)
        for size, dim in lacking.values():
            shape[dim] = size
        self.offset = nn.Parameter(initial.new_zeros(*shape, len(initial))) if lacking else None

    def forward(self, context: Tensor, upstream: Tensor | None, indices: Mapping[str, Tensor]) -> Tensor:
        """λ, ``(*batch, W)``, from context ``(..., C)`` and upstream values ``(..., V)``."""
        self._check(context)
        if self.inner is None or self.outer is None:
            return cast("Tensor", self.output(context))
        side = self._side(upstream, indices)
        context, side = _broadcast([context, side])
        mixed = context + self.outer(silu(self.inner(torch.cat([context, side], dim=-1))))
        parameters: Tensor = self.output(torch.cat([mixed, side], dim=-1))
        return parameters if self.offset is None else parameters + self._own_offset(indices)

    def forget(self, initial: Tensor) -> None:
        """Return a λ ``(W,)`` for every datum and every upstream value, as at the start."""
        zeros = [self.output.weight, self.offset]
        if isinstance(self.outer, ScaledLinear):
            zeros += [self.outer.weight, self.outer.bias]
        for parameter in zeros:
            if parameter is not None:
                parameter.zero_()
        self.output.bias.copy_(initial)

    def _own_offset(self, indices: Mapping[str, Tensor]) -> Tensor:
        offset = cast("Tensor", self.offset)
        for name, dim in self.lacking.items():
            if name in indices:
                offset = offset.index_select(dim - 1, indices[name].to(offset.device))
        return offset

    @property
    def start(self) -> Tensor:
        return self.origin

    @property
    def known_sizes(self) -> Mapping[str, int]:
        return {n: len(rows) for n, rows in zip(self.lacking, self.embeddings, strict=True)}

    def like(self, width: int) -> AmortizedHead:
        lacking = {name: (self.known_sizes[name], dim) for name, dim in self.lacking.items()}
        return AmortizedHead(self.context_size, self.output.bias.new_zeros(width), self.origin, lacking)

    def example(self) -> Tensor:
        return self.output.bias.detach()

    def _check(self, context: Tensor) -> None:
        if context.shape[-1] != self.context_size or context.dtype != self.output.weight.dtype:
            raise ValueError(
                f"the encoder returned {context.shape[-1]} values of {context.dtype} per row, but the guide "
                f"was set up with {self.context_size} of {self.output.weight.dtype}; an encoder's contexts "
                "must keep their size and dtype"
            )

    def _side(self, upstream: Tensor | None, indices: Mapping[str, Tensor]) -> Tensor:
        parts = [] if upstream is None else [upstream - self.origin]
        for (name, dim), embedding in zip(self.lacking.items(), self.embeddings, strict=True):
            rows = embedding
            if name in indices:
                rows = rows.index_select(0, indices[name].to(rows.device))
            parts.append(rows.reshape(rows.shape[0], *[1] * (-dim - 1), rows.shape[-1]))
        return torch.cat(_broadcast(parts), dim=-1)


@final
class PromotedHead(Head):
    """λ of a richer family: the q that the old family has at the old head's λ, and a change of it.

    Args:
        old: the old head.
        convert: from the old family's λ to λ of the new family at which q is the same.
        change: a head for what is new.
    """

    def __init__(self, old: Head, convert: nn.Module, change: Head) -> None:
        super().__init__()
        self.old = old
        self.convert = convert
        self.change = change
        self.learned_shape = old.learned_shape

    def forward(self, *inputs: Any) -> Tensor:
        """λ of the new family, from what the old head took."""
        converted: Tensor = self.convert(self.old(*inputs))
        return converted + self.change(*inputs)

    @property
    def start(self) -> Tensor:
        return self.old.start

    @property
    def known_sizes(self) -> Mapping[str, int]:
        return self.old.known_sizes

    def like(self, width: int) -> Head:
        return self.old.like(width)

    def example(self) -> Tensor:
        with torch.no_grad():
            converted: Tensor = self.convert(self.old.example())
            return converted + self.change.example()


@final
class WhitenedHead(Head):
    r"""λ of :math:`u = a + L v` from the λ that a learned head has for v.

    What is learned is the distribution of v, whose values are about zero and as wide as one. q is what its λ
    says in either coordinates; only an optimizer's steps are others, in units of L.

    Args:
        inner: a head of learned λ of v.
        moving: from λ of v, a and L to λ of u.
        loc: a, ``(*batch of full size, D)``.
        scale: L, ``(*batch of full size, D)`` if diagonal, else lower triangular with one more D.
        dims: the dimension of each plate, by name.
    """

    def __init__(
        self, inner: Head, moving: nn.Module, loc: Tensor, scale: Tensor, dims: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.moving = moving
        self.dims = dict(dims)
        self.learned_shape = inner.learned_shape
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.loc: Tensor
        self.scale: Tensor

    def forward(self, upstream: Tensor | None, indices: Mapping[str, Tensor]) -> Tensor:
        """λ of u, ``(*batch, W)``, from upstream values ``(..., V)``."""
        loc = _taken(self.loc, 1, self.dims, indices)
        scale = _taken(self.scale, 1 + self.scale.dim() - self.loc.dim(), self.dims, indices)
        moved: Tensor = self.moving(self.inner(upstream, indices), loc, scale)
        return moved

    def around(self, inner: Head, moving: nn.Module) -> WhitenedHead:
        """The same coordinates for another head of v."""
        return WhitenedHead(inner, moving, self.loc, self.scale, self.dims)

    def suits(self, closed_under: str | None) -> bool:
        """Whether L is among the maps under which a family is closed."""
        diagonal = self.scale.dim() == self.loc.dim()
        return closed_under == "triangular" or (closed_under == "diagonal" and diagonal)

    @property
    def start(self) -> Tensor:
        return self.inner.start

    def like(self, width: int) -> Head:
        return self.inner.like(width)

    def example(self) -> Tensor:
        with torch.no_grad():
            moved: Tensor = self.moving(self.inner.example(), self.loc, self.scale)
            return moved


def held_fixed(head: nn.Module, *args: Any) -> Tensor:
    """What ``head`` returns, without a gradient path to its parameters."""
    fixed = {name: value.detach() for name, value in head.named_parameters()}
    return functional_call(head, fixed, args)


def _taken(
    parameter: Tensor, event_dim: int, dims: Mapping[str, int], indices: Mapping[str, Tensor]
) -> Tensor:
    """The elements of plates that a subsample asks for."""
    for name, dim in dims.items():
        if name in indices:
            parameter = parameter.index_select(dim - event_dim, indices[name].to(parameter.device))
    return parameter


def _broadcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Expand all but the last dimension to a common shape."""
    batch = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
    return [tensor.expand(*batch, tensor.shape[-1]) for tensor in tensors]
