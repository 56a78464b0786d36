"""From q to Pyro's NUTS: where chains start, and how wide they step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from pyro.infer import NUTS
from torch import Tensor

from pyro_guides.statistics import arguments

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior

__all__ = ["WarmStart", "nuts"]


class WarmStart(NamedTuple):
    """A kernel, and where its chains start.

    Attributes:
        kernel: for ``pyro.infer.MCMC``.
        initial_params: unconstrained values by site; with a dimension of chains on the left if there are
            several.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import MCMC
        >>> from pyro_guides import AmortizedGuide
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(3)
        >>> start = AmortizedGuide(model).posterior(x, num_draws=100).nuts()
        >>> mcmc = MCMC(start.kernel, 20, 20, initial_params=start.initial_params, disable_progbar=True)
        >>> mcmc.run(x)
        >>> mcmc.get_samples()["z"].shape
        torch.Size([20, 3])
    """

    kernel: NUTS
    initial_params: dict[str, Tensor]


@final
class _WarmNUTS(NUTS):
    """NUTS whose mass matrix starts at the covariance of q.

    Args:
        model: the model.
        draws: unconstrained draws by site, ``(S, *unconstrained shape)``.
        full_mass: whether the mass matrix has off-diagonal elements.
        **options: for NUTS.
    """

    def __init__(self, model: Any, draws: dict[str, Tensor], *, full_mass: bool, **options: Any) -> None:
        super().__init__(model, full_mass=full_mass, **options)
        self._of_q = draws

    def _initialize_adapter(self) -> None:
        super()._initialize_adapter()
        adapter = self.mass_matrix_adapter
        adapter.inverse_mass_matrix = {
            sites: self._covariance(sites, full=matrix.dim() == 2)
            for sites, matrix in adapter.inverse_mass_matrix.items()
        }

    def _covariance(self, sites: tuple[str, ...], *, full: bool) -> Tensor:
        draws = [self._of_q[name] for name in sites]
        u = torch.cat([x.reshape(len(x), -1) for x in draws], dim=-1)
        if not full:
            return u.var(0)
        # Shrunk towards its diagonal, as Stan does with as many draws.
        weight = len(u) / (len(u) + 5.0)
        covariance = torch.cov(u.T).reshape(u.shape[-1], u.shape[-1])
        return weight * covariance + (1.0 - weight) * covariance.diag().diag()


def nuts(posterior: Posterior, *, full_mass: bool, num_chains: int, **options: Any) -> WarmStart:
    """See ``Posterior.nuts``."""
    arguments.flag("full_mass", full_mass)
    arguments.count("num_chains", num_chains, least=1)
    if posterior.num_draws < 2:
        raise ValueError("a mass matrix needs at least 2 draws; ask for more num_draws")
    query = posterior.query
    if discrete := [name for name, latent in query.latents.items() if latent.discrete]:
        raise ValueError(f"NUTS moves continuous latents only, but {discrete} are discrete")
    if live := [name for name in query.latents if query.is_live(name)]:
        raise ValueError(
            f"NUTS moves latents on fixed supports, but those of {live} depend on other latents; write them "
            "as a fixed one that is scaled, such as Uniform(0, 1) times the bound"
        )
    plates = query.structure.plates.items()
    if subsampled := [name for name, plate in plates if plate.subsampled or name in query.opened]:
        raise ValueError(
            f"NUTS needs all rows, but the model subsamples {subsampled}; use a model that takes the rows it "
            "is given whole"
        )
    draws = posterior.draws
    u = {n: latent.require_transform().inv(draws[n]) for n, latent in query.latents.items()}
    model = query.guide.model
    if query.held:
        from pyro import poutine

        model = poutine.condition(model, data=dict(query.held))
    kernel = _WarmNUTS(model, u, full_mass=full_mass, **options)
    chosen = _starts(posterior, num_chains)
    starts = {name: value[chosen] if num_chains > 1 else value[chosen[0]] for name, value in u.items()}
    return WarmStart(kernel, starts)


def _starts(posterior: Posterior, count: int) -> Tensor:
    """Draws to start at, by their joint weights; the same draw for all rows, so that they fit each other."""
    log_weights = posterior.log_weights.double()
    joint = log_weights.reshape(len(log_weights), -1).sum(-1)
    weights = (joint - joint.logsumexp(0)).exp().clamp(min=1e-12)
    return torch.multinomial(weights, count, replacement=count > len(weights))
