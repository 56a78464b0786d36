"""A variational autoencoder of handwritten digits: what does a richer family of q buy?

The model is a decoder network from ten normal latents to 28 x 28 binary pixels. Nobody writes an encoder:
``AmortizedGuide(model, family=...)`` brings it. Model and guide are trained jointly by ``fit``, once for
each of five families, and judged on digits that training never saw.

Look at three columns. The *ELBO* is what was trained. The *bound* (500 weighted draws) is close to log
p(x) of the model that was learned, where k-hat is small. The *gap* between the two is what q loses. It is
small beside what the decoders differ by: each is trained along with its q, and a richer family costs more
and takes longer to get anywhere.

    python examples/vae.py             # four minutes
    python examples/vae.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save
from torch import nn

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    FullRankNormal,
    LowRankNormal,
    NormalizingFlow,
    NormalMixture,
    fit,
)

LATENTS, PIXELS = 10, 28 * 28
FAMILIES = {
    "diagonal": DiagonalNormal(),
    "low rank 3": LowRankNormal(3),
    "full rank": FullRankNormal(),
    "mixture of 4": NormalMixture(4),
    "flow": NormalizingFlow(),
}


class Decoder(nn.Module):
    """z ~ N(0, I), pixel ~ Bernoulli(network(z))."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(LATENTS, 200), nn.SiLU(), nn.Linear(200, PIXELS))

    def forward(self, image):
        """The Pyro model."""
        pyro.module("decoder", self.network)
        with pyro.plate("image", len(image)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=self.network(z)).to_event(1), obs=image)


def digits(training, held_out):
    """Black and white images, a row of pixels each."""
    images = (load("mnist")["images"] > 127).float().flatten(1)
    train = torch.randperm(9997)[:training]  # the file has these sorted by digit
    return images[train], images[-held_out:]


def trained(family, images, steps):
    """A decoder and its guide, from the same seed for every family."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Decoder()
    guide = AmortizedGuide(model, family=family)
    rate = 3e-3 if isinstance(family, NormalizingFlow) else 5e-3  # flows want a lower one
    result = fit(model, guide, images, max_steps=steps, learning_rate=rate, seed=0)
    return model, guide, result


def judge(guide, images, draws):
    """ELBO, a tighter bound on log p(x), and the number of images whose weights can be trusted."""
    posterior = guide.posterior(images, num_draws=draws)
    bound, _ = posterior.bound()
    return posterior.elbo.mean(), bound.mean(), (posterior.k_hat < 0.7).sum()


@torch.no_grad()
def draw(model, guide, images, gaps, options):
    """Digits, their reconstructions, what the prior makes of noise, and the gaps."""
    z = guide.posterior(images, num_draws=200).draws["z"]
    pixels = torch.sigmoid(model.network(z))
    prior = torch.sigmoid(model.network(torch.randn(len(images), LATENTS)))
    rows = {"image": images, "mean": pixels.mean(0), "sd": 2 * pixels.std(0), "prior": prior}
    figure, axes = canvas(1, 2, width=10, height=3.2, width_ratios=(3, 1))
    strips = [torch.cat(list(row.reshape(-1, 28, 28)), dim=1) for row in rows.values()]
    axes[0].imshow(torch.cat(strips).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes[0].set(xticks=[], yticks=[14 + 28 * i for i in range(len(rows))], yticklabels=rows)
    axes[1].barh(list(gaps), list(gaps.values()))
    axes[1].set(xlabel="gap, nats per image", title="what q loses")
    axes[1].invert_yaxis()
    save(figure, options, "vae")


def main(options):
    """Train with every family, print the table, draw."""
    steps, training, held_out, draws = (2, 300, 5, 30) if options.short else (800, 9000, 300, 500)
    images, test = digits(training, held_out)
    print(f"{len(images)} digits, {len(test)} held out; nats per image")
    print(f"{'family':14s}{'ELBO':>10s}{'bound':>10s}{'gap':>8s}{'k_hat < 0.7':>14s}{'seconds':>9s}")
    gaps = {}
    for name, family in FAMILIES.items():
        model, guide, result = trained(family, images, steps)
        elbo, bound, trusted = judge(guide, test, draws)
        gaps[name] = float(bound - elbo)
        print(
            f"{name:14s}{elbo:10.2f}{bound:10.2f}{gaps[name]:8.2f}"
            f"{f'{trusted} of {len(test)}':>14s}{result.seconds:9.0f}",
            flush=True,
        )
    draw(model, guide, test[:14], gaps, options)


if __name__ == "__main__":
    main(begin(__doc__))
