r"""Monotone rational-quadratic splines, lean in both directions.

On K bins of :math:`[-B, B]` the map of each element is a ratio of quadratics with given knots and slopes;
outside it goes on linearly, with the slopes at the ends. The 3K + 1 *logits* of an element are K widths,
K heights and K + 1 slopes. Each becomes a positive number by

.. math:: g(v) = \frac{1 + \gamma |v| + v/2}{1 + \gamma |v| - v/2}, \qquad g(0) = 1,\ g(-v) = 1 / g(v)

which stands in for the exponential of a soft-clipped logit: it stays within :data:`RANGE` of 1 both ways, so
that no bin or slope degenerates, needs no exponential, and has the derivative
:math:`1 / (1 + \gamma|v| - v/2)^2`. Widths and heights are then divided by their sums. All-zero logits
give the identity.

Logits lie along the *first* dimension, so that every operation runs over contiguous elements. The gradient is
written out for both directions at once: they differ only in which end of the map is held fixed.

Source: Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios, "Neural Spline Flows", NeurIPS 2019,
arXiv:1906.04032.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = ["RANGE", "Piece", "spline", "spline_backward"]

RANGE = 7.5
# g(v) written as (κ + |v| + v κ/2) / (κ + |v| - v κ/2), which takes fewer passes; κ = 1/γ.
_KAPPA = 2.0 * (RANGE - 1.0) / (RANGE + 1.0)


@final
class Piece(NamedTuple):
    """Where x fell, and what the gradient needs of it; the interval is one unit long here."""

    bin: Tensor
    sums: Tensor  # of widths and of heights, by which both are divided
    sizes: Tensor  # width and height of the bin
    starts: Tensor  # its left and its lower end
    steepness: Tensor
    bend: Tensor
    position: Tensor  # in the bin: 0 to 1
    parabola: Tensor
    risen: Tensor  # the image's position in the bin
    whole: Tensor
    difference: Tensor  # between the slopes of its ends
    top: Tensor
    slope: Tensor  # of the map
    beyond: Tensor  # how far x is outside
    inside: Tensor
    below: Tensor  # the denominators of g


def spline(logits: Tensor, x: Tensor, bound: float, *, inverse: bool) -> tuple[Tensor, Tensor, Piece]:
    r"""Map x, or map it back, by differentiable operations.

    Args:
        logits: widths, heights and slopes, ``(3 K + 1, ...)``.
        x: what is mapped, ``(...)``.
        bound: B.
        inverse: whether to map back.

    Returns:
        The mapped values; in both directions the log of the *map's* slope there, ``(...)``; and where x fell.

    Example:
        >>> import torch
        >>> spline(torch.zeros(25, 2), torch.tensor([0.5, 7.0]), 5.0, inverse=False)[:2]
        (tensor([0.5000, 7.0000]), tensor([0., 0.]))
    """
    bins = len(logits) // 3
    table, below = _positive(logits)
    ends = table[: 2 * bins].view(2, bins, *x.shape).cumsum(1)
    sums = ends[:, -1]

    unit = (x * (0.5 / bound)).add_(0.5)
    within = unit.clamp(0.0, 1.0)
    bin_ = (within * sums[int(inverse)] >= ends[int(inverse), :-1]).sum(0, keepdim=True)
    found = table.gather(0, bin_ + _rows(bins, x))
    sizes = found[:2] / sums
    starts = ends.gather(1, bin_.expand(2, *bin_.shape)).squeeze(1) / sums - sizes
    width, height, left, right = *sizes.unbind(), *found[2:].unbind()

    steepness = height / width
    bend = torch.sub(left + right, steepness, alpha=2.0)
    excess = left - steepness
    if inverse:
        risen = (within - starts[1]) / height
        position = _solve(risen, steepness, excess, bend)
    else:
        position = (within - starts[0]) / width
    parabola = torch.addcmul(position, position, position, value=-1.0)
    whole = torch.addcmul(steepness, bend, parabola)
    if not inverse:
        risen = torch.addcmul(steepness * position, excess, parabola) / whole
    difference = right - left
    top = torch.addcmul(torch.addcmul(left, difference, position), bend, parabola, value=-1.0)
    ratio = steepness / whole
    slope = top * ratio * ratio
    beyond = unit - within
    if inverse:
        beyond = beyond / slope
        image = torch.addcmul(starts[0], width, position) + beyond
    else:
        image = torch.addcmul(torch.addcmul(starts[1], height, risen), slope, beyond)
    # As a shift from x, which is exactly zero where the map is the identity.
    value = torch.add(x, image - unit, alpha=2.0 * bound)
    return (
        value,
        slope.log(),
        Piece(
            bin_,
            sums,
            sizes,
            starts,
            steepness,
            bend,
            position,
            parabola,
            risen,
            whole,
            difference,
            top,
            slope,
            beyond,
            unit == within,
            below,
        ),
    )


def _positive(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Widths, heights and slopes as they are before division, and the denominators of g."""
    weight = logits.abs().add_(_KAPPA)
    below = torch.sub(weight, logits, alpha=0.5 * _KAPPA)
    return torch.add(weight, logits, alpha=0.5 * _KAPPA) / below, below


def _rows(bins: int, x: Tensor) -> Tensor:
    """From a bin to the rows of its width, its height and its two slopes."""
    rows = torch.arange(0, 4 * bins, bins, device=x.device).clamp_(max=2 * bins + 1)
    return rows.view(4, *[1] * x.dim())


def _solve(risen: Tensor, steepness: Tensor, excess: Tensor, bend: Tensor) -> Tensor:
    """The position in the bin at which the map has risen that far, between 0 and 1."""
    curve = torch.addcmul(excess, risen, bend, value=-1.0)
    linear = steepness + curve
    scaled = steepness * risen
    root = torch.addcmul(linear.square(), curve, scaled, value=-4.0).clamp(min=0.0).sqrt()
    return (scaled + scaled) / (linear + root)  # this form does not cancel


def spline_backward(
    piece: Piece, in_value: Tensor, in_log_slope: Tensor, bound: float, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """From the gradients in the results of :func:`spline` to those in its logits and in x."""
    p, q, bend, risen, slope = piece.position, piece.parabola, piece.bend, piece.risen, piece.slope
    width, height = piece.sizes.unbind()
    per_whole, per_top = piece.whole.reciprocal(), piece.top.reciprocal()
    turn = torch.addcmul(bend, bend, p, value=-2.0)  # bend times the parabola's slope
    log_slope_in_p = torch.addcmul((piece.difference - turn) * per_top, turn, per_whole, value=-2.0)
    log_slope_in_unit = log_slope_in_p / width

    in_x = in_log_slope * log_slope_in_unit * piece.inside
    if inverse:
        in_x = torch.add(in_value, in_x, alpha=0.5 / bound) / slope
        in_image = in_x * (-2.0 * bound * _KAPPA**2)  # what moves the image up moves x down
    else:
        in_x = torch.add(in_value * slope, in_x, alpha=0.5 / bound)
        in_image = in_value * (2.0 * bound * _KAPPA**2)
    # From here on all is κ² times as large: see the end.
    in_start = in_image * slope
    in_log_slope = torch.add(in_start * piece.beyond, in_log_slope, alpha=_KAPPA**2)

    a, b = in_image * height * per_whole, in_log_slope * per_top
    square = p - q
    common = torch.add(a * risen, in_log_slope * per_whole, alpha=2.0)
    shared = common * q
    in_left = torch.addcmul(torch.addcmul(b, b, p + q, value=-1.0), a, q) - shared
    in_right = b * square - shared
    in_steepness = torch.addcmul(shared, b, q).addcdiv_(in_log_slope, piece.steepness)
    in_steepness = torch.add(a * square - common, in_steepness, alpha=2.0)

    in_start = torch.addcmul(in_start, in_log_slope, log_slope_in_unit)
    per_width = in_steepness / width
    in_width = torch.addcmul(in_start * p, per_width, piece.steepness)
    in_height = torch.addcmul(per_width, in_image, risen)
    in_all = torch.stack([-in_start, in_image, -in_width, in_height, in_left, in_right])
    return _to_logits(piece, in_all), in_x


def _to_logits(piece: Piece, in_all: Tensor) -> Tensor:
    """Spread the gradients in starts, sizes and slopes, which are those of one bin, over all logits."""
    bins = len(piece.below) // 3
    in_all[:4].view(2, *piece.sums.shape).div_(piece.sums)
    in_sums = torch.addcmul(in_all[:2] * piece.starts, in_all[2:4], piece.sizes)
    before = torch.arange(bins, device=in_all.device).view(bins, *[1] * piece.top.dim()) < piece.bin
    in_logits = torch.zeros_like(piece.below)
    torch.sub(
        before * in_all[:2].unsqueeze(1),
        in_sums.unsqueeze(1),
        out=in_logits[: 2 * bins].view(2, bins, *piece.top.shape),
    )
    in_logits.scatter_add_(0, piece.bin + _rows(bins, piece.top), in_all[2:])
    return in_logits.div_(piece.below).div_(piece.below)  # the derivative of g is κ² / below²
