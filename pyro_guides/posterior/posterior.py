"""The posterior of given rows: draws, their densities, and what they say about each latent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from pyro_guides.distributions.transforms import strip_independent
from pyro_guides.posterior import handover, prediction, refining, weighing
from pyro_guides.posterior.contents import attributes, contents
from pyro_guides.posterior.loo import Loo, loo
from pyro_guides.posterior.query import Query
from pyro_guides.scoring import Scores
from pyro_guides.structure import Latent, Structure
from pyro_guides.variables import Variable

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["Posterior", "Sample"]

_VALUES_PER_PASS = 500_000  # bounds the memory of one pass; measured in latent values


@final
@dataclass(frozen=True, eq=False)
class Sample:
    """Draws of the latents, and log q of each."""

    draws: dict[str, Tensor]
    log_q: Tensor


@final
class Posterior:
    """Draws from q(z | x) for given rows, with log q and log p of each draw.

    Made by ``guide.posterior(...)``. Draws are taken once, when first asked for, and kept; log q and log p
    belong to them. Nothing here carries gradients.

    Where every latent lies inside common plates (a row each, no shared latents), densities are *per row*, and
    free of the model's subsampling scale: log p of the row, not of the rows it stands for. Otherwise they are
    joint, with that scale; :meth:`local` then holds the shared latents and looks at rows again.

    Args:
        query: the guide, the model's arguments, and what is held.
        num_draws: S, how many draws to take.
        sample: the draws, if they are there already.

    Raises:
        ValueError: ``num_draws`` is less than 1.
    """

    def __init__(self, query: Query, *, num_draws: int = 1000, sample: Sample | None = None) -> None:
        if isinstance(num_draws, bool) or not isinstance(num_draws, int):
            raise TypeError(f"num_draws must be an int, got {num_draws!r}")
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        self.query = query
        self.num_draws = num_draws
        self.resampled = sample is not None
        self.gain: refining.Gain | None = None
        if sample is not None:
            self.__dict__["_sample"] = sample

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name}: {tuple(self.query.natural_shape(latent))}"
            for name, latent in self.query.latents.items()
        )
        given = f", given {', '.join(self.query.held)}" if self.query.held else ""
        return f"Posterior({self.num_draws} draws of {shapes}{given})"

    @property
    def guide(self) -> AmortizedGuide:
        """The guide whose q this is."""
        return self.query.guide

    @property
    def structure(self) -> Structure:
        """The model's structure for these rows."""
        return self.query.structure

    @property
    def row_plates(self) -> tuple[str, ...]:
        """The plates whose elements are posteriors of their own, leftmost dimension first."""
        return self.query.row_plates

    # --- draws and densities

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws by site, ``(S, *natural shape)``: the shape the site has in the model itself."""
        return self._sample.draws

    @property
    def log_q(self) -> Tensor:
        """Log q of each draw, ``(S, *row plates)``."""
        return self._sample.log_q

    @cached_property
    def log_p(self) -> Tensor:
        """Log p(x, z) of each draw under the model, ``(S, *row plates)``.

        Raises:
            NotImplementedError: the model draws other latents itself.
        """
        return self.query.by_row(self._scores.log_prob)

    @cached_property
    def log_weights(self) -> Tensor:
        """Log p − log q of each draw, ``(S, *row plates)``: how much the posterior wants it.

        Raises:
            ValueError: one is NaN or infinitely large; the message names the site and the rows.
        """
        log_weights = self.log_p - self.log_q
        weighing.check_finite(log_weights, self._scores.log_prob, self.query)
        return log_weights

    @property
    def log_likelihood(self) -> dict[str, Tensor]:
        """Log p of each observed site's elements, ``(S, *natural batch shape)``, unscaled."""
        return self._scores.likelihood

    @property
    def observed(self) -> dict[str, Tensor]:
        """The values of the observed sites."""
        return self._scores.observed

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Exact log q of given values of all latents, ``(*row plates)`` or ``(S, *row plates)``.

        Args:
            values: by site, in natural shapes, or with one more dimension of draws on the left.

        Raises:
            ValueError: a latent's value is missing, has another shape, or lies outside its support.
        """
        latents = self.query.latents
        if unknown := [name for name in values if name not in latents]:
            raise ValueError(f"there are no latents {unknown}; they are {list(latents)}")
        given = {name: self._checked(name, values) for name in latents}
        counts = {name: len(value) for name, value in given.items()}
        count = max(counts.values())
        if any(other not in (1, count) for other in counts.values()):
            raise ValueError(f"the values hold different numbers of draws: {counts}")
        with torch.no_grad():
            log_q = self.query.log_q_of(self.query.run(count, given))
        batched = any(
            values[name].dim() > len(self.query.natural_shape(latent)) for name, latent in latents.items()
        )
        return log_q if batched else log_q.squeeze(0)

    def local(self, given: Mapping[str, Tensor] | None = None) -> Posterior:
        r"""The posterior of the latents of each row given all others, q(z_i | x_i, θ).

        Rows are independent given what they share, so each can be judged and repaired on its own. Where
        nothing is shared it is this posterior itself.

        Args:
            given: values of the latents outside the rows' plates, in natural shapes; if None, the draw of q
                that lies closest to its centre.

        Raises:
            ValueError: no plate keeps the rows apart, or a value is missing or has another shape.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyro_guides import AmortizedGuide
            >>> def model(x):
            ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("row", len(x)):
            ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> AmortizedGuide(model).posterior(torch.randn(5)).local()
            Posterior(1000 draws of z: (5,), given mean)
        """
        if self.row_plates:
            return self
        query = self.query
        upper = [name for name in query.latents if name not in query.inner]
        if not query.inner or len(upper) == len(query.latents):
            raise ValueError(
                "no plate keeps the rows of this model apart: all of its latents are judged jointly. Rows "
                "are apart if every site that depends on a latent of a row lies in the row's plate"
            )
        if given is None:
            given = query.central_draw({name: self.draws[name] for name in upper})
        held = {name: self._checked(name, given)[0] for name in upper}
        if unknown := sorted(given.keys() - held.keys()):
            raise ValueError(f"given names {unknown}, but the latents outside the rows are {upper}")
        return Posterior(query.holding(held), num_draws=self.num_draws)

    # --- summaries

    def mean(self) -> dict[str, Tensor]:
        """The mean of the draws of each latent, in its natural shape."""
        return {name: _floating(draws).mean(0) for name, draws in self.draws.items()}

    def sd(self) -> dict[str, Tensor]:
        """The standard deviation of the draws of each latent, in its natural shape."""
        if self.num_draws < 2:
            raise ValueError("a standard deviation needs at least 2 draws; ask for more num_draws")
        return {name: _floating(draws).std(0) for name, draws in self.draws.items()}

    def median(self) -> dict[str, Tensor]:
        """The median of each latent, in its natural shape; see ``AmortizedGuide.median``."""
        network = self.guide.network
        closed = all(network.family(index).has_quantiles for index in range(len(network.parts)))
        if closed and not self.resampled:
            return self._place(torch.tensor(0.5))
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    def quantiles(self, probabilities: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Marginal quantiles of each latent, ``(len(probabilities), *natural shape)``.

        In closed form where q is normal, depends on nothing upstream and reaches the support by an
        increasing function of each value; from the draws otherwise.

        Raises:
            ValueError: a probability is not between 0 and 1.
        """
        levels = torch.as_tensor(probabilities, dtype=torch.float64)
        if levels.dim() != 1 or not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles must be a list of numbers from 0 to 1, got {probabilities}")
        if self.resampled or not self._has_closed_quantiles():
            return {n: _quantiles(x, levels) for n, x in self.draws.items()}
        placed = [self._place(level) for level in levels]
        return {name: torch.stack([values[name] for values in placed]) for name in placed[0]}

    # --- judgement

    @property
    def elbo(self) -> Tensor:
        """The ELBO, ``(*row plates)``, in nats."""
        return self.log_weights.mean(0)

    @property
    def k_hat(self) -> Tensor:
        """Pareto k̂ of the log weights, ``(*row plates)``; −inf where q is as good as exact."""
        return weighing.smoothed(self.log_weights)[1]

    @property
    def effective_size(self) -> Tensor:
        """How many independent draws from the posterior these are worth, ``(*row plates)``."""
        return weighing.effective_size(self.log_weights)

    def bound(self, num_draws: int | None = None) -> tuple[Tensor, Tensor]:
        r"""The importance-weighted bound on log p(x) and its standard error, ``(*row plates)`` each.

        .. math:: E\Bigl[\log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}\Bigr]

        Args:
            num_draws: K; all draws if None.

        Raises:
            ValueError: there are fewer draws than K.

        Source: Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, "Importance Weighted Autoencoders", 2016,
        arXiv:1509.00519.
        """
        return weighing.bound(self.log_weights, num_draws)

    def loo(self) -> Loo:
        """Leave-one-out predictive density of each observation; see :class:`~pyro_guides.Loo`."""
        return loo(self)

    # --- prediction and repair

    def predict(self, *args: Any, **kwargs: Any) -> prediction.Prediction:
        """What the model predicts; see :func:`prediction.predict`."""
        return prediction.predict(self, args, kwargs)

    def prior(self, num_draws: int | None = None) -> prediction.Prediction:
        """What the model draws without data: its latents, and data like these.

        Args:
            num_draws: how many draws; as many as there are here if None.
        """
        return prediction.prior(self.query, self.num_draws if num_draws is None else num_draws)

    def resample(self, num_draws: int | None = None) -> Posterior:
        """Draws that stand for the posterior better than those of q; see :func:`weighing.resample`."""
        return weighing.resample(self, num_draws)

    def refine(self, **options: Any) -> Posterior:
        """The best q of the same family for these rows; see :func:`refining.refine`."""
        refinement, gain = refining.refine(self.query, num_draws=self.num_draws, **options)
        refined = Posterior(self.query.refined(refinement), num_draws=self.num_draws)
        refined.gain = gain
        return refined

    def nuts(self, *, full_mass: bool = False, num_chains: int = 1, **options: Any) -> handover.WarmStart:
        """Pyro's NUTS, started from q; see :func:`handover.nuts`."""
        return handover.nuts(self, full_mass=full_mass, num_chains=num_chains, **options)

    # --- to ArviZ

    def to_groups(self) -> dict[str, dict[str, Variable]]:
        """NumPy arrays by group and variable, see :func:`pyro_guides.to_arviz`."""
        return contents(self)

    @property
    def attrs(self) -> dict[str, Any]:
        """What is noted beside the arrays."""
        return attributes(self)

    # --- passes over guide and model

    @cached_property
    def _sample(self) -> Sample:
        query = self.query
        size = sum(math.prod(query.natural_shape(latent)) for latent in query.latents.values())
        most = max(1, _VALUES_PER_PASS // max(1, size))
        counts = [min(most, self.num_draws - i) for i in range(0, self.num_draws, most)]
        with torch.no_grad():
            passes = []
            for count in counts:
                trace = query.run(count)
                passes.append((query.draws_of(trace), query.log_q_of(trace)))
        draws = {name: torch.cat([own[name] for own, _ in passes]) for name in query.latents}
        return Sample(draws, torch.cat([log_q for _, log_q in passes]))

    @cached_property
    def _scores(self) -> Scores:
        with torch.no_grad():
            return self.query.model.score(self.draws, self.query.held)

    def _checked(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A given value with a dimension for draws on the left."""
        latent = self.structure.latents[name]
        natural = self.query.natural_shape(latent)
        if name not in values:
            raise ValueError(f"values for all latents are needed, but '{name}' is missing")
        value = values[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"the value of '{name}' must be a tensor, got a {type(value).__name__}")
        lead = value.shape[: value.dim() - len(natural)]
        if len(lead) > 1 or value.shape != lead + natural:
            raise ValueError(
                f"the value of '{name}' has shape {tuple(value.shape)}, expected {tuple(natural)} or "
                f"(S, {', '.join(map(str, natural))})"
            )
        if latent.fixed and not bool(latent.support.check(value).all()):
            raise ValueError(f"the value of '{name}' lies outside its support {latent.support}")
        return value if lead else value.unsqueeze(0)

    def _place(self, level: Tensor) -> dict[str, Tensor]:
        placed = self.query.place(lambda q: q.quantile(level.to(q.mean)))
        return {name: placed[name] for name in self.query.latents}

    def _has_closed_quantiles(self) -> bool:
        network = self.guide.network
        return all(
            not part.upstream and network.family(index).has_quantiles
            for index, part in enumerate(network.parts)
        ) and all(map(_is_increasing, self.structure.latents.values()))


def _floating(draws: Tensor) -> Tensor:
    return draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantiles; of discrete values those that occur."""
    how = "linear" if draws.is_floating_point() else "nearest"
    values = _floating(draws)
    return torch.quantile(values, levels.to(values), dim=0, interpolation=how).to(draws.dtype)


def _is_increasing(latent: Latent) -> bool:
    """Whether each value is an increasing function of one unconstrained value."""
    transform = strip_independent(latent.require_transform())
    try:
        return transform.codomain.event_dim == 0 and transform.sign == 1
    except NotImplementedError:
        return False
