r"""The best q for the rows at hand: their λ optimized from where the encoder puts it.

Everything but :math:`\lambda_i` of these rows stays fixed, so rows are optimized independently, all at once:

.. math:: \max_{\delta_i} E_{q(z_i; \lambda_i + \delta_i)}[\log p(x_i, z_i) - \log q(z_i; \lambda_i +
\delta_i)]

Adam walks in units of the Fisher information of λ, in which a step changes q alike wherever it lies and
however narrow it is.

Source: Yoon Kim et al., "Semi-Amortized Variational Autoencoders", 2018, arXiv:1802.02550; Chris Cremer,
Xuechen Li, David Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018, arXiv:1801.03558
(the gaps).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.refinement import Change, Refinement
from pyro_guides.statistics import arguments

if TYPE_CHECKING:
    from pyro_guides.posterior.query import Query

__all__ = ["Gain", "refine"]

_RATES = (0.1, 0.03, 0.01)  # of Adam, each until the ELBO has settled
_BLOCK = 50  # steps between looks at the ELBO
_LOOKS = 64  # draws per look
_PROBES = 64  # draws that tell the information about λ
_LEAST_INFORMATION = 0.02  # elements of λ that hardly matter are not to run away


@final
@dataclass(frozen=True, eq=False)
class Gain:
    """What refining λ has gained.

    Attributes:
        value: the ELBO of the refined q minus that of the amortized q, ``(*rows)``, in nats, from fresh
            draws.
        error: its standard error.
        steps: how many steps were taken.
        settled: whether the ELBO had stopped growing when they ended.
    """

    value: Tensor
    error: Tensor
    steps: int
    settled: bool


def refine(
    query: Query, *, num_draws: int = 1000, particles: int = 16, max_steps: int = 2000
) -> tuple[Refinement, Gain]:
    """Optimize λ of the rows of a query, see ``Posterior.refine``.

    Args:
        query: the rows.
        num_draws: S, how many draws measure the gain.
        particles: how many draws each step takes.
        max_steps: when to stop in any case.
    """
    arguments.count("particles", particles, least=1)
    arguments.count("max_steps", max_steps, least=1)
    query = query.remembering()
    start = query.refinement if query.refinement is not None else Refinement(_changes(query))
    refinement = copy.deepcopy(start).requires_grad_()
    walk = _Walk(query, refinement, particles)
    with torch.enable_grad():
        settled = walk.until_settled(max_steps)
    before, after = _compared(query, refinement, num_draws)
    _keep_where(query, _change(before, after).mean(0) > 0, refinement, copy.deepcopy(start))
    before, after = _compared(query, refinement, num_draws)
    gain = _change(before, after)
    error = gain.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(gain[0], float("nan"))
    return refinement.requires_grad_(False), Gain(gain.mean(0), error, walk.steps, settled)


class _Walk:
    """Stochastic ascent of the ELBO of all rows."""

    def __init__(self, query: Query, refinement: Refinement, particles: int) -> None:
        self.query = query.refined(refinement)
        self.refinement = refinement
        self.parameters = list(refinement.parameters())
        self.particles = particles
        self.steps = 0

    def until_settled(self, max_steps: int) -> bool:
        """Take steps of each size until the ELBO has stopped growing; whether it has."""
        state = torch.get_rng_state()
        last = _log_weights(self.query, _LOOKS, state)
        for rate in _RATES:
            grown = True
            while grown:
                if self.steps >= max_steps:
                    return False
                self._block(rate, min(_BLOCK, max_steps - self.steps))
                now = _log_weights(self.query, _LOOKS, state)  # the same random numbers: less noise
                grown, last = _has_grown(last, now), now
        return True

    def _block(self, rate: float, count: int) -> None:
        """Some steps, after which parameters are the mean over the second half of them."""
        _renew_units(self.query, self.refinement)
        optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=(0.9, 0.99))
        sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        first = count // 2
        for step in range(count):
            surrogate = _surrogate(self.query, self.particles)
            gradients = torch.autograd.grad(-surrogate, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
            optimizer.step()
            if step >= first:
                for total, parameter in zip(sums, self.parameters, strict=True):
                    total += parameter.detach()
        self.steps += count
        with torch.no_grad():
            for total, parameter in zip(sums, self.parameters, strict=True):
                parameter.copy_(total / (count - first))


def _change(before: Tensor, after: Tensor) -> Tensor:
    """How log weights changed: not at all where draws are impossible before and after."""
    change = after - before
    return torch.where(after.isneginf() & before.isneginf(), torch.zeros_like(change), change)


def _has_grown(before: Tensor, after: Tensor) -> bool:
    """Whether log weights ``(_LOOKS, *rows)`` say that the ELBO has grown by more than their noise."""
    change = _change(before, after)
    if int(after.isfinite().sum()) > int(before.isfinite().sum()):
        return True
    growth = change.where(change.isfinite(), torch.zeros_like(change)).reshape(_LOOKS, -1).mean(1)
    return bool(growth.mean() > max(2.0 * float(growth.std()) / len(growth) ** 0.5, 1e-3))


def _surrogate(query: Query, particles: int) -> Tensor:
    """What to differentiate: its gradient is that of the sum of all rows' ELBOs."""
    trace = query.run(particles)
    trace.compute_score_parts()
    parts = {name: trace.nodes[name]["score_parts"] for name in query.latents}
    plates = query.inner_plates
    log_p = query.by_row(query.model.score(query.draws_of(trace), query.held).log_prob, plates)
    entropy = query.by_row(
        {n: p.entropy_term for n, p in parts.items() if _is_tensor(p.entropy_term)}, plates
    )
    surrogate = log_p - entropy
    scores = {n: p.score_function for n, p in parts.items() if _is_tensor(p.score_function)}
    if scores and particles > 1:  # the other draws of the same row are its baseline
        log_q = query.by_row({name: part.log_prob for name, part in parts.items()}, plates)
        cost = (log_p - log_q).detach()
        centred = (cost - cost.mean(0)) * particles / (particles - 1)
        surrogate = surrogate + centred * query.summed(scores, plates)
    return surrogate.mean(0).sum()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _changes(query: Query) -> dict[tuple[int, int | None], Change]:
    """A change for each group of the rows: none yet, in units of the information about λ."""
    targets = _targets(query)
    head = query.guide.network.head
    units = _units(query, Refinement({}), targets)
    return {key: Change(unit, head(key[0]).start) for key, unit in units.items()}


def _renew_units(query: Query, refinement: Refinement) -> None:
    """Units of the information at the λ of now; changes stay what they are."""
    for key, unit in _units(query, refinement, list(refinement.position)).items():
        cast("Change", refinement.get(*key)).measure_in(unit)


def _units(
    query: Query, refinement: Refinement, targets: list[tuple[int, int | None]]
) -> dict[tuple[int, int | None], Tensor]:
    """One over the root of the Fisher information about each element of λ, ``(*batch, W)`` by group."""
    depth = query.structure.depth
    probes = {key: _Probe(depth, refinement.get(*key)) for key in targets}
    with torch.no_grad():
        draws = query.draws_of(query.run(_PROBES))
    with torch.enable_grad():
        trace = query.refined(Refinement(probes)).run(_PROBES, draws)
        log_q = query.log_q_of(trace, query.inner_plates).sum()
    log_q.backward(inputs=[probe.added for probe in probes.values()])
    return {key: probe.unit() for key, probe in probes.items()}


def _targets(query: Query) -> list[tuple[int, int | None]]:
    """The groups that lie in the rows, step by step; all that are amortized if there are no rows."""
    parts = query.guide.network.parts
    own = [turn for turn in query.turns if query.latents.keys() >= set(turn.group.sites)]
    inside = [turn for turn in own if query.inner >= set(turn.group.sites)]
    amortized = [turn for turn in own if parts[turn.part].encodings]
    return [(turn.part, turn.step) for turn in inside or amortized or own]


class _Probe(nn.Module):
    """Finds out how much each element of λ decides about log q of draws.

    Args:
        depth: how many dimensions the model's plates take.
        change: the change of λ so far, if there is one.
    """

    def __init__(self, depth: int, change: nn.Module | None) -> None:
        super().__init__()
        self.depth = depth
        self.change = change
        self.lead = 0
        self.added: Tensor = torch.empty(0)

    def forward(self, parameters: Tensor, upstream: Tensor | None) -> Tensor:
        """λ with something added to it that is zero, draw by draw."""
        if self.change is not None:
            parameters = self.change(parameters, upstream)
        if self.added.numel():  # the path through upstream values alone is of no interest
            return parameters
        batch = parameters.shape[:-1]
        if len(batch) <= self.depth:
            self.lead = self.depth - len(batch)
            batch = torch.Size((_PROBES, *[1] * self.lead, *batch))
        self.added = parameters.new_zeros(*batch, parameters.shape[-1]).requires_grad_()
        return parameters + self.added

    def unit(self) -> Tensor:
        """One over the root of the information, ``(*batch, W)``."""
        information = cast("Tensor", self.added.grad).square().mean(0)
        for _ in range(self.lead):
            information = information.squeeze(0)
        return (information + _LEAST_INFORMATION).rsqrt()


def _keep_where(query: Query, better: Tensor, refinement: Refinement, start: Refinement) -> None:
    """Go back to the start where that was better, ``(*rows)``."""
    rows = better.reshape(query.rows_in(query.structure.depth, query.inner_plates))
    pairs = zip(refinement.changes, start.changes, strict=True)
    for change, other in cast("Iterator[tuple[Change, Change]]", pairs):
        batch_dim = change.unit.dim() - 1
        change.keep(rows.reshape(rows.shape[rows.dim() - batch_dim :]), other)


def _compared(query: Query, refinement: Refinement, count: int) -> tuple[Tensor, Tensor]:
    """Log weights ``(S, *rows)`` before and after, with the same random numbers."""
    state = torch.get_rng_state()
    before = _log_weights(query, count, state)
    return before, _log_weights(query.refined(refinement), count, state)


@torch.no_grad()
def _log_weights(query: Query, count: int, state: Tensor) -> Tensor:
    """Log weights of rows, ``(S, *rows)``, by the random numbers that follow a given state."""
    elsewhere = torch.get_rng_state()
    torch.set_rng_state(state)
    parts = []
    for some in query.passes(count):
        trace = query.run(some.stop - some.start)
        parts.append((query.draws_of(trace), query.log_q_of(trace, query.inner_plates)))
    if not torch.equal(state, elsewhere):
        torch.set_rng_state(elsewhere)
    draws = {name: torch.cat([own[name] for own, _ in parts]) for name in query.latents}
    log_q = torch.cat([log_q for _, log_q in parts])
    log_p = query.by_row(query.model.score(draws, query.held).log_prob, query.inner_plates)
    return log_p - log_q
