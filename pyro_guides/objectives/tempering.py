r"""Scales the latents of guide and model alike, whatever guide, model and ELBO are.

What is optimized, then, is

.. math:: \mathbb E_q \log p(x \mid z) - \beta \, \mathbb E_q[\log q(z) - \log p(z)]

Score functions, which say how draws come about and are no terms of it, are not scaled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.escape_messenger import EscapeMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample

from pyro_guides.distributions.mixture import VectorStratum
from pyro_guides.distributions.sites import SiteDistribution
from pyro_guides.objectives.rows import is_delta

__all__ = ["Tempering", "Unweighed"]


class Unweighed(Messenger):
    """Runs of a guide whose log q is what is trained, not a part of a KL term: no weights concern them."""


class Tempering(Messenger):
    """Multiplies the scale of latents while it is open, and counts how often it was.

    Latents that the model alone has, such as those it enumerates, stay as they are.

    Args:
        only: the names of latents, or of plates for all latents inside; all latents if None.

    Attributes:
        step: how often it was closed.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        super().__init__()
        names = isinstance(only, Collection) and not isinstance(only, str)
        if only is not None and not (names and all(isinstance(name, str) for name in only)):
            raise TypeError(f"only must be a list of names of latents or plates, got {only!r}")
        self.step = 0
        self._only = None if only is None else frozenset(only)
        self._met: set[str] = set()
        self._has_auxiliary = False

    @abstractmethod
    def weight_of(self, msg: Any, name: str | None) -> float:
        """The weight of a latent.

        Args:
            msg: the latent.
            name: which of the given names selects it; None if none was given.
        """

    def state_dict(self) -> dict[str, float]:
        """All that changes, as numbers by name."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        if "step" not in state:
            raise ValueError(f"state must be what state_dict() returned, got {state!r}")
        self.step = int(state["step"])

    # --- what Pyro calls

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        if not self.concerns(msg):
            return
        weight = self._weight(msg)
        if weight != 0.0:
            msg["scale"] = msg["scale"] * weight
        elif self._replayed() or getattr(msg["fn"], "has_rsample", False):
            msg["mask"] = False  # zero times minus infinity would be NaN
        else:
            msg["scale"] = msg["scale"] * 0.0  # a mask would hide the score function, too

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.step += 1
        missing = (self._only or frozenset()) - self._met
        if error[0] is None and self._met and missing:
            raise ValueError(f"{sorted(missing)} are neither latents nor plates of any: {sorted(self._met)}")

    # --- which latents

    def concerns(self, msg: Any) -> bool:
        """Whether a site is a latent that the guide draws."""
        if msg["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg):
            return False
        if any(isinstance(handler, Unweighed) for handler in _PYRO_STACK):
            return False
        return not self._replayed() or self.is_in_model(msg)

    def is_in_model(self, msg: Any) -> bool:
        """Whether a latent is met in the model, at a value that the guide has drawn."""
        return any(msg["name"] in trace for trace in self._replayed())

    def _replayed(self) -> list[Trace]:
        """The runs whose draws a model is given; none in the guide."""
        at = _PYRO_STACK.index(self)
        return [
            handler.trace
            for outer, handler in pairwise(_PYRO_STACK[at:])
            if isinstance(handler, ReplayMessenger)
            and handler.trace is not None
            # One inside of an escape gives a guide its own draws: so sequential enumeration starts over.
            and not isinstance(outer, EscapeMessenger)
        ]

    def _weight(self, msg: Any) -> float:
        plates = [frame.name for frame in msg["cond_indep_stack"]]
        self._met |= {msg["name"], *plates}
        weight = self._weight_by_name(msg, msg["name"], plates)
        fn = msg["fn"]
        if self._only is not None and not self.is_in_model(msg):
            self._has_auxiliary |= bool(msg["infer"].get("is_auxiliary"))
            if self._has_auxiliary and weight != 1.0 and is_delta(fn):
                raise ValueError(
                    f"the guide draws '{msg['name']}' through an auxiliary site, of which names of latents "
                    "and plates say nothing; such a guide (an AutoNormal, for instance) takes one weight "
                    "for all latents"
                )
        if isinstance(fn, SiteDistribution):
            others = {other: self._weight_by_name(msg, other, plates) for other in fn.joint.bounds}
            if isinstance(fn.joint.distribution, VectorStratum):
                others["its component"] = self._weight_by_name(msg, "", plates)
            for other, its in others.items():
                if its != weight:
                    raise ValueError(
                        f"'{msg['name']}' is drawn jointly with '{other}', but one has the weight {weight} "
                        f"and the other {its}; name both, or their plate, or give them families of their "
                        f"own with family={{'{msg['name']}': ...}}"
                    )
        return weight

    def _weight_by_name(self, msg: Any, site: str, plates: list[str]) -> float:
        """The weight by the site's name, or else that of its innermost plate that has one."""
        if self._only is None:
            return self.weight_of(msg, None)
        for name in (site, *reversed(plates)):
            if name in self._only:
                return self.weight_of(msg, name)
        return 1.0
