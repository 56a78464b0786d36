"""What a model of the gallery comes with, and the autoguide that it is compared with."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_median

from pyro_guides import AmortizedGuide

__all__ = ["Data", "Example", "mean_field", "mean_field_given_sums_over"]

Model = Callable[..., Any]
Arguments = tuple[Any, ...]


class Data(NamedTuple):
    """The model's arguments: training batches, taken in turns, and rows that training never sees."""

    batches: tuple[Arguments, ...]
    held_out: Arguments
    rows: int
    held_out_rows: int


@dataclass(frozen=True)
class Example:
    """A model, its data, and its guide.

    Attributes:
        name: what kind of model it is.
        model: makes the model, with new weights if it has networks.
        guide: the user's lines.
        data: loads the data.
        row: what the bound is counted per.
        steps: how many steps of training.
        elbo: makes the ELBO.
        autoguide: from the model to the model and the autoguide to compare with; or why there is none.
        shared: latents outside the rows, which held-out rows take as training left them.
        note: what the model shows.
    """

    name: str
    model: Callable[[], Model]
    guide: Callable[[Model], AmortizedGuide]
    data: Callable[[], Data]
    row: str
    steps: int
    autoguide: Callable[[Model], tuple[Model, Any]] | str
    elbo: Callable[[], Any] = Trace_ELBO
    shared: tuple[str, ...] = ()
    note: str = ""

    @property
    def lines(self) -> str:
        """The user's lines: the body of ``guide``."""
        body = inspect.getsource(self.guide).split("\n", 1)[1]
        before, _, result = textwrap.dedent(body).strip().rpartition("return ")
        return f"{before}guide = {result}"


def mean_field(model: Model) -> tuple[Model, AutoNormal]:
    """The model as it is, and a normal of its own for every latent."""
    return model, AutoNormal(model)


def mean_field_given_sums_over(
    *names: str, start: Callable[[], Callable[..., Any]] = lambda: init_to_median
) -> Callable[[Model], tuple[Model, AutoNormal]]:
    """The same with discrete latents summed out in the model, exactly: no q of their own could be better."""

    def build(model: Model) -> tuple[Model, AutoNormal]:
        summed = config_enumerate(model)
        return summed, AutoNormal(poutine.block(summed, hide=list(names)), init_loc_fn=start())

    return build
