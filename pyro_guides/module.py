"""What a guide is as a module: its model is no part of it, and copies are guides of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self, cast

from pyro.infer.autoguide import AutoGuide, init_to_median
from torch import nn

from pyro_guides.naming import unique_name
from pyro_guides.network import Network
from pyro_guides.planning import Plan
from pyro_guides.structure import Memory
from pyro_guides.structure.memory import require

__all__ = ["GuideModule"]


class GuideModule(AutoGuide):
    """A module whose parameters exist once it is set up.

    Args:
        model: the model, which is no submodule even if it is a module.
        plan: what the user asked for.
        create_plates: as in Pyro's autoguides.
        name: the prefix of the parameters' names; a new one if None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        plan: Plan,
        create_plates: Callable[..., Any] | None,
        name: str | None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._plan = plan
        self._store_name = unique_name(name)
        self._memory: Memory | None = None
        self._start = 0.0  # what tells whether parameters have moved

    @property
    def network(self) -> Network:
        """The trainable part of the guide, once it is set up."""
        network = self._modules.get("network")
        if network is None:
            raise RuntimeError(
                "the guide has no parameters yet: call guide.setup(*args) with the model's arguments "
                "(or the guide itself) first"
            )
        return cast("Network", network)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What ``to``, ``double`` and the like do: inputs are expected where the guide goes."""
        super()._apply(fn, recurse)
        if self.is_set_up:
            sources = {encoding.source for part in self.network.parts for encoding in part.encodings}
            for source in sources:
                source.follow(fn)
        return self

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has read its model and built its parameters."""
        return "network" in self._modules

    @property
    def is_trained(self) -> bool:
        """Whether parameters have moved since the guide was set up."""
        return self.network.fingerprint() != self._start

    @property
    def model(self) -> Callable[..., Any]:
        """The model; a guide that was unpickled needs it set again."""
        return require(self._known_model)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # not a submodule, even if it is a module
            object.__setattr__(self, "_model", (value,))
        else:
            super().__setattr__(name, value)

    @property
    def _known_model(self) -> Callable[..., Any] | None:
        return self._model[0] if self._model else None

    def _require_memory(self) -> Memory:
        _ = self.network  # says what to do if the guide is not set up
        return cast("Memory", self._memory)

    def _take(self, network: Network, memory: Memory, start: float) -> None:
        """Be set up with these."""
        self._memory = memory
        self._modules["network"] = network
        self._start = start

    def replace_network(self, network: Network) -> None:
        """Go on with another network, whose parameters get names of their own in Pyro's store."""
        self._modules["network"] = network if self.training else network.eval()
        object.__setattr__(self, "_store_name", unique_name())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; before :meth:`setup` there are none, and asking is a mistake.

        Raises:
            RuntimeError: the guide is not set up, so that an optimizer would miss its parameters.
        """
        _ = self.network
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, once the guide is set up."""
        _ = self.network
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As any module's, once the guide is set up."""
        _ = self.network
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, which may not be picklable, and without its list."""
        for parameter in super().parameters() if self.is_set_up else ():
            # Pyro's store hangs a weak reference on every tensor it hands out, anew at each access.
            vars(parameter).pop("unconstrained", None)
        # Where q started is of no use any more, and may be a function that cannot be pickled.
        plan = replace(self._plan, init_loc_fn=init_to_median) if self.is_set_up else self._plan
        return {**self.__dict__, "_model": None, "master": None, "_plan": plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "_store_name", unique_name())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A guide of the same model with parameters of its own, under a name of its own."""
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        object.__setattr__(clone, "_model", self._model)
        return clone
