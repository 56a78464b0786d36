"""Takes draws from q, in passes of bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_guides.posterior.query import Query

__all__ = ["Sample", "take"]


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
def take(query: Query, num_draws: int, shared: Mapping[str, Tensor] | None = None) -> Sample:
    """Draw from q.

    Args:
        query: whose q.
        num_draws: S.
        shared: draws of what rows share, if these are there already; rows are then scored on their own, too.
    """
    draws: list[dict[str, Tensor]] = []
    log_q, of_rows = [], []
    for some in query.passes(num_draws):
        trace = query.run(some.stop - some.start, {name: x[some] for name, x in (shared or {}).items()})
        draws.append(query.draws_of(trace))
        log_q.append(query.log_q_of(trace))
        if shared and not query.row_plates:
            of_rows.append(query.log_q_of(trace, query.inner_plates))
    joined = {name: torch.cat([own[name] for own in draws]) for name in query.latents}
    return Sample(joined, torch.cat(log_q), torch.cat(of_rows) if of_rows else None)
