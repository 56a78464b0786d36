"""Real images for what overfits and what collapses: scikit-learn's digits and a variational autoencoder."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["Autoencoder", "images"]

PIXELS = 64


def images() -> Tensor:
    """All 1,797 images, pixels in [0, 1], in an order drawn from torch's random state."""
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16.0
    return x[torch.randperm(len(x))]


class Autoencoder(nn.Module):
    """Ten standard normal latents and a decoder of rectified layers.

    Args:
        width: of each hidden layer.
        depth: how many there are.
        noise: where the scale of normal pixels starts, which is learned; None for binary pixels.
    """

    latents = 10

    def __init__(self, width: int, depth: int, noise: float | None = None) -> None:
        super().__init__()
        sizes = [self.latents] + [width] * depth
        layers: list[Any] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Linear(width, PIXELS))
        self.log_noise = None if noise is None else nn.Parameter(torch.tensor(noise).log())

    def forward(self, x: Tensor) -> None:
        """The model."""
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
            out = self.decoder(z)
            pixels: Any = dist.Bernoulli(logits=out)
            if self.log_noise is not None:
                pixels = dist.Normal(out, self.log_noise.exp())
            pyro.sample("x", pixels.to_event(1), obs=x)
