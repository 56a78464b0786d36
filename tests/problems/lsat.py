"""Five questions of a law school test and 1,000 students, one ability each (Bock and Lieberman 1970).

The model ``lsat_model`` of posteriordb with difficulties and slope fixed at their posterior means, so that
every student's ability has an exact posterior, by quadrature.
"""

import pyro
import pyro.distributions as dist
import torch

from . import stored

HALF_WIDTH, NODES = 10.0, 801  # of the quadrature: the prior's mass outside is 1e-23


def load(dtype=torch.float32):
    """Return the responses (1000, 5), the difficulties alpha (5,) and the slope beta ()."""
    data = stored("lsat", dtype)
    responses = data["patterns"].repeat_interleave(data["counts"], dim=0)
    return responses.to(dtype), data["alpha"], data["beta"]


def model(responses, alpha, beta):
    """A student answers question k rightly with log odds beta θ - alpha[k]."""
    with pyro.plate("student", len(responses)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        odds = (beta * theta).unsqueeze(-1) - alpha
        pyro.sample("response", dist.Bernoulli(logits=odds).to_event(1), obs=responses)


def exact(responses, alpha, beta):
    """Return log p(r_n), and the means and sds of every θ_n, each (N,)."""
    patterns, student = responses.double().unique(dim=0, return_inverse=True)
    theta = torch.linspace(-HALF_WIDTH, HALF_WIDTH, NODES, dtype=torch.float64)
    odds = (beta * theta).unsqueeze(-1) - alpha.double()
    likelihood = dist.Bernoulli(logits=odds).to_event(1).log_prob(patterns.unsqueeze(1))
    joint = likelihood + dist.Normal(0.0, 1.0).log_prob(theta) + (theta[1] - theta[0]).log()
    evidence = joint.logsumexp(-1)
    weight = (joint - evidence.unsqueeze(-1)).exp()
    mean = weight @ theta
    sd = (weight @ theta.square() - mean.square()).sqrt()
    return evidence[student], mean[student], sd[student]


def exact_log_evidence(responses, alpha, beta):
    """Return log p(r_n) of every student."""
    return exact(responses, alpha, beta)[0]
