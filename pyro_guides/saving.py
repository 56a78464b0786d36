"""Guides in files: everything about q, nothing of the model, and no code of the user's.

The user's own encoders are written as their states and the user's functions as their names; both are asked
for when the guide is loaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from pyro.infer.autoguide import init_to_median
from torch import nn

from pyro_guides.network import Network
from pyro_guides.planning import Plan
from pyro_guides.storage import UnreadableFileError, is_writable, objects
from pyro_guides.structure import Memory

__all__ = ["Contents", "load", "save"]

_KIND = "guide"
_INSTEAD = (
    "Instead of guide.save(path), keep guide.state_dict(), and load it into a guide that is set up alike"
)


@final
@dataclass(frozen=True, eq=False)
class ModuleState:
    """What is written of a module whose class is the user's.

    Attributes:
        state: its ``state_dict()``.
        trainable: which of its parameters require a gradient.
        training: whether it is in training mode.
    """

    state: Mapping[str, Any]
    trainable: Mapping[str, bool]
    training: bool


@final
@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds of a guide.

    Attributes:
        network: its trainable part.
        plan: what the user asked for.
        memory: what it knows of its model.
        create_plates: the user's function of that name.
        start: what tells whether parameters have moved.
        training: whether it is in training mode.
        states: the states of the user's own modules, by the argument that each was given as.
    """

    network: Network
    plan: Plan
    memory: Memory
    create_plates: Callable[..., Any] | None
    start: float
    training: bool
    states: Mapping[str, ModuleState] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """Whether everything is of its kind: nobody knows who wrote a file."""
        parts = (self.network, Network), (self.plan, Plan), (self.memory, Memory), (self.states, dict)
        return all(isinstance(part, kind) for part, kind in parts)


def save(path: Any, contents: Contents) -> None:
    """Write a guide to a file.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
        TypeError: the guide holds something that no file can hold, and that :func:`load` cannot ask for.
        ValueError: modules lie too deep within each other.
    """
    _check_path(path)
    plan = _plain(contents.plan)
    given = _by_slot(plan.encoder, plan.inputs, contents.create_plates)
    external = {slot: value for slot, value in given.items() if not is_writable(value)}
    states = {slot: _state(value) for slot, value in external.items() if isinstance(value, nn.Module)}
    contents = replace(contents, plan=plan, memory=contents.memory.without_structures(), states=states)
    try:
        objects.save(path, contents, _KIND, external)
    except TypeError as error:
        raise TypeError(f"{error}. {_INSTEAD}") from error


def load(path: Any, encoder: Any, inputs: Any, create_plates: Any, device: torch.device | str) -> Contents:
    """Read a guide from a file; see :meth:`pyro_guides.AmortizedGuide.load`."""
    _check_path(path)
    given = _by_slot(encoder, inputs, create_plates)
    contents = objects.load(path, _KIND, lambda needed: _matched(path, needed, given), device=device)
    if not isinstance(contents, Contents) or not contents.valid:
        raise UnreadableFileError(path, "does not hold what makes up a guide")
    for slot, state in contents.states.items():
        _restore(given.get(slot), state, slot, path, device)
    return contents


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must name a file, got {path!r}")


def _plain(plan: Plan) -> Plan:
    """The same plan in dicts and lists, and without the function that says where q starts."""
    return replace(
        plan,
        encoder=dict(plan.encoder) if isinstance(plan.encoder, Mapping) else plan.encoder,
        family=dict(plan.family) if isinstance(plan.family, Mapping) else plan.family,
        inputs=dict(plan.inputs) if isinstance(plan.inputs, Mapping) else plan.inputs,
        amortize=None if plan.amortize is None else sorted(plan.amortize),
        order=None if plan.order is None else list(plan.order),
        given=None if plan.given is None else {name: sorted(seen) for name, seen in plan.given.items()},
        init_loc_fn=init_to_median,  # where q started is of no use any more
    )


def _by_slot(encoder: Any, inputs: Any, create_plates: Any) -> dict[str, Any]:
    """What may be the user's own, by what error messages call it."""
    slots: dict[str, Any] = {}
    for name, choice in (("encoder", encoder), ("inputs", inputs), ("create_plates", create_plates)):
        if isinstance(choice, Mapping):
            slots |= {f"{name}[{key!r}]": value for key, value in choice.items()}
        elif choice is not None:
            slots[name] = choice
    return slots


def _matched(path: Any, needed: Mapping[str, str], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was given, if it is what is needed.

    Raises:
        TypeError: something is missing, superfluous, or no module or function.
    """
    for slot, value in given.items():
        if slot.startswith("encoder") and not isinstance(value, nn.Module):
            raise TypeError(f"{slot} must be a torch.nn.Module, got {value!r}")
        if not callable(value):
            raise TypeError(f"{slot} must be a function of the model's arguments, got {value!r}")
    if missing := [f"{slot} ({what})" for slot, what in needed.items() if slot not in given]:
        raise TypeError(
            f"{path} holds no code, and this guide was made with code of your own: give load() the same "
            f"arguments again, which are missing: {', '.join(missing)}"
        )
    if superfluous := [slot for slot in given if slot not in needed]:
        asked = f"asks for {', '.join(needed)} only" if needed else "holds all that it needs"
        raise TypeError(f"load() got {', '.join(superfluous)}, but {path} {asked}; leave it out")
    return given


# --- the user's own modules


def _state(module: nn.Module) -> ModuleState:
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    return ModuleState(dict(module.state_dict()), trainable, module.training)


def _restore(module: Any, saved: ModuleState, slot: str, path: Any, device: torch.device | str) -> None:
    """Give a module of the user's the state that it had.

    Raises:
        TypeError: it is no module.
        ValueError: the state does not fit; the module is unchanged, then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{slot} must be a torch.nn.Module, as it was when {path} was saved, got {module!r}")
    for target in (copy.deepcopy(module), module):  # a rehearsal first
        target.to(device)
        _fill(target, saved, slot, path)


def _fill(module: nn.Module, saved: ModuleState, slot: str, path: Any) -> None:
    try:
        module.load_state_dict(dict(saved.state))
    except RuntimeError as error:
        raise ValueError(f"{slot} is not the module whose state {path} holds: {error}") from error
    now = module.state_dict()
    for name, value in saved.state.items():
        if isinstance(value, torch.Tensor) and now[name].dtype != value.dtype:
            raise ValueError(
                f"{slot} has {now[name].dtype} in '{name}', but {path} holds {value.dtype}; convert it with "
                f".to({value.dtype})"
            )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(saved.trainable.get(name, parameter.requires_grad))
    module.train(saved.training)
