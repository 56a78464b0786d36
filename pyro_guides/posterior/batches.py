"""Posteriors of batch after batch of rows, with one at a time in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_guides.posterior.posterior import Posterior
from pyro_guides.posterior.query import Query

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["posteriors"]


def posteriors(guide: AmortizedGuide, batches: Iterable[Any], num_draws: int) -> Iterator[Posterior]:
    """See ``AmortizedGuide.posteriors``."""
    if isinstance(batches, (Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be a DataLoader or another iterable of batches, got a "
            f"{type(batches).__name__}; cut a tensor into some with x.split(500)"
        )
    shared: dict[str, Tensor] | None = None
    for batch in batches:
        named = dict(batch) if isinstance(batch, Mapping) else {}
        args = () if named else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        query = Query.of(guide.setup(*args, **named), args, named)
        shared = _learned_draws(Posterior(query, num_draws=num_draws)) if shared is None else shared
        yield Posterior(query, num_draws=num_draws, shared=shared)


def _learned_draws(posterior: Posterior) -> dict[str, Tensor]:
    """Draws of what all rows share, if it is learned, and hence the same for every batch."""
    query = posterior.query
    parts = query.guide.network.parts
    outer = [turn for turn in query.turns if not query.inner >= set(turn.group.sites)]
    if not query.inner or any(parts[turn.part].encodings for turn in outer):
        return {}
    names = [name for turn in outer for name in turn.group.sites if name in query.latents]
    return {name: posterior.draws[name] for name in names}
