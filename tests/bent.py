"""Flows for tests, far from their start and in double precision."""

import pytest
import torch

from pyro_guides.families.flow import NormalizingFlow

KINDS = ("affine", "spline")
SIZES = (1, 2, 3, 6)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("size", SIZES)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def disturb(module, spread):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn_like(parameter)


def bound(size, kind="spline", *, spread=0.3):
    """A bound family far from its start, in double precision."""
    family = NormalizingFlow(kind=kind, hidden=(8, 7), context_size=3, stick_the_landing=True)
    family = family.bind(size).double()
    disturb(family, spread)
    return family


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def parameters_of(family, *batch):
    start = family.initial(draw(*batch, family.size), 0.7)
    return start + 0.4 * torch.randn_like(start)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def integral(log_density, size, points=401, reach=12.0):
    t = torch.linspace(-reach, reach, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[t] * size).reshape(-1, size)
    return log_density(grid).exp().sum() * (t[1] - t[0]) ** size
