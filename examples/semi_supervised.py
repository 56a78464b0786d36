"""Digits with few labels: what are 4,000 images without labels worth?

Kingma and others (2014): a digit ``y`` and a style ``z`` make an image. In batches with labels y is
observed; in all others it is a discrete latent that ``TraceEnum_ELBO`` sums out. One guide serves both,
``order=["y", "z"]``: q(y | x) q(z | x, y). The ELBO never trains q(y | x) on the labels themselves, as y
is not drawn there; the usual remedy, a term log q(y | x) on labelled images, is one more line.

Look at the accuracy on test images as labels get fewer, beside a logistic regression that knows the
labelled images only: without labels little is gained. The picture says why: rows are the styles of
images, columns digits, and a style that is free to say all says which digit it is, too.

    python examples/semi_supervised.py           # two minutes
    python examples/semi_supervised.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import avg_pool2d, one_hot

from pyro_guides import AmortizedGuide, Discrete

STYLES, SIDE, BATCH = 8, 14, 128


class Digits(nn.Module):
    """z ~ N(0, I), y ~ one of ten, pixel ~ Bernoulli(network(z, y))."""

    def __init__(self):
        super().__init__()
        self.of_style, self.of_digit = nn.Linear(STYLES, 128), nn.Linear(10, 128)
        self.pixels = nn.Sequential(nn.SiLU(), nn.Linear(128, SIDE * SIDE))

    def decode(self, z, y):
        """Logits of the pixels."""
        return self.pixels(self.of_style(z) + self.of_digit(y))

    def forward(self, x, y=None):
        """The Pyro model."""
        pyro.module("digits", self)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(STYLES), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.full((10,), 0.1)), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z, y)).to_event(1), obs=x)


def images(training, held_out):
    """Black and white images of 14 x 14, and one-hot labels: for training, and for tests."""
    data = load("mnist")
    x = (avg_pool2d(data["images"].float(), 2) > 100).float().flatten(1)
    y = one_hot(data["labels"], 10).float()
    train = torch.randperm(9997)[:training]  # the file has these sorted by digit
    return (x[train], y[train]), (x[-held_out:], y[-held_out:])


def log_q_of_labels(guide, x, y):
    """Log q(y | x), with gradients: the guide's own site, at the labels."""
    trace = poutine.trace(poutine.condition(guide, {"y": y})).get_trace(x)
    return trace.nodes["y"]["fn"].log_prob(y)


def train(labels, data, steps):
    """Batches with and without labels in turn; the first ``labels`` images have one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    (x, y), model = data, Digits()
    summed = {"y": Discrete(enumerate="parallel")}
    guide = AmortizedGuide(model, order=["y", "z"], family=summed).setup(x)
    # Pyro warns of batches in which nothing is left to sum over: here, those with labels.
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    parameters = [*model.parameters(), *guide.parameters()]
    adam = torch.optim.Adam(parameters, lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, total_iters=steps)
    for _ in range(steps):
        known, unknown = torch.randint(labels, (BATCH // 2,)), torch.randint(len(x), (BATCH,))
        loss = elbo.differentiable_loss(model, guide, x[unknown]) / BATCH
        loss = loss + elbo.differentiable_loss(model, guide, x[known], y[known]) / BATCH
        loss = loss - 20 * log_q_of_labels(guide, x[known], y[known]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    return model, guide


@torch.no_grad()
def accuracy(guide, x, y):
    """How often the most probable digit is the right one."""
    chances = torch.stack([log_q_of_labels(guide, x, d.expand(len(x), -1)) for d in torch.eye(10)], -1)
    return float((chances.argmax(-1) == y.argmax(-1)).float().mean())


def draw(model, guide, accuracies, x, options):
    """Accuracy against labels, and the styles of a few images in all ten digits."""
    with torch.no_grad():
        z = guide.posterior(x, num_draws=100).mean()["z"]
        rows = [
            torch.cat([image.reshape(SIDE, SIDE), *decoded(model, style)], dim=1)
            for image, style in zip(x, z, strict=True)
        ]
    figure, (curve, grid) = canvas(1, 2, width=10, height=3.4, width_ratios=(2, 3))
    labels = list(accuracies)
    for name, values in zip(
        ("with images without labels", "labelled images only"),
        zip(*accuracies.values(), strict=True),
        strict=True,
    ):
        curve.semilogx(labels, values, "o-", label=name)
    curve.set(xlabel="labels", ylabel="accuracy on test images", xticks=labels, xticklabels=labels)
    curve.legend()
    grid.imshow(torch.cat(rows).numpy(), cmap="gray_r")
    grid.set(title="an image, and its style in ten digits", xticks=[], yticks=[])
    save(figure, options, "semi_supervised")


def decoded(model, style):
    """One style as each of the ten digits."""
    return torch.sigmoid(model.decode(style.expand(10, -1), torch.eye(10))).reshape(10, SIDE, SIDE)


def main(options):
    """Fewer and fewer labels."""
    counts, training, held_out, steps = (
        ((30,), 200, 50, 1) if options.short else ((50, 200, 1000), 4000, 2000, 500)
    )
    data, (x, y) = images(training, held_out)
    print(f"{training} images, some with labels; accuracy on {held_out} others")
    print(f"{'labels':>8s}{'with the others':>18s}{'labelled only':>16s}")
    accuracies = {}
    for labels in counts:
        model, guide = train(labels, data, steps)
        known, digits = data[0][:labels].numpy(), data[1][:labels].argmax(-1).numpy()
        alone = LogisticRegression(max_iter=300).fit(known, digits)
        accuracies[labels] = accuracy(guide, x, y), alone.score(x.numpy(), y.argmax(-1).numpy())
        print(f"{labels:8d}{accuracies[labels][0]:18.1%}{accuracies[labels][1]:16.1%}", flush=True)
    draw(model, guide, accuracies, x[:6], options)


if __name__ == "__main__":
    main(begin(__doc__))
