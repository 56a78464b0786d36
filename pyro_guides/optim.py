"""One fused torch optimizer inside Pyro's optimizer contract.

Pyro makes a torch optimizer for every parameter and steps them one by one, which costs more than the
gradients of a small guide. A :class:`FusedOptim` puts all parameters into one optimizer: same arguments,
same state by parameter name, new parameters taken in whenever they appear.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
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
        optim_args: its keyword arguments, or a function from a parameter's name to them. ``fused=True`` is
            added where the optimizer has it.
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
        super().__init__(optim_constructor, optim_args, clip_args)
        self.schedule = schedule
        self._constructor: Callable[..., Optimizer] = optim_constructor
        self._has_fused = "fused" in inspect.signature(optim_constructor).parameters
        self.optimizer: Optimizer | None = None
        self._groups: dict[Tensor, dict[str, Any]] = {}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Make one step on ``params``, taking in those not seen before."""
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

    def get_state(self) -> dict[str, Any]:
        """State and options of each parameter, by name."""
        store = pyro.get_param_store()
        return {
            str(store.param_name(param)): {
                "state": {} if self.optimizer is None else dict(self.optimizer.state[param]),
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
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.schedule(steps)
            group["steps"] = steps + 1

    def _take_in(self, param: Tensor) -> None:
        options = dict(self._get_optim_args(param))
        if self._has_fused:
            options.setdefault("fused", True)
        if self.optimizer is None:
            self.optimizer = self._constructor([{"params": [param], **options}])
        else:
            _add(self.optimizer, param, options)
        self._groups[param] = next(
            group
            for group in self.optimizer.param_groups
            if any(param is member for member in group["params"])
        )
        self.grad_clip[param] = self._get_grad_clip(cast("str", param))  # Pyro's annotation is wrong
        self._restore(param)

    def _restore(self, param: Tensor) -> None:
        name = pyro.get_param_store().param_name(param)
        saved = self._state_waiting_to_be_consumed.pop(name, None)
        if saved is None or self.optimizer is None:
            return
        self.optimizer.state[param] = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in saved["state"].items()
        }
        self._groups[param].update(saved["options"])


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


def _add(optimizer: Optimizer, param: Tensor, options: dict[str, Any]) -> None:
    """Join the group with the same options, for one fused step; open a new one otherwise."""
    for group in optimizer.param_groups:
        base = {**group, "lr": group.get("initial_lr", group.get("lr"))}
        if all(base[key] == value for key, value in options.items()):
            group["params"].append(param)
            return
    optimizer.add_param_group({"params": [param], **options})
