"""The trainable part of a guide: encoders, heads and families, and what each group gets of them.

Nothing here knows Pyro's handlers: a :class:`Network` maps inputs and upstream values to q(u; λ).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from pyro_guides.conditional import Conditional
from pyro_guides.distributions import Alphabet, ControlVariate
from pyro_guides.encoders import Standardize
from pyro_guides.families import BoundFamily, Family
from pyro_guides.groups import Group
from pyro_guides.heads import Head, held_fixed
from pyro_guides.inputs import Source
from pyro_guides.structure import Structure

__all__ = ["Network", "Part", "encode"]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """What one group of latents was given when the guide was set up.

    Attributes:
        group: the latents.
        upstream: the groups, by position, whose values λ depends on.
        source: where the encoder's inputs come from; None if λ is learned.
        encoder: which encoder reads them, by position.
        family: the family the user chose.
        alphabet: the values of a discrete latent.
        local: dimensions of the plates over which elements share no cost.
    """

    group: Group
    upstream: tuple[int, ...]
    source: Source | None
    encoder: int | None
    family: Family
    alphabet: Alphabet | None
    local: tuple[int, ...]


@final
class Network(nn.Module):
    """Encoders, one head and one bound family per group.

    Args:
        parts: what each group gets.
        encoders: the encoders.
        depth: how many dimensions the model's plates take.
    """

    def __init__(self, parts: Sequence[Part], encoders: Sequence[nn.Module], depth: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.depth = depth
        self.encoders = nn.ModuleList(encoders)
        self.heads = nn.ModuleList()
        self.families = nn.ModuleList()
        # For groups with a score function, by position: its control, and the head that predicts costs.
        self.controls = nn.ModuleDict()
        self.predictors = nn.ModuleDict()

    def head(self, index: int) -> Head:
        """Where λ of one group comes from."""
        return cast("Head", self.heads[index])

    def family(self, index: int) -> BoundFamily:
        """The family of one group."""
        return cast("BoundFamily", self.families[index])

    def check_learned(self, structure: Structure) -> None:
        """Raise a ValueError if a group learned per element meets other elements than it knows."""
        for index, part in enumerate(self.parts):
            expected = self.head(index).learned_shape
            if expected is None:
                continue
            got = tuple(structure.batch_shape(part.group.plates, full=True))
            if expected != got:
                raise ValueError(
                    f"{part.group} are learned per element of the plates {list(part.group.plates)}: the "
                    f"guide was set up with shape {expected}, this call has {got}. Amortize them (pass "
                    "an encoder's input as a float argument, or inputs=...) to serve other rows"
                )

    def conditional(
        self,
        index: int,
        context: Tensor | None,
        upstream: Tensor | None,
        indices: Mapping[str, Tensor],
    ) -> Conditional:
        """What one group's q depends on, given its context and upstream values."""
        inputs = (upstream, indices) if context is None else (context, upstream, indices)
        parameters, twin = self._lambda_and_twin(index, inputs, has_upstream=upstream is not None)
        key, prediction = str(index), None
        if key in self.predictors and torch.is_grad_enabled():
            blind = (x.detach() if isinstance(x, Tensor) else x for x in inputs)  # to what it could teach
            prediction = self.predictors[key](*blind).squeeze(-1)
        control = cast("ControlVariate", self.controls[key]) if key in self.controls else None
        bounds = self.parts[index].group.bounds
        return Conditional(self.family(index), bounds, parameters, twin, control, prediction)

    def _lambda_and_twin(
        self, index: int, inputs: tuple[Any, ...], *, has_upstream: bool
    ) -> tuple[Tensor, Tensor | None]:
        """λ of one group, and a twin whose only gradient path is the one through upstream values.

        The twin is None where there is nothing upstream, or no gradient to take.
        """
        head = self.heads[index]
        parameters: Tensor = head(*inputs)
        if not has_upstream or self.parts[index].group.discrete or not torch.is_grad_enabled():
            return parameters, None
        if torch._C._get_tracing_state():  # functional calls cannot be traced: the ordinary estimator, then
            return parameters, parameters
        fixed = inputs if len(inputs) == 2 else (inputs[0].detach(), *inputs[1:])
        return parameters, held_fixed(head, *fixed)


def encode(
    encoder: nn.Module,
    source: Source,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    *,
    simulated: bool = False,
) -> Tensor:
    """One pass of an encoder over this call's inputs: context ``(*batch, C)``, laid out as the plates.

    Encoders see rows ``(B, *features)`` whatever the plates are, or one data set as it is.

    Raises:
        TypeError: the encoder returns no floating-point tensor.
        ValueError: its context has another number of rows, or is not finite.
    """
    plates = [structure.plates[name] for name in source.plates]
    missing = partial(declares_missing, encoder)
    x = source.rows(args, kwargs, plates, indices, missing=missing, simulated=simulated)
    batch = x.shape[: x.dim() - len(source.feature_shape)]
    context = encoder(source.as_rows(x) if batch else x)
    _check_context(context, batch.numel() if batch else None, encoder)
    if not batch:
        return context
    if len(batch) == len(plates):
        batch = structure.batch_shape(source.plates)
    return context.reshape(*batch, context.shape[-1])


def declares_missing(encoder: nn.Module) -> bool:
    """Whether the encoder, or a ``Standardize`` in it, takes NaN for a missing value."""
    own = getattr(encoder, "missing", False)
    return bool(own) or any(isinstance(m, Standardize) and m.missing for m in encoder.modules())


def _check_context(context: Any, rows: int | None, encoder: nn.Module) -> None:
    name = type(encoder).__name__
    expected = "(C,), one for the whole data set" if rows is None else f"({rows}, C), one per row"
    if not isinstance(context, Tensor) or not context.is_floating_point():
        got = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(
            f"encoder {name} returned {got}, expected one float tensor of shape {expected}; wrap it in "
            "a module that returns the tensor to condition on"
        )
    if context.dim() != (1 if rows is None else 2) or (rows is not None and len(context) != rows):
        raise ValueError(
            f"encoder {name} returned contexts of shape {tuple(context.shape)}, expected {expected}"
        )
    # A sum settles it, unless it overflows itself.
    if not math.isfinite(context.detach().sum().item()) and not bool(context.isfinite().all()):
        raise ValueError(
            f"encoder {name} returned NaN or infinite values for finite inputs; its weights may have "
            "diverged: lower the learning rate or clip gradients"
        )
