"""Log q and ELBOs written by hand, for draws that a guide really made.

What a test compares with is computed here from how draws are made alone: densities of the affine map that
turns noise into u, and Jacobians of the bijections that autograd takes row by row. None of the package's own
densities, inverses of scales or log-determinants is used.
"""

import math
from functools import partial

import pyro
import torch
from models import F64, PARTICLES, two
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal

from pyro_guides import DiagonalNormal
from pyro_guides.distributions import bijection
from pyro_guides.families import BoundMixture


class Recorder:
    """Stands in for a guide and keeps, for every call, its trace and λ of each group."""

    def __init__(self, guide):
        self.guide = guide
        self.calls = []

    def __call__(self, *args, **kwargs):
        parameters = {}

        def note(index, head, inputs, output):
            parameters.setdefault(index, output)  # the first call; later ones serve the gradient

        heads = enumerate(self.guide.network.heads)
        hooks = [head.register_forward_hook(partial(note, index)) for index, head in heads]
        with poutine.trace() as tracer:
            values = self.guide(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        self.calls.append((tracer.trace, parameters))
        return values


def normal(bound, parameters, scored=None):
    """q(u; λ) of a bound family by what its map u = μ + S ε does to 0 and to unit vectors."""
    q = bound(parameters, None if scored is None or scored.all() else scored)
    loc = q.push(torch.zeros_like(q.mean))[0]
    columns = [q.push(unit.expand_as(loc))[0] - loc for unit in torch.eye(loc.shape[-1], dtype=loc.dtype)]
    scale = torch.stack(columns, dim=-1)
    return MultivariateNormal(loc, scale @ scale.mT)


def _pairs(scored):
    return scored.unsqueeze(-1) & scored.unsqueeze(-2)


def free_entries(support, value):
    """The coordinates with respect to which a density on ``support`` is one."""
    event = value.shape[value.dim() - support.event_dim :]
    name = type(support).__name__
    if "Chol" in name or name in ("_CorrMatrix", "_PositiveDefinite"):
        offset = -1 if "Corr" in name or "Unit" in name else 0
        rows, columns = torch.tril_indices(*event, offset)
        return value[..., rows, columns]
    flat = value.reshape(*value.shape[: value.dim() - len(event)], -1)
    return flat[..., :-1] if name == "_Simplex" else flat


def unconstrain(support, value):
    """u of a site, ``(*batch, size)``."""
    transform = bijection(support)
    u = transform.inv(value)
    return u.reshape(*u.shape[: u.dim() - transform.domain.event_dim], -1)


def log_volume(support, u, scored):
    """Log of the volume change from u to the site's free entries, by autograd, row by row of J.

    A partial mask makes sense only where the bijection acts on each element alone.
    """
    transform = bijection(support)
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        shaped = u if transform.domain.event_dim else u.squeeze(-1)
        value = free_entries(support, transform(shaped)).reshape(u.shape)
        rows = [torch.autograd.grad(v.sum(), u, retain_graph=True)[0] for v in value.unbind(-1)]
    eye = torch.eye(u.shape[-1], dtype=u.dtype)
    return torch.where(_pairs(scored), torch.stack(rows, dim=-2), eye).slogdet()[1]


def groups(guide):
    """The sites of each group and the family that the guide gives it."""
    return [
        (part.group.sites, family) for part, family in zip(guide.network.parts, guide.families, strict=True)
    ]


def log_q_by_hand(guide, trace, parameters, masks=None):
    """Log q, unscaled, of the values in a trace, ``{sites: (*batch)}``, for sites that q draws jointly.

    Args:
        masks: for sites that are masked, which unconstrained elements count, ``(*batch, size)``.
    """
    densities = {}
    for index, (sites, family) in enumerate(groups(guide)):
        nodes = [trace.nodes[name] for name in sites]
        parts = [unconstrain(node["fn"].support, node["value"].detach()) for node in nodes]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        u = torch.cat([part.expand(*batch, -1) for part in parts], dim=-1)
        every = [(masks or {}).get(name, torch.ones(1, dtype=torch.bool)) for name in sites]
        every = torch.cat([mask.expand(part.shape) for mask, part in zip(every, parts, strict=True)], dim=-1)
        bound, λ = guide.network.family(index), parameters[index].detach()
        units = [(name,) for name in sites] if isinstance(family, DiagonalNormal) else [sites]
        bounds = dict(guide.network.parts[index].group.bounds)
        for unit in units:
            inside = slice(bounds[unit[0]][0], bounds[unit[-1]][1])
            density = log_density(bound, λ, u, every, inside)
            for name in unit:
                own = slice(*bounds[name])
                support = trace.nodes[name]["fn"].support
                density = density - log_volume(support, u[..., own], every[..., own])
            densities[unit] = density
    return densities


def log_density(bound, parameters, u, scored, inside):
    """Log density of the scored elements of a slice of u, by what the family says that λ means."""
    if isinstance(bound, BoundMixture):
        logits, parts = parameters.split([bound.count, bound.width - bound.count], dim=-1)
        components = parts.unflatten(-1, (bound.count, -1)).unbind(-2)
        terms = [log_density(bound.component, part, u, scored, inside) for part in components]
        return (logits.log_softmax(-1) + torch.stack(terms, dim=-1)).logsumexp(-1)
    if hasattr(bound, "flow"):
        return pushed_log_prob(bound(parameters, None if scored.all() else scored), u, scored)
    return marginal_log_prob(normal(bound, parameters, scored), u, scored, inside)


def pushed_log_prob(q, u, scored):
    """The density of noise that an invertible map pushes to u, by autograd through the map."""
    with torch.enable_grad():
        noise = q.pull(u)[0].detach().requires_grad_()
        image = q.push(noise)[0]
        # A bent flow is steep: its inverse magnifies rounding.
        assert torch.where(scored, image - u, torch.zeros_like(u)).abs().max() < 1e-5
        rows = [torch.autograd.grad(v.sum(), noise, retain_graph=True)[0] for v in image.unbind(-1)]
    eye = torch.eye(u.shape[-1], dtype=u.dtype)
    volume = torch.where(_pairs(scored), torch.stack(rows, dim=-2), eye).slogdet()[1]
    terms = 0.5 * noise.detach().square() + 0.5 * math.log(2.0 * math.pi)
    return -torch.where(scored, terms, torch.zeros_like(terms)).sum(-1) - volume


def marginal_log_prob(q, u, scored, inside):
    """Log density of the scored elements of a slice of u alone."""
    scored, deviation = scored[..., inside], (u - q.loc)[..., inside]
    covariance = q.covariance_matrix[..., inside, inside]
    eye = torch.eye(deviation.shape[-1], dtype=u.dtype)
    covariance = torch.where(_pairs(scored), covariance, eye)
    deviation = torch.where(scored, deviation, torch.zeros_like(deviation))
    density = MultivariateNormal(torch.zeros_like(deviation), covariance).log_prob(deviation)
    return density + (~scored).to(u).sum(-1) * math.log(2.0 * math.pi) / 2.0


def log_p_by_pyro(model, trace, *args):
    """Log p of a guide's trace under the model as Pyro scores it: ``(particles, *plates)`` summed."""
    with poutine.block(), torch.no_grad():
        frames = {f.name: f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())}
        run = poutine.trace(poutine.replay(model, trace=trace))
        if "num_particles_vectorized" not in frames:
            return run.get_trace(*args).log_prob_sum()
        frame = frames["num_particles_vectorized"]
        with pyro.plate(frame.name, frame.size, dim=frame.dim):
            return run.get_trace(*args).log_prob_sum() / frame.size


def hand_written_loss(model, recorder, *args, scale=1.0, masks=None):
    """-ELBO at the draws that were recorded.

    Args:
        scale: how much one element counts, for all groups or by their first site.
        masks: see `log_q_by_hand`.
    """
    total = 0.0
    for trace, parameters in recorder.calls:
        elbo = log_p_by_pyro(model, trace, *args)
        for sites, density in log_q_by_hand(recorder.guide, trace, parameters, masks).items():
            factor = scale.get(sites[0], 1.0) if isinstance(scale, dict) else scale
            elbo = elbo - (factor * density).sum() / _particles(trace)
        total = total - elbo / len(recorder.calls)
    return float(total.detach())


def _particles(trace):
    sizes = [
        frame.size
        for node in trace.nodes.values()
        for frame in node.get("cond_indep_stack", ())
        if frame.name == "num_particles_vectorized"
    ]
    return sizes[0] if sizes else 1


def check_loss(model, guide, *args, elbo=Trace_ELBO, depth=1, particles="vectorized", **options):
    """Assert that an ELBO's loss is the one written by hand, at the same draws; returns the recorder."""
    recorder = Recorder(guide)
    loss = elbo(max_plate_nesting=depth, **PARTICLES[particles]).loss(model, recorder, *args)
    expected = hand_written_loss(model, recorder, *args, **options)
    assert abs(loss - expected) < 1e-7 * max(1.0, abs(expected)), (
        f"{elbo}, {particles}: {loss} instead of {expected}"
    )
    return recorder


def forest_by_hand(x):
    """The precision of all latents given x, their posterior mean, and log p(x)."""
    rows_, cells = x.shape
    total = 1 + rows_ + rows_ * cells
    step = torch.eye(total, **F64)  # latents minus their parents are independent noise
    noise = torch.cat([two(1.0), torch.full((rows_,), 0.8, **F64), torch.full((rows_ * cells,), 0.6, **F64)])
    step[1 : 1 + rows_, 0] = -1.0
    for cell in range(rows_ * cells):
        step[1 + rows_ + cell, 1 + cell // cells] = -1.0
    prior = step.T @ noise.square().reciprocal().diag() @ step
    seen = torch.zeros(total, **F64)
    seen[1 + rows_ :] = 1.0
    precision = prior + (seen / 0.25).diag()
    center = torch.full((total,), 0.3, **F64)
    mean = center + precision.inverse()[:, 1 + rows_ :] @ (x.flatten() - 0.3) / 0.25
    marginal = prior.inverse()[1 + rows_ :, 1 + rows_ :] + 0.25 * torch.eye(rows_ * cells, **F64)
    evidence = MultivariateNormal(center[1 + rows_ :], marginal).log_prob(x.flatten())
    return precision, mean, float(evidence)
