"""A training step against guides and losses that others wrote: Pyro's autoguides, and flows of zuko's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_guides import MLP, AmortizedGuide, DiagonalNormal, FullRankNormal, NormalizingFlow, ZukoFlow, optim
from pyro_guides.objectives import ForwardKL
from tests.benchmarks.clock import Effort, Step, allocations, compare, seeded
from tests.benchmarks.flows import unvalidated
from tests.benchmarks.report import Result
from tests.benchmarks.speed.steps import RATE, Model, Size, data, trunk

__all__ = ["against_autoguides", "against_npe", "against_zuko"]

ROWS, COEFFICIENTS = 500, 30
FLOW: dict[str, Any] = {"transforms": 4, "hidden": (64, 64), "bins": 8}
NPE: dict[str, Any] = {"transforms": 5, "hidden": (50, 50), "bins": 10}  # sbi's defaults

_numbers = itertools.count()


# --- a data set that stays, and latents without rows


def regression(columns: Tensor, y: Tensor) -> None:
    """Thirty coefficients of a logistic regression."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(columns.shape[1]), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=columns @ beta), obs=y)


def fixed(make: Callable[[], Any]) -> Step:
    """A step on the regression."""
    columns = torch.randn(ROWS, COEFFICIENTS)
    y = (torch.rand(ROWS) < 0.5).float()
    svi = SVI(regression, make(), optim.Adam({"lr": RATE}), Trace_ELBO())
    return lambda: svi.step(columns, y)


def against_autoguides(effort: Effort) -> list[Result]:
    """Our guide without rows against Pyro's, with the same optimizer."""
    pairs: dict[str, tuple[Any, Any]] = {
        "AutoNormal": (DiagonalNormal(), AutoNormal),
        "AutoMultivariateNormal": (FullRankNormal(), AutoMultivariateNormal),
    }
    results = []
    for name, (family, theirs) in pairs.items():
        # Pyro names parameters after the class, and all guides share one store here.
        other = type(f"{name}{next(_numbers)}", (theirs,), {})
        steps = {
            "ours": seeded(fixed, lambda family=family: AmortizedGuide(regression, family=family)),
            "theirs": seeded(fixed, lambda other=other: other(regression)),
        }
        what = f"guide of {type(family).__name__}() / {name}"
        results += _pair(what, f"{COEFFICIENTS} coefficients, {ROWS} rows", steps, effort, target=1.1)
    return results


# --- flows


class Drawn(TorchDistribution):
    """A distribution of zuko's as Pyro takes it, that remembers the density of its draw."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        self.last: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        self.last = self.flow.rsample_and_log_prob(sample_shape)
        return self.last[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self.last is not None and value is self.last[0]:
            return self.last[1]
        return self.flow.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Drawn:
        return Drawn(self.flow.expand(batch_shape))


def spline_of_zuko(features: int, context: int) -> Any:
    """Zuko's splines in couplings, as they come."""
    from zuko.flows import NSF

    return NSF(features, context, bins=FLOW["bins"], passes=2, transforms=4, hidden_features=FLOW["hidden"])


def by_hand(size: Size) -> Step:
    """A step of SVI with a hand-written guide around a flow of zuko's, turned round to draw fast."""
    from zuko.flows import Flow

    network = nn.Sequential(trunk(size.features), nn.LazyLinear(32))
    turned = spline_of_zuko(size.latents, 32)
    flow: Any = Flow(turned.transform.inv, turned.base)
    model, name = Model(size), f"zuko{next(_numbers)}"
    x = data(size)
    network(x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name}.network", network)
        pyro.module(f"{name}.flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Drawn(flow(network(x))))

    svi = SVI(model, guide, optim.Adam({"lr": RATE}), Trace_ELBO())
    return lambda: svi.step(x)


def amortized(size: Size, family: Any) -> Step:
    """The same with a guide of ours."""
    model, x = Model(size), data(size)
    guide = AmortizedGuide(model, trunk(size.features), family).setup(x)
    svi = SVI(model, guide, optim.Adam({"lr": RATE}), Trace_ELBO())
    return lambda: svi.step(x)


def against_zuko(size: Size, effort: Effort) -> list[Result]:
    """Spline flows in our guide, ours and zuko's, against a hand-written guide on zuko; all unvalidated."""
    around = DiagonalNormal()
    families = {
        "NormalizingFlow()": NormalizingFlow(**FLOW, base=around),
        "ZukoFlow(NSF)": ZukoFlow(spline_of_zuko, context_size=32, base=around),
    }
    targets = {"NormalizingFlow()": 0.75, "ZukoFlow(NSF)": 1.1}
    with unvalidated(), pyro.validation_enabled(False):
        steps = {name: seeded(amortized, size, family) for name, family in families.items()}
        steps["hand"] = seeded(by_hand, size)
        timings = compare(steps, effort)
    return [
        Result(
            f"guide of {name} / hand-written guide on zuko's NSF",
            str(size),
            *timings[name].over(timings["hand"]),
            target=target,
        )
        for name, target in targets.items()
    ]


# --- neural posterior estimation


def simulator(x: Tensor) -> None:
    """Ten values seen through noise."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def forward_kl(batch: int) -> Step:
    """Our step, which simulates its batch."""
    x = torch.zeros(batch, 10)
    guide = AmortizedGuide(simulator, MLP(50), NormalizingFlow(**NPE))
    svi = SVI(simulator, guide, optim.Adam({"lr": RATE}), ForwardKL())
    return lambda: svi.step(x)


def npe_of_zuko(batch: int, *, passes: int | None) -> Step:
    """A plain loop around zuko's flow, as in sbi, on rows that were simulated before."""
    from zuko.flows import NSF

    network: nn.Module = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())
    flow: Any = NSF(10, 50, bins=NPE["bins"], passes=passes, transforms=5, hidden_features=NPE["hidden"])
    parameters = [*network.parameters(), *flow.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    z = torch.randn(batch, 10)
    x = z + 0.5 * torch.randn(batch, 10)

    def step() -> float:
        loss = -flow(network(x)).log_prob(z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def against_npe(effort: Effort, batch: int = 200) -> list[Result]:
    """``ForwardKL`` against the loop that trains a flow of zuko's on stored simulations, both unvalidated."""
    with unvalidated():
        steps = {
            "ours": seeded(forward_kl, batch),
            "autoregressive": seeded(npe_of_zuko, batch, passes=None),
            "coupling": seeded(npe_of_zuko, batch, passes=2),
        }
        timings = compare(steps, effort)
    where = f"10 latents, 10 values, B={batch}"
    return [
        Result(
            f"ForwardKL with NormalizingFlow() / zuko's {kind} NSF",
            where,
            *timings["ours"].over(timings[kind]),
            target=1.1,
        )
        for kind in ("autoregressive", "coupling")
    ]


def _pair(what: str, where: str, steps: dict[str, Step], effort: Effort, target: float) -> list[Result]:
    timings = compare(steps, effort)
    memory = allocations(steps["ours"]).bytes / allocations(steps["theirs"]).bytes
    return [
        Result(what, where, *timings["ours"].over(timings["theirs"]), target=target),
        Result(f"{what}, bytes allocated", where, memory),
    ]
