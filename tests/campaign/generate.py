"""Hypothesis makes descriptions: it starts from small ones, and shrinks to small ones."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from hypothesis import strategies as st

from .description import Axis, Description, Latent, Seen
from .priors import DISCRETE, ENDS_AT_TENSORS, LIKELIHOODS, LINEAR, PRIORS

__all__ = ["descriptions"]

LAYOUTS = {
    "none": (),
    "one": (("row", -1, 4),),
    "left": (("row", -2, 4),),
    "nested": (("outer", -2, 4), ("inner", -1, 3)),
    "crossed": (("left", -2, 3), ("right", -1, 5)),
    "ragged": (("group", -1, 3), ("row", -1, 5)),
}
TAKES = {
    "none": ("all",),
    "one": ("all", "batch", "own", "chosen", "unsized"),
    "left": ("all", "batch", "own"),
    "nested": ("all", "batch", "own", "chosen"),
    "crossed": ("all", "batch"),
    "ragged": ("all",),
}
FAMILIES = ("diagonal", "full rank", "low rank", "mixture", "flow")


def stacks(layout: str) -> list[tuple[str, ...]]:
    """The plates that a latent may lie in."""
    names = [name for name, *_ in LAYOUTS[layout]]
    if layout == "nested":
        return [(), ("outer",), ("outer", "inner")]
    if layout == "ragged":
        return [(), ("group",), ("row",)]
    return [combination for count in range(len(names) + 1) for combination in combinations(names, count)]


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """A model of one to four latents and one or two observations."""
    layout = draw(st.sampled_from(sorted(LAYOUTS, key=lambda name: len(LAYOUTS[name]))))
    linear = draw(st.integers(0, 5)) == 5
    family = draw(st.sampled_from(FAMILIES))
    plates = _plates(draw, layout)
    latents: list[Latent] = []
    for index in range(draw(st.integers(1, 4))):
        latents.append(_latent(draw, index, layout, latents, linear, family, plates))
    return Description(
        plates,
        tuple(latents),
        _seen(draw, layout, latents, linear, _whole(plates)),
        family=family,
        scale=draw(st.sampled_from([1.0, 1.0, 0.5])),
        ragged=layout == "ragged",
        linear=linear,
        # What is learned per element needs to know which elements a batch holds.
        amortized=any(plate.take == "batch" for plate in plates) or draw(st.integers(0, 5)) < 5,
        seed=draw(st.integers(0, 99)),
    )


def _plates(draw: Any, layout: str) -> tuple[Axis, ...]:
    take = draw(st.sampled_from(TAKES[layout]))
    first, *others = [Axis(*axis) for axis in LAYOUTS[layout]] or [None]
    if first is None:
        return ()
    odd = take in ("own", "chosen") and first.size % 2
    return (Axis(first.name, first.dim, first.size + odd, take), *others)


def _latent(
    draw: Any,
    index: int,
    layout: str,
    earlier: list[Latent],
    linear: bool,
    family: str,
    axes: tuple[Axis, ...],
) -> Latent:
    possible = stacks(layout)
    if layout == "crossed" and axes[0].take == "batch":  # what is pooled must be complete
        possible = [names for names in possible if names != ("right",)]
    plates = draw(st.sampled_from(possible))
    kinds = LINEAR if linear else PRIORS
    if any(axis.take == "own" and axis.name in plates for axis in axes):
        kinds = {kind: prior for kind, prior in kinds.items() if kind not in ENDS_AT_TENSORS}
    kind = draw(st.sampled_from(sorted(kinds)))
    scale = draw(st.sampled_from([1.0, 1.0, 2.0])) if family == "diagonal" or kind in DISCRETE else 1.0
    masked = bool(plates) and not linear and _whole(axes) and draw(st.integers(0, 5)) == 5
    return Latent("abcd"[index], kind, plates, _parents(draw, plates, earlier, layout), masked, scale)


def _whole(axes: tuple[Axis, ...]) -> bool:
    return Description(axes, (), ()).takes_all


def _parents(draw: Any, plates: tuple[str, ...], earlier: list[Latent], layout: str) -> tuple[str, ...]:
    """Any of the latents whose values each element of some plates may see."""
    seen = {*plates, "group"} if layout == "ragged" and "row" in plates else {*plates}
    possible = [latent.name for latent in earlier if seen.issuperset(latent.plates)]
    chosen = draw(st.sets(st.sampled_from(possible), max_size=2)) if possible else set()
    return tuple(sorted(chosen))


def _seen(draw: Any, layout: str, latents: list[Latent], linear: bool, fixed: bool) -> tuple[Seen, ...]:
    """One or two observations, the first at the bottom of all plates."""
    found = []
    lowest = ("row",) if layout == "ragged" else stacks(layout)[-1]
    for index in range(draw(st.integers(1, 2))):
        plates = lowest if index == 0 else draw(st.sampled_from([p for p in stacks(layout) if p] or [()]))
        if layout == "ragged":
            plates = ("row",)
        kind = draw(st.sampled_from(sorted(("normal", "normals") if linear else LIKELIHOODS)))
        parents = _parents(draw, plates, latents, layout) if index else _all(plates, latents, layout)
        masks = ["", "", "mask", "obs_mask"] if plates and fixed and not linear else [""]
        mask = draw(st.sampled_from(masks))
        if mask == "obs_mask" and kind == "poisson":
            mask = "mask"  # what is not seen would be a latent without a family
        scale = draw(st.sampled_from([1.0, 1.0, 3.0])) if mask != "obs_mask" else 1.0
        found.append(Seen("xy"[index], kind, plates, parents, mask, scale))
    return tuple(found)


def _all(plates: tuple[str, ...], latents: list[Latent], layout: str) -> tuple[str, ...]:
    """All latents whose values each element of some plates may see."""
    seen = {*plates, "group"} if layout == "ragged" else {*plates}
    return tuple(latent.name for latent in latents if seen.issuperset(latent.plates))
