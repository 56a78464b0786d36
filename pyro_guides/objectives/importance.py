"""Importance-weighted bounds, row by row: tighter than the ELBO, and right under subsampling."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, final

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_guides.distributions.sites import SiteDistribution
from pyro_guides.objectives.base import Objective
from pyro_guides.objectives.rows import Guide, Model, Rows, Site, read_rows
from pyro_guides.objectives.surrogate import valued
from pyro_guides.objectives.terms import Terms, evaluate, rescored

__all__ = ["IWELBO", "Gradient"]

Gradient = Literal["doubly_reparameterized", "standard", "wake"]
_GRADIENTS = ("doubly_reparameterized", "standard", "wake")


@final
class IWELBO(Objective):
    r"""The importance-weighted bound of each row, with K particles.

    Rows are the elements of plates that are independent given the latents g outside of them, which are drawn
    once:

    .. math::
        \mathcal L_K = \log \frac{p(g)}{q(g)}
        + \frac NB \sum_{r=1}^B \log \frac1K \sum_{k=1}^K \frac{p(x_r, z_{kr} \mid g)}{q(z_{kr} \mid x_r, g)}

    It grows with K towards the ELBO of g under exact posteriors of all rows; without g, towards log p(x).
    The scale N/B of a subsample stands before a row's bound. (``RenyiELBO`` has it within, which is no
    bound at all.) A scale around a whole row is treated alike; one around some of its sites weighs these.
    With one particle it is ``Trace_ELBO``.

    Args:
        num_particles: K, of each row.
        gradient: how parameters learn.

            * ``"doubly_reparameterized"``: the signal of the encoder grows with K instead of vanishing
              (Tucker et al.); for reparameterized families that stick the landing.
            * ``"standard"``: the gradient of the bound for any guide. What is not reparameterized
              gets a score function, controlled by the other particles (Mnih and Rezende).
            * ``"wake"``: the rows' q learns to cover the weighted particles instead (Bornschein and Bengio;
              Le et al.), for any guide. Latents outside of rows learn as the model does, from given
              particles.
        plates: the names of the plates whose elements are rows; none, ``()``, for one joint posterior. If
            None, those that all latents in plates have in common; of an ``AmortizedGuide``, those over which
            its amortized latents are independent.
        max_plate_nesting: how many dimensions plates take; found out by a first run if infinite.

    Raises:
        TypeError, ValueError: an argument is not what it should be. When called, ValueError: guide and model
            are no sum of rows, or ``gradient`` does not fit the guide's distributions.

    Source: Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, "Importance Weighted Autoencoders", 2016,
    arXiv:1509.00519; George Tucker, Dieterich Lawson, Shixiang Gu, Chris J. Maddison, "Doubly Reparameterized
    Gradient Estimators for Monte Carlo Objectives", 2019, arXiv:1810.04152; Andriy Mnih, Danilo J. Rezende,
    "Variational inference for Monte Carlo objectives", 2016, arXiv:1602.06725; Jörg Bornschein, Yoshua
    Bengio, "Reweighted Wake-Sleep", 2015, arXiv:1406.2751; Tuan Anh Le et al., "Revisiting Reweighted
    Wake-Sleep for Models with Stochastic Control Flow", 2019, arXiv:1805.10469.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_guides import AmortizedGuide, optim
        >>> from pyro_guides.objectives import IWELBO
        >>> def model(x):
        ...     with pyro.plate("data", 1000, subsample_size=len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AmortizedGuide(model), optim.Adam({"lr": 0.01}), IWELBO(8))
        >>> losses = [svi.step(torch.randn(20)) for _ in range(3)]
    """

    def __init__(
        self,
        num_particles: int = 8,
        *,
        gradient: Gradient = "doubly_reparameterized",
        plates: Collection[str] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be an int, got {num_particles!r}")
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient must be one of {list(_GRADIENTS)}, got {gradient!r}")
        least = 2 if gradient == "wake" else 1
        if num_particles < least:
            raise ValueError(
                f"num_particles must be at least {least} with gradient={gradient!r}, got {num_particles}"
            )
        if isinstance(plates, str):
            raise TypeError(f"plates must be a list of names, got the string {plates!r}; write [{plates!r}]")
        if plates is not None and not isinstance(plates, Collection):
            raise TypeError(f"plates must be a list of names, or None to find them, got {plates!r}")
        if isinstance(max_plate_nesting, bool) or not isinstance(max_plate_nesting, (int, float)):
            raise TypeError(f"max_plate_nesting must be an int, got {max_plate_nesting!r}")
        if not max_plate_nesting >= 0:
            raise ValueError(f"max_plate_nesting must not be negative, got {max_plate_nesting}")
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.gradient = gradient
        self.plates = None if plates is None else frozenset(plates)
        self._depth = max_plate_nesting
        self._known: tuple[Model, Guide, Rows] | None = None

    def differentiable_loss(self, model: Model, guide: Guide, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, with the gradient that was asked for."""
        if self.num_particles == 1:
            if self.plates is not None:
                self._rows(model, guide, args, kwargs)  # says which plates there are not
            plain = Trace_ELBO(max_plate_nesting=self._depth)
            return torch.as_tensor(plain.differentiable_loss(model, guide, *args, **kwargs))
        rows = self._rows(model, guide, args, kwargs)
        if not torch.is_grad_enabled():
            terms = evaluate(model, guide, args, kwargs, rows, self.num_particles)
            return -(terms.shared + (terms.scale * _bound(terms.log_weights)).sum())
        estimate = {
            "doubly_reparameterized": _doubly_reparameterized,
            "standard": _standard,
            "wake": _wake,
        }[self.gradient]
        terms, bound, surrogate = estimate(model, guide, args, kwargs, rows, self.num_particles)
        counted = terms.scale * bound
        surrogate = (terms.scale * surrogate).sum() + terms.shared_surrogate(counted)
        return valued(-surrogate, -(terms.shared + counted.sum()))

    def _rows(self, model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """What belongs to a row, which is found out once for a model and a guide."""
        if self._known is None or self._known[:2] != (model, guide):
            rows = read_rows(model, guide, args, kwargs, self.plates, self._depth)
            self._known = (model, guide, rows)
        return self._known[2]


# --- gradients: each returns a run, the bound of each row, and what has the gradient of the bound, by row


def _bound(log_weights: Tensor) -> Tensor:
    """The bound of each row; without a gradient where all particles are impossible."""
    lost = _are_lost(log_weights)
    log_weights = torch.where(lost, torch.zeros_like(log_weights), log_weights)
    return (log_weights.logsumexp(0) - math.log(len(log_weights))).masked_fill(lost, -math.inf)


def _are_lost(log_weights: Tensor) -> Tensor:
    """The rows whose particles are all impossible."""
    return log_weights.detach().isneginf().all(0)


def _normalized(log_weights: Tensor) -> Tensor:
    """Weights that sum to one; zero where all particles of a row are impossible."""
    lost = _are_lost(log_weights)
    return torch.where(lost, torch.zeros_like(log_weights), log_weights).softmax(0).masked_fill(lost, 0.0)


def _standard(
    model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, count: int
) -> tuple[Terms, Tensor, Tensor]:
    """The bound's own gradient, with a score function where q is not reparameterized."""
    terms = evaluate(model, guide, args, kwargs, rows, count)
    bound, lost = _bound(terms.log_weights), _are_lost(terms.log_weights)
    surrogate = bound.masked_fill(lost, 0.0)
    scores = terms.scores()
    if scores is not None:
        signal = bound - _bound_without_one(terms.log_weights)
        surrogate = surrogate + (scores * signal.detach().masked_fill(lost, 0.0)).sum(0)
    return terms, bound.detach(), surrogate


def _bound_without_one(log_weights: Tensor) -> Tensor:
    """The bound with each particle's weight replaced by the geometric mean of the others', ``(K, ...)``."""
    w = log_weights.detach()
    count = len(w)
    others = ~torch.eye(count, dtype=torch.bool, device=w.device).reshape(count, count, *[1] * (w.dim() - 1))
    each = torch.where(others, w.unsqueeze(0), torch.zeros_like(w))  # (K left out, K, ...)
    mean = each.sum(1, keepdim=True) / (count - 1)
    bound = torch.where(others, w.unsqueeze(0), mean).logsumexp(1) - math.log(count)
    return torch.where(bound.isfinite(), bound, torch.zeros_like(bound))


def _doubly_reparameterized(
    model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, count: int
) -> tuple[Terms, Tensor, Tensor]:
    """Squared weights for what q's parameters do to draws; weights for the model.

    The model is run at copies of the draws, through which gradients come back multiplied by the weights
    once more.
    """
    weights: list[Tensor] = []

    def weighted(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        copy = value.view_as(value)

        def weigh(gradient: Tensor) -> Tensor:
            (own,) = weights
            return gradient * own.reshape(own.shape + (1,) * (gradient.dim() - own.dim()))

        copy.register_hook(weigh)
        return copy

    terms = evaluate(model, guide, args, kwargs, rows, count, weighted)
    for site in terms.row_latents:
        _check_sticks(site, shared=terms.has_shared_latents)
    log_q = terms.log_q_along_paths()
    log_weights = (terms.log_p - log_q).detach()
    weights.append(_normalized(log_weights))
    log_p = _where_possible(terms.log_p, log_weights)
    surrogate = (weights[0] * log_p - weights[0].square() * log_q).sum(0)
    return terms, _bound(log_weights), surrogate


def _wake(
    model: Model, guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, count: int
) -> tuple[Terms, Tensor, Tensor]:
    """The bound's gradient for the model; for q, that of the log density of weighted draws."""
    terms = evaluate(model, guide, args, kwargs, rows, count, Tensor.detach)
    log_q = rescored(guide, args, kwargs, terms).log_q
    log_weights = (terms.log_p - terms.log_q).detach()  # with whatever weighs the KL term, log_q without
    log_p = _where_possible(terms.log_p, log_weights)
    surrogate = (_normalized(log_weights) * (log_p + log_q)).sum(0)
    return terms, _bound(log_weights), surrogate


def _where_possible(log_p: Tensor, log_weights: Tensor) -> Tensor:
    """Log p, and zero where a weight of zero would meet minus infinity."""
    return torch.where(log_weights.isneginf(), torch.zeros_like(log_p), log_p)


def _check_sticks(site: Site, *, shared: bool) -> None:
    """Raise a ValueError unless log q of a site has a gradient through its value alone, and counts once."""
    fn = site["fn"]
    q = fn.joint.distribution if isinstance(fn, SiteDistribution) else fn
    reason = None
    if not q.has_rsample:
        reason = "is not fully reparameterized"
    elif not getattr(q, "stick_the_landing", False):
        reason = "has a density whose gradient does not follow the path of the draw alone (a family of this "
        reason += "package does, with stick_the_landing=True)"
    elif isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
        reason = "counts with a scale other than its row's"
    elif shared and isinstance(fn, SiteDistribution) and _is_live(fn.piece.support):
        reason = "has a support that other latents decide"
    if reason is not None:
        raise ValueError(
            f"latent '{site['name']}' {reason}, which gradient='doubly_reparameterized' cannot take; use "
            "gradient='standard'"
        )


def _is_live(support: Any) -> bool:
    """Whether the bounds of a support have gradients."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return any(isinstance(value, Tensor) and value.requires_grad for value in vars(support).values())
