"""Scores a model at many draws, each exactly as one call of the model would.

Most users' models are written for one value per latent and do not broadcast over draws. ``torch.vmap`` runs
them on all draws at once with the meaning of a loop; where it cannot, a loop it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["Scores", "score_model"]

_VALUES_PER_PASS = 2_000_000  # bounds the memory of one pass

PerSite = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says about S draws.

    Attributes:
        log_prob: of every latent and observed site, masked and scaled, ``(S, *batch)``.
        likelihood: of every observed site, neither masked nor scaled, ``(S, *batch)``.
        observed: the observed values.
    """

    log_prob: PerSite
    likelihood: PerSite
    observed: PerSite


def score_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
) -> Scores:
    """Run the model at every draw.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        draws: values of all latents, ``(S, *natural shape)``.
        indices: the elements that subsampled plates take.

    Raises:
        NotImplementedError: the model draws other latents itself.
    """

    def run(values: Mapping[str, Tensor]) -> Trace:
        given = _trace_of({**values, **indices})
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        return trace

    first = run({name: value[0] for name, value in draws.items()})
    sites = [name for name, site in first.nodes.items() if _is_random(site)]
    if drawn := [name for name in first.stochastic_nodes if name in sites and name not in draws]:
        raise NotImplementedError(
            f"the model itself draws {drawn}, which the guide leaves to it (enumerated sites, for "
            "instance), so log p of the other latents alone is not to be had"
        )
    observed = {n: _full(first.nodes[n], "value") for n in first.observation_nodes if n in sites}

    def score(values: Mapping[str, Tensor]) -> tuple[PerSite, PerSite]:
        nodes = run(values).nodes
        log_prob = {name: _full(nodes[name], "log_prob") for name in sites}
        return log_prob, {name: _full(nodes[name], "unscaled_log_prob") for name in observed}

    size = sum(_full(first.nodes[name], "value").numel() for name in sites)
    log_prob, likelihood = _over_draws(score, draws, max(1, _VALUES_PER_PASS // max(1, size)))
    return Scores(log_prob, likelihood, observed)


def _over_draws(
    score: Callable[[Mapping[str, Tensor]], tuple[PerSite, PerSite]],
    draws: Mapping[str, Tensor],
    at_once: int,
) -> tuple[PerSite, PerSite]:
    try:
        # Validation asks for Python booleans, and missing batching rules warn before they loop.
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.vmap(score, chunk_size=at_once)(dict(draws))
    except Exception:  # noqa: BLE001 - one draw went well, so vmap is what failed: anything may come
        count = len(next(iter(draws.values())))
        scores = [score({name: x[i] for name, x in draws.items()}) for i in range(count)]
        first, second = zip(*scores, strict=True)
        return _stacked(first), _stacked(second)


def _stacked(scores: tuple[PerSite, ...]) -> PerSite:
    return {name: torch.stack([score[name] for score in scores]) for name in scores[0]}


def _full(site: Any, key: str) -> Tensor:
    """A site's log density in the full batch shape of the site (or its value, as it is)."""
    value = torch.as_tensor(site[key])
    if key == "value":
        return value
    return value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape))


def _is_random(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


def _trace_of(values: Mapping[str, Tensor]) -> Trace:
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", name=name, is_observed=False, value=value, infer={})
    return trace
