"""Names of parameters in Pyro's global store.

The store is keyed by name and keeps the first tensor it sees; a second guide of the same name would train
the first one's parameters and leave its own untouched, without a word. So every guide gets a name that no
other guide of the process has had, copies and loaded guides included.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pyro
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import nn
from torch.distributions import constraints

__all__ = ["announce", "unique_name"]

_taken: set[str] = set()


def unique_name(name: str | None = None, *, stem: str = "AmortizedGuide") -> str:
    """``name`` if the caller insists on one; otherwise the next free name made from ``stem``."""
    if name is None:
        candidates = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in _taken)
    _taken.add(name)
    return name


def announce(name: str, module: nn.Module) -> None:
    """Tell the handlers outside (an SVI, above all) which parameters this call uses.

    Raises:
        RuntimeError: Pyro's store holds other parameters under these names.
    """
    local = pyro.settings.get("module_local_params")
    for parameter_name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        full_name = param_with_module_name(name, parameter_name)
        if local:
            _announce_local(full_name, parameter)
        elif pyro.param(full_name, parameter)._cdata != parameter._cdata:
            raise RuntimeError(
                f"Pyro's parameter store holds another tensor under '{full_name}', so this guide would "
                "not train: give the guide another name=, or call pyro.clear_param_store() first"
            )


def _announce_local(full_name: str, parameter: nn.Parameter) -> None:
    # SVI asks every value for the leaf behind it; a view answers without touching the leaf itself.
    view: Any = parameter.detach()
    view.unconstrained = weakref.ref(parameter)
    statement = effectful(type="param")(lambda *_, **__: view)
    statement(full_name, parameter, constraint=constraints.real, name=full_name)
