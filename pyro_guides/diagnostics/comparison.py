"""Simulated data sets, put through a trained guide: where are true values among draws from q?

Data sets lie side by side in one pass wherever encoders read the model's arguments as they are; a function of
the user's, which may expect one data set, gets one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_guides.diagnostics.simulations import Simulated, coordinates, in_rows
from pyro_guides.inputs import with_observations

if TYPE_CHECKING:
    from pyro_guides.posterior import Query

__all__ = ["Comparison", "compare"]

_DRAWS, _DATA_SETS = "_draws_per_data_set", "_simulated_data_sets"
_VALUES_PER_PASS = 250_000  # latent values; bounds memory, and what fits into caches is faster
_VALUES_KEPT = 10_000_000  # bounds the draws that are kept for distances
_ROUNDING = 1e-5  # equal log densities of two passes are not further apart

PerSite = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """Where the true values of n rows are among S draws from q of each.

    Attributes:
        ranks: by site, how many draws are below the true value, ``(n, *shape of a row)``.
        denser: how many draws have a higher log q than the true values of the row, ``(n,)``.
        draws: unconstrained values of the first draws, as many as are worth keeping, ``(S or less, n, D)``.
        truth: the true unconstrained values, ``(n, D)``.
    """

    ranks: PerSite
    denser: Tensor
    draws: Tensor
    truth: Tensor


@torch.no_grad()
def compare(query: Query, simulated: Simulated, num_draws: int) -> Comparison:
    """Draw from q of every simulated data set, and see where the true values are."""
    truths, data = simulated.truths, simulated.data
    count = len(next(iter(truths.values())))
    size = sum(value[0].numel() for value in truths.values())
    at_once = max(1, _VALUES_PER_PASS // (num_draws * size)) if _lie_side_by_side(query) else 1
    kept = max(1, _VALUES_KEPT // simulated.references.numel())
    parts = []
    for start in range(0, count, at_once):
        some = slice(start, start + at_once)
        own, seen = ({name: x[some] for name, x in values.items()} for values in (truths, data))
        parts.append(_compare(query, own, seen, num_draws, kept))
    return Comparison(
        {name: torch.cat([part.ranks[name] for part in parts]) for name in truths},
        torch.cat([part.denser for part in parts]),
        torch.cat([part.draws for part in parts], dim=1),
        torch.cat([part.truth for part in parts]),
    )


def _compare(query: Query, truths: PerSite, data: PerSite, num_draws: int, kept: int) -> Comparison:
    """The same for data sets that lie side by side, with as many draws in a pass as memory allows."""
    count, latents = len(next(iter(truths.values()))), query.latents
    most = max(1, _VALUES_PER_PASS // sum(value.numel() for value in truths.values()))
    tallies = {name: _Tally(value) for name, value in truths.items()}
    density = _Tally(query.log_q_of(run(query, data, 1, truths))[0], rounding=_ROUNDING)
    first = []
    for start in range(0, num_draws, most):
        trace = run(query, data, min(most, num_draws - start))
        nodes = {name: cast("Tensor", trace.nodes[name]["value"]) for name in latents}
        draws = {n: x.reshape(-1, count, *query.natural_shape(latents[n])) for n, x in nodes.items()}
        density.add(query.log_q_of(trace))
        for name, value in draws.items():
            tallies[name].add(value)
        if start < kept:
            first.append(coordinates(query, {n: x[: kept - start] for n, x in draws.items()}, lead=1))
    return Comparison(
        {name: in_rows(query, tally.ranks(), latents[name]) for name, tally in tallies.items()},
        num_draws - density.ranks().flatten(),
        torch.cat(first),
        coordinates(query, truths),
    )


def run(query: Query, data: PerSite, num_draws: int, values: Mapping[str, Tensor] | None = None) -> Trace:
    """Trace the guide for draws and simulated data sets side by side, ``(S, M, *batch, *event)``.

    Args:
        query: what is judged.
        data: values of the observed sites, ``(M, *natural shape)``.
        num_draws: S.
        values: values of latents to take instead of drawing them, ``(M, *natural shape)``.
    """
    structure = query.structure
    count = len(next(iter(data.values())))
    alone = {name: x[0] for name, x in data.items()} if count == 1 else data  # as the model has it
    args, kwargs = with_observations(structure, query.args, query.kwargs, alone)
    given = {name: value.unsqueeze(0) for name, value in query.held.items()} | dict(values or {})

    def sample() -> PerSite:
        return query.guide._open(args, kwargs, structure=structure).sample()

    guide = poutine.condition(sample, data={name: _aligned(query, name, x) for name, x in given.items()})
    with (
        query.guide.network.evaluated(),
        poutine.block(),
        pyro.plate(_DRAWS, num_draws, dim=-structure.depth - 2),
        pyro.plate(_DATA_SETS, count, dim=-structure.depth - 1),
    ):
        return poutine.trace(guide).get_trace()


def _aligned(query: Query, name: str, value: Tensor) -> Tensor:
    """A value ``(M, *natural shape)`` with a dimension of draws, both on the left of all plates."""
    latent = query.structure.latents[name]
    natural = query.natural_shape(latent)
    gap = (1,) * (query.structure.depth - len(natural) + len(latent.event_shape))
    return value.reshape(1, len(value), *gap, *natural)


def _lie_side_by_side(query: Query) -> bool:
    """Whether data sets on the left of all plates mean to guide and encoders what each means alone."""
    structure = query.structure
    sources = [encoding.source for part in query.guide.network.parts for encoding in part.encodings]
    plain = all(x.argument is not None and len(x.plates) in (0, structure.depth) for x in sources)
    fixed = all(latent.fixed for latent in structure.latents.values())
    unmasked = all(site.mask is None for site in structure.observed.values())
    return plain and fixed and unmasked and query.guide.create_plates is None


@final
class _Tally:
    """Counts the draws below true values, as they come in parts; which of equal ones are, is left to chance.

    Args:
        truth: the true values.
        rounding: how far apart, absolutely or relatively, equal ones may be.
    """

    def __init__(self, truth: Tensor, rounding: float = 0.0) -> None:
        self.truth = truth
        self.rounding = rounding
        self.below = torch.zeros_like(truth, dtype=torch.long)
        self.equal = torch.zeros_like(self.below)

    def add(self, draws: Tensor) -> None:
        """Count more draws, with their dimension on the left."""
        truth = self.truth.expand_as(draws)
        equal = draws == truth
        if self.rounding:
            equal = torch.isclose(draws, truth, rtol=self.rounding, atol=self.rounding)
        self.below += ((draws < truth) & ~equal).sum(0)
        self.equal += equal.sum(0)

    def ranks(self) -> Tensor:
        """How many draws are below each true value."""
        chance = torch.rand(self.equal.shape, device=self.equal.device, dtype=torch.double)
        return self.below + (chance * (self.equal + 1)).long()
