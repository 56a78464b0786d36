"""What every objective of this package is to Pyro: an ELBO that ``SVI`` and ``ELBOModule`` take."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

__all__ = ["Objective"]


class Objective(ELBO):
    """An objective that is written as one differentiable number."""

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with the gradient of the objective."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            return _number(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return _number(loss)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} does not run guide and model one particle at a time"
        )


def _number(loss: Tensor) -> float:
    number = float(loss.detach())
    if math.isnan(number):
        warnings.warn("the loss is NaN", stacklevel=3)
    return number
