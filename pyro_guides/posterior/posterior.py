"""The posterior of given rows: draws, their densities, and what they say about each latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from pyro_guides.posterior import handover, prediction, refining, sampling, summaries, weighing
from pyro_guides.posterior.contents import attributes, contents
from pyro_guides.posterior.loo import Loo, loo
from pyro_guides.posterior.query import Query
from pyro_guides.scoring import Scores
from pyro_guides.statistics import arguments
from pyro_guides.structure import Structure
from pyro_guides.variables import Variable

if TYPE_CHECKING:
    from pyro_guides.guide import AmortizedGuide

__all__ = ["Posterior"]


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
        shared: draws of some latents, if these are there already.

    Raises:
        ValueError: ``num_draws`` is less than 1.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide
        >>> def model(x, noise=1.0):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, noise), obs=x)
        >>> posterior = AmortizedGuide(model).posterior(torch.randn(5), num_draws=100)
        >>> posterior.predict()["x"].shape
        torch.Size([100, 5])
        >>> posterior.predict(torch.zeros(5), noise=0.1)["x"].shape  # other arguments than the guide's
        torch.Size([100, 5])
        >>> rows = posterior.local({"mean": torch.tensor(0.5)})
        >>> rows
        Posterior(100 draws of z: (5,), given mean)
        >>> rows.refine(max_steps=50).gain.value.shape
        torch.Size([5])
        >>> rows.resample(50)
        Posterior(50 draws of z: (5,), given mean)
    """

    def __init__(
        self,
        query: Query,
        *,
        num_draws: int = 1000,
        sample: sampling.Sample | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.query = query
        self.num_draws = arguments.count("num_draws", num_draws, least=1)
        self.resampled = sample is not None
        self.shared = shared
        self.gain: refining.Gain | None = None
        if sample is not None:
            self.__dict__["_sample"] = sample

    def __repr__(self) -> str:
        query = self.query
        shapes = ", ".join(f"{n}: {tuple(query.natural_shape(x))}" for n, x in query.latents.items())
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

    def densities_of_rows(self) -> tuple[Tensor, Tensor] | None:
        """Log p and log q of each row given what rows share, for batches of such rows; else None."""
        log_q, query = self._sample.log_q_of_rows, self.query
        return None if log_q is None else (query.by_row(self._scores.log_prob, query.inner_plates), log_q)

    @cached_property
    def log_weights(self) -> Tensor:
        """Log p − log q of each draw, ``(S, *row plates)``: how much the posterior wants it.

        Raises:
            ValueError: one is NaN or infinitely large, and the message names the site and the rows; or the
                draws were resampled.
        """
        weighing.check_unspent(self)
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

    @property
    def counted(self) -> dict[str, Tensor]:
        """Which values of the observed sites the model does not mask, of those that have a mask."""
        return self._scores.counted

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Exact log q of given values of all latents, ``(*row plates)`` or ``(S, *row plates)``.

        Args:
            values: by site, in natural shapes, or with one more dimension of draws on the left.

        Raises:
            ValueError: a latent's value is missing, has another shape, or lies outside its support.
        """
        latents = self.query.latents
        given = {name: self.query.checked(name, values) for name in latents}
        if unknown := [name for name in values if name not in latents]:
            raise ValueError(f"there are no latents {unknown}; they are {list(latents)}")
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

        Rows are independent given what they share, so each can be judged and repaired on its own.

        Args:
            given: values of the latents outside the rows' plates, in natural shapes; if None, the draw of q
                that lies closest to its centre.

        Raises:
            ValueError: no plate keeps the rows apart, or a value is missing or has another shape.
        """
        if self.row_plates and not given:
            return self
        query = self.query
        upper = [name for name in query.latents if name not in query.inner]
        if not query.inner or len(upper) == len(query.latents):
            raise ValueError(
                "no plate keeps the rows of this model apart: all of its latents are judged jointly. Rows "
                "are apart if every site that depends on a latent of a row lies in the row's plate"
            )
        given = query.central_draw({name: self.draws[name] for name in upper}) if given is None else given
        held = {name: query.single(name, given) for name in upper}
        if unknown := sorted(given.keys() - held.keys()):
            raise ValueError(f"given names {unknown}, but the latents outside the rows are {upper}")
        return Posterior(query.holding(held), num_draws=self.num_draws)

    # --- summaries

    def mean(self) -> dict[str, Tensor]:
        """The mean of the draws of each latent, in its natural shape."""
        return {name: summaries.floating(draws).mean(0) for name, draws in self.draws.items()}

    def sd(self) -> dict[str, Tensor]:
        """The standard deviation of the draws of each latent, in its natural shape."""
        if self.num_draws < 2:
            raise ValueError("a standard deviation needs at least 2 draws; ask for more num_draws")
        return {name: summaries.floating(draws).std(0) for name, draws in self.draws.items()}

    def median(self) -> dict[str, Tensor]:
        """The median of each latent, in its natural shape; see ``AmortizedGuide.median``."""
        return summaries.median(self)

    def quantiles(self, probabilities: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Marginal quantiles of each latent, ``(len(probabilities), *natural shape)``.

        In closed form where q is normal, depends on nothing upstream and reaches the support by an
        increasing function of each value; from the draws otherwise.

        Raises:
            ValueError: a probability is not between 0 and 1.
        """
        levels = torch.as_tensor(arguments.as_reals("quantiles", probabilities), dtype=torch.float64)
        if levels.dim() != 1 or not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles must be a list of numbers from 0 to 1, got {probabilities}")
        return summaries.quantiles(self, levels)

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
        """Leave-one-out predictive density of each observation, corrected for draws from q.

        Returns:
            Pointwise densities and k̂, see :class:`~pyro_guides.Loo`.

        Raises:
            ValueError: the model observes nothing, or the draws were resampled.
        """
        return loo(self)

    # --- prediction and repair

    def predict(self, *args: Any, **kwargs: Any) -> prediction.Prediction:
        """What the model predicts at each draw, ``(S, *natural shape)`` of each site.

        Observed sites are hidden and drawn anew, ``pyro.deterministic`` sites are computed; the model and the
        guide share one subsample.

        Args:
            *args: arguments of the model, if they are to be others than the guide's, for the same rows.
            **kwargs: its keyword arguments; without ``args``, those that are to change.

        Raises:
            ValueError: with these arguments the model expects latents of other shapes.
        """
        return prediction.predict(self, args, kwargs)

    def prior(self, num_draws: int | None = None) -> prediction.Prediction:
        """What the model draws without data: its latents, and data like these.

        Args:
            num_draws: how many draws; as many as there are here if None.
        """
        return prediction.prior(self.query, self.num_draws if num_draws is None else num_draws)

    def resample(self, num_draws: int | None = None) -> Posterior:
        r"""Take each draw as often as the posterior wants it, row by row.

        Draws are taken with replacement with their Pareto-smoothed weights, evenly spread over the cumulative
        weight. Good where k̂ is below its threshold; it cannot find what q has missed.

        Args:
            num_draws: how many to take; as many as there are if None.

        Raises:
            ValueError: they are resampled already, or ``num_draws`` is less than 1.

        Source: Aki Vehtari et al., "Pareto Smoothed Importance Sampling", 2024, arXiv:1507.02646.
        """
        return weighing.resample(self, num_draws)

    def refine(self, *, particles: int = 16, max_steps: int = 2000) -> Posterior:
        r"""The best q of the same family for these rows; the guide stays as it is.

        λ of each row is optimized from where the encoder puts it, everything else fixed, all rows at once:

        .. math:: \max_{\delta_i} E_{q(z_i; \lambda_i + \delta_i)}
            [\log p(x_i, z_i) - \log q(z_i; \lambda_i + \delta_i)]

        Each of three step sizes is taken until 50 further steps raise the mean ELBO by less than two standard
        errors or 0.001 nats; λ is the mean over the last 25 steps. A row whose ELBO that has not raised, by
        as many fresh draws, keeps its amortized λ.

        Args:
            particles: how many draws each step takes.
            max_steps: when to stop in any case.

        Returns:
            A posterior like this one, whose ``gain`` says by how much each row's ELBO was raised.

        Raises:
            ValueError: an argument is less than 1.
            NotImplementedError: the model draws other latents itself.

        Source: Yoon Kim et al., "Semi-Amortized Variational Autoencoders", 2018, arXiv:1802.02550.
        """
        refinement, gain = refining.refine(
            self.query, num_draws=self.num_draws, particles=particles, max_steps=max_steps
        )
        refined = Posterior(self.query.refined(refinement), num_draws=self.num_draws)
        refined.gain = gain
        return refined

    def nuts(self, *, full_mass: bool = False, num_chains: int = 1, **options: Any) -> handover.WarmStart:
        """Pyro's NUTS with initial values and a mass matrix from q.

        Chains start at draws of q that are taken with their weights, and the inverse mass matrix starts as
        the covariance of q, so that a short warm-up is enough. What is held stays.

        Args:
            full_mass: whether the mass matrix has off-diagonal elements.
            num_chains: how many chains are to start.
            **options: for ``pyro.infer.NUTS``.

        Returns:
            A kernel and initial values, for ``MCMC(kernel, initial_params=...)``; run it with the model's
            arguments.

        Raises:
            ValueError: ``num_chains`` is less than 1; a latent is discrete; the model subsamples its rows.

        Source: Matthew D. Hoffman, Andrew Gelman, "The No-U-Turn Sampler", 2014, arXiv:1111.4246.
        """
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
    def _sample(self) -> sampling.Sample:
        return sampling.take(self.query, self.num_draws, self.shared)

    @cached_property
    def _scores(self) -> Scores:
        with torch.no_grad():
            return self.query.model.score(self.draws, self.query.held)
