"""Encoders of sequences: a context for every step, and one for the whole.

Sequences of a batch may differ in length. They start together and are padded at the end; what stands in
the padding is never read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_guides.arguments import check_flags, check_sizes
from pyro_guides.encoders.late import Late
from pyro_guides.encoders.mlp import MLP, ResidualBlock
from pyro_guides.encoders.sets import Pooling
from pyro_guides.layers import ScaledLinear

__all__ = ["GRUEncoder", "SequenceEncoder"]

_DECAYS = (0.25, 0.5, 0.75, 0.9, 0.97)


class SequenceEncoder(nn.Module, ABC):
    """From sequences to one context per step, and one per sequence.

    To write one, implement ``forward`` and ``summary`` so that they depend neither on what stands in the
    padding nor on the other sequences.
    """

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One context per step.

        Args:
            x: the sequences, ``(B, T, *features)``.
            lengths: how many steps each sequence has, integers ``(B,)`` from 0 to T; the rest is padding.
                All have T if None.

        Returns:
            ``(B, T, C)``, zero in the padding.
        """

    @abstractmethod
    def summary(self, contexts: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One context per sequence.

        Args:
            contexts: what ``forward`` returned, ``(B, T, C)``.
            lengths: as there.

        Returns:
            ``(B, C)``.
        """


@final
class GRUEncoder(SequenceEncoder):
    r"""Gated recurrent units that read the sequences forwards and backwards.

    .. math::
        h_t = W \tilde x_t, \qquad
        f_t = \mathrm{GRU}_f(f_{t-1}, h_t), \qquad
        b_t = \mathrm{GRU}_b(b_{t+1}, h_t)

    The context of step t is a residual network of h, f and b at t, and so holds a linear view of the step.
    Its linear part has gates that depend on the distances to both ends, as powers of several decays: near
    its ends a sequence tells less about a step, and a smoother's gains approach their limits like powers.

    Statistics for the standardization are taken from all steps but the padding. Layers are created on the
    first call, in the dtype and on the device of the data.

    Args:
        width: C, the width of the layers and of the contexts.
        causal: whether the context of step t depends on steps 1 to t only; then nothing runs backwards.
        missing: NaN marks a missing value, see :class:`Standardize`.
        layers: how many layers the GRU has, in each direction.

    Shapes: ``(B, T, ...), (B,) -> (B, T, C)``; trailing dimensions are flattened.

    Raises:
        ValueError: ``width`` or ``layers`` is less than 1; sequences and lengths do not fit.

    Source: Kyunghyun Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical
    Machine Translation", 2014, arXiv:1406.1078.

    Example:
        >>> import torch
        >>> encoder = GRUEncoder(width=32)
        >>> contexts = encoder(torch.randn(2, 9, 3), torch.tensor([9, 4]))
        >>> contexts.shape, encoder.summary(contexts, torch.tensor([9, 4])).shape
        (torch.Size([2, 9, 32]), torch.Size([2, 32]))
    """

    def __init__(
        self, width: int = 128, *, causal: bool = False, missing: bool = False, layers: int = 1
    ) -> None:
        super().__init__()
        check_sizes("GRUEncoder", width=width, layers=layers)
        check_flags("GRUEncoder", causal=causal, missing=missing)
        self.steps = MLP(width, 0, missing=missing)
        self.recurrence = Late(_Recurrence, width, layers, 1 if causal else 2)
        self.ends = Late(_Summary, width)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"GRUEncoder: expected sequences (B, T, ...), got {tuple(x.shape)}")
        lengths = _lengths(x, lengths)
        longest = int(lengths.max()) if len(lengths) else 0
        if not longest and self.steps.standardize.mean is None:
            raise ValueError(f"GRUEncoder: the first call needs at least one step, got {tuple(x.shape)}")
        # Cut to the longest: how much padding follows must not even matter for the rounding.
        contexts = self._contexts(x[:, :longest].flatten(2) if x.dim() > 2 else x[:, :longest, None], lengths)
        return pad(contexts, (0, 0, 0, x.shape[1] - longest))

    def summary(self, contexts: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One context per sequence: the contexts at both ends, and those of all steps pooled as a set.

        Args:
            contexts: what ``forward`` returned, ``(B, T, C)``.
            lengths: as there.

        Returns:
            ``(B, C)``.
        """
        return self.ends(contexts, _lengths(contexts, lengths))

    def _contexts(self, x: Tensor, lengths: Tensor) -> Tensor:
        there = _there(x, lengths)
        features = self.steps(x[there])
        padded = features.new_zeros(*there.shape, features.shape[-1]).masked_scatter(
            there.unsqueeze(-1), features
        )
        return self.recurrence(padded, lengths) * there.unsqueeze(-1)


@final
class _Recurrence(nn.Module):
    """From features of steps to contexts of steps; those of the padding mean nothing."""

    def __init__(self, width: int, layers: int, directions: int, **options: Any) -> None:
        super().__init__()
        units = -(-width // directions)
        # One by one: a packed sequence, which both directions at once would need, is several times slower.
        self.directions = nn.ModuleList(
            nn.GRU(width, units, layers, batch_first=True, **options) for _ in range(directions)
        )
        ends = directions * len(_DECAYS)
        self.linear = ScaledLinear(width + directions * units + ends, width, **options)
        self.gate = ScaledLinear(ends, width, zero=True, **options)
        self.block = ResidualBlock(width, **options)

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        if not h.numel():
            return h
        ends = _ends(h, lengths, both=len(self.directions) > 1)
        views = [h, self.directions[0](h)[0]]
        if len(self.directions) > 1:
            # Turned round within its length, a sequence still starts together with the others.
            steps = torch.arange(h.shape[1], device=h.device)
            turned = torch.where(_there(h, lengths), lengths.unsqueeze(-1) - 1 - steps, steps)
            views.append(_take(self.directions[1](_take(h, turned))[0], turned))
        gated = self.linear(torch.cat([*views, ends], dim=-1)) * (1.0 + self.gate(ends))
        return cast("Tensor", self.block(gated))


@final
class _Summary(nn.Module):
    """From contexts of steps to one of the sequence."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.pooling = Pooling(width, 0, **options)
        self.linear = ScaledLinear(2 * width, width, **options)
        self.block = ResidualBlock(width, **options)

    def forward(self, contexts: Tensor, lengths: Tensor) -> Tensor:
        there = _there(contexts, lengths)
        last = (lengths - 1).clamp(min=0).unsqueeze(-1)
        ends = torch.cat([contexts[:, 0], _take(contexts, last)[:, 0]], dim=-1)
        pooled = self.pooling(contexts[there], there.nonzero()[:, 0], len(contexts))
        return cast("Tensor", self.block(pooled + self.linear(ends)))


def _there(x: Tensor, lengths: Tensor) -> Tensor:
    """Which steps of ``x`` ``(B, T, ...)`` are no padding, boolean ``(B, T)``."""
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)


def _ends(x: Tensor, lengths: Tensor, *, both: bool) -> Tensor:
    """How far each step is from the first one, and from the last: a power of each decay, ``(B, T, E)``."""
    steps = torch.arange(x.shape[1], device=x.device)
    distances = [steps.expand(x.shape[:2])]
    if both:
        distances.append((lengths.unsqueeze(-1) - 1 - steps).clamp(min=0))
    decays = torch.tensor(_DECAYS, dtype=x.dtype, device=x.device)
    return torch.cat([decays ** distance.unsqueeze(-1) for distance in distances], dim=-1)


def _take(x: Tensor, steps: Tensor) -> Tensor:
    """Of each sequence in ``x`` ``(B, T, C)`` the given steps ``(B, N)``."""
    return x.gather(1, steps.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The lengths of the sequences in ``x``, checked."""
    if lengths is None:
        return torch.full(x.shape[:1], x.shape[1], device=x.device)
    if lengths.shape != x.shape[:1] or lengths.dtype != torch.long:
        raise ValueError(
            f"GRUEncoder: expected lengths of dtype torch.int64 and shape {tuple(x.shape[:1])} for sequences "
            f"{tuple(x.shape)}, got {lengths.dtype} and shape {tuple(lengths.shape)}"
        )
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[1]:
        raise ValueError(
            f"GRUEncoder: lengths must lie between 0 and {x.shape[1]}, the number of steps with padding, got "
            f"{int(lengths.min())} to {int(lengths.max())}"
        )
    return lengths.to(x.device)
