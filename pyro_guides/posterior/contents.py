"""What a posterior holds, as named NumPy arrays for ArviZ."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_guides.structure import Structure
from pyro_guides.variables import Variable

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior
    from pyro_guides.posterior.query import Query

__all__ = ["attributes", "contents", "variable"]

_DRAW_DIMS = ("chain", "draw")


def contents(posterior: Posterior) -> dict[str, dict[str, Variable]]:
    """All that ArviZ takes of a posterior."""
    query = posterior.query
    structure, rows = query.structure, query.row_plates
    dims = {name: _dims(site.plates, structure) for name, site in structure.latents.items()}
    dims |= {name: _dims(site.plates, structure) for name, site in structure.observed.items()}

    def drawn(values: Mapping[str, Tensor], event: Mapping[str, int]) -> dict[str, Variable]:
        return {name: variable(value, dims[name], event[name]) for name, value in values.items()}

    latents = query.latents
    unconstrained = {
        name: latent.require_transform().inv(posterior.draws[name])
        for name, latent in latents.items()
        if not (latent.discrete or query.is_live(name))
    }
    sizes = {name: len(latent.unconstrained_shape) for name, latent in latents.items()}
    events = {name: len(latent.event_shape) for name, latent in latents.items()}
    groups = {
        "posterior": drawn(posterior.draws, events),
        "unconstrained_posterior": drawn(unconstrained, sizes),
        "log_likelihood": drawn(posterior.log_likelihood, dict.fromkeys(posterior.log_likelihood, 0)),
        "observed_data": {
            name: _observed(value, name, structure, dims[name]) for name, value in posterior.observed.items()
        },
        "constant_data": _constants(posterior),
        "sample_stats": _statistics(posterior, _dims(rows, structure)),
    }
    return {group: found for group, found in groups.items() if found}


def _observed(value: Tensor, name: str, structure: Structure, dims: Mapping[str, int]) -> Variable:
    """Observed values in all elements of their plates, over which they may broadcast."""
    site = structure.observed[name]
    event = value.shape[value.dim() - site.event_dim :]
    whole = torch.broadcast_shapes(value.shape, (*structure.batch_shape(site.plates), *event))
    return variable(value.expand(whole), dims, site.event_dim, draws=False)


def attributes(posterior: Posterior) -> dict[str, Any]:
    """What is noted beside the arrays."""
    note = "draws from q; weight by exp(log_weight)"
    if posterior.resampled:
        note = "draws from q, resampled with Pareto-smoothed weights; not to be weighted again"
    held = {f"given_{name}": value.flatten().tolist() for name, value in posterior.query.held.items()}
    families = ", ".join(type(family).__name__ for family in posterior.guide.families)
    return {"families": families, "arviz_note": note, **held}


def variable(value: Tensor, plates: Mapping[str, int], event_dim: int, *, draws: bool = True) -> Variable:
    """An array with the names of its plates.

    Args:
        value: ``(S, *batch, *event)``, or ``(*batch, *event)``.
        plates: the dimension of each plate, by name.
        event_dim: how many dimensions one value has.
        draws: whether the first dimension is that of draws.
    """
    array = value.numpy(force=True)
    lead = int(draws)
    batch = array.shape[lead : array.ndim - event_dim]
    ordered = sorted(plates, key=lambda name: plates[name])
    named: tuple[str, ...] = ()
    if ordered and -plates[ordered[0]] <= len(batch):  # else it broadcasts over its plates
        kept = [batch[plates[name]] for name in ordered]
        # Dimensions between plates have size 1 and no name.
        array = array.reshape(*array.shape[:lead], *kept, *array.shape[lead + len(batch) :])
        named = tuple(ordered)
    if not draws:
        return Variable(array, named)
    return Variable(array[None], _DRAW_DIMS + named)


def _dims(plates: tuple[str, ...], structure: Structure) -> dict[str, int]:
    return {name: structure.plates[name].dim for name in plates}


def _statistics(posterior: Posterior, rows: Mapping[str, int]) -> dict[str, Variable]:
    """Log densities of each draw, and what they say of q."""
    log_p, log_q = posterior.log_p, posterior.log_q
    of_rows = posterior.densities_of_rows()
    if of_rows is not None:
        rows = _dims(posterior.query.inner_plates, posterior.query.structure)
        log_p, log_q = of_rows
    found = {name: _in_rows(x, rows, draws=True) for name, x in (("lp", log_p), ("log_q", log_q))}
    if not posterior.resampled:
        found["log_weight"] = _in_rows(log_p - log_q, rows, draws=True)
        finite = bool((log_p - log_q < torch.inf).all())
        if finite and posterior.num_draws >= 25 and of_rows is None:
            found["k_hat"] = _in_rows(posterior.k_hat, rows, draws=False)
    return found


def _in_rows(value: Tensor, rows: Mapping[str, int], *, draws: bool) -> Variable:
    array = value.numpy(force=True)
    names = tuple(sorted(rows, key=lambda name: rows[name]))
    return Variable(array[None], _DRAW_DIMS + names) if draws else Variable(array, names)


def _constants(posterior: Posterior) -> dict[str, Variable]:
    """The model's tensor arguments that it does not observe."""
    query = posterior.query
    observed = {site.argument for site in query.structure.observed.values()}
    model = query.guide.model
    try:
        names = list(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):
        names = []
    found: dict[str, Any] = {
        names[at] if at < len(names) else f"argument_{at}": value
        for at, value in enumerate(query.args)
        if at not in observed
    }
    found |= {name: value for name, value in query.kwargs.items() if name not in observed}
    taken = {*query.structure.latents, *query.structure.observed}
    return {
        name: Variable(array, _rows_of(value, query))
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and name not in taken and (array := _array(value)) is not None
    }


def _array(value: Tensor) -> NDArray[Any] | None:
    """An argument as NumPy has it, if it does."""
    if value.layout != torch.strided:
        value = value.to_dense()
    try:
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    except TypeError:
        return None


def _rows_of(value: Tensor, query: Query) -> tuple[str, ...]:
    """The plate of the rows, if an argument has as many of them."""
    plates = query.structure.plates_of(query.inner_plates)
    is_rows = len(plates) == 1 and value.dim() > 0 and len(value) == plates[0].batch > 1
    return (plates[0].name,) if is_rows else ()
