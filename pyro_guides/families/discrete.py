"""Discrete latents: a table of probabilities per element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, final

from torch import Tensor

from pyro_guides.arguments import check_choice
from pyro_guides.distributions import Alphabet
from pyro_guides.families.base import BASELINES, Baseline, BoundFamily, Family

__all__ = ["BoundDiscrete", "Discrete"]

ENUMERATIONS = (None, "parallel", "sequential")


@final
@dataclass(frozen=True)
class Discrete(Family):
    r"""A probability for each of finitely many values: :math:`q(k) \propto \exp \lambda_k`.

    What a discrete latent gets unless told otherwise: ``Bernoulli``, ``Categorical``,
    ``OneHotCategorical`` and ``Binomial`` sites, and others with the same finite supports. Elements of one
    event are independent given λ. Discrete latents are groups of their own, drawn in the model's order:
    they see continuous latents before them, and continuous ones after them see their values.

    Args:
        enumerate: how ``TraceEnum_ELBO`` sums the site out, "parallel" or "sequential"; None draws it. A
            site that is enumerated must be a scalar per plate element; if its largest value differs between
            elements, its prior needs ``validate_args=False``.
        baseline: what takes the noise out of its score function when it is drawn, under any ELBO.
            "amortized" predicts each datum's cost from its encoding; "leave_one_out" averages over the
            other data (only where the likelihood is local to the plates) or particles; "running_mean"
            over earlier steps; "auto" does what it can of these; None nothing.

    Raises:
        ValueError: an unknown ``enumerate`` or ``baseline``.

    Source: Andriy Mnih, Karol Gregor, "Neural Variational Inference and Learning in Belief Networks",
    2014, arXiv:1402.0030.

    Example:
        >>> Discrete(enumerate="parallel").enumerate
        'parallel'
    """

    enumerate: Literal["parallel", "sequential"] | None = None
    baseline: Baseline = "auto"

    def __post_init__(self) -> None:
        check_choice("Discrete", "enumerate", self.enumerate, ENUMERATIONS)
        check_choice("Discrete", "baseline", self.baseline, BASELINES)

    def bind(self, size: int) -> BoundFamily:
        raise ValueError(
            "Discrete() is for discrete latents, and this group is continuous: give it a family such as "
            "FullRankNormal(), or name the discrete site: family={'site': Discrete(...)}"
        )

    def bind_to(self, alphabet: Alphabet) -> BoundDiscrete:
        """The family for a site with the given values.

        Raises:
            ValueError: a site of several elements is to be enumerated.
        """
        if self.enumerate and alphabet.elements > 1:
            raise ValueError(
                f"a discrete site of shape {tuple(alphabet.event_shape)} has several elements, whose "
                "combinations cannot be enumerated; put them into a plate, or draw them: Discrete()"
            )
        return BoundDiscrete(self, alphabet)


@final
class BoundDiscrete(BoundFamily):
    """λ = the logits of one discrete site, in the layout of its :class:`Alphabet`."""

    def __init__(self, family: Discrete, alphabet: Alphabet) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.size = self.width = alphabet.shape.numel()
        self.baseline = family.baseline
        self.enumerate = family.enumerate

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """Equal probabilities."""
        return loc.new_zeros(loc.shape)

    def forward(self, parameters: Tensor, scored: Tensor | None = None) -> Any:
        raise TypeError("a discrete family has no density over vectors")

    def adopt(self, other: BoundFamily, parameters: Tensor) -> Tensor:
        if not isinstance(other, BoundDiscrete):
            raise ValueError("a discrete latent keeps its table: promote it to Discrete(...)")
        return parameters

    def table(self, parameters: Tensor, alphabet: Alphabet, mask: Tensor | None) -> Any:
        """The distribution of a site whose values are, in this call, those of ``alphabet``."""
        if alphabet.count != self.alphabet.count:
            raise ValueError(
                f"a discrete latent was set up with {self.alphabet.count} values, this call's support has "
                f"{alphabet.count}; set the guide up with the largest support"
            )
        return cast("Any", alphabet.distribution(parameters, mask))
