"""What one group's q depends on in one call: λ, and what its gradient estimator needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from torch import Tensor

from pyro_guides.distributions import Alphabet, ControlVariate, VectorDistribution, VectorMixture
from pyro_guides.families import BoundDiscrete, BoundFamily
from pyro_guides.heads import held_fixed

__all__ = ["Conditional"]


@final
@dataclass(frozen=True, eq=False)
class Conditional:
    """q of one group given its context and upstream values.

    Attributes:
        family: the group's family.
        bounds: where each site lies in u.
        parameters: λ.
        twin: λ with a gradient path to upstream values only; None if there are none.
        control: what takes the noise out of a score function; None if nothing does.
        prediction: what a network expects the cost to be; None without one.
        counted: which elements are not masked, ``(*batch)``; all of them if None.
    """

    family: BoundFamily
    bounds: Mapping[str, tuple[int, int]]
    parameters: Tensor
    twin: Tensor | None = None
    control: ControlVariate | None = None
    prediction: Tensor | None = None
    counted: Tensor | None = None

    def distribution(self, scored: Tensor | None = None, site: str | None = None) -> VectorDistribution:
        """q(u; λ) of the group, or of one site alone where the family factorizes."""
        if site is not None and scored is not None:
            scored = scored[..., slice(*self.bounds[site])]
        q = self._bind(self.family, self.parameters, scored, site)
        if self.twin is not None:
            family: Any = self.family
            traced = self.twin is self.parameters  # an ELBO that is traced takes the ordinary estimator
            if not traced and any(True for _ in family.parameters()):
                family = partial(held_fixed, family)
            q.path_twin = self._bind(family, self.twin, scored, site)
        if isinstance(q, VectorMixture):
            q.control = self.controlled
        return q

    def table(self, alphabet: Alphabet, mask: Tensor | None) -> Any:
        """The distribution of a discrete site whose values are those of ``alphabet``."""
        assert isinstance(self.family, BoundDiscrete)  # noqa: S101 - planning gave it to discrete groups only
        return self.family.table(self.parameters, alphabet, mask)

    def controlled(self, score: Tensor) -> Tensor:
        """The same score function with less noise in its gradient."""
        if self.control is None:
            return score
        controlled: Tensor = self.control(score, self.prediction, self.counted)
        return controlled

    def _bind(self, family: Any, parameters: Tensor, scored: Tensor | None, site: str | None) -> Any:
        if site is None:
            return family(parameters, scored)
        return family.select(parameters, *self.bounds[site], scored)
