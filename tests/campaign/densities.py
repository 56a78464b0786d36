"""Log q and log p of a guide's draws, written by hand for any description."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from by_hand import Recorder, groups, log_density, log_p_by_pyro, log_volume, unconstrain
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical, constraints

from pyro_guides.families import BoundDiscrete

from .description import Description, Latent, Seen
from .program import Program, mask

__all__ = ["hand_written_loss", "log_evidence", "log_p_by_hand"]

TABLES = {"bernoulli": Bernoulli, "bernoullis": Bernoulli, "one-hot": OneHotCategorical}


def hand_written_loss(program: Program, recorder: Recorder, *data: Tensor) -> float:
    """-ELBO at the draws that were recorded."""
    total = 0.0
    for trace, parameters in recorder.calls:
        elbo = float(log_p_by_pyro(program, trace, *data))
        elbo -= float(log_q(program.description, recorder.guide, trace, parameters))
        total -= elbo / len(recorder.calls)
    return total


def log_p_by_hand(
    description: Description, draws: dict[str, Tensor], data: tuple[Tensor, ...], rows: tuple[str, ...]
) -> Tensor:
    """Log p of each draw, one after another, ``(S,)``, free of a scale around all latents.

    Plates that subsample themselves are taken whole.

    Args:
        description: the model.
        draws: values of all latents, by name.
        data: the model's arguments.
        rows: plates whose elements are posteriors of their own: they do not stand for others, and nothing
            outside of them counts.
    """
    plates = tuple(replace(p, take="all") if rows or p.take == "own" else p for p in description.plates)
    program = Program(replace(description, plates=plates))
    found = []
    for index in range(len(next(iter(draws.values())))):
        values = {name: value[index] for name, value in draws.items()}
        run = poutine.trace(poutine.condition(program, data=values))
        with poutine.block(), torch.no_grad():
            trace = run.get_trace(*data)
        trace.compute_log_prob()
        inside = [node for node in trace.nodes.values() if "log_prob_sum" in node]
        inside = [node for node in inside if {f.name for f in node["cond_indep_stack"]}.issuperset(rows)]
        found.append(sum(node["log_prob_sum"] for node in inside))
    return torch.stack(found) / description.common_scale


def log_evidence(description: Description, draws: dict[str, Tensor], data: tuple[Tensor, ...]) -> float:
    """Log of the integral of a linear normal model over its latents: its log density is quadratic."""
    program = Program(description)
    values = {name: value[0] for name, value in draws.items()}
    sizes = [value.numel() for value in values.values()]

    def log_p(z: Tensor) -> Tensor:
        parts = zip(values, z.split(sizes), strict=True)
        given = {name: part.reshape(values[name].shape) for name, part in parts}
        with poutine.block():
            return poutine.trace(poutine.condition(program, data=given)).get_trace(*data).log_prob_sum()

    z = torch.zeros(sum(sizes), dtype=torch.float64)
    precision = -torch.autograd.functional.hessian(log_p, z)
    slope = torch.autograd.functional.jacobian(log_p, z)
    distance = slope @ torch.linalg.solve(precision, slope)
    log_volume = len(z) * math.log(2.0 * math.pi) - precision.logdet()
    return float(log_p(z) + 0.5 * (distance + log_volume))


def log_q(description: Description, guide: Any, trace: Any, parameters: dict[int, Tensor]) -> float:
    """Scaled log q of a trace, the mean over its particles."""
    total = 0.0
    for index, (names, _) in enumerate(groups(guide)):
        bound, λ = guide.network.family(index), parameters[index].detach()
        if isinstance(bound, BoundDiscrete):
            total += _of_table(description, trace, names[0], λ)
            continue
        apart = bound.factorized
        for unit in [(name,) for name in names] if apart else [names]:
            total += _of_unit(description, guide, trace, index, unit, λ)
    return total / _particles(trace)


def _of_unit(
    description: Description, guide: Any, trace: Any, index: int, unit: tuple[str, ...], λ: Tensor
) -> float:
    """Scaled log q of sites that are drawn together: that of u, less the volume changes of all sites."""
    names = groups(guide)[index][0]
    nodes = [trace.nodes[name] for name in names]
    parts = [unconstrain(node["fn"].support, node["value"].detach()) for node in nodes]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    u = torch.cat([part.expand(*batch, -1) for part in parts], dim=-1)
    masks = [_scored(description, name).unsqueeze(-1) for name in names]
    every = [one.expand(part.shape) for one, part in zip(masks, parts, strict=True)]
    scored = torch.cat(every, dim=-1)
    bounds = dict(guide.network.parts[index].group.bounds)
    inside = slice(bounds[unit[0]][0], bounds[unit[-1]][1])
    density = log_density(guide.network.family(index), λ, u, scored, inside)
    for name in unit:
        own, support = slice(*bounds[name]), trace.nodes[name]["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is constraints.real:
            continue
        density = density - log_volume(trace.nodes[name]["fn"].support, u[..., own], scored[..., own])
    [scale] = {description.scale_of(_site(description, name)[0]) for name in unit}
    return float(scale * density.sum())


def _of_table(description: Description, trace: Any, name: str, logits: Tensor) -> float:
    """Scaled log q of a discrete site."""
    site, value = _site(description, name)[0], trace.nodes[name]["value"].detach()
    table = TABLES.get(site.kind)
    if table is None:
        density = Categorical(logits=logits).log_prob(value)
    elif table is Bernoulli and site.kind == "bernoulli":
        density = Bernoulli(logits=logits[..., 0]).log_prob(value)
    else:
        density = table(logits=logits).log_prob(value)
        density = density.sum(-1) if table is Bernoulli else density
    density = torch.where(_scored(description, name), density, torch.zeros_like(density))
    return float(description.scale_of(site) * density.sum())


def _site(description: Description, name: str) -> tuple[Latent | Seen, bool]:
    """The site of a latent's name, and whether it is what an observation has not seen."""
    for site in (*description.latents, *description.seen):
        if name in (site.name, f"{site.name}_unobserved"):
            return site, name != site.name
    raise KeyError(name)


def _scored(description: Description, name: str) -> Tensor:
    """Which elements of a latent count."""
    site, unseen = _site(description, name)
    if unseen:
        return ~mask(description, site.plates)
    return mask(description, site.plates) if site.masked else torch.tensor(True)


def _particles(trace: Any) -> int:
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    return next((f.size for f in frames if f.name == "num_particles_vectorized"), 1)
