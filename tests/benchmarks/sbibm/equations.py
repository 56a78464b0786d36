"""Differential equations for many rows at once, by the classical Runge-Kutta method with fixed steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["epidemic", "predators", "solve"]

POPULATION = 1e6


def solve(
    slope: Callable[[Tensor], Tensor], start: Tensor, interval: float, steps: int, count: int
) -> Tensor:
    """States at ``count`` times, ``(count, *start.shape)``, the first at the start.

    Args:
        slope: from a state to its derivative.
        start: the state at first.
        interval: the time between two saved states.
        steps: how many steps to take in it.
        count: how many states to save.
    """
    size, state, saved = interval / steps, start, [start]
    for _ in range(count - 1):
        for _ in range(steps):
            a = slope(state)
            b = slope(torch.add(state, a, alpha=0.5 * size))
            c = slope(torch.add(state, b, alpha=0.5 * size))
            d = slope(torch.add(state, c, alpha=size))
            state = torch.add(state, torch.add(a + d, b + c, alpha=2.0), alpha=size / 6.0)
        saved.append(state)
    return torch.stack(saved)


def epidemic(theta: Tensor, steps: int = 10) -> Tensor:
    """The share of a population that is infected at ten times, 17 days apart: ``(*batch, 10)``.

    The state is (log S, log I): both stay positive, and the first days of growth are a straight line.
    """
    beta, gamma = theta.unbind(-1)

    def slope(state: Tensor) -> Tensor:
        susceptible, infected = state.exp().unbind(0)
        return torch.stack([-beta * infected, beta * susceptible - gamma])

    start = torch.stack([torch.full_like(beta, math.log(x / POPULATION)) for x in (POPULATION - 1.0, 1.0)])
    return solve(slope, start, 17.0, steps, 10)[:, 1].exp().movedim(0, -1)


def predators(theta: Tensor, steps: int = 21) -> Tensor:
    """Log numbers of prey and of predators at ten times, 2.1 apart: ``(*batch, 20)``, prey first."""
    alpha, beta, gamma, delta = theta.unbind(-1)
    born, eaten = torch.stack([alpha, -gamma]), torch.stack([-beta, delta])

    def slope(state: Tensor) -> Tensor:
        return torch.addcmul(born, eaten, state.exp().flip(0))

    start = torch.stack([torch.full_like(alpha, math.log(30.0)), torch.zeros_like(alpha)])
    return solve(slope, start, 2.1, steps, 10).movedim(0, -1).movedim(0, -2).flatten(-2)
