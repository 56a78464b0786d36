"""What log weights say about draws, and how they mend them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_guides.posterior.sampling import Sample
from pyro_guides.statistics import arguments, psis

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior
    from pyro_guides.posterior.query import Query

_SAME = 1e-3  # nats between the largest and the smallest weight: as good as exact

__all__ = ["bound", "check_finite", "check_unspent", "effective_size", "resample", "smoothed"]


def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed normalized log weights ``(S, ...)`` and their k̂ ``(...)``.

    Rows whose draws are all impossible have equal weights, and a k̂ of +inf.
    """
    dead = _impossible(log_weights)
    spread = log_weights.amax(0) - log_weights.amin(0)
    # Weights that differ by rounding have no tail to speak of.
    same = torch.where(spread < _SAME, log_weights.mean(0), log_weights).masked_fill(dead, 0.0)
    found = psis.smooth(same.numpy(force=True))
    k_hat = torch.as_tensor(found.k_hat).to(log_weights).masked_fill(dead, torch.inf)
    return torch.from_numpy(found.log_weights).to(log_weights), k_hat


def effective_size(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² over the first dimension; zero where all draws are impossible."""
    dead = _impossible(log_weights)
    size = psis.effective_size(log_weights.masked_fill(dead, 0.0).numpy(force=True))
    return torch.as_tensor(size).to(log_weights).masked_fill(dead, 0.0)


def _impossible(log_weights: Tensor) -> Tensor:
    """The rows whose draws have all weight zero."""
    return (log_weights == -torch.inf).all(0)


def bound(log_weights: Tensor, num_draws: int | None) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound at ``num_draws`` draws and its standard error."""
    count = len(log_weights)
    size = count if num_draws is None else arguments.count("num_draws", num_draws, least=1)
    if size > count:
        raise ValueError(f"a bound at {size} draws needs as many; the posterior has {count}")
    blocks = log_weights[: count // size * size].double().unflatten(0, (-1, size))
    bounds = blocks.logsumexp(1) - torch.tensor(float(size)).log()
    if len(bounds) > 1:
        value, error = bounds.mean(0), bounds.std(0) / len(bounds) ** 0.5
    else:  # of a single block by the delta method: the relative error of a mean weight
        value, error = bounds[0], (1 / effective_size(log_weights.double()) - 1 / count).clamp(min=0).sqrt()
    return value.to(log_weights), error.to(log_weights)


def check_unspent(posterior: Posterior) -> None:
    """Raise a ValueError if draws were resampled: they are to be weighted no more."""
    if posterior.resampled:
        raise ValueError(
            "these draws are resampled already, so that their weights are spent; ask the posterior that they "
            "came from"
        )


def check_finite(log_weights: Tensor, log_prob: Mapping[str, Tensor], query: Query) -> None:
    """Raise a ValueError if a log weight is NaN or infinitely large; zero weights are fine."""
    bad = log_weights.isnan() | (log_weights == torch.inf)
    if not bool(bad.any()):
        return
    names = [n for n, x in log_prob.items() if bool((x.isnan() | (x == torch.inf)).any())]
    culprit = f"log p of site '{names[0]}'" if names else "log q"
    rows = torch.nonzero(bad.any(0)).tolist() if bad.dim() > 1 else []
    where = ""
    if rows:
        first = [row[0] if len(row) == 1 else tuple(row) for row in rows[:5]]
        where = f" in {len(rows)} rows (first {', '.join(map(str, first))}) of plate {list(query.row_plates)}"
    raise ValueError(
        f"{culprit} is NaN or infinite for {int(bad.sum())} draws{where}: look for values at the edge of the "
        "support, for float32 overflow (float64 helps), or for weights of the guide that have diverged"
    )


def resample(posterior: Posterior, num_draws: int | None) -> Posterior:
    """See ``Posterior.resample``."""
    from pyro_guides.posterior.posterior import Posterior

    check_unspent(posterior)
    count = posterior.num_draws if num_draws is None else arguments.count("num_draws", num_draws, least=1)
    if bool((dead := _impossible(posterior.log_weights)).any()):
        raise ValueError(
            f"every draw has weight zero in {int(dead.sum())} of {dead.numel()} rows, the first at "
            f"{dead.nonzero()[0].tolist()}: q misses the posterior there, so leave them out, or look for an "
            "observation the model cannot make"
        )
    weights = smoothed(posterior.log_weights)[0].double().exp()
    rows = weights.reshape(len(weights), -1).T.contiguous()  # (rows, S)
    points = (
        torch.arange(count, dtype=torch.float64) + torch.rand(len(rows), 1, dtype=torch.float64)
    ) / count
    last = weights.shape[0] - 1
    cumulative = rows.cumsum(-1)
    chosen = torch.searchsorted(cumulative / cumulative[:, -1:], points).clamp(max=last)
    order = torch.rand(len(rows), count).argsort(-1)  # draws of different rows are not to be in step
    chosen = chosen.gather(-1, order).T.reshape(count, *weights.shape[1:])
    draws = {name: _pick(posterior, name, x, chosen) for name, x in posterior.draws.items()}
    log_q = posterior.log_q.gather(0, chosen)
    return Posterior(posterior.query, num_draws=count, sample=Sample(draws, log_q))


def _pick(posterior: Posterior, name: str, draws: Tensor, chosen: Tensor) -> Tensor:
    """Each row's chosen draws of one latent; ``chosen`` is ``(S, *row plates)``."""
    query = posterior.query
    event_dim = len(query.structure.latents[name].event_shape)
    shape = query.rows_in(draws.dim() - 1, query.row_plates, event_dim)
    index = chosen.reshape(len(chosen), *shape).expand(len(chosen), *draws.shape[1:])
    return draws.gather(0, index)
