"""How far a guide's posterior is from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_guides.statistics.psis import smooth
from tests.benchmarks.accuracy.targets import Draws, Target, scalars

__all__ = ["Score", "score"]

DRAWS = 10_000  # means are known to 0.01 sd, sds to 0.7 %
_VALUES_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Score:
    """What was found.

    Attributes:
        mean_error: the mean over scalars of |mean - reference|, in the reference's sds.
        worst_mean: the largest of these.
        ratios: the sds as shares of the reference's: median, smallest, largest.
        k_hat: of the joint.
        elbo: in nats.
        elbo_error: its standard error.
        seconds: of training.
        flipped: the share of draws in the second of two modes; NaN where there is one.
    """

    mean_error: float
    worst_mean: float
    ratios: tuple[float, float, float]
    k_hat: float
    elbo: float
    elbo_error: float
    seconds: float
    flipped: float = math.nan


@torch.no_grad()
def score(target: Target, guide: Callable[..., Any], seconds: float, draws: int = DRAWS) -> Score:
    """Draw from the guide, and compare."""
    values, log_weights = _drawn(target, guide, draws)
    found, known = scalars(target, values), target.known
    error = (found.mean(0) - known.mean).abs() / known.sd
    ratio = found.std(0) / known.sd
    flipped = math.nan if target.flipped is None else float(target.flipped(values).double().mean())
    return Score(
        float(error.mean()),
        float(error.max()),
        (float(ratio.median()), float(ratio.min()), float(ratio.max())),
        float(smooth(log_weights.numpy()).k_hat),
        float(log_weights.mean()),
        float(log_weights.std()) / math.sqrt(draws),
        seconds,
        flipped,
    )


def _drawn(target: Target, guide: Callable[..., Any], draws: int) -> tuple[Draws, Tensor]:
    """Values of all latents, ``(S, ...)``, and log p - log q of each draw."""
    values: dict[str, list[Tensor]] = {}
    weights = []
    for count in _portions(target, draws):
        log_weights, model_trace, guide_trace = vectorized_importance_weights(
            target.model, guide, *target.data, num_samples=count, max_plate_nesting=target.nesting
        )
        weights.append(log_weights)
        for name in model_trace.stochastic_nodes:
            if name in guide_trace:
                values.setdefault(name, []).append(model_trace.nodes[name]["value"])
    return {name: torch.cat(parts) for name, parts in values.items()}, torch.cat(weights)


def _portions(target: Target, draws: int) -> Iterator[int]:
    """How many draws to take at once, so that a pass over the data fits into memory."""
    most = max(2, _VALUES_AT_ONCE // max(tensor.numel() for tensor in target.data))
    while draws:
        count = min(most, draws if draws - most != 1 else draws + 1)
        yield min(count, draws)
        draws -= min(count, draws)
