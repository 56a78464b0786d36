"""Several objectives as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from pyro_guides.objectives.base import Objective
from pyro_guides.objectives.surrogate import differentiable_loss

__all__ = ["WeightedSum"]

Weight: TypeAlias = float | Callable[[int], float]


@final
class WeightedSum(Objective):
    r"""A weighted sum of objectives, :math:`\sum_i c_i(t) \mathcal L_i`.

    Args:
        *terms: pairs of an ELBO (Pyro's, this package's or a user's) and its weight: a number, or a function
            of the step that returns one. A term of weight zero is not run.

    Attributes:
        step: t, how often the sum was evaluated with gradients.

    Raises:
        TypeError, ValueError: a term is no such pair, or a weight negative or infinite.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_guides.objectives import ForwardKL, WeightedSum
        >>> elbo = WeightedSum((ForwardKL(), lambda step: max(0.0, 1 - step / 500)), (Trace_ELBO(), 1.0))
        >>> elbo.weights
        [1.0, 1.0]
    """

    def __init__(self, *terms: tuple[Any, Weight]) -> None:
        if not terms:
            raise ValueError("WeightedSum needs at least one pair (elbo, weight)")
        for term in terms:
            if not isinstance(term, tuple) or len(term) != 2:
                raise TypeError(f"each term must be a pair (elbo, weight), got {term!r}")
            if isinstance(term[0], type) or not hasattr(term[0], "loss_and_grads"):
                raise TypeError(f"a term must begin with an ELBO such as Trace_ELBO(), got {term[0]!r}")
            if not callable(term[1]):
                _checked(term[1])
        super().__init__()
        self.terms = terms
        self.step = 0

    @property
    def weights(self) -> list[float]:
        """The weights at this step."""
        return [_checked(weight(self.step) if callable(weight) else weight) for _, weight in self.terms]

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the losses, with its gradient; the step counts on."""
        total = torch.zeros(())
        for (elbo, _), weight in zip(self.terms, self.weights, strict=True):
            if weight:
                total = total + weight * self._loss_of(elbo, model, guide, args, kwargs)
        self.step += torch.is_grad_enabled()
        return total

    def state_dict(self) -> dict[str, int]:
        """All that changes."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.step = int(state["step"])

    def _loss_of(self, elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            return differentiable_loss(elbo, model, guide, *args, **kwargs)
        return torch.as_tensor(elbo.loss(model, guide, *args, **kwargs))


def _checked(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(
            f"a weight must be a number or a function of the step that returns one, got {weight!r}"
        )
    if not (0.0 <= float(weight) < math.inf):
        raise ValueError(f"a weight must be at least 0 and finite, got {weight!r}")
    return float(weight)
