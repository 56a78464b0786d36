"""Distributions of discrete sites: from logits to values, and from values to what encoders can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import one_hot

from pyro_guides.distributions.sites import Tags, tagged
from pyro_guides.distributions.vector import Mark, Shape

__all__ = ["LARGEST_COUNT", "Alphabet", "DiscreteSite", "alphabet"]

LARGEST_COUNT = 1024  # one logit per value: beyond this, a table is no sensible posterior

Control = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Alphabet:
    """The finitely many values that one discrete site can take.

    Attributes:
        kind: zeros and ones, numbers from zero, or one-hot vectors.
        count: K, how many values an element has.
        event_shape: the shape of one value of the site.
        dtype: the dtype of its values.
        precision: the dtype of its encoding and its logits: that of the model's own.
        largest: the largest number, if it differs between plate elements; None otherwise.
    """

    kind: Literal["boolean", "number", "one_hot"]
    count: int
    event_shape: torch.Size
    dtype: torch.dtype
    precision: torch.dtype
    largest: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of one value's logits, and of its encoding."""
        return torch.Size((*self.event_shape, self.count)) if self.kind == "number" else self.event_shape

    @property
    def elements(self) -> int:
        """How many values make up one event."""
        return self.event_shape[:-1].numel() if self.kind == "one_hot" else self.event_shape.numel()

    def encode(self, value: Tensor) -> Tensor:
        """A value as a vector of indicators, ``(*batch, *event_shape) -> (*batch, size)``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if self.kind == "number":
            value = one_hot(value.long(), self.count)
        return value.to(self.precision).reshape(*batch, self.shape.numel())

    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> Any:
        """The distribution with these logits ``(*batch, size)``; ``mask`` says which elements count."""
        logits = logits.reshape(logits.shape[:-1] + self.shape)
        if self.kind == "boolean":
            base: Any = dist.Bernoulli(logits=logits)
        elif self.kind == "one_hot":
            base = dist.OneHotCategorical(logits=logits)
        else:
            base = dist.Categorical(logits=self._possible(logits))
        event_dim = len(self.event_shape) - (self.kind == "one_hot")
        if mask is not None:
            base = base.mask(mask)
        return base.to_event(event_dim) if event_dim else base

    def _possible(self, logits: Tensor) -> Tensor:
        if self.largest is None:
            return logits
        values = torch.arange(self.count, device=logits.device)
        lowest = torch.finfo(logits.dtype).min / 2
        return torch.where(values <= self.largest.unsqueeze(-1), logits, torch.full_like(logits, lowest))


def alphabet(fn: Distribution) -> Alphabet | None:
    """The values of a discrete distribution; None if they are not finitely many, or no plain table.

    Example:
        >>> import torch
        >>> alphabet(torch.distributions.Categorical(torch.ones(3))).count
        3
    """
    support: Any = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return Alphabet("boolean", 2, fn.event_shape, *_dtypes(fn))
    if support is constraints.one_hot:
        return Alphabet("one_hot", fn.event_shape[-1], fn.event_shape, *_dtypes(fn))
    if isinstance(support, constraints.integer_interval):
        largest = torch.as_tensor(support.upper_bound)
        count = int(largest.max()) + 1
        if bool((torch.as_tensor(support.lower_bound) != 0).any()) or count > LARGEST_COUNT:
            return None
        same = bool((largest == count - 1).all())
        return Alphabet("number", count, fn.event_shape, *_dtypes(fn), None if same else largest)
    return None


def _dtypes(fn: Any) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a distribution's values, and of its probabilities."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    precision = fn.probs.dtype if hasattr(fn, "probs") else torch.get_default_dtype()
    try:
        return fn.enumerate_support(expand=False).dtype, precision
    except NotImplementedError:  # counts with totals of their own, which are floats
        return precision, precision


@final
class DiscreteSite(TorchDistribution):
    """A discrete site of a guide: drawn with a controlled score function, or enumerated.

    Args:
        base: the distribution.
        dtype: the dtype of its values.
        control: what controls its score function; None for the plain one.
        tags: those of the upstream values that its logits depend on.
        revise: the distribution at upstream values that changed since the draw; None if they did not.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        base: Any,
        dtype: torch.dtype,
        *,
        control: Control | None = None,
        tags: Tags = frozenset(),
        revise: Callable[[], Any] = lambda: None,
    ) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base = base
        self.dtype = dtype
        self.control = control
        self.tags = tags
        self.revise = revise
        self._drawn: Mark | None = None

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support of the distribution."""
        return self.base.support

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether all its values can be listed: not those of several elements at once."""
        return bool(self.base.has_enumerate_support)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values."""
        return self._typed(self.base.enumerate_support(expand))

    def expand(self, batch_shape: Shape, _instance: DiscreteSite | None = None) -> DiscreteSite:
        """The same distribution with a larger batch shape."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        base = self.base.expand(torch.Size(batch_shape))
        return DiscreteSite(
            base, self.dtype, control=self.control, tags=self.tags, revise=self._expanded_revision
        )

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw values, without a gradient."""
        value = self._typed(self.base.sample(torch.Size(sample_shape)))
        self._drawn = Mark(value)
        return tagged(value, self.tags)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of values."""
        base = self.revise() or self.base
        return tagged(base.log_prob(value if value.dtype == self.dtype else value.to(self.dtype)), self.tags)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """Log q as log density and as score function; values that were enumerated need no control."""
        log_prob = self.log_prob(value)
        score = detach_provenance(log_prob)
        own = self._drawn is not None and self._drawn.matches(detach_provenance(value))
        if own and self.control is not None and score.requires_grad:
            score = self.control(score)
        no_entropy: Any = 0.0
        return ScoreParts(log_prob, score, no_entropy)

    def _typed(self, value: Tensor) -> Tensor:
        return value if value.dtype == self.dtype else value.to(self.dtype)

    def _expanded_revision(self) -> Any:
        base = self.revise()
        return None if base is None else base.expand(self.batch_shape)
