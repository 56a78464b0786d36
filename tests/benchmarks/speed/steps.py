"""A training step: against guides written by hand, against N, and against particles.

The task is a variational autoencoder of binary rows, the model with the least work around its guide. All
candidates share the decoder's and the encoder's layers, the batch and the learning rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, LowRankNormal, optim
from tests.benchmarks.clock import Effort, Step, Timing, allocations, compare, seeded
from tests.benchmarks.report import Result

__all__ = [
    "LARGE",
    "RATE",
    "SMALL",
    "Size",
    "against_hand",
    "against_particles",
    "against_reading",
    "against_rows",
    "families",
    "hand",
    "ours",
    "textbook",
]

HIDDEN = 256
RATE = 1e-3
ROWS = (10**3, 10**4, 10**5, 10**6)


@dataclass(frozen=True)
class Size:
    """X features, D latents, B rows per batch."""

    features: int
    latents: int
    batch: int = 128

    def __str__(self) -> str:
        return f"X={self.features}, D={self.latents}, B={self.batch}"


LARGE = Size(784, 20)
SMALL = Size(20, 10)

# --- the task

_numbers = itertools.count()


def trunk(inputs: int) -> nn.Module:
    """The encoder's hidden layer, without its head."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU())


class Decoder(nn.Sequential):
    """From latents to logits."""

    def __init__(self, size: Size) -> None:
        super().__init__(nn.Linear(size.latents, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size.features))


class Encoder(nn.Module):
    """From rows to the location and scale of a normal q(z | x)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.trunk = trunk(size.features)
        self.head = nn.Linear(HIDDEN, 2 * size.latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.head(self.trunk(x)).chunk(2, dim=-1)
        return loc, softplus(raw) + 1e-6


class Model:
    """A Pyro model of rows, for a data set of N rows of which the batch may be a part."""

    def __init__(
        self, size: Size, rows: int | None = None, *, subsamples: bool = False, changeable: bool = False
    ) -> None:
        self.size = size
        self.changeable = changeable
        self.rows = rows
        self.subsamples = subsamples
        self.name = f"decoder{next(_numbers)}"
        self.decoder = Decoder(size)

    def __call__(self, x: Tensor) -> None:
        pyro.module(self.name, self.decoder)
        if self.changeable:
            float(x[0, 0])  # from here on, this value may decide about anything
        batch = self.size.batch if self.subsamples else len(x)
        prior = torch.zeros(self.size.latents), torch.ones(self.size.latents)
        with pyro.plate("rows", self.rows or len(x), subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Normal(*prior).to_event(1))
            x = x[rows] if self.subsamples else x
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def data(size: Size, rows: int | None = None) -> Tensor:
    """Binary rows."""
    return (torch.rand(rows or size.batch, size.features) < 0.3).float()


# --- candidates: functions that return a training step


def ours(
    size: Size,
    encoder: Callable[[], nn.Module] | None = None,
    family: Any = None,
    *,
    rows: int | None = None,
    subsamples: bool = False,
    changeable: bool = False,
    elbo: Any = None,
    hook: Callable[..., Any] | None = None,
) -> Step:
    """A step of SVI with the package's guide and optimizer, around the shared trunk by default."""
    module = trunk(size.features) if encoder is None else encoder()
    model = Model(size, rows, subsamples=subsamples, changeable=changeable)
    guide = AmortizedGuide(model, module, DiagonalNormal() if family is None else family)
    svi = SVI(model, guide, optim.Adam({"lr": RATE}), elbo or Trace_ELBO())
    x = data(size, rows if subsamples else None)
    guide.setup(x)
    if hook is not None:
        module.register_forward_hook(hook)
    return lambda: svi.step(x)


def hand(size: Size, *, optimizer: Any = None, rows: int | None = None, elbo: Any = None) -> Step:
    """A step of SVI with a guide written in a few lines of Pyro, and Pyro's optimizer."""
    model, encoder, name = Model(size, rows), Encoder(size), f"encoder{next(_numbers)}"

    def guide(x: Tensor) -> None:
        pyro.module(name, encoder)
        with pyro.plate("rows", rows or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    svi = SVI(model, guide, optimizer or pyro.optim.Adam({"lr": RATE}), elbo or Trace_ELBO())
    x = data(size)
    return lambda: svi.step(x)


def textbook(size: Size, **options: Any) -> Step:
    """A step of a plain PyTorch loop with the analytic KL divergence."""
    encoder, decoder = Encoder(size), Decoder(size)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, **options)
    x = data(size)

    def step() -> float:
        loc, scale = encoder(x)
        z = loc + scale * torch.randn_like(scale)
        misfit = binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        divergence = 0.5 * (loc.square() + scale.square() - 1.0).sum() - scale.log().sum()
        loss = misfit + divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def unchecked(step: Step) -> Step:
    """The same step without the validation of models and values that Pyro does by default."""

    def run() -> None:
        with pyro.validation_enabled(False):
            step()

    return run


# --- measurements


def against_hand(size: Size, effort: Effort) -> list[Result]:
    """Our step against the same network in a hand-written guide, and against plain PyTorch."""
    timings = compare(
        {
            "ours": seeded(ours, size),
            "MLP": seeded(ours, size, MLP),
            "hand": seeded(hand, size),
            "hand fused": seeded(hand, size, optimizer=optim.Adam({"lr": RATE})),
            "ours unchecked": unchecked(seeded(ours, size)),
            "hand unchecked": unchecked(seeded(hand, size)),
            "textbook": seeded(textbook, size),
            "textbook fused": seeded(textbook, size, fused=True),
        },
        effort,
    )

    def ratio(a: str, b: str, what: str, target: float | None = None) -> Result:
        return Result(what, str(size), *timings[a].over(timings[b]), target=target)

    return [
        ratio("ours", "hand", "guide / hand-written guide", 0.8),
        ratio("ours", "hand fused", "guide / hand-written guide with our optimizer"),
        ratio("ours", "textbook", "guide / plain PyTorch", 1.1 if size.features >= 784 else None),
        ratio("ours", "textbook fused", "guide / plain PyTorch, fused Adam"),
        ratio("ours unchecked", "hand unchecked", "guide / hand-written guide, both without validation"),
        ratio("ours unchecked", "textbook", "guide without validation / plain PyTorch"),
        ratio("MLP", "hand", "guide with the default encoder / hand-written guide"),
        ratio("MLP", "ours", "guide with the default encoder / with the trunk"),
        ratio("textbook fused", "hand", "plain PyTorch, fused Adam / hand-written guide"),
        ratio("hand fused", "textbook", "hand-written guide with our optimizer / plain PyTorch"),
        Result("guide, ms of CPU", str(size), timings["ours"].milliseconds),
    ]


def families(size: Size, effort: Effort) -> list[Result]:
    """The richer families against the diagonal one."""
    choices = {"FullRankNormal()": FullRankNormal(), "LowRankNormal(4)": LowRankNormal(4)}
    steps = {name: seeded(ours, size, family=family) for name, family in choices.items()}
    timings = compare({"diagonal": seeded(ours, size), **steps}, effort)
    return [
        Result(f"{name} / DiagonalNormal()", str(size), *timings[name].over(timings["diagonal"]))
        for name in choices
    ]


def against_rows(size: Size, effort: Effort, rows: tuple[int, ...] = ROWS) -> list[Result]:
    """Time and memory of a step at a fixed batch, for data sets of N rows."""
    results = []
    for subsamples, label in ((False, "batch passed in"), (True, "model subsamples")):
        steps = {str(n): seeded(ours, size, rows=n, subsamples=subsamples) for n in rows}
        timings = compare(steps, effort)
        results += _growth(label, size, steps, timings)
    return results


def _growth(label: str, size: Size, steps: dict[str, Step], timings: dict[str, Timing]) -> list[Result]:
    counts = {name: allocations(step) for name, step in steps.items()}
    first, *others = steps
    results = []
    for name in others:
        where = f"{size}, N={int(name):.0e} / N={int(first):.0e}"
        memory = counts[name].bytes / counts[first].bytes
        results.append(Result(f"time, {label}", where, *timings[name].over(timings[first]), target=1.1))
        results.append(Result(f"memory, {label}", where, memory, target=1.01))
    return results


def against_reading(size: Size, effort: Effort) -> list[Result]:
    """A model whose structure must be read at every step against one that is read once."""
    steps = {"once": seeded(ours, size), "each": seeded(ours, size, changeable=True)}
    timings = compare(steps, effort)
    ratio = timings["each"].over(timings["once"])
    return [Result("structure read at every step / once", str(size), *ratio, target=1.1)]


def against_particles(size: Size, effort: Effort, particles: int = 10) -> list[Result]:
    """Several vectorized particles against one, and how often the encoder runs for them."""
    passes: list[int] = []
    many: dict[str, Any] = {"num_particles": particles, "max_plate_nesting": 1}

    def vectorized() -> Any:
        return Trace_ELBO(vectorize_particles=True, **many)

    timings = compare(
        {
            "one": seeded(ours, size),
            "vectorized": seeded(ours, size, elbo=vectorized()),
            "in turn": seeded(ours, size, elbo=Trace_ELBO(**many)),
            "hand": seeded(hand, size, elbo=vectorized()),
        },
        effort,
    )
    counted = seeded(ours, size, elbo=vectorized(), hook=lambda *_: passes.append(1))
    counted()
    where = f"{size}, {particles} particles"
    return [
        Result("vectorized particles / one", where, *timings["vectorized"].over(timings["one"])),
        Result("vectorized particles / in turn", where, *timings["vectorized"].over(timings["in turn"])),
        Result("vectorized particles / hand-written", where, *timings["vectorized"].over(timings["hand"])),
        Result("encoder passes per step", where, float(len(passes)), target=1.0),
    ]
