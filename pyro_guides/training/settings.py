"""What a training run is told, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, final

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_guides.statistics.arguments import count
from pyro_guides.training.gradients import Limit

__all__ = ["MakeOptimizer", "Settings", "check_counts", "check_elbo", "check_functions"]

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


@final
@dataclass(frozen=True, eq=False)
class Settings:
    """How to train; see :func:`~pyro_guides.fit`.

    Attributes:
        max_steps: when to stop at the latest.
        every: how many steps lie between two looks at the validation rows.
        learning_rate: the peak.
        optimizer: makes the optimizer; Adam if None.
        schedule: from the share of steps done to a factor on the learning rate; None for a constant one.
        clip: what limits gradients.
        patience: after how many looks without a gain beyond noise to stop; None for never.
        max_skips: how many steps in a row may have no finite loss or gradient.
    """

    max_steps: int
    every: int
    learning_rate: float
    optimizer: MakeOptimizer | None
    schedule: Callable[[float], float] | None
    clip: Limit
    patience: int | None
    max_skips: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "every", "max_skips", "patience"):
            if name != "patience" or self.patience is not None:
                count(name, getattr(self, name))
        _check_positive("learning_rate", self.learning_rate)
        if not isinstance(self.clip, str) and self.clip is not None:
            _check_positive("clip", self.clip, 'a positive norm, "auto", "normalize" or None')
        elif isinstance(self.clip, str) and self.clip not in ("auto", "normalize"):
            expected = 'a positive norm, "auto", "normalize" or None'
            raise ValueError(f"clip must be {expected}, got {self.clip!r}")
        if isinstance(self.optimizer, PyroOptim):
            raise TypeError(
                "optimizer must make a torch optimizer, got one of Pyro's, which steps parameters one by "
                "one; give for instance lambda parameters: torch.optim.Adam(parameters, lr=0.001)"
            )
        for name in ("optimizer", "schedule"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function or None, got {getattr(self, name)!r}")

    def make_optimizer(self, parameters: Sequence[Tensor]) -> Optimizer:
        """The optimizer of some parameters.

        Raises:
            TypeError: the user's function returned something else.
        """
        if self.optimizer is None:
            return torch.optim.Adam(list(parameters), lr=self.learning_rate, fused=True)
        made: Any = self.optimizer(list(parameters))
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer(parameters) must return a torch optimizer, got {made!r}")
        return made

    def rate(self, step: int) -> float:
        """The factor on the learning rate of a step, counted from 0.

        Raises:
            ValueError: the user's schedule gives no usable factor.
        """
        if self.schedule is None:
            return 1.0
        factor = self.schedule((step + 1) / (self.max_steps + 1))
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"schedule must return a number, got {factor!r} at step {step}")
        factor = float(factor)
        if not math.isfinite(factor) or factor < 0.0:
            raise ValueError(f"schedule must return a factor of at least 0, got {factor} at step {step}")
        return factor


def check_elbo(elbo: Any, name: str = "loss") -> ELBO:
    """The ELBO that was given as an argument of this name.

    Raises:
        TypeError: it is none.
    """
    if isinstance(elbo, type) and issubclass(elbo, ELBO):
        raise TypeError(f"{name} must be an ELBO, got the class {elbo.__name__}; write {elbo.__name__}()")
    if not isinstance(elbo, ELBO):
        raise TypeError(f"{name} must be one of Pyro's ELBOs such as Trace_ELBO(), got {elbo!r}")
    return elbo


def check_functions(model: Any, guide: Any, tempering: Any) -> None:
    """Raise a TypeError unless model and guide can be called, and tempering be entered before every step."""
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{name} must be a function or module, got {function!r}")
    if tempering is not None and (isinstance(tempering, type) or not hasattr(tempering, "__enter__")):
        raise TypeError(
            "tempering must be an object that weighs latents, such as LinearWarmup(1000) or kl_weight(0.5), "
            f"got {tempering!r}"
        )


def check_counts(*, batch_size: Any, devices: Any, **counts: Any) -> None:
    """Raise a TypeError or ValueError unless numbers are positive ints; devices may be named."""
    if batch_size is not None:
        count("batch_size", batch_size)
    if not isinstance(devices, str):
        count("devices", devices)
    for name, value in counts.items():
        count(name, value)


def _check_positive(name: str, value: Any, expected: str = "a positive number") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not 0.0 < float(value) < math.inf:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
