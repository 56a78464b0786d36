r"""Log weights of the latents that rows share, with the rows' own latents integrated out.

The joint weight of a hierarchy is a product over rows, and has a heavy tail for any q of many rows. What
shared latents θ weigh does not depend on single draws of the rows:

.. math:: w(\theta) = \frac{p(\theta)}{q(\theta)} \prod_i p(x_i \mid \theta), \qquad
    p(x_i \mid \theta) \approx
    \frac{1}{K} \sum_k \frac{p(x_i, z_{ik} \mid \theta)}{q(z_{ik} \mid x_i, \theta)}

Source: Christophe Andrieu, Gareth Roberts, "The pseudo-marginal approach for efficient Monte Carlo
computations", Annals of Statistics 2009, arXiv:0903.5480.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_guides.posterior import Posterior
from pyro_guides.posterior.weighing import effective_size, smoothed

__all__ = ["are_some_rows", "rows_share", "shared_log_weights", "shared_statistics"]

_DRAWS = 500  # of shared latents
_INNER = 32  # draws of the rows, for each of these
_VALUES_PER_PASS = 1_000_000


def rows_share(posterior: Posterior) -> bool:
    """Whether rows have latents of their own, and others that they share."""
    return bool(posterior.query.inner) and not posterior.row_plates


def are_some_rows(posterior: Posterior) -> bool:
    """Whether the rows stand for more of them, so that they do not tell how good q of shared latents is."""
    query = posterior.query
    return any(query.structure.plates[name].subsampled for name in query.inner_plates)


def shared_statistics(posterior: Posterior) -> dict[str, float]:
    """What log weights say of the latents that rows share: ``k_hat``, ``effective_size``, ``num_draws``.

    Args:
        posterior: of all rows that q of the shared latents was trained on: that of others is wider or lies
            elsewhere.
    """
    log_weights = shared_log_weights(posterior)
    return {
        "k_hat": float(smoothed(log_weights)[1]),
        "effective_size": float(effective_size(log_weights)),
        "num_draws": len(log_weights),
    }


@torch.no_grad()
def shared_log_weights(posterior: Posterior) -> Tensor:
    """Log weights of draws of the shared latents, ``(S or 500,)``.

    Args:
        posterior: of rows that share latents.
    """
    query = posterior.query
    shared = [name for name in query.latents if name not in query.inner]
    draws = {name: posterior.draws[name][:_DRAWS] for name in shared}
    count = len(draws[shared[0]])
    rows = sum(math.prod(query.natural_shape(latent)) for latent in query.latents.values())
    at_once = max(1, _VALUES_PER_PASS // (_INNER * rows))
    parts = []
    for start in range(0, count, at_once):
        some = {name: x[start : start + at_once].repeat_interleave(_INNER, 0) for name, x in draws.items()}
        trace = query.run(len(some[shared[0]]), some)
        log_p = query.model.score({**query.draws_of(trace), **some}, query.held).log_prob
        joint = query.by_row(log_p) - query.log_q_of(trace)
        own = query.by_row(log_p, query.inner_plates) - query.log_q_of(trace, query.inner_plates)
        scale = query.scale_of_row(query.inner_plates) / query.scale_of_row()
        outside = joint - scale * own.flatten(1).sum(-1)
        within = own.unflatten(0, (-1, _INNER)).logsumexp(1) - math.log(_INNER)
        parts.append(outside[::_INNER] + scale * within.flatten(1).sum(-1))
    return torch.cat(parts)
