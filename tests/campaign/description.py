"""A model as data: plates, latents with their parents, and observations. It prints as it reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = ["Axis", "Description", "Latent", "Seen"]


@dataclass(frozen=True)
class Axis:
    """A plate.

    Attributes:
        name: its name.
        dim: its dimension, negative.
        size: how many elements the data have.
        take: "all" of them, in a plate of that size; a "batch", in a plate of four times that size; in an
            "unsized" plate; "own", half of them, drawn by the model itself; or those "chosen" by an index.
    """

    name: str
    dim: int
    size: int
    take: str = "all"

    @property
    def taken(self) -> int:
        """How many elements a call uses."""
        return self.size // 2 if self.take in ("own", "chosen") else self.size

    @property
    def scale(self) -> float:
        """How many elements each of them stands for."""
        return 4.0 if self.take == "batch" else self.size / self.taken


@dataclass(frozen=True)
class Latent:
    """A latent site: what kind of prior, in which plates, and which latents its prior depends on."""

    name: str
    kind: str
    plates: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    masked: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Seen:
    """An observed site; ``mask`` is how some of its elements are left out, if they are."""

    name: str
    kind: str
    plates: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    mask: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Description:
    """A model and how its guide is made.

    Attributes:
        plates: its plates.
        latents: its latents, each after its parents.
        seen: its observations.
        family: which family the guide has, see ``checks.FAMILIES``.
        scale: of the whole model.
        ragged: whether the elements of "row" belong to those of "group", by an index.
        linear: whether all dependencies are linear.
        amortized: whether the guide is to have encoders.
        seed: of data and draws.
    """

    plates: tuple[Axis, ...]
    latents: tuple[Latent, ...]
    seen: tuple[Seen, ...]
    family: str = "full rank"
    scale: float = 1.0
    ragged: bool = False
    linear: bool = False
    amortized: bool = True
    seed: int = field(default=0)

    def plate(self, name: str) -> Axis:
        """A plate by its name."""
        return next(plate for plate in self.plates if plate.name == name)

    def scale_of(self, site: Latent | Seen) -> float:
        """By how much Pyro multiplies a site's log density."""
        scale = self.scale * site.scale
        for name in site.plates:
            scale *= self.plate(name).scale
        return scale

    @property
    def depth(self) -> int:
        """How many dimensions the plates take."""
        return max((-plate.dim for plate in self.plates), default=0)

    @property
    def whole(self) -> Description:
        """The same model, which takes all rows that it is given."""
        plates = tuple(replace(plate, take="all") for plate in self.plates)
        return replace(self, plates=plates)

    def with_rows(self, count: int) -> Description:
        """The same model for so many rows, if rows are all that it has."""
        if len(self.plates) != 1:
            return self
        return replace(self, plates=(replace(self.plates[0], size=count),))

    @property
    def takes_all(self) -> bool:
        """Whether no plate subsamples."""
        return all(plate.take in ("all", "unsized") for plate in self.plates)

    @property
    def drawn(self) -> tuple[Latent | Seen, ...]:
        """All that the guide draws: the latents, and what observations have not seen."""
        return (*self.latents, *(seen for seen in self.seen if seen.mask == "obs_mask"))

    @property
    def common_scale(self) -> float:
        """The scale around all latents; one if they are scaled apart."""
        scales = {self.scale * site.scale for site in self.drawn}
        return scales.pop() if len(scales) == 1 else 1.0

    def __str__(self) -> str:
        lines = [f"family {self.family}, scale {self.scale}, seed {self.seed}"]
        lines += [f"plate {p.name}: {p.size} at dim {p.dim}, takes {p.take}" for p in self.plates]
        for site in (*self.latents, *self.seen):
            lines.append(f"{site.name} ~ {site.kind}({', '.join(site.parents)}) in {list(site.plates)}")
        return "\n".join(lines)
