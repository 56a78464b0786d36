"""Takes draws from q, in passes of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.posterior.query import Query

__all__ = ["Sample", "take"]

_VALUES_PER_PASS = 500_000  # bounds the memory of one pass; measured in latent values


@final
@dataclass(frozen=True, eq=False)
class Sample:
    """Draws of the latents, and log q of each.

    Attributes:
        draws: by site, ``(S, *natural shape)``.
        log_q: ``(S, *row plates)``.
        log_q_of_rows: of each row given what rows share, ``(S, *rows)``, if that was asked for.
    """

    draws: dict[str, Tensor]
    log_q: Tensor
    log_q_of_rows: Tensor | None = None


@torch.no_grad()
def take(query: Query, num_draws: int, shared: Mapping[str, Tensor] | None) -> Sample:
    """Draw from q.

    Args:
        query: whose q.
        num_draws: S.
        shared: draws of what rows share, if these are there already; rows are then scored on their own, too.
    """
    size = sum(math.prod(query.natural_shape(latent)) for latent in query.latents.values())
    most = max(1, _VALUES_PER_PASS // max(1, size))
    draws: list[dict[str, Tensor]] = []
    log_q, of_rows = [], []
    for start in range(0, num_draws, most):
        some = slice(start, min(start + most, num_draws))
        trace = query.run(some.stop - start, {name: x[some] for name, x in (shared or {}).items()})
        draws.append(query.draws_of(trace))
        log_q.append(query.log_q_of(trace))
        if shared and not query.row_plates:
            of_rows.append(query.log_q_of(trace, query.inner_plates))
    joined = {name: torch.cat([own[name] for own in draws]) for name in query.latents}
    return Sample(joined, torch.cat(log_q), torch.cat(of_rows) if of_rows else None)
