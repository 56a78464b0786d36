"""What the model predicts at draws of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from pyro_guides.posterior.contents import variable
from pyro_guides.scoring import ModelCall, Simulation
from pyro_guides.variables import Variable

if TYPE_CHECKING:
    from pyro_guides.posterior.posterior import Posterior
    from pyro_guides.posterior.query import Query

__all__ = ["Prediction", "predict", "prior"]


@final
@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model draws besides the latents that it was given.

    Made by ``posterior.predict(...)`` and ``posterior.prior()``. ``prediction["x"]`` are the draws of one
    site, ``(S, *natural shape)``: of an observed site drawn anew, of a ``pyro.deterministic`` site, or of a
    latent.

    Attributes:
        simulation: the draws.
        group: the ArviZ group of what is observed or computed in the model.
        latent_group: the ArviZ group of latents.
    """

    simulation: Simulation
    group: str
    latent_group: str

    @property
    def draws(self) -> dict[str, Tensor]:
        """All draws by site, ``(S, *natural shape)``."""
        return self.simulation.values

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.draws:
            raise KeyError(f"there is no site '{name}'; there are {list(self.draws)}")
        return self.draws[name]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(value.shape[1:])}" for name, value in self.draws.items())
        count = len(next(iter(self.draws.values()), ()))
        return f"Prediction({count} draws of {shapes})"

    def to_groups(self) -> dict[str, dict[str, Variable]]:
        """NumPy arrays by group and variable, see :func:`pyro_guides.to_arviz`."""
        found: dict[str, dict[str, Variable]] = {}
        simulation = self.simulation
        for name, value in self.draws.items():
            group = self.group if name in simulation.observed else self.latent_group
            own = variable(value, simulation.plates[name], simulation.event_dims[name])
            found.setdefault(group, {})[name] = own
        return found

    @property
    def attrs(self) -> dict[str, Any]:
        """What is noted beside the arrays: nothing."""
        return {}


def predict(posterior: Posterior, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prediction:
    """What the model predicts at each draw of the posterior, ``(S, *natural shape)`` of each site.

    Observed sites are hidden and drawn anew; the model and the guide share one subsample.

    Args:
        posterior: where values of latents come from.
        args: arguments of the model, if they are to be others than the guide's, for the same rows.
        kwargs: its keyword arguments.

    Raises:
        ValueError: with these arguments the model expects latents of other shapes.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide
        >>> def model(x, noise=1.0):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, noise), obs=x)
        >>> x = torch.randn(5)
        >>> posterior = AmortizedGuide(model).posterior(x, num_draws=100)
        >>> posterior.predict()["x"].shape
        torch.Size([100, 5])
        >>> posterior.predict(x, noise=0.0001)["x"].shape  # other arguments than the guide's
        torch.Size([100, 5])
    """
    query = posterior.query
    if not args and not kwargs:
        model, group = query.model, "posterior_predictive"
    else:
        model, group = replace(query.model, args=args, kwargs=dict(kwargs)), "predictions"
    return Prediction(model.simulate(posterior.draws, query.held), group, group)


def prior(query: Query, num_draws: int) -> Prediction:
    """What the model draws without any data; what is held stays so."""
    model: ModelCall = query.model
    return Prediction(model.simulate({}, query.held, count=num_draws), "prior_predictive", "prior")
