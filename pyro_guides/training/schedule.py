"""How the learning rate goes."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]

_WARMUP = 0.05  # of all steps


def warmup_cosine(progress: float) -> float:
    r"""The default schedule: up linearly over the first 5 % of the steps, down along a cosine to zero.

    The way up keeps Adam's first steps, whose second moments are guesses, from spoiling a good start; the
    way down averages out the noise of the gradients.

    Args:
        progress: the share of all steps that is done, from 0 to 1.

    Returns:
        The factor on the learning rate.

    Source: Ilya Loshchilov, Frank Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    arXiv:1608.03983 (the cosine); Priya Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    arXiv:1706.02677 (the warm-up).

    Example:
        >>> from pyro_guides.training import warmup_cosine
        >>> [round(warmup_cosine(share), 3) for share in (0.025, 0.05, 0.525, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if progress < _WARMUP:
        return progress / _WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (progress - _WARMUP) / (1.0 - _WARMUP)))
