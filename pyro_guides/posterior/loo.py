"""Leave-one-out cross-validation from draws of q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from pyro_guides.posterior.weighing import check_unspent
from pyro_guides.statistics import psis

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior

__all__ = ["Loo", "loo"]


@final
@dataclass(frozen=True, eq=False)
class Loo:
    r"""Expected log predictive density of each observation, left out in turn.

    Draws are from q, not from the posterior, so those that leave out :math:`y_i` weigh
    :math:`p(x, z) / q(z) / p(y_i \mid z)`, Pareto-smoothed. Plain LOO, which takes them for draws from the
    posterior, is silently off.

    Attributes:
        pointwise: by observed site, ``(*natural batch shape)``, in nats; NaN where it is masked.
        k_hat: by observed site, of the weights of each observation; above its threshold, do not trust it.

    Source: Måns Magnusson, Michael Riis Andersen, Johan Jonasson, Aki Vehtari, "Bayesian Leave-One-Out
    Cross-Validation for Large Data", 2019, arXiv:1904.10679.
    """

    pointwise: dict[str, Tensor]
    k_hat: dict[str, Tensor]

    @property
    def elpd(self) -> float:
        """The sum over all observations, in nats."""
        return float(self._values().sum())

    @property
    def error(self) -> float:
        """The standard error of the sum, from how observations differ."""
        values = self._values()
        return float(values.std() * len(values) ** 0.5) if len(values) > 1 else float("nan")

    def _values(self) -> Tensor:
        """All that is not masked, in one row."""
        values = torch.cat([values.flatten() for values in self.pointwise.values()])
        return values[~values.isnan()]

    def __repr__(self) -> str:
        infinite = {"posinf": torch.inf, "neginf": -torch.inf}
        worst = max(float(x.nan_to_num(-torch.inf, **infinite).max()) for x in self.k_hat.values())
        return f"Loo(elpd={self.elpd:.2f}, error={self.error:.2f}, worst k_hat={worst:.2f})"


def loo(posterior: Posterior) -> Loo:
    """See ``Posterior.loo``."""
    check_unspent(posterior)
    if not posterior.log_likelihood:
        raise ValueError("the model observes nothing, so there is nothing to leave out")
    pointwise, k_hat = {}, {}
    likelihoods = posterior.log_likelihood
    for name in likelihoods.keys() & posterior.query.scored:
        likelihood = likelihoods[name]
        impossible = likelihood == -torch.inf  # and so never a draw from the posterior
        weights = _broadcast_weights(posterior, name, likelihood) - likelihood
        weights = weights.masked_fill(impossible, -torch.inf)
        found = psis.smooth(weights.numpy(force=True))
        smooth = torch.from_numpy(found.log_weights)
        masked = _masked(posterior, name, likelihood)
        elpd = (smooth + likelihood.double()).logsumexp(0)
        pointwise[name] = elpd.masked_fill(masked, torch.nan)
        k_hat[name] = torch.as_tensor(found.k_hat).masked_fill(masked, torch.nan)
    return Loo(pointwise, k_hat)


def _masked(posterior: Posterior, name: str, likelihood: Tensor) -> Tensor:
    """Which observations the model masks, all of what they hold."""
    counted = posterior.counted.get(name)
    if counted is None:
        return torch.zeros(likelihood.shape[1:], dtype=torch.bool)
    counted = counted.reshape(*counted.shape[: likelihood.dim() - 1], -1).any(-1)
    return ~counted.expand(likelihood.shape[1:])


def _broadcast_weights(posterior: Posterior, name: str, likelihood: Tensor) -> Tensor:
    """Log weights of the row that each observation lies in, ``(S, ...)``."""
    query = posterior.query
    shape = query.rows_in(likelihood.dim() - 1, query.row_plates)
    return posterior.log_weights.reshape(posterior.num_draws, *shape)
