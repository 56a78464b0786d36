"""Runs a model unseen and describes what it met.

A model is an ordinary function, so the only way to know its sites is to run it. When nothing that was met
can change between calls with arguments of the same signature, the structure is *static* and may be kept;
otherwise it is read again at every call, up to the last latent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, final

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import Independent

from pyro_guides.distributions.discrete import LARGEST_COUNT, alphabet
from pyro_guides.distributions.transforms import bijection
from pyro_guides.structure.changes import EscapeDetector, outer_dims
from pyro_guides.structure.description import Latent, Observed, Plate, Structure
from pyro_guides.structure.values import Init, feasible_value, started

__all__ = ["is_left_to_model", "mask_inside", "random_subset", "read"]

Model = Callable[..., Any]


def read(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    given: Mapping[str, Tensor] | None = None,
    indices: Mapping[str, Tensor] | None = None,
    init: Init | None = None,
    until: Collection[str] | None = None,
    known: Callable[[str], bool] = lambda name: False,
    once: bool = False,
) -> Structure:
    """Run the model unseen by any outer handler and describe it.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        given: values for some latents, instead of feasible ones.
        indices: the elements that some subsampled plates take, instead of random ones.
        init: where the other latents' values come from, as Pyro's ``init_loc_fn``.
        until: stop as soon as all these sites were met; run to the end if None.
        known: whether a site is a latent in other calls, and so to be described if it is observed.
        once: whether the structure is for this call only; to find out whether it may be kept costs time.

    Raises:
        ValueError: a site has a support without bijection, batch dimensions without a plate, or a
            name that occurs twice; a batch is empty or longer than its plate.
        NotImplementedError: a latent lies in a sequential plate.
    """
    escapes = EscapeDetector()
    reader = _Reader(
        given or {}, indices or {}, init or feasible_value, until, known, _arguments(args, kwargs), escapes
    )
    # What depends on given values depends on them with its gradient.
    kept = until is None and not given and not once
    watching = escapes.watching() if kept else nullcontext()
    gradients = torch.set_grad_enabled(torch.is_grad_enabled() and bool(given))
    try:
        # Validation turns tensors into booleans all the time, and the real run does it anyway.
        with gradients, pyro.validation_enabled(False), poutine.block(), watching, reader:
            model(*args, **kwargs)
    except _AllRead:
        pass
    return reader.structure(static=kept and not escapes.found)


def random_subset(size: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """``count`` different numbers below ``size`` in random order, at a cost that ignores ``size``.

    Repeats among a few too many draws are dropped, which leaves a draw without replacement.

    Example:
        >>> sorted(random_subset(3, 3).tolist())
        [0, 1, 2]
    """
    if 4 * count > size:
        return torch.randperm(size, device=device)[:count].clone()
    drawn = torch.randint(size, (count + 16,), device=device)
    while True:
        order = drawn.argsort(stable=True)
        ordered = drawn[order]
        fresh = torch.ones_like(drawn, dtype=torch.bool)
        fresh[order[1:]] = ordered[1:] != ordered[:-1]
        drawn = drawn[fresh]
        if len(drawn) >= count:
            return drawn[:count].clone()
        drawn = torch.cat([drawn, torch.randint(size, (count,), device=device)])


class _AllRead(BaseException):
    """Leaves the model behind the last latent; no model's ``except Exception`` may stop it."""


@final
class _Reader(Messenger):
    """Collects the sites of one run; the outermost handler, so that it sees them finished."""

    def __init__(
        self,
        given: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        init: Init,
        until: Collection[str] | None,
        known: Callable[[str], bool],
        arguments: Mapping[int | str, Any],
        escapes: EscapeDetector,
    ) -> None:
        super().__init__()
        self.escapes = escapes
        self.given = given
        self.indices = dict(indices)
        self.weighted = False  # whether a handler scales or masks latents, if only by one for now
        self.chosen: set[str] = set()  # plates whose elements the model itself names
        self.init = init
        self.waiting = None if until is None else set(until)
        self.known = known
        self.arguments = arguments
        self.latents: dict[str, Latent] = {}
        self.observed: dict[str, Observed] = {}
        self.plates: dict[str, Plate] = {}
        self.values: dict[str, Tensor] = {}

    def structure(self, *, static: bool) -> Structure:
        fixed = all(latent.fixed for latent in self.latents.values())
        fixed = fixed and all(site.value is None for site in self.observed.values())
        return Structure(
            self.latents,
            self.plates,
            self.observed,
            self.values,
            static and fixed and not self.weighted and not self.chosen,
        )

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _is_subsample(msg):
            self._note_subsample(msg)
        elif not msg["is_observed"] and msg["value"] is None and not is_left_to_model(msg):
            _check_support(msg)
            value = self.given.get(msg["name"])
            if value is None:
                init = feasible_value if msg["fn"].support.is_discrete else self.init
                value = self.escapes.ignoring(started, init, msg)
            msg["value"] = value

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if _is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name = msg["name"]
        if name in self.latents or name in self.observed:
            raise ValueError(f"the model has two sites named '{name}'; give every pyro.sample its own name")
        if not msg["is_observed"] and is_left_to_model(msg):
            return
        plates = tuple(plate.name for plate in self._note_plates(msg))
        if msg["is_observed"]:
            self.observed[name] = self._describe_observed(msg, plates)
        else:
            self.weighted = self.weighted or self._is_weighted()
            self.latents[name] = self._describe(msg, plates)
            self.values[name] = msg["value"]
        if self.waiting is not None:
            self.waiting.discard(name)
            if not self.waiting:
                raise _AllRead

    def _describe(self, msg: dict[str, Any], plates: tuple[str, ...]) -> Latent:
        latent: Latent = self.escapes.ignoring(_describe, msg, plates, [self.plates[name] for name in plates])
        return latent

    def _describe_observed(self, msg: dict[str, Any], plates: tuple[str, ...]) -> Observed:
        name, value = msg["name"], msg["value"]
        argument = self._argument(value)
        latent = self._describe(msg, plates) if self.known(name) else None
        kept = value if latent is not None and argument is None else None
        mask, *_ = _masks(msg)
        return Observed(name, plates, argument, msg["fn"].event_dim, mask, latent, kept)

    def _is_weighted(self) -> bool:
        inside = _PYRO_STACK[_PYRO_STACK.index(self) + 1 :]
        return any(isinstance(handler, (ScaleMessenger, MaskMessenger)) for handler in inside)

    def _note_subsample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if fn.subsample_size is not None and fn.subsample_size > fn.size:
            raise ValueError(
                f"plate '{msg['name']}' has size {fn.size}, but its batch has {fn.subsample_size} "
                "rows; the plate's size is the number of rows of the whole data set"
            )
        name, size, batch = msg["name"], fn.size, fn.subsample_size
        if size == 0 or batch == 0:
            raise ValueError(f"plate '{name}' has size 0: the batch is empty; pass at least one row")
        if msg["value"] is not None:
            self.chosen.add(name)
            self.indices[name] = torch.as_tensor(msg["value"])
        elif batch is not None and batch < size:
            if name not in self.indices:
                self.indices[name] = self.escapes.ignoring(random_subset, size, batch, fn.device)
            msg["value"] = self.indices[name]

    def _note_plates(self, msg: dict[str, Any]) -> list[Plate]:
        batch_shape = msg["fn"].batch_shape
        plates = []
        for frame in msg["cond_indep_stack"]:
            if not frame.vectorized:
                _refuse_sequential(msg, frame)
                continue
            size = frame.full_size if frame.full_size is not None else frame.size
            in_shape = -frame.dim <= len(batch_shape)
            batch = frame.size if size != -1 else (batch_shape[frame.dim] if in_shape else 1)
            name = frame.name
            chosen = name in self.chosen
            plate = Plate(name, frame.dim, size, batch, self.indices.get(name), chosen)
            plates.append(plate)
            self.plates[frame.name] = plate
        return sorted(plates, key=lambda plate: plate.dim)

    def _argument(self, value: Any) -> int | str | None:
        return next((key for key, argument in self.arguments.items() if argument is value), None)


def _describe(msg: dict[str, Any], names: tuple[str, ...], plates: list[Plate]) -> Latent:
    fn = msg["fn"]
    _check_batch_shape(msg, plates)
    values, transform = alphabet(fn), None
    if values is None:
        transform = bijection(fn.support)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :]
    else:
        shape = values.shape
    scale = msg["scale"]
    for plate in plates:
        scale = scale / plate.scale
    mask, inner_mask, inner_mask_dim = _masks(msg)
    return Latent(
        name=msg["name"],
        plates=names,
        support=fn.support,
        transform=transform,
        alphabet=values,
        event_shape=fn.event_shape,
        unconstrained_shape=torch.Size(shape),
        mask=mask,
        inner_mask=inner_mask,
        inner_mask_dim=inner_mask_dim,
        scale=1.0 if not isinstance(scale, Tensor) and abs(scale - 1.0) < 1e-9 else scale,
    )


def _masks(msg: dict[str, Any]) -> tuple[Any, Tensor | None, int]:
    """The mask of whole elements, the one below ``to_event``, and its number of event dimensions."""
    mask = None if msg["mask"] is True else msg["mask"]
    inner, event_dim = mask_inside(msg["fn"])
    if inner is None or event_dim:
        return mask, inner, event_dim
    return (inner if mask is None else inner & mask), None, 0  # masks whole elements, like poutine.mask


def mask_inside(fn: Any) -> tuple[Tensor | None, int]:
    """The masks between ``to_event`` calls, as one, and how many of its dimensions are the event's."""
    event_dim = 0  # dimensions that to_event calls above the present level have made event dimensions
    mask, mask_event_dim = None, 0
    while isinstance(fn, (Independent, MaskedDistribution)):
        if isinstance(fn, Independent):
            event_dim += fn.reinterpreted_batch_ndims
        elif fn._mask is not True:
            own = torch.as_tensor(fn._mask).expand(fn.batch_shape)
            if mask is not None:  # an outer mask covers all of the inner dimensions
                own = own & mask.reshape(mask.shape + (1,) * (event_dim - mask_event_dim))
            mask, mask_event_dim = own, event_dim
        fn = fn.base_dist
    return mask, mask_event_dim


def _is_subsample(msg: dict[str, Any]) -> bool:
    return type(msg["fn"]).__name__ == "_Subsample"


def is_left_to_model(msg: dict[str, Any]) -> bool:
    """Whether a latent is no business of the guide's: enumerated, or a plain function of others."""
    fn = msg["fn"]
    if msg["infer"].get("enumerate") and fn.has_enumerate_support:
        return True
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ in ("Delta", "Unit")


def _check_support(msg: dict[str, Any]) -> None:
    name, support = msg["name"], msg["fn"].support
    if alphabet(msg["fn"]) is not None:
        return
    try:
        bijection(support)
    except NotImplementedError:
        if support.is_discrete:
            hint = (
                f"is discrete with the support {support}, which is no list of at most {LARGEST_COUNT} values "
                "from zero: truncate a count (to a Categorical or Binomial), sum the site out analytically, "
                f"or hide it with AmortizedGuide(poutine.block(model, hide=['{name}']))"
            )
        elif "sphere" in repr(support).lower():
            hint = (
                "lives on a sphere, which no bijection maps to the whole space: use ProjectedNormal "
                f"with poutine.reparam(config={{'{name}': ProjectedNormalReparam()}})"
            )
        else:
            hint = f"has the support {support}, to which no bijection is known; reparameterize it"
        raise ValueError(f"latent site '{name}' {hint}") from None


def _check_batch_shape(msg: dict[str, Any], plates: list[Plate]) -> None:
    shape = msg["fn"].batch_shape
    dims = {plate.dim for plate in plates}
    # Values given for upstream latents may carry the dimensions of particles around the guide.
    loose = [d for d in range(-len(shape), 0) if shape[d] != 1 and d not in dims]
    loose = [d for d in loose if d not in outer_dims()]
    if loose:
        raise ValueError(
            f"latent site '{msg['name']}' has batch shape {tuple(shape)}, but no plate at "
            f"dim {loose[0]}; open a pyro.plate there or declare it with .to_event(...)"
        )


def _refuse_sequential(msg: dict[str, Any], frame: Any) -> None:
    if not msg["is_observed"]:
        raise NotImplementedError(
            f"latent site '{msg['name']}' lies in the sequential plate '{frame.name}'; "
            f"vectorize it: 'with pyro.plate(\"{frame.name}\", ...):' instead of 'for ... in'"
        )


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    return {key: value for key, value in named.items() if isinstance(value, Tensor)}
