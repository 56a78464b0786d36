"""Another start for the same guide: weights drawn anew, and q where a draw of the prior lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor, nn

from pyro_guides.families import BoundFamily
from pyro_guides.groups import Group
from pyro_guides.guide import AmortizedGuide
from pyro_guides.heads import AmortizedHead, Head, WhitenedHead
from pyro_guides.structure import Structure, read
from pyro_guides.training.data import Arguments
from pyro_guides.turns import take_turns

__all__ = ["scatter"]

_DRAWS = 64  # to find where a q without closed moments lies


@torch.no_grad()
def scatter(model: Callable[..., Any], guide: Callable[..., Any], batch: Arguments) -> None:
    """Move guide and model to another start, in place.

    Modules' layers are drawn anew where they know how (``reset_parameters``), of the model only if it is a
    module; each continuous group of an :class:`~pyro_guides.AmortizedGuide` is centred on a draw of the
    prior, with the spread that it had. Nothing else is touched.

    Args:
        model: the model.
        guide: the guide, set up and not trained.
        batch: what to read the model with.
    """
    if isinstance(model, nn.Module):
        _draw_anew(model)
    if not isinstance(guide, AmortizedGuide):
        if isinstance(guide, nn.Module):
            _draw_anew(guide)
        return
    _draw_anew(guide.network.encoders)
    structure = read(model, batch.args, batch.kwargs, init=init_to_sample)
    turns = take_turns([part.group for part in guide.network.parts], structure)
    for index, part in enumerate(guide.network.parts):
        group = next((turn.group for turn in turns if turn.part == index), None)
        if group is not None and not part.group.discrete:
            _centre(guide.network.head(index), guide.network.family(index), _draw(group, structure))


def _draw_anew(module: nn.Module) -> None:
    for layer in module.modules():
        reset: Any = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()


def _draw(group: Group, structure: Structure) -> Tensor:
    """A draw of a group's unconstrained values from the prior, ``(*batch, D)``."""
    batch = structure.batch_shape(group.plates)
    parts = []
    for name in group.sites:
        latent = structure.latents[name]
        u = latent.unconstrain(structure.values[name])
        parts.append(u.reshape(u.shape[-1 - len(batch) :]).expand(*batch, latent.size))
    return torch.cat(parts, dim=-1)


def _centre(head: Head, family: BoundFamily, u: Tensor) -> None:
    """Move all λ of a head so that q lies around u, for one element of the plates if λ is amortized."""
    if isinstance(head, WhitenedHead):
        offset = u - head.loc
        diagonal = head.scale.dim() == head.loc.dim()
        u = offset / head.scale if diagonal else _solved(head.scale, offset)
        head = head.inner
    bias: Tensor | None = head.output.bias if isinstance(head, AmortizedHead) else getattr(head, "bias", None)
    if bias is None or family.closed_under is None:
        return
    if isinstance(head, AmortizedHead):
        u = u.reshape(-1, u.shape[-1])[0]
    now = family(bias).sample((_DRAWS,)).mean(0)
    if now.shape == u.shape:
        bias.copy_(family.moving(bias, u - now, torch.ones_like(now)))


def _solved(scale: Tensor, offset: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(scale, offset.unsqueeze(-1), upper=False).squeeze(-1)
