"""Linear models with normal effects: exact given the scales, integrated over unknown scales by quadrature.

y = columns @ (sds * e) + noise * ε, where all elements of e and ε are independent standard normals.
Everything is float64, and batched over leading dimensions of ``sds`` and ``noise``.
"""

import math
from typing import NamedTuple

import torch
from pyro.distributions import HalfNormal

from . import Reference

CHUNK = 64  # nodes at once: memory, not accuracy


class Normal(NamedTuple):
    """The posterior of the effects sds * e, and log p(y)."""

    mean: torch.Tensor
    covariance: torch.Tensor
    log_evidence: torch.Tensor


def condition(columns, sds, noise, y):
    """Return the posterior given the scales; an sd of zero makes a constant."""
    noise = torch.as_tensor(noise, dtype=torch.float64)[..., None]
    gram, target = columns.T @ columns, columns.T @ y
    right = (sds * target / noise.square()).unsqueeze(-1)
    scaled = sds.unsqueeze(-1) * gram * sds.unsqueeze(-2) / noise.unsqueeze(-1).square()
    factor = torch.linalg.cholesky(torch.eye(sds.shape[-1], dtype=sds.dtype) + scaled)
    mean = torch.cholesky_solve(right, factor)
    quadratic = (right * mean).sum((-2, -1)) - y.square().sum() / noise.squeeze(-1).square()
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = len(y) * (2.0 * math.pi * noise.squeeze(-1).square()).log()
    covariance = sds.unsqueeze(-1) * torch.cholesky_inverse(factor) * sds.unsqueeze(-2)
    return Normal(sds * mean.squeeze(-1), covariance, 0.5 * (quadratic - log_det - constant))


class Scale(NamedTuple):
    """An unknown scale ~ HalfNormal(prior): equally spaced nodes of its logarithm between two bounds."""

    prior: float
    low: float
    high: float
    nodes: int

    def rule(self):
        """Return the nodes, and the log weights of their densities."""
        logs = torch.linspace(math.log(self.low), math.log(self.high), self.nodes, dtype=torch.float64)
        weight = HalfNormal(self.prior).log_prob(logs.exp()) + logs + (logs[1] - logs[0]).log()
        return logs.exp(), weight


class Answer(NamedTuple):
    """Posterior means and sds of all scales and of linear readouts of the effects, and log p(y)."""

    scale_mean: torch.Tensor
    scale_sd: torch.Tensor
    mean: torch.Tensor
    sd: torch.Tensor
    log_evidence: torch.Tensor

    def ordered(self, names, order):
        """Return the `Reference` of scales and readouts, called ``names``, in another order; and log p(y)."""
        rows = [names.index(name) for name in order]
        mean, sd = torch.cat([self.scale_mean, self.mean]), torch.cat([self.scale_sd, self.sd])
        return Reference(order, mean[rows], sd[rows]), self.log_evidence


def integrate(columns, fixed, group, scales, y, readout):
    """Sum over a grid of scales, the last of which is the noise.

    The first columns have the known sds ``fixed``; column ``len(fixed) + j`` has scale number ``group[j]``.
    ``readout`` turns effects into the quantities asked for.
    """
    nodes, weights = zip(*(scale.rule() for scale in scales), strict=True)
    nodes, weights = torch.cartesian_prod(*nodes), torch.cartesian_prod(*weights).sum(-1)
    sds = torch.cat([fixed.expand(len(nodes), -1), nodes[:, group]], dim=-1)
    parts = [
        condition(columns, s, n, y) for s, n in zip(sds.split(CHUNK), nodes[:, -1].split(CHUNK), strict=True)
    ]
    weights = weights + torch.cat([part.log_evidence for part in parts])
    log_evidence = weights.logsumexp(0)
    weights = (weights - log_evidence).exp()
    moments = [_moments(part, w) for part, w in zip(parts, weights.split(CHUNK), strict=True)]
    first, second = (sum(m) for m in zip(*moments, strict=True))
    mean, scale_mean = readout @ first, weights @ nodes
    variance = ((readout @ second) * readout).sum(-1) - mean.square()
    scale_sd = (weights @ nodes.square() - scale_mean.square()).sqrt()
    return Answer(scale_mean, scale_sd, mean, variance.sqrt(), log_evidence)


def _moments(part, weights):
    squares = part.covariance + part.mean.unsqueeze(-1) * part.mean.unsqueeze(-2)
    return weights @ part.mean, (weights @ squares.flatten(1)).view_as(squares[0])
