"""Nested normal random effects: areas, groups in areas, and n observations of every group.

a ~ N(MU, AREA²), g ~ N(a, GROUP²), y ~ N(g, NOISE²). Everything is jointly normal, so that the posterior of
all areas and groups and the evidence are exact. Either level can be subsampled, out of all of y, (A, G, n).
"""

import pyro
import pyro.distributions as dist
import torch

from .linear import condition

MU, MU_SD, AREA, GROUP, NOISE = 0.5, 2.0, 1.5, 0.75, 1.25


def _areas(y, mu, area_size, group_size):
    areas = pyro.plate("area", y.shape[0], subsample_size=area_size, dim=-2)
    groups = pyro.plate("group", y.shape[1], subsample_size=group_size, dim=-1)
    with areas as area:
        a = pyro.sample("a", dist.Normal(mu, AREA))
        with groups as group:
            g = pyro.sample("g", dist.Normal(a, GROUP))
            seen = y[area][:, group]
            each = dist.Normal(g.unsqueeze(-1), NOISE).expand([*g.shape, y.shape[2]])
            pyro.sample("y", each.to_event(1), obs=seen)


def model(y, area_size=None, group_size=None):
    """The mean of the areas is known."""
    _areas(y, MU, area_size, group_size)


def model_of_mean(y, area_size=None, group_size=None):
    """The mean of the areas is a latent outside the plates."""
    mu = pyro.sample("mu", dist.Normal(MU, MU_SD))
    _areas(y, mu, area_size, group_size)


def model_of_three_plates(y):
    """`model`, the observations in a plate of their own."""
    areas = pyro.plate("area", y.shape[0], dim=-3)
    groups = pyro.plate("group", y.shape[1], dim=-2)
    observations = pyro.plate("observation", y.shape[2], dim=-1)
    with areas:
        a = pyro.sample("a", dist.Normal(MU, AREA))
        with groups:
            g = pyro.sample("g", dist.Normal(a, GROUP))
            with observations:
                pyro.sample("y", dist.Normal(g, NOISE), obs=y)


def simulate(areas, groups, observations, seed=0, dtype=torch.float32):
    """Draw y, (areas, groups, observations), from `model`."""
    draw = torch.Generator().manual_seed(seed)
    a = MU + AREA * torch.randn(areas, 1, 1, generator=draw, dtype=torch.float64)
    g = a + GROUP * torch.randn(areas, groups, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(areas, groups, observations, generator=draw, dtype=torch.float64)
    return (g + NOISE * noise).to(dtype)


def exact_joint(y, latent_mean=False):
    """Return mean and covariance of (mu, a_1.., g_11, g_12..) given y, and log p(y).

    With a known mean, mu has variance zero.
    """
    areas, groups, observations = y.shape
    area = torch.eye(areas, dtype=torch.float64).repeat_interleave(groups, dim=0)
    deviations = torch.cat([torch.ones_like(area[:, :1]), area, torch.eye(areas * groups).double()], 1)
    sds = torch.tensor([MU_SD if latent_mean else 0.0] + areas * [AREA] + areas * groups * [GROUP]).double()
    columns = deviations.repeat_interleave(observations, dim=0)
    posterior = condition(columns, sds, NOISE, y.double().flatten() - MU)
    readout = torch.eye(len(sds), dtype=torch.float64)
    readout[1 : 1 + areas, 0] = 1.0  # an area's effect is the mean plus its deviation,
    readout[1 + areas :] = deviations  # and a group's adds one more
    mean, covariance = MU + readout @ posterior.mean, readout @ posterior.covariance @ readout.T
    return mean, covariance, posterior.log_evidence


def exact(y, latent_mean=False):
    """Return ``{site: (means, sds)}`` for mu (), a (A,) and g (A, G), and log p(y)."""
    mean, covariance, evidence = exact_joint(y, latent_mean)
    sd, areas = covariance.diagonal().sqrt(), y.shape[0]
    parts = {"mu": 0, "a": slice(1, 1 + areas), "g": slice(1 + areas, None)}
    shapes = {"mu": (), "a": (areas,), "g": y.shape[:2]}
    return {k: (mean[i].reshape(shapes[k]), sd[i].reshape(shapes[k])) for k, i in parts.items()}, evidence
