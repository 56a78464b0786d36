r"""What guide and model say about K draws, row by row.

Rows are the elements of plates that are independent given all that lies outside. What lies outside is drawn
once; inside, each row has K particles and log-weights

.. math:: \log w_{kr} = \sum_{i \in \text{row}} \log p_i - \log q_i

in which the row counts once: the N / B of a subsampled plate, and any scale of the row as a whole, stands
before a row's bound, not within it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import is_identically_zero, is_validation_enabled, scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.util import check_site_shape
from torch import Tensor

from pyro_guides.objectives.frozen import frozen
from pyro_guides.objectives.rows import Guide, Model, Rows, Site, is_delta, random_sites
from pyro_guides.objectives.scales import split_scales
from pyro_guides.objectives.tempering import Unweighed
from pyro_guides.particles import RowParticles

__all__ = ["Terms", "evaluate", "rescored"]

_PARTICLES = "row_particles"


@final
@dataclass(frozen=True, eq=False)
class Terms:
    """One run of guide and model with K particles.

    Attributes:
        rows: what belongs to a row.
        count: K.
        scale: how many times each row counts, a number or a tensor that broadcasts over rows.
        model_trace: the run of the model.
        guide_trace: the run of the guide.
    """

    rows: Rows
    count: int
    scale: float | Tensor
    model_trace: Trace
    guide_trace: Trace

    @cached_property
    def model(self) -> list[Site]:
        """The sites of the model."""
        return random_sites(self.model_trace)

    @cached_property
    def guide(self) -> list[Site]:
        """The sites of the guide."""
        return random_sites(self.guide_trace)

    def particles(self) -> RowParticles:
        """The plate of the particles, to be opened once more."""
        return RowParticles(_PARTICLES, self.count, self.rows.plates, self.rows.particle_dim)

    # --- inside of the rows; shapes are (K, *plates) with ones for plates that are no rows

    @cached_property
    def row_latents(self) -> list[Site]:
        """The guide's sites inside of rows."""
        return [site for site in self.guide if self.rows.hold(site)]

    @cached_property
    def log_p(self) -> Tensor:
        """Log p of the sites inside of rows, with its gradient."""
        return self._by_row([(site, log_prob_of(site)) for site in self.model if self.rows.hold(site)])

    @cached_property
    def log_q(self) -> Tensor:
        """Log q of the latents inside of rows, with its full gradient."""
        return self._by_row([(site, log_prob_of(site)) for site in self.row_latents])

    def log_q_along_paths(self) -> Tensor:
        """Log q of the latents inside of rows, with a gradient through their values alone."""
        return self._by_row([(site, parts_of(site).entropy_term) for site in self.row_latents])

    def scores(self) -> Tensor | None:
        """The score functions of the latents inside of rows; None if all are reparameterized."""
        found = [(site, parts_of(site).score_function) for site in self.row_latents]
        found = [(site, score) for site, score in found if not is_identically_zero(score)]
        return self._by_row(found) if found else None

    @cached_property
    def log_weights(self) -> Tensor:
        """Log w of each particle and row, with its full gradient."""
        return self.log_p - self.log_q

    def _by_row(self, values: list[tuple[Site, Tensor]]) -> Tensor:
        total = sum((self.rows.sum(site, value) for site, value in values), torch.zeros(()))
        total = total.reshape((1,) * (self.rows.depth + 1 - total.dim()) + total.shape)
        return total.expand(self.count, *total.shape[1:])

    # --- outside of them

    @cached_property
    def shared(self) -> Tensor:
        """Log p - log q of all sites outside of rows, in one number."""
        zero = torch.zeros(())
        log_p = sum((log_prob_of(site).sum() for site in self.outside(self.model)), zero)
        return log_p - sum((log_prob_of(site).sum() for site in self.outside(self.guide)), zero)

    def shared_surrogate(self, bound: Tensor) -> Tensor:
        """A number with the gradient that sites outside of rows have.

        Args:
            bound: of the rows, ``(*plates)``, as they count; the cost of what has a score function.
        """
        surrogate: Any = torch.zeros(())
        costs = MultiFrameTensor()
        for site in self.outside(self.model):
            log_prob = log_prob_of(site)
            surrogate = surrogate + log_prob.sum()
            costs.add((site["cond_indep_stack"], log_prob.detach()))
        parts = [(site, parts_of(site)) for site in self.outside(self.guide)]
        for site, (log_prob, _, entropy_term) in parts:
            costs.add((site["cond_indep_stack"], -log_prob.detach()))
            if not is_identically_zero(entropy_term):
                surrogate = surrogate - entropy_term.sum()
        costs.add((self._row_frames, bound.detach()))
        for site, (_, score_function, _) in parts:
            if not is_identically_zero(score_function):
                surrogate = surrogate + (costs.sum_to(site["cond_indep_stack"]) * score_function).sum()
        return surrogate

    @property
    def has_shared_latents(self) -> bool:
        """Whether some latents lie outside of rows."""
        return bool(self.outside(self.guide))

    def outside(self, sites: list[Site]) -> list[Site]:
        """Those of some sites that lie outside of rows."""
        return [site for site in sites if not self.rows.hold(site)]

    @property
    def _row_frames(self) -> tuple[Any, ...]:
        inside = next((site for site in self.model if self.rows.hold(site)), None)
        stack = () if inside is None else inside["cond_indep_stack"]
        return tuple(frame for frame in stack if frame.name in self.rows.plates)


def evaluate(
    model: Model,
    guide: Guide,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: Rows,
    count: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Terms:
    """Run the guide for K particles of each row, and the model at its draws.

    Args:
        model: the model.
        guide: the guide.
        args: their arguments.
        kwargs: their keyword arguments.
        rows: what belongs to a row.
        count: K.
        change: what the model gets in place of the draw of a latent inside of rows; the draw if None.

    Raises:
        ValueError: a site outside of the rows depends on draws inside; a latent is the model's or the guide's
            alone; or guide and model subsample what is weighed jointly.
    """
    particles = RowParticles(_PARTICLES, count, rows.plates, rows.particle_dim)

    def changed(site: Site) -> Tensor:
        value: Tensor = site["value"]
        return change(value) if change is not None and rows.hold(site) else value

    inner: Any = poutine.unwrap(guide)
    if isinstance(inner, GuideMessenger):  # which runs the model itself
        if change is not None:
            raise NotImplementedError(
                "a GuideMessenger draws from guide and model at once, so that the model cannot be run at "
                "other values; take IWELBO(..., gradient='standard')"
            )
        with particles:
            guide(*args, **kwargs)
        model_trace, guide_trace = inner.get_traces()
    else:
        guide_trace = poutine.trace(particles(guide)).get_trace(*args, **kwargs)
        given = _replaced(guide_trace, changed)
        replayed = particles(poutine.replay(model, trace=given))
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    scale = split_scales([*random_sites(model_trace), *random_sites(guide_trace)], rows)
    terms = Terms(rows, count, scale, model_trace, guide_trace)
    for check in (_check_same_latents, _check_outside, _check_draws, _check_shapes):
        check(terms)
    return terms


def rescored(guide: Guide, args: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms) -> Terms:
    """The same with the guide run once more, at values that no gradient leads to.

    λ of all latents is found anew from these values, so that each log q depends on the guide's parameters
    only, whichever guide it is.
    """
    given = _replaced(terms.guide_trace, lambda site: site["value"].detach())
    replayed = terms.particles()(poutine.replay(guide, trace=given))
    with frozen(guide, lambda part: not terms.rows.plates <= set(part.group.plates)), Unweighed():
        trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    for site in random_sites(trace):
        site["scale"] = terms.guide_trace.nodes[site["name"]]["scale"]
    return replace(terms, guide_trace=trace)


def log_prob_of(site: Site) -> Tensor:
    """Log density of a site at its value, masked, and scaled by what is left of its scale; found once."""
    if "log_prob" not in site:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
    found: Tensor = site["log_prob"]
    return found


def parts_of(site: Site) -> ScoreParts:
    """The same with the gradient estimator of the site's distribution; its score function is not scaled."""
    parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
    return parts.scale_and_mask(site["scale"], site["mask"])


def _replaced(trace: Trace, change: Callable[[Site], Tensor]) -> Trace:
    """A trace to be replayed with other values of its latents."""
    latents = {site["name"] for site in random_sites(trace)}
    changed = Trace()
    for name, site in trace.nodes.items():
        new = {**site, "value": change(site)} if name in latents else site
        if site["type"] == "sample":
            changed.add_node(name, **new)
    return changed


# --- what makes a run no sum of rows


def _check_same_latents(terms: Terms) -> None:
    drawn = {site["name"]: site for site in terms.guide}
    latents = {site["name"] for site in terms.model if not site["is_observed"]}
    if alone := sorted(latents - drawn.keys()):
        raise ValueError(
            f"the model draws {alone}, which the guide does not; what TraceEnum_ELBO would sum out cannot be "
            "weighed: give these sites a posterior in the guide, or sum them out in the model"
        )
    for name in sorted(drawn.keys() - latents):
        if not drawn[name]["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide draws '{name}', which the model does not; if this is meant, mark the site with "
                "infer={'is_auxiliary': True}"
            )
    for name, site in drawn.items():
        if site["infer"].get("enumerate") and site["infer"].get("_enumerate_dim") is not None:
            raise ValueError(f"latent '{name}' is enumerated, but weights are those of draws")


def _check_outside(terms: Terms) -> None:
    """Raise a ValueError if what is drawn once depends on draws of rows."""
    for site in [*terms.outside(terms.model), *terms.outside(terms.guide)]:
        own = {frame.dim for frame in site["cond_indep_stack"]}
        shape = log_prob_of(site).shape
        if any(size > 1 and at - len(shape) not in own for at, size in enumerate(shape)):
            raise ValueError(
                f"site '{site['name']}' lies outside of the plates {sorted(terms.rows.plates)}, but its log "
                f"density has shape {tuple(shape)}, one number for each particle: it depends on latents "
                "inside, so that the rows are not independent. Name the plates that hold all of them with "
                "plates=[...], or plates=() for one joint posterior"
            )


def _check_draws(terms: Terms) -> None:
    """Raise a ValueError if the guide draws what is inside of rows outside of them."""
    own = terms.row_latents
    if own and all(is_delta(site["fn"]) for site in own) and terms.has_shared_latents:
        raise ValueError(
            f"the guide draws nothing inside of the plates {sorted(terms.rows.plates)}: it draws all rows "
            "jointly, elsewhere (AutoContinuous guides do), so that rows have no weights of their own; take "
            "plates=() for one joint posterior, or another guide"
        )


def _check_shapes(terms: Terms) -> None:
    if is_validation_enabled():
        for site in [*terms.model, *terms.guide]:
            log_prob_of(site)  # where the check looks for it
            check_site_shape(site, terms.rows.depth + 1)
