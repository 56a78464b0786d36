r"""Conditional coupling flows: invertible networks that cost the same in both directions.

Each layer leaves one half of the vector as it is, and maps the elements of the other half one by one, with
parameters that a small network - its *conditioner* - computes from the first half and the context h:

.. math:: y_A = x_A, \qquad y_B = g(x_B;\ \mathrm{net}(x_A, h))

The inverse needs the same single pass of the network, and the Jacobian is triangular. Halves take turns;
after each pair of layers the elements are riffled like cards, so that the next pair splits them otherwise.

The context meets all conditioners in one product, once per context whatever the number of draws; the layers
themselves are in :mod:`pyro_guides.families.passes`.

Sources: Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio, "Density estimation using Real NVP", 2017,
arXiv:1605.08803; for the splines see :mod:`pyro_guides.families.splines`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast, final

import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance, track_provenance
from torch import Tensor, nn

from pyro_guides.distributions.scales import broadcast
from pyro_guides.families.conditioners import Weights, project
from pyro_guides.families.passes import Plan, pass_through
from pyro_guides.layers import ScaledLinear

__all__ = ["KINDS", "ConditionedFlow", "CouplingFlow"]

KINDS = ("affine", "spline")


@final
class CouplingFlow(nn.Module):
    r"""A conditional flow :math:`f(\varepsilon; h)` of coupling layers, at first the identity.

    Args:
        size: D, at least 1. A single element is mapped by parameters that depend on the context alone.
        context_size: H, the size of the context.
        transforms: T, the number of coupling layers; two map each element once.
        kind: ``"affine"``, or ``"spline"`` for monotone rational-quadratic splines: more flexible, at
            about twice the cost.
        hidden: the widths of the conditioners' hidden layers, at least one.
        bins: the number of bins of a spline.
        bound: splines bend within [-bound, bound] and are linear outside.

    Example:
        >>> import torch
        >>> flow = CouplingFlow(3, 8)
        >>> value, log_volume = flow(torch.randn(5, 3), torch.randn(5, 8))
        >>> value.shape, log_volume.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        size: int,
        context_size: int,
        transforms: int = 4,
        kind: str = "spline",
        *,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        super().__init__()
        self.size = size
        self.kind = kind
        self.bound = bound
        self.context = ScaledLinear(context_size, transforms * hidden[0])
        halves = size // 2, size - size // 2
        outputs = 2 if kind == "affine" else 3 * bins + 1
        self.conditioners = nn.ModuleList()
        for i in range(transforms):
            source, target = halves[::-1] if i % 2 and size > 1 else halves
            self.conditioners.append(_Conditioner(source, hidden, outputs * target))
        self.register_buffer("orders", _orders(size, transforms))
        self.orders: Tensor

    def condition(self, context: Tensor, scored: Tensor | None = None) -> ConditionedFlow:
        r"""The map for given contexts, with the weights as they are now.

        Args:
            context: h, ``(..., H)``.
            scored: which elements count, boolean ``(..., D)``: the others stay as they are, influence
                none and add nothing to the log-volume. All count if None.
        """
        # Provenance, by which Pyro credits costs to draws, does not pass through functions of our own.
        provenance = get_provenance(context) if isinstance(context, ProvenanceTensor) else frozenset()
        layer = self.context
        rows = detach_provenance(context).reshape(-1, context.shape[-1])
        projected = project(rows, (layer.bias, layer.weight, layer.gain))
        weights = [cast("_Conditioner", conditioner).held() for conditioner in self.conditioners]
        return ConditionedFlow(self, context.shape[:-1], projected, weights, scored, provenance)

    def forward(self, noise: Tensor, context: Tensor, scored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image of noise ``(..., D)`` and the log-volume of the map there, ``(...)``."""
        return self.condition(context, scored).forward(noise)

    def inverse(self, value: Tensor, context: Tensor, scored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise that ``value`` is the image of, and the log-volume of the map there."""
        return self.condition(context, scored).inverse(value)

    def extra_repr(self) -> str:
        """Sizes, for the module's repr."""
        return f"{self.size}, kind={self.kind!r}"


@final
class _Conditioner(nn.Module):
    """From one half and the projected context to the parameters of the other half; zero at first."""

    def __init__(self, source: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.source: nn.Parameter | None = None
        if source:  # its bias comes with the context
            limit = 1.0 / math.sqrt(source)
            self.source = nn.Parameter(torch.empty(hidden[0], source).uniform_(-limit, limit))
        layers = [ScaledLinear(*sizes) for sizes in pairwise(hidden)]
        self.layers = nn.ModuleList([*layers, ScaledLinear(hidden[-1], outputs, zero=True)])

    def held(self) -> Weights:
        """The weights as they are now."""
        layers = (cast("ScaledLinear", layer) for layer in self.layers)
        return Weights(self.source, tuple((layer.bias, layer.weight, layer.gain) for layer in layers))


@final
class ConditionedFlow:
    """A flow with its context bound and its weights taken as they were: an invertible map of vectors.

    Args:
        flow: where the sizes come from.
        batch_shape: the batch shape of the context.
        projected: what the contexts add in the first layers of all conditioners, one column each.
        weights: those of the conditioners.
        scored: see :meth:`CouplingFlow.condition`.
        provenance: that of the context.
    """

    def __init__(
        self,
        flow: CouplingFlow,
        batch_shape: torch.Size,
        projected: Tensor,
        weights: Sequence[Weights],
        scored: Tensor | None,
        provenance: frozenset[Any] = frozenset(),
    ) -> None:
        self.batch_shape = batch_shape
        self._flow = flow
        self._projected = projected
        self._weights = weights
        self._scored = scored
        self._provenance = provenance

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The image of noise ``(..., D)`` and the log-volume of the map there, ``(...)``."""
        return self._map(noise, inverse=False)

    def inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that ``value`` is the image of, and the log-volume of the map there."""
        return self._map(value, inverse=True)

    def fixed(self) -> ConditionedFlow:
        """The same map without gradient paths to weights and context."""
        weights = [held.replaced([tensor.detach() for tensor in held.tensors()]) for held in self._weights]
        return ConditionedFlow(self._flow, self.batch_shape, self._projected.detach(), weights, self._scored)

    def _map(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if isinstance(x, ProvenanceTensor) or self._provenance:
            plain = copy.copy(self)
            plain._provenance = frozenset()
            results = plain._map(detach_provenance(x), inverse=inverse)
            return track_provenance(results, self._provenance | get_provenance(x))
        flow, shape = self._flow, broadcast(x.shape[:-1], self.batch_shape)
        x, scored = x.expand(*shape, flow.size), None
        counted = x
        if self._scored is not None:
            scored = self._scored.expand(x.shape)
            counted = torch.where(scored, x, torch.zeros_like(x))  # conditioners see no others
            scored = _columns(scored)
        plan = Plan(flow.orders, flow.kind, flow.bound, inverse, shape, self.batch_shape, scored)
        mapped, log_volume = pass_through(plan, _columns(counted), self._projected, self._weights)
        value = mapped.t().reshape(x.shape)
        if self._scored is not None:
            value = torch.where(self._scored, value, x)
        return value, log_volume.view(shape)


def _columns(x: Tensor) -> Tensor:
    """Vectors ``(..., D)`` as columns ``(D, N)``."""
    return x.reshape(-1, x.shape[-1]).t().contiguous()


def _orders(size: int, transforms: int) -> Tensor:
    """How each pair of layers arranges the elements, and the way back: ``(pairs, 2, D)``."""
    riffle = torch.cat([torch.arange(1, size, 2), torch.arange(0, size, 2)])
    order, orders = torch.arange(size), []
    for _ in range(0, transforms, 2):
        orders.append(torch.stack([order, order.argsort()]))
        order = order[riffle]
    return torch.stack(orders)
