"""The tensors that training changes: parameters, and what modules remember besides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

__all__ = ["Weights"]

_BASELINES = "__baseline_avg_"  # running means that TraceGraph_ELBO keeps in Pyro's store
_LATE = re.compile(r"late\[(\w+)\]\.(.+)", re.DOTALL)


@final
class Weights:
    """The parameters of guide and model by name, and the buffers of both.

    Those of modules carry the module's name for them; those that a function makes with ``pyro.param`` or
    ``pyro.module`` carry the name in Pyro's store, and, if they came to be during training, the name of
    their constraint, so that they can be made again. All are unconstrained.

    Args:
        model: the model.
        guide: the guide, set up.
        run: evaluates the loss once, so that all parameters are met.

    Raises:
        ValueError: there is nothing to train.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], run: Callable[[], Any]) -> None:
        self.modules = {"guide": guide, "model": model}
        self.parameters: dict[str, Tensor] = {}
        self._stored = -1
        self._first: set[str] | None = None
        self.find(run)
        if not self.parameters:
            raise ValueError(
                "nothing to train: neither guide nor model has a parameter that requires a gradient; a "
                "function's networks are found if it registers them with pyro.module(...)"
            )
        self._first = set(self.parameters)

    def find(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """Take in parameters that were not there before; returns them."""
        with poutine.trace(param_only=True) as capture:
            run()
        known = {id(tensor) for tensor in self.parameters.values()}
        new = {}
        for name, tensor in [*self._of_modules(), *self._captured(capture.trace)]:
            if tensor.requires_grad and id(tensor) not in known:
                known.add(id(tensor))
                new[name] = tensor
        self.parameters.update(new)
        self._stored = len(pyro.get_param_store())
        return new

    @property
    def outgrown(self) -> bool:
        """Whether Pyro's store has got parameters since the last search."""
        return len(pyro.get_param_store()) != self._stored

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What modules remember that is no parameter: statistics of inputs, say."""
        owners = {label: getattr(function, "__self__", function) for label, function in self.modules.items()}
        return {
            f"{label}.{name}": buffer
            for label, module in owners.items()
            if isinstance(module, nn.Module)
            for name, buffer in module.named_buffers()
        }

    @property
    def baselines(self) -> dict[str, Tensor]:
        """What an ELBO of Pyro remembers in Pyro's store."""
        store = pyro.get_param_store()
        names = [name for name in store if name.startswith(_BASELINES)]
        return {name: detach_provenance(store[name].detach()) for name in names}

    def state(self) -> dict[str, Tensor]:
        """A copy of all values."""
        return {name: tensor.detach().clone() for name, tensor in {**self.parameters, **self.buffers}.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take on values from :meth:`state`, in place.

        Parameters that came later than the state stay as they are; those that have yet to come are made.

        Raises:
            ValueError: they belong to other parameters.
        """
        for name in state.keys() - self.parameters.keys():
            self._make(name, state[name])
        own = {**self.parameters, **self.buffers}
        late = self.parameters.keys() - (self._first or set())
        shapes = {name: tuple(own[name].shape) for name in own if name in state or name not in late}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes != given:
            different = sorted(
                name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)
            )
            raise ValueError(
                f"the saved parameters are not those of this model and guide: {different[:5]} differ in name "
                "or shape; resume with the same model, guide, family and encoder, or start anew elsewhere"
            )
        for name in shapes:
            own[name].copy_(state[name])

    def load_baselines(self, state: Mapping[str, Tensor]) -> None:
        """Take on :attr:`baselines`."""
        for name, value in state.items():
            pyro.get_param_store()[name] = value.clone()
        self._stored = len(pyro.get_param_store())

    def _make(self, name: str, value: Tensor) -> None:
        """Put a parameter into Pyro's store that a run came to have in its course."""
        if (match := _LATE.fullmatch(name)) and (constraint := _named_constraints().get(match[1])):
            store = pyro.get_param_store()
            device = next(iter(self.parameters.values())).device
            store.setdefault(match[2], transform_to(constraint)(value.to(device)), constraint)
            made: Any = store[match[2]]
            self.parameters[name] = made.unconstrained()
            self._stored = len(store)

    def _of_modules(self) -> Iterator[tuple[str, Tensor]]:
        for label, module in self.modules.items():
            if isinstance(module, nn.Module):
                yield from ((f"{label}.{name}", tensor) for name, tensor in module.named_parameters())

    def _captured(self, trace: poutine.Trace) -> Iterator[tuple[str, Tensor]]:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                value: Any = site["value"]
                label = "store" if self._first is None else f"late[{_constraint_of(name)}]"
                yield f"{label}.{name}", value.unconstrained()


def _constraint_of(name: str) -> str:
    constraint = pyro.get_param_store()._constraints[name]  # its get_state() takes parameters apart
    return next((label for label, other in _named_constraints().items() if other is constraint), "unknown")


def _named_constraints() -> dict[str, Constraint]:
    return {name: value for name, value in vars(constraints).items() if isinstance(value, Constraint)}
