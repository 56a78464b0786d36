"""Amortized hierarchies, sets and tables against exact posteriors, all by stochastic variational inference."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample

from pyro_guides import MLP, AmortizedGuide, DeepSet, DiagonalNormal, FullRankNormal, NormalizingFlow, optim
from tests.problems import gaussian_linear, lsat, nested, radon, rats, table

pytestmark = pytest.mark.slow


def train(model, guide, batches, rate, steps, particles=4, plates=1, last=0.01):
    """Adam, its rate falling exponentially down to ``last`` of what it was."""
    optimizer = optim.Adam({"lr": rate}, {"clip_norm": 10.0}, schedule=lambda step: last ** (step / steps))
    elbo = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=plates)
    svi = SVI(model, guide, optimizer, elbo)
    return [svi.step(*batches()) for _ in range(steps)]


def errors(posterior, sites):
    """Errors of means in exact sds, and relative errors of sds, by site and in its shape."""
    means, sds = posterior.mean(), posterior.sd()
    return {
        name: (((means[name].reshape(mean.shape) - mean) / sd), sds[name].reshape(sd.shape) / sd - 1.0)
        for name, (mean, sd) in sites.items()
    }


def worst(found):
    """The largest error of a mean and of an sd; prints both of every site."""
    largest = {name: [float(e.abs().max()) for e in pair] for name, pair in found.items()}
    for name, (mean, sd) in largest.items():
        print(f"  {name}: mean {mean:.3f} sd, sd {100.0 * sd:.1f} %")
    return [max(pair[i] for pair in largest.values()) for i in range(2)]


def gap(posterior, evidence):
    """Log p(x) minus the ELBO, summed over rows, and its Monte Carlo error."""
    log_weight = (posterior.log_p - posterior.log_q).flatten(1).sum(-1)
    return float(evidence - log_weight.mean()), float(log_weight.std()) / math.sqrt(len(log_weight))


# --- rows


def test_students_never_seen():
    """Trained on 800 students, asked for the ability of 200 others."""
    responses, alpha, beta = lsat.load()
    order = torch.randperm(len(responses))
    seen, unseen = responses[order[:800]], responses[order[800:]]
    guide = AmortizedGuide(lsat.model).setup(seen, alpha, beta)
    train(lsat.model, guide, lambda: (seen[torch.randint(800, (200,))], alpha, beta), 5e-3, 1000)
    posterior = guide.posterior(unseen, alpha, beta, num_draws=2000)
    missing, error = (x / 200 for x in gap(posterior, lsat.exact_log_evidence(unseen, alpha, beta).sum()))
    print(f"gap {missing:.5f} ± {error:.5f} nats per student")
    assert error < 0.0005
    assert -3.0 * error < missing < 0.002


def test_data_sets_never_seen():
    """One guide for all data sets; its KL from the exact posteriors of ten given ones."""
    x, _, _ = gaussian_linear.load()
    simulated = gaussian_linear.simulate(10_000)
    guide = AmortizedGuide(gaussian_linear.model).setup(simulated)
    batches = lambda: (simulated[torch.randint(10_000, (256,))],)  # noqa: E731
    train(gaussian_linear.model, guide, batches, 5e-3, 800)
    posterior = guide.posterior(x, num_draws=2000)
    divergence, error = (v / 10 for v in gap(posterior, gaussian_linear.exact(x)[0].sum()))
    print(f"KL {divergence:.5f} ± {error:.5f} nats per data set")
    assert error < 0.001
    assert -3.0 * error < divergence < 0.005
