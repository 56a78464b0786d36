"""From one draw of q(u; λ) to the values of several sites, and back to their joint density.

A group of latents is drawn jointly, but Pyro wants one ``pyro.sample`` per site. A :class:`Joint` cuts
the draw into slices, one :class:`SiteDistribution` per site maps its slice to the site's support. Every
site scores its own Jacobian; the last one also scores log q of the whole group, at the values that the
sites really took. Replayed, conditioned and detached values are therefore scored exactly, and a group of
one site needs no special treatment: its only site is the last one.

Where q is not fully reparameterized, the *first* site carries the score function. ``TraceGraph_ELBO`` tags
what such a site returns, and charges it with the costs that carry its tag; so the other slices, everything
that is drawn given them, and all their densities take the tag over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_guides.distributions.scales import broadcast
from pyro_guides.distributions.transforms import is_identity, strip_independent
from pyro_guides.distributions.vector import Mark, Shape, VectorDistribution

__all__ = ["Joint", "Piece", "SiteDistribution", "Tags", "joined", "tagged", "tags_of"]

# Names of the sites that a value was drawn from without full reparameterization; empty but under TraceGraph.
Tags = frozenset[str]


@dataclass(frozen=True, eq=False)
class Piece:
    """How one site gets from its slice of u to its support.

    Attributes:
        transform: the bijection from unconstrained values to the support.
        unconstrained_shape: the shape that the bijection takes, without plates.
        support: the site's support.
        event_shape: the site's event shape.
        mask: which elements are scored, ``(*batch, *leading event dims)``; all of them if None.
        mask_event_dim: how many dimensions of ``mask`` belong to the event.
    """

    transform: Transform
    unconstrained_shape: torch.Size
    support: Constraint
    event_shape: torch.Size
    mask: Tensor | None = None
    mask_event_dim: int = 0

    def constrain(self, u: Tensor) -> Tensor:
        """The site's value from its slice of u, ``(*batch, size) -> (*batch, *event_shape)``."""
        shaped = u
        if len(self.unconstrained_shape) != 1:  # a reshape to the same shape would be a step in the graph
            shaped = u.reshape(u.shape[:-1] + self.unconstrained_shape)
        return shaped if is_identity(self.transform) else self.transform(shaped)

    def unconstrain(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`constrain`."""
        shaped = value if is_identity(self.transform) else self.transform.inv(value)
        batch = shaped.shape[: shaped.dim() - len(self.unconstrained_shape)]
        return shaped.reshape(*batch, self.unconstrained_shape.numel())

    def log_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        """Log of the volume change from u to value over the scored elements, ``(*batch)``."""
        batch_dim = u.dim() - 1
        shaped = u.reshape(u.shape[:-1] + self.unconstrained_shape)
        jacobian = strip_independent(self.transform).log_abs_det_jacobian(shaped, value)
        if self.mask is not None:
            extra = jacobian.dim() - batch_dim - self.mask_event_dim
            mask = self.mask.reshape(self.mask.shape + (1,) * extra)
            jacobian = torch.where(mask, jacobian, torch.zeros_like(jacobian))
        return jacobian.flatten(batch_dim).sum(-1) if jacobian.dim() > batch_dim else jacobian


@final
class Joint:
    """One draw of u shared by the sites of a group.

    Args:
        distribution: q(u; λ).
        bounds: where each site's slice of u starts and stops, in order; the last site scores q.
        tags: those of the upstream values that λ depends on.
        revise: q at the values that upstream sites have by now, if these changed since the draw (Pyro's
            wake phase detaches a trace before it scores it); None if they did not.
    """

    def __init__(
        self,
        distribution: VectorDistribution,
        bounds: Mapping[str, tuple[int, int]],
        revise: Callable[[], VectorDistribution | None] = lambda: None,
        tags: Tags = frozenset(),
    ) -> None:
        self.distribution = distribution
        self.bounds = bounds
        self.revise = revise
        self.tags = tags
        self.first, *_ = bounds
        *_, self.last = bounds
        self._pieces: dict[str, Piece] = {}
        self._draw: Tensor | None = None
        self._drawn: dict[str, Mark] = {}
        self._values: dict[str, Tensor] = {}
        self._settled: dict[str, Tensor] = {}
        self._parts: tuple[Tensor, ScoreParts] | None = None

    def site(self, name: str, piece: Piece) -> SiteDistribution:
        """The distribution that ``pyro.sample(name, ...)`` takes."""
        self._pieces[name] = piece
        return SiteDistribution(self, name, piece, self.distribution.batch_shape)

    def expand(self, batch_shape: torch.Size) -> None:
        """Grow to the plates around the first site; the other sites follow."""
        self.distribution = self.distribution.expand(batch_shape)

    def draw(self, name: str) -> Tensor:
        """The value of one site from the group's joint draw, which the first caller makes."""
        if self._draw is None:
            self._draw = self.distribution()
        value = self._pieces[name].constrain(self._slice(self._draw, name))
        self.tags |= tags_of(value)  # a support may depend on tagged values
        value = detach_provenance(value)
        self._drawn[name] = Mark(value)
        return tagged(value, self.tags)

    def take(self, name: str, value: Tensor) -> Tensor:
        """Note the value that a site took, and return its unconstrained slice ``(..., size)``."""
        self.tags |= tags_of(value)
        self._values[name] = detach_provenance(value)
        return self._unconstrained(name)

    def settle(self) -> Tensor:
        """Close the draw at the values its sites took; returns u."""
        self._settled = dict(self._values)
        return self.unconstrained()

    @property
    def changed(self) -> bool:
        """Whether some site was scored at another value than it took when it was drawn."""
        return any(self._values[name] is not value for name, value in self._settled.items())

    def scored(self) -> VectorDistribution:
        """Return q as it is to be scored now."""
        return self.revise() or self.distribution

    def score_parts(self) -> ScoreParts:
        """Log q of the whole group at the values its sites took, with its gradient estimator."""
        u = self.unconstrained()
        if self._parts is None or self._parts[0] is not u:
            self._parts = (u, self.scored().score_parts(u))
        return self._parts[1]

    def unconstrained(self) -> Tensor:
        """Values u of the whole group at the values its sites took, ``(..., D)``."""
        if self._draw is not None and all(map(self._is_own, self.bounds)):
            return self._draw
        return joined([self._unconstrained(name) for name in self.bounds])

    def _unconstrained(self, name: str) -> Tensor:
        if self._draw is not None and self._is_own(name):
            return self._slice(self._draw, name)
        return self._pieces[name].unconstrain(self._values[name])

    def _slice(self, u: Tensor, name: str) -> Tensor:
        """One site's part of u: all of it if there is no other, without a step in the graph."""
        return u if len(self.bounds) == 1 else u[..., slice(*self.bounds[name])]

    def _is_own(self, name: str) -> bool:
        return name in self._drawn and self._drawn[name].matches(self._values[name])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate vectors whose batch dimensions broadcast."""
    if len(parts) == 1:
        return parts[0]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], dim=-1)


def tags_of(value: Tensor) -> Tags:
    """The tags of a value that ``pyro.sample`` returned."""
    return frozenset() if type(value) is Tensor else get_provenance(value)


def tagged(value: Tensor, tags: Tags) -> Tensor:
    """The same value with more tags."""
    return track_provenance(value, tags) if tags else value


@final
class SiteDistribution(TorchDistribution):
    """One site's share of a :class:`Joint`: its slice of the draw, constrained.

    ``log_prob`` is minus the site's log-Jacobian, plus log q of the whole group at the last site; the
    sum over the group's sites is the exact joint log density.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, joint: Joint, name: str, piece: Piece, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, piece.event_shape, validate_args=False)
        self.joint = joint
        self.name = name
        self.piece = piece

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the site needs no score function: all but the first leave that to the first."""
        return self.joint.distribution.has_rsample or self.name != self.joint.first

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The site's own support."""
        return self.piece.support

    def expand(self, batch_shape: Shape, _instance: SiteDistribution | None = None) -> SiteDistribution:
        """Pyro expands every site in a plate; only a real growth makes a new object."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        self.joint.expand(torch.Size(batch_shape))
        return SiteDistribution(self.joint, self.name, self.piece, torch.Size(batch_shape))

    def __call__(self, sample_shape: Shape = ()) -> Tensor:
        """What ``pyro.sample`` calls: draws carry their gradients even if these are not all there is."""
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """The site's part of the joint draw."""
        if sample_shape:
            raise NotImplementedError(
                f"site '{self.name}' is drawn jointly with its group: put the guide into a "
                f"pyro.plate instead of asking for sample_shape={tuple(sample_shape)}"
            )
        return self.joint.draw(self.name)

    def log_prob(self, value: Tensor) -> Tensor:
        """The site's share of the group's log density, ``(*batch_shape)``."""
        if self._scores_q_alone(value):
            return tagged(self.joint.scored().log_prob(self.joint.unconstrained()), self.joint.tags)
        log_prob = -self._log_jacobian(value)
        if self.name == self.joint.last:
            log_prob = log_prob + self.joint.scored().log_prob(self.joint.unconstrained())
        return tagged(log_prob, self.joint.tags)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """As :meth:`log_prob`, with the gradient estimator of the group's distribution."""
        alone = self._scores_q_alone(value)
        jacobian = 0.0 if alone else self._log_jacobian(value)
        score_function: Any = 0.0
        if not self.has_rsample:
            score_function = self.joint.score_parts().score_function
        if self.name == self.joint.last:
            parts = self.joint.score_parts()
            log_prob = parts.log_prob if alone else parts.log_prob - jacobian
            entropy_term = parts.entropy_term if alone else parts.entropy_term - jacobian
        else:
            log_prob = entropy_term = -cast("Tensor", jacobian)
        return ScoreParts(tagged(log_prob, self.joint.tags), score_function, entropy_term)

    def _scores_q_alone(self, value: Tensor) -> bool:
        """Note the value; True if its Jacobian is one and the site scores q, which then is all there is."""
        self.joint.take(self.name, value)
        whole = value.shape == self.batch_shape + self.event_shape
        return whole and self.name == self.joint.last and is_identity(self.piece.transform)

    def _log_jacobian(self, value: Tensor) -> Tensor:
        u = self.joint.take(self.name, value)
        if is_identity(self.piece.transform):
            return u.new_zeros(()).expand(self._batch_of(u))
        jacobian = self.piece.log_jacobian(u, detach_provenance(value))
        return jacobian.expand(self._batch_of(u))

    def _batch_of(self, u: Tensor) -> torch.Size:
        return broadcast(u.shape[:-1], self.batch_shape)
