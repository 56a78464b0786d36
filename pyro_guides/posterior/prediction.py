"""What the model predicts at draws of its latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from pyro_guides.posterior.contents import variable
from pyro_guides.scoring import Simulation
from pyro_guides.statistics import arguments
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
        """What is noted beside the arrays, which is nothing."""
        return {}


def predict(posterior: Posterior, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prediction:
    """See ``Posterior.predict``."""
    query = posterior.query
    model, group = query.model, "posterior_predictive"
    if args or kwargs:
        if not args:
            args, kwargs = _updated(query, kwargs)
        model, group = replace(model, args=args, kwargs=dict(kwargs)), "predictions"
    found = model.simulate(posterior.draws, query.held)
    found = replace(found, observed=found.observed | query.left_to_model)
    return Prediction(found, group, group)


def _updated(query: Query, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The guide's arguments with some of them changed by name."""
    model = query.guide.model
    try:
        bound = inspect.signature(getattr(model, "forward", model)).bind(*query.args, **query.kwargs)
    except (TypeError, ValueError):
        return query.args, {**query.kwargs, **kwargs}
    own = {name: value for name, value in kwargs.items() if name in bound.signature.parameters}
    bound.arguments.update(own)
    return bound.args, {**bound.kwargs, **{name: x for name, x in kwargs.items() if name not in own}}


def prior(query: Query, num_draws: int) -> Prediction:
    """What the model draws without any data; what is held stays so."""
    count = arguments.count("num_draws", num_draws, least=1)
    return Prediction(query.model.simulate({}, query.held, count=count), "prior_predictive", "prior")
