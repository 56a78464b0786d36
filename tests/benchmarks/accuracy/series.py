"""Time series, hidden Markov models, a Gaussian process and a differential equation."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.benchmarks.accuracy.targets import FLAT, Draws, Ordered, Target, known, stored

__all__ = ["series"]

LAGS = 5
STEPS_PER_YEAR = 4  # of the Runge-Kutta method


def series() -> list[Target]:
    """All of them."""
    y, arch, gp = stored("arK_data")["y"], stored("garch"), stored("gp")
    lags = torch.stack([y[LAGS - k : len(y) - k] for k in range(1, LAGS + 1)], -1)
    bball, hares, walk = stored("bball"), stored("hudson"), stored("brownian")["observed"]
    drive = (torch.stack([bball["u"], bball["v"]], -1), bball["alpha"])
    seen, scales = ~walk.isnan(), torch.tensor([0.1, 0.15], dtype=torch.float64)
    return [
        Target("arK", "series", autoregression, (lags, y[LAGS:]), known("arK"), 1),
        Target("garch11", "series", garch, (arch["y"], arch["sigma1"]), known("garch11"), derived=_garch),
        Target("hmm_example", "series", two_levels, (stored("hmm")["y"],), known("hmm_example")),
        Target("bball_drive_event_0", "series", two_speeds, drive, known("bball_drive_event_0")),
        Target("gp_regr", "series", gaussian_process, (gp["x"], gp["y"]), known("gp_regr")),
        Target(
            "hudson_lynx_hare", "series", predators, (hares["y_init"], hares["y"]), known("hudson_lynx_hare")
        ),
        Target(
            "brownian_motion",
            "series",
            brownian,
            (walk.nan_to_num(), seen, scales),
            known("brownian_motion"),
        ),
        Target(
            "brownian_unknown_scales",
            "hierarchy",
            brownian_unknown,
            (walk.nan_to_num(), seen),
            known("brownian_motion_unknown_scales"),
        ),
    ]


def autoregression(lags: Tensor, y: Tensor) -> None:
    """An autoregression of order 5."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(alpha + (lags * beta).sum(-1), sigma), obs=y)


def garch(y: Tensor, first: Tensor) -> None:
    """Variances that follow the last square and the last variance; flat on the triangle of their weights.

    The recursion is linear, so that the variance at t is a sum over the past, with powers of beta.
    """
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), FLAT))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(y.new_tensor(FLAT)))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=y.dtype)))
    alpha1, beta = weights[..., :1], weights[..., 1:2]
    news = alpha0.unsqueeze(-1) + alpha1 * (y[:-1] - mu.unsqueeze(-1)).square()
    time = torch.arange(len(y) - 1)
    ago = time.unsqueeze(-1) - time
    powers = (beta.log().unsqueeze(-1) * ago.clamp(min=0)).exp() * (ago >= 0)
    later = (powers @ news.unsqueeze(-1)).squeeze(-1) + first.square() * beta ** (time + 1)
    variance = torch.cat([first.square().expand(*later.shape[:-1], 1), later], -1)
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), variance.sqrt()).to_event(1), obs=y)


def _garch(draws: Draws) -> Draws:
    return {"alpha1": draws["weights"][..., 0], "beta1": draws["weights"][..., 1]}


def two_levels(y: Tensor) -> None:
    """A hidden Markov model with two normal levels, the states summed out."""
    theta = _transitions(torch.ones(2, 2, dtype=y.dtype))
    mu = pyro.sample("mu", Ordered(dist.Normal(y.new_tensor([3.0, 10.0]), 1.0), positive=True))
    pyro.factor("y", _log_evidence(theta.log(), dist.Normal(mu.unsqueeze(-2), 1.0).log_prob(y.unsqueeze(-1))))


def two_speeds(uv: Tensor, alpha: Tensor) -> None:
    """A hidden Markov model of a drive in basketball: two exponential distances, in each of two states."""
    theta = _transitions(alpha)
    rates = Ordered(dist.Normal(uv.new_tensor([0.0, 3.0]), 1.0), positive=True)
    phi, lam = pyro.sample("phi", rates), pyro.sample("lambda", rates)
    u, v = uv[:, :1], uv[:, 1:]
    emitted = dist.Exponential(phi.unsqueeze(-2)).log_prob(u) + dist.Exponential(lam.unsqueeze(-2)).log_prob(
        v
    )
    pyro.factor("uv", _log_evidence(theta.log(), emitted))


def _transitions(concentration: Tensor) -> Tensor:
    rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(concentration[k])) for k in range(2)]
    return torch.stack(rows, -2)


def _log_evidence(transition: Tensor, emitted: Tensor) -> Tensor:
    """Log of the sum over all paths, each first state weighing 1, by a tree of matrix products.

    Args:
        transition: ``(..., K, K)``, in logarithms.
        emitted: ``(..., T, K)``, in logarithms.
    """
    steps = transition.unsqueeze(-3) + emitted[..., 1:, :].unsqueeze(-2)
    while (count := steps.shape[-3]) > 1:
        left, right, rest = (
            steps[..., 0 : count - 1 : 2, :, :],
            steps[..., 1::2, :, :],
            steps[..., count // 2 * 2 :, :, :],
        )
        joined = (left.unsqueeze(-1) + right.unsqueeze(-3)).logsumexp(-2)
        steps = torch.cat([joined, rest], -3)
    return (emitted[..., 0, :].unsqueeze(-1) + steps.squeeze(-3)).logsumexp((-1, -2))


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """Eleven points of a Gaussian process; sigma is a variance."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))[..., None, None]
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))[..., None, None]
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(1.0)))[..., None, None]
    near = (-0.5 * ((x.unsqueeze(-1) - x) / rho).square()).exp()
    covariance = alpha.square() * near + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def predators(y_init: Tensor, y: Tensor) -> None:
    """Hares and lynx of twenty years by the equations of Lotka and Volterra.

    A normal cut off at zero is a half-normal times exp(loc theta / scale^2), up to a constant.
    """
    loc, scale = y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05])
    theta = pyro.sample("theta", dist.HalfNormal(scale).to_event(1))
    pyro.factor("cut_off", (loc * theta / scale.square()).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(y.new_tensor([10.0, 10.0]).log(), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_tensor([-1.0, -1.0]), 1.0).to_event(1))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    years = populations(z_init.log(), theta, len(y))
    pyro.sample("y", dist.LogNormal(years, sigma.unsqueeze(-2)).to_event(2), obs=y)


def populations(log_z: Tensor, theta: Tensor, years: int, steps: int = STEPS_PER_YEAR) -> Tensor:
    """Log populations ``(..., years, 2)`` at the end of each year, by the classical Runge-Kutta method."""
    alpha, beta, gamma, delta = theta.unbind(-1)
    own, others = torch.stack([alpha, -gamma], -1), torch.stack([-beta, delta], -1)
    step, found = 1.0 / steps, []

    def slope(w: Tensor) -> Tensor:
        return torch.addcmul(own, others, w.clamp(max=20.0).exp().flip(-1))

    for _ in range(years):
        for _ in range(steps):
            first = slope(log_z)
            second = slope(log_z + 0.5 * step * first)
            third = slope(log_z + 0.5 * step * second)
            fourth = slope(log_z + step * third)
            log_z = log_z + step / 6.0 * (first + 2.0 * (second + third) + fourth)
        found.append(log_z)
    return torch.stack(found, -2)


def brownian(y: Tensor, seen: Tensor, scales: Tensor) -> None:
    """A random walk of 30 steps, ten of them unseen: exactly normal."""
    _walk(y, seen, scales[0], scales[1])


def brownian_unknown(y: Tensor, seen: Tensor) -> None:
    """The same with unknown scales."""
    innovation = pyro.sample("innovation", dist.LogNormal(y.new_tensor(0.0), 2.0))
    noise = pyro.sample("noise", dist.LogNormal(y.new_tensor(0.0), 2.0))
    _walk(y, seen, innovation, noise)


def _walk(y: Tensor, seen: Tensor, innovation: Tensor, noise: Tensor) -> None:
    sums = innovation[..., None, None] * y.new_ones(len(y), len(y)).tril()
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=sums))
    errors = dist.Normal(x, noise.unsqueeze(-1)).log_prob(y)
    pyro.factor("y", torch.where(seen, errors, torch.zeros_like(errors)).sum(-1))
