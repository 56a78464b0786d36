"""Amortized posteriors of 1,797 handwritten digits, checked against the exact answer.

Two models of the same images, each written as ordinary Pyro code:

1. *Factor model*: 16 normal factors, a linear decoder, normal noise. Its posterior and evidence are known
   exactly, so every number the guide prints can be compared with the truth.
2. *Decoder network*: 16 normal factors, a neural decoder, binomial pixels. Model and encoder are trained
   jointly; nothing is known exactly, but richer families must reach a higher ELBO.

Each is fitted with three families on 1,497 images, and judged on 300 that training never saw.

    python examples/quickstart.py            # about a minute
    python examples/quickstart.py --short    # 10 steps only
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis
from torch import nn

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    optim,
    to_arviz,
)

FACTORS = 16
FAMILIES = (DiagonalNormal(), LowRankNormal(rank=4), FullRankNormal())


def load_images():
    """Rows of pixels, 0 to 16, for training (1,497) and test (300), and which pixels vary at all."""
    images = load_digits().data[np.random.default_rng(0).permutation(1797)]
    train, test = images[:1497], images[1497:]
    inked = train.var(axis=0) > 0.5
    return train, test, inked


@dataclass
class FactorModel:
    """z ~ N(0, I), x ~ N(μ + W z, diag(ψ)), with W, μ, ψ of highest likelihood."""

    mu: torch.Tensor
    weights: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def fit(cls, x):
        """Fit by scikit-learn; a rotation then correlates the factors without changing the likelihood."""
        fitted = FactorAnalysis(FACTORS, svd_method="lapack", tol=1e-6, max_iter=5000).fit(x)
        rotation = ortho_group.rvs(FACTORS, random_state=0)
        arrays = (fitted.mean_, fitted.components_.T @ rotation, fitted.noise_variance_)
        return cls(*(torch.tensor(a, dtype=torch.float32) for a in arrays))

    def __call__(self, x):
        """The Pyro model."""
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
            pixels = dist.Normal(self.mu + z @ self.weights.T, self.noise.sqrt())
            pyro.sample("x", pixels.to_event(1), obs=x)

    def exact(self, x):
        """Exact log evidence, posterior means ``(B, 16)`` and standard deviations ``(16,)``."""
        mu, weights, noise = self.mu.double(), self.weights.double(), self.noise.double()
        precision = torch.eye(FACTORS) + weights.T @ (weights / noise[:, None])
        covariance = torch.linalg.inv(precision)
        marginal = torch.distributions.LowRankMultivariateNormal(mu, weights, noise)
        mean = (x.double() - mu) / noise @ weights @ covariance
        return marginal.log_prob(x.double()).mean(), mean, covariance.diagonal().sqrt()

    def best_diagonal_gap(self):
        """How far below the evidence the best diagonal normal stays, in nats per image."""
        weights = self.weights.double()
        precision = torch.eye(FACTORS) + weights.T @ (weights / self.noise.double()[:, None])
        return 0.5 * (precision.diagonal().log().sum() - precision.logdet())


class DecoderModel(nn.Module):
    """z ~ N(0, I), pixels ~ Binomial(16, sigmoid(network(z)))."""

    def __init__(self, pixels):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FACTORS, 128), nn.SiLU(), nn.Linear(128, pixels))

    def forward(self, x):
        """The Pyro model."""
        pyro.module("decoder", self.network)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
            pixels = dist.Binomial(16, logits=self.network(z))
            pyro.sample("x", pixels.to_event(1), obs=x)


def train(model, family, x, steps, batch=128):
    """Plain SVI on minibatches."""
    guide = AmortizedGuide(model, family=family).setup(x)
    adam = optim.Adam({"lr": 1e-2}, schedule=lambda step: min(1.0, 2.0 - 2.0 * step / steps))
    svi = SVI(model, guide, adam, Trace_ELBO())
    for _ in range(steps):
        svi.step(x[torch.randint(len(x), (batch,))])
    return guide


@torch.no_grad()
def mean_elbo(model, guide, x, repeats=50):
    """The ELBO in nats per image."""
    elbo = Trace_ELBO()
    return -np.mean([elbo.loss(model, guide, x) for _ in range(repeats)]) / len(x)


def normal_moments(guide, x):
    """Means and standard deviations of q, in closed form: its quantiles are those of a normal."""
    low, middle, high = guide.quantiles([0.15865525, 0.5, 0.84134475], x)["z"]
    return middle.double(), ((high - low) / 2).double()


def errors(guide, x, mean, sd):
    """Errors of q's means, in exact standard deviations, and of its standard deviations, relative."""
    q_mean, q_sd = normal_moments(guide, x)
    return ((q_mean - mean) / sd).abs(), (q_sd / sd - 1).abs()


def factor_report(x_train, x_test, steps):
    """Fit the factor model with every family and compare with the exact answer."""
    model = FactorModel.fit(x_train.numpy())
    evidence, mean, sd = model.exact(x_test)
    ceiling = {DiagonalNormal: evidence - model.best_diagonal_gap(), FullRankNormal: evidence}
    print(f"\nFactor model, {len(x_test)} held-out images. Exact log evidence {evidence:.3f} nats per image")
    columns = ("family", "ELBO", "best possible", "error of means, in sd", "error of sds")
    print("{:24s}{:>10s}{:>15s}{:>32s}{:>28s}".format(*columns))
    guides = {}
    for family in FAMILIES:
        guide = guides[family] = train(model, family, x_train, steps)
        mean_error, sd_error = errors(guide, x_test, mean, sd)
        best = ceiling.get(type(family))
        print(
            f"{family_name(family):24s}{mean_elbo(model, guide, x_test):10.3f}"
            f"{'-' if best is None else f'{best:.3f}':>15s}"
            f"{f'median {mean_error.median():.4f}, worst {mean_error.max():.3f}':>32s}"
            f"{f'median {sd_error.median():.1%}, worst {sd_error.max():.1%}':>28s}"
        )
    return guides


def decoder_report(x_train, x_test, steps):
    """Fit the decoder network jointly with an encoder of every family."""
    print(f"\nDecoder network, {len(x_test)} held-out images")
    print(f"{'family':24s}{'ELBO':>10s}")
    fitted = None
    for family in FAMILIES:
        pyro.clear_param_store()  # "decoder" names a new network
        torch.manual_seed(0)
        model = DecoderModel(x_train.shape[-1])
        fitted = model, train(model, family, x_train, steps)
        print(f"{family_name(family):24s}{mean_elbo(*fitted, x_test):10.3f}")
    return fitted


def family_name(family):
    """``LowRankNormal(4)`` for ``LowRankNormal(rank=4, stick_the_landing=True)``."""
    rank = getattr(family, "rank", "")
    return f"{type(family).__name__}({rank})"


@torch.no_grad()
def draw_figure(model, guide, x, inked, path):
    """Images, posterior mean reconstructions, and the standard deviation over posterior draws."""
    import matplotlib.pyplot as plt

    z = guide.posterior(x, num_draws=200).draws["z"]
    pixels = 16 * torch.sigmoid(model.network(z))
    rows = {"image": x, "one draw": pixels[0], "mean of 200": pixels.mean(0), "sd of 200": pixels.std(0)}
    figure, axes = plt.subplots(len(rows), len(x), figsize=(len(x), 4.2))
    for axis_row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axis_row, images, strict=True):
            canvas = np.zeros(64)
            canvas[inked] = image.numpy()
            axis.imshow(canvas.reshape(8, 8), cmap="gray_r", vmin=0, vmax=4 if "sd" in label else 16)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(steps, output):
    """Run everything; files go to ``output``."""
    pyro.set_rng_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    train_pixels, test_pixels, inked = load_images()
    x_train, x_test = (torch.tensor(p[:, inked], dtype=torch.float32) for p in (train_pixels, test_pixels))

    guides = factor_report(x_train, x_test, steps)
    idata = to_arviz(guides[FAMILIES[-1]].posterior(x_test[:20], num_draws=1000))
    idata.to_netcdf(str(output / "digits.nc"))
    decoder, guide = decoder_report(x_train, x_test, steps)
    draw_figure(decoder, guide, x_test[:12], inked, output / "digits.png")
    print(f"\nSaved in {output}: digits.nc (posterior draws of 20 images, for ArviZ) and digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="training steps per fit")
    parser.add_argument("--output", type=Path, default=Path("examples/output"))
    parser.add_argument("--short", action="store_true", help="10 steps only: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # layers this small are slower on several threads
    main(10 if arguments.short else arguments.steps, arguments.output)
