"""A linear-Gaussian state-space model: a damped rotation in the plane, seen by three noisy linear sensors.

z_1 ~ N(0, I), z_t = TRANSITION z_{t-1} + N(0, DRIFT²), x_t = SENSORS z_t + N(0, NOISE²); every z_t is
N(0, I) a priori. The Kalman filter and the Rauch-Tung-Striebel smoother give everything exactly.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

DAMPING, ANGLE, NOISE = 0.95, 0.6, 0.75
DRIFT = math.sqrt(1.0 - DAMPING**2)
TRANSITION = DAMPING * torch.tensor(
    [[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]], dtype=torch.float64
)
SENSORS = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-1.0, 0.5]], dtype=torch.float64)


def model(x):
    """Sequences of one length: x is (B, T, 3)."""
    transition, sensors = TRANSITION.to(x.dtype), SENSORS.to(x.dtype)
    with pyro.plate("series", len(x)):
        z = x.new_zeros(2)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            scale = DRIFT if t > 1 else 1.0
            z = pyro.sample(f"z_{t}", dist.Normal(z @ transition.T, scale).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z @ sensors.T, NOISE).to_event(1), obs=x[:, t - 1])


def padded_model(x, lengths):
    """The same for a padded batch: sequence b ends after ``lengths[b]`` steps."""
    transition, sensors = TRANSITION.to(x.dtype), SENSORS.to(x.dtype)
    with pyro.plate("series", len(x)):
        z = x.new_zeros(2)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            scale = DRIFT if t > 1 else 1.0
            with poutine.mask(mask=lengths >= t):
                z = pyro.sample(f"z_{t}", dist.Normal(z @ transition.T, scale).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z @ sensors.T, NOISE).to_event(1), obs=x[:, t - 1])


def simulate(series, steps, seed=0, dtype=torch.float32):
    """Draw x, (series, steps, 3), from the model."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, series, 5, generator=draw, dtype=torch.float64)
    z, x = noise[0, :, :2], []
    for t in range(steps):
        z = z @ TRANSITION.T + DRIFT * noise[t, :, :2] if t else z
        x.append(z @ SENSORS.T + NOISE * noise[t, :, 2:])
    return torch.stack(x, dim=1).to(dtype)


def pad(x, lengths):
    """Return x with zeros after the end of each sequence."""
    return x * (torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1)


def exact(x, lengths=None):
    """Return log p(x_b) (B,), and the means and sds (B, T, 2) of every z_t given all of its sequence.

    Steps after the end of a sequence count as never seen: there, means and sds are predictions.
    """
    x = x.double()
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    predicted, filtered, evidence = _filter(x, lengths)
    mean, covariance = filtered[-1]
    smoothed = [(mean, covariance)]
    for t in reversed(range(x.shape[1] - 1)):
        gain = torch.linalg.solve(predicted[t + 1][1], TRANSITION @ filtered[t][1]).mT
        mean = filtered[t][0] + _times(gain, mean - predicted[t + 1][0])
        covariance = filtered[t][1] + gain @ (covariance - predicted[t + 1][1]) @ gain.mT
        smoothed.insert(0, (mean, covariance))
    means, covariances = (torch.stack(part, dim=1) for part in zip(*smoothed, strict=True))
    return evidence, means, covariances.diagonal(dim1=-2, dim2=-1).sqrt()


def _filter(x, lengths):
    """Kalman's: predicted and filtered (mean, covariance) of every step, and the log evidence."""
    eye = torch.eye(2, dtype=torch.float64)
    mean, covariance = x.new_zeros(len(x), 2), eye.expand(len(x), 2, 2)
    predicted, filtered, evidence = [], [], 0.0
    for t in range(x.shape[1]):
        if t:
            mean = _times(TRANSITION, mean)
            covariance = TRANSITION @ covariance @ TRANSITION.T + DRIFT**2 * eye
        predicted.append((mean, covariance))
        spread = SENSORS @ covariance @ SENSORS.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
        seen = t < lengths
        log_p = dist.MultivariateNormal(_times(SENSORS, mean), spread).log_prob(x[:, t])
        evidence = evidence + torch.where(seen, log_p, 0.0)
        gain = torch.linalg.solve(spread, SENSORS @ covariance).mT * seen[:, None, None]
        mean = mean + _times(gain, x[:, t] - _times(SENSORS, mean))
        covariance = covariance - gain @ SENSORS @ covariance
        filtered.append((mean, covariance))
    return predicted, filtered, evidence


def _times(matrix, vector):
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
