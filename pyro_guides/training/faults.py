"""Where a loss that is no number comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_guides.training.data import Arguments

__all__ = ["fault", "without_warnings"]

_MOST = 10  # rows that are named


def fault(model: Callable[..., Any], guide: Callable[..., Any], batch: Arguments) -> str | None:
    """The first site, and the rows, whose log-density is not finite in one draw; None if all are finite."""
    # Validation would stop at what is wrong, without a word about where.
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        drawn = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        said = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*batch.args, **batch.kwargs)
        for owner, trace in (("the guide", drawn), ("the model", said)):
            for name, log_prob, plates in _densities(trace):
                wrong = ~log_prob.isfinite()
                if bool(wrong.any()):
                    where = _rows(wrong, plates, batch.rows)
                    return f"{owner}'s site '{name}' has log-density {float(log_prob[wrong][0])}{where}"
    return None


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without Pyro's warnings of NaN, which are dealt with here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def _densities(trace: poutine.Trace) -> Iterator[tuple[str, Tensor, list[Any]]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            fn: Any = site["fn"]
            log_prob = torch.as_tensor(fn.log_prob(site["value"]))
            if site["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, torch.zeros_like(log_prob))
            yield name, log_prob, frames


def _rows(wrong: Tensor, frames: list[Any], rows: Tensor | None) -> str:
    """In words, which elements of its plates are meant."""
    if not frames or not wrong.dim():
        return ""
    first = min(frames, key=lambda frame: frame.dim)
    if -first.dim > wrong.dim():
        return ""
    others = [dim for dim in range(wrong.dim()) if dim != wrong.dim() + first.dim]
    found = (wrong.any(others) if others else wrong).nonzero().reshape(-1)
    if rows is not None and int(found.max()) < len(rows) == len(wrong.movedim(first.dim, 0)):
        found = rows.to(found.device)[found]
    named = ", ".join(str(int(row)) for row in found[:_MOST])
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return f" in rows {named}{more} of plate '{first.name}'"
