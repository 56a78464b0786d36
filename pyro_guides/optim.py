"""One fused torch optimizer inside Pyro's optimizer contract.

Pyro makes a torch optimizer for every parameter and steps them one by one, which costs more than the
gradients of a small guide. A :class:`FusedOptim` puts all parameters into one optimizer: same arguments,
same state by parameter name, new parameters taken in whenever they appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, cast

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Adam", "FusedOptim"]


class FusedOptim(PyroOptim):
    """A drop-in for ``pyro.optim.PyroOptim`` with a single torch optimizer for all parameters.

    Args:
        optim_constructor: a torch optimizer class.
        optim_args: its keyword arguments, or a function from a parameter's name to them. Adam and AdamW
            are made with ``fused=True``.
        clip_args: ``clip_norm`` and/or ``clip_value``, or a function from module and parameter name to
            them, as in Pyro; clips each parameter on its own.
        schedule: from the number of steps made so far to a factor on the learning rate.

    Raises:
        TypeError: ``optim_args`` or ``clip_args`` is neither a dict nor callable.

    Example:
        >>> import torch
        >>> from pyro_guides.optim import FusedOptim
        >>> optimizer = FusedOptim(torch.optim.SGD, {"lr": 0.5})
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> p.grad = torch.ones(1)
        >>> optimizer({p})
        >>> p.data
        tensor([0.5000])
    """

    def __init__(
        self,
        optim_constructor: type[Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | Callable[..., dict[str, float]] | None = None,
        *,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        for label, value in (("optim_args", optim_args), ("clip_args", clip_args or {})):
            if not callable(value) and not isinstance(value, dict):
                raise TypeError(f"{label} must be a dict or a function that returns one, got {value!r}")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be a function of the step or None, got {schedule!r}")
        if not (isinstance(optim_constructor, type) and issubclass(optim_constructor, Optimizer)):
            raise TypeError(
                f"optim_constructor must be a class such as torch.optim.Adam, got {optim_constructor!r}"
            )
        super().__init__(optim_constructor, optim_args, clip_args)
        self.schedule = schedule
        self._constructor: Callable[..., Optimizer] = optim_constructor
        self._fuses = issubclass(optim_constructor, (torch.optim.Adam, torch.optim.AdamW))
        self.optimizer: Optimizer | None = None
        self._groups: dict[Tensor, dict[str, Any]] = {}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Make one step on ``params``, taking in those not seen before; their gradients are used up."""
        used = dict.fromkeys(params)
        for param in used:
            if param not in self._groups:
                self._take_in(param)
            if (clip := self.grad_clip[param]) is not None:
                clip(param)
        # What this step does not use must stay: torch skips parameters without a gradient.
        unused = [param for param in self._groups if param not in used]
        gradients = [param.grad for param in unused]
        for param in unused:
            param.grad = None
        if self.optimizer is not None:
            self._follow_schedule(self.optimizer)
            self.optimizer.step(*args, **kwargs)
        for param, gradient in zip(unused, gradients, strict=True):
            param.grad = gradient
        # SVI would fill used gradients with zeros and add the next ones; none are cheaper to start from.
        for param in used:
            param.grad = None

    def get_state(self) -> dict[str, Any]:
        """A snapshot of state and options of each parameter, by name."""
        store = pyro.get_param_store()
        return {
            str(store.param_name(param)): {
                "state": {} if self.optimizer is None else _cloned(self.optimizer.state[param]),
                "options": {key: value for key, value in group.items() if key != "params"},
            }
            for param, group in self._groups.items()
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`get_state` returned; parameters not met yet get theirs when they are."""
        self._state_waiting_to_be_consumed.update(state_dict)
        for param in self._groups:
            self._restore(param)

    def _follow_schedule(self, optimizer: Optimizer) -> None:
        if self.schedule is None:
            return
        for group in optimizer.param_groups:
            steps = group.setdefault("steps", 0)
            factor = self.schedule(steps)
            if isinstance(factor, bool) or not isinstance(factor, Real):
                raise TypeError(f"schedule must return a number, got {factor!r} at step {steps}")
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            group["steps"] = steps + 1

    def _take_in(self, param: Tensor) -> None:
        options = dict(self._get_optim_args(param))
        if self._fuses and not options.get("foreach"):
            options.setdefault("fused", True)
        # An optimizer of its own checks the options, completes them, and makes the state to start with.
        own = self._constructor([param], **options)
        self.optimizer = self.optimizer or own
        if own is not self.optimizer:
            self.optimizer.state.update(own.state)
            _join(self.optimizer, own.param_groups[0])
        self._groups[param] = _group_of(self.optimizer, param)
        self.grad_clip[param] = self._get_grad_clip(cast("str", param))  # Pyro's annotation is wrong
        self._restore(param)

    def _restore(self, param: Tensor) -> None:
        name = pyro.get_param_store().param_name(param)
        saved = self._state_waiting_to_be_consumed.pop(name, None)
        if saved is None or self.optimizer is None:
            return
        self.optimizer.state[param] = _cloned(saved["state"])
        group = self._groups[param]
        if any(group.get(key) != value for key, value in saved["options"].items()):
            group["params"] = [member for member in group["params"] if member is not param]
            self.optimizer.param_groups = [own for own in self.optimizer.param_groups if own["params"]]
            _join(self.optimizer, {"params": [param], **saved["options"]}, steps=True)
            self._groups[param] = _group_of(self.optimizer, param)


class Adam(FusedOptim):
    """Adam in one fused step: ``pyro.optim.Adam``, several times cheaper for small guides.

    Args:
        optim_args: keyword arguments of ``torch.optim.Adam``, or a function from a parameter's name to
            them.
        clip_args: see :class:`FusedOptim`.
        schedule: see :class:`FusedOptim`.

    Source: Diederik P. Kingma, Jimmy Ba, "Adam: A Method for Stochastic Optimization", 2015,
    arXiv:1412.6980.

    Example:
        >>> from pyro_guides import optim
        >>> optimizer = optim.Adam({"lr": 1e-3}, schedule=lambda step: 0.999**step)
    """

    def __init__(
        self,
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, float] | Callable[..., dict[str, float]] | None = None,
        *,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(torch.optim.Adam, optim_args, clip_args, schedule=schedule)


def _join(optimizer: Optimizer, group: dict[str, Any], *, steps: bool = False) -> None:
    """Put a group's parameters where the options are the same, for one fused step; or on their own.

    Args:
        optimizer: the optimizer.
        group: the group.
        steps: whether the schedule must be at the same step, too; else they follow that of the others.
    """
    for other in optimizer.param_groups:
        if steps and other.get("steps", 0) != group.get("steps", 0):
            continue
        if _options(other) == _options(group):
            other["params"].extend(group["params"])
            return
    optimizer.add_param_group(group)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as they were given: before a schedule changed them."""
    options = {**group, "lr": group.get("initial_lr", group.get("lr"))}
    return {key: x for key, x in options.items() if key not in ("params", "initial_lr", "steps")}


def _group_of(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    groups = optimizer.param_groups
    return next(g for g in groups if any(member is param for member in g["params"]))


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in state.items()}
