"""Binary digits of 28 x 28 pixels, and a decoder network for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["LATENTS", "PIXELS", "Decoder", "Split", "load"]

FILE = Path(__file__).parents[3] / "examples" / "data" / "mnist.npz"
PIXELS = 784
LATENTS = 32
HIDDEN = 200
HELD_OUT = 2000  # images to validate with, and as many to test with


class Split(NamedTuple):
    """Images, ``(rows, 784)`` zeros and ones each."""

    train: Tensor
    valid: Tensor
    test: Tensor


def load(rows: int | None = None) -> Split:
    """One Bernoulli draw per pixel of its grey level and one order of images, both the same for ever.

    Args:
        rows: how many images to train on; all that are not held out if None.
    """
    grey = np.load(FILE, allow_pickle=False)["images"].reshape(-1, PIXELS)
    random = np.random.default_rng(0)
    binary = random.random(grey.shape, dtype=np.float32) < grey / np.float32(255.0)
    x = torch.tensor(binary[random.permutation(len(binary))], dtype=torch.float32)
    test, valid, train = x.tensor_split([HELD_OUT, 2 * HELD_OUT])
    return Split(train[:rows], valid, test)


class Decoder(nn.Module):
    """z ~ N(0, I) of 32 values; pixels ~ Bernoulli, from two hidden layers of 200 units."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(HIDDEN, PIXELS))

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.network(z)).to_event(1), obs=x)
