"""Analytic KL divergences from a site's q to its prior, for ``TraceMeanField_ELBO``.

Only what is exact is registered: a site drawn on its own from a normal q whose prior is normal or
log-normal. Everything else raises ``NotImplementedError``, upon which Pyro uses the draw.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, constraints
from torch.distributions.distribution import Distribution
from torch.distributions.kl import register_kl

from pyro_guides.distributions.normal import VectorNormal
from pyro_guides.distributions.sites import SiteDistribution
from pyro_guides.distributions.transforms import is_identity

__all__: list[str] = []


@register_kl(SiteDistribution, Normal)
@register_kl(SiteDistribution, LogNormal)
@register_kl(SiteDistribution, Independent)
def _kl_site_prior(site: SiteDistribution, prior: Distribution) -> Tensor:
    q = site.joint.distribution
    if len(site.joint.bounds) > 1 or not isinstance(q, VectorNormal):
        raise NotImplementedError
    if q.scale.scored is not None or site.piece.mask is not None:
        raise NotImplementedError
    loc, scale = (x.reshape(*prior.batch_shape, -1) for x in _normal_moments(site, prior))
    deviation = q.variance + (q.mean - loc).square()
    divergence = 0.5 * (deviation / scale.square() - 1.0) + scale.log()
    return (divergence.sum(-1) - q.scale.log_determinant()).expand(site.batch_shape)


def _normal_moments(site: SiteDistribution, prior: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prior in the site's unconstrained space."""
    if prior.event_shape != site.event_shape:
        raise NotImplementedError
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if isinstance(prior, Normal) and is_identity(site.piece.transform):
        return prior.loc, prior.scale
    if isinstance(prior, LogNormal) and _is_exponential(site):
        return prior.loc, prior.scale
    raise NotImplementedError


def _is_exponential(site: SiteDistribution) -> bool:
    support: Any = site.piece.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    # Subclasses of these constraints are reached by other functions than exp.
    is_positive = type(support) in (type(constraints.positive), type(constraints.nonnegative))
    return is_positive and support.lower_bound == 0
