"""Bach's chorales: what does a hidden state that moves know about the next chord?

A deep Markov model (Krishnan and others 2017): a latent of 16 numbers moves from quarter note to quarter
note, and a network says which of 88 notes sound. Chorales have 25 to 160 steps; a batch is padded, and
the model masks what lies behind each end. The guide sees numbered sites ``z_1 .. z_T``, makes one encoder
over time and one family for all steps, q(z_t | z_{t-1}, x): its size does not depend on T.

Look at the bound per step beside two baselines: notes that sound as often as they do in training, and
notes that depend on whether they sounded before. Training is minutes here; published models train for a
day (6.9 nats). The picture shows a test chorale, what the model makes of it, and a chorale that the model
makes up.

    python examples/chorales.py           # two to three minutes
    python examples/chorales.py --short
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import DATA, begin, canvas, save
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import softplus

from pyro_guides import AmortizedGuide, DiagonalNormal, optim

NOTES, LATENTS = 88, 16


def chorales(split):
    """The notes (B, T, 88), zero after the end, and the lengths (B,), of train, valid or test."""
    with np.load(DATA / "chorales.npz", allow_pickle=False) as file:
        steps = np.unpackbits(file[split], axis=1, count=NOTES)  # eight notes to a byte
        lengths = torch.as_tensor(file[f"{split}_lengths"].astype(np.int64))
    rows = torch.as_tensor(steps, dtype=torch.float32).split(lengths.tolist())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


class DeepMarkovModel(nn.Module):
    """p(z_t | z_{t-1}) is a step plus a network; p(notes | z_t) another."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(LATENTS))
        self.step = nn.Sequential(nn.Linear(LATENTS, 64), nn.SiLU(), nn.Linear(64, 2 * LATENTS))
        self.emitter = nn.Sequential(nn.Linear(LATENTS, 64), nn.SiLU(), nn.Linear(64, NOTES))

    def forward(self, notes, lengths, warmth=1.0):
        """The Pyro model; ``warmth`` below one counts the latents' densities less, early in training."""
        pyro.module("chorales", self)
        with pyro.plate("chorale", len(notes)):
            z = self.start.expand(len(notes), -1)
            for t in pyro.markov(range(1, notes.shape[1] + 1)):
                change, spread = self.step(z).chunk(2, dim=-1)
                with poutine.mask(mask=lengths >= t):
                    with poutine.scale(scale=warmth):
                        z = pyro.sample(
                            f"z_{t}", dist.Normal(z + change, softplus(spread) + 1e-3).to_event(1)
                        )
                    chord = dist.Bernoulli(logits=self.emitter(z))
                    pyro.sample(f"notes_{t}", chord.to_event(1), obs=notes[:, t - 1])


def batches(data, size=20):
    """Batches of chorales of about equal lengths, each as long as its longest, in random order."""
    notes, lengths = data
    chunks = (lengths + 8 * torch.rand(len(lengths))).argsort().split(size)
    for i in torch.randperm(len(chunks)):
        own = lengths[chunks[i]]
        yield notes[chunks[i], : int(own.max())], own


def train(model, guide, data, epochs):
    """Plain SVI: a warm-up of the latents' terms, a rate that rises and falls."""
    total = epochs * len(list(batches(data)))

    def schedule(step):
        return min(1.0, step / 50, 0.02 + 1.5 * (1 - step / total))

    adam = optim.Adam({"lr": 6e-3}, {"clip_norm": 10.0}, schedule=schedule)
    svi = SVI(model, guide, adam, Trace_ELBO())
    for epoch in range(epochs):
        warmth = min(1.0, 0.1 + 4 * epoch / epochs)
        loss = sum(svi.step(*batch, warmth) for batch in batches(data)) / int(data[1].sum())
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: {loss:.2f} nats per step in training", flush=True)
    return svi


def baselines(train_data, data):
    """Nats per step of notes that are independent, and of notes that depend on themselves a step before."""
    found = []
    for depends in (False, True):
        now, before = steps(train_data)
        seen = [(before == value) | (not depends) for value in (0, 1)]
        rates = [((now * s).sum(0) + 0.5) / (s.sum(0) + 1.0) for s in seen]
        now, before = steps(data)
        chance = torch.where(before == 1, rates[1], rates[0])
        found.append(-float(dist.Bernoulli(chance).log_prob(now).sum(-1).mean()))
    return found


def steps(data):
    """Each step's notes, and those of the step before (silence before the first)."""
    notes, lengths = data
    there = torch.arange(notes.shape[1]) < lengths.unsqueeze(-1)
    before = torch.cat([torch.zeros_like(notes[:, :1]), notes[:, :-1]], dim=1)
    return notes[there], before[there]


@torch.no_grad()
def draw(model, guide, chorale, options):
    """A piano roll, its reconstruction, and one from the prior."""
    length = torch.tensor([chorale.shape[1]])
    posterior = guide.posterior(chorale, length, num_draws=50)
    states = torch.stack([posterior.draws[f"z_{t}"][:, 0] for t in range(1, chorale.shape[1] + 1)], dim=1)
    prior = posterior.prior(1)  # data like these, from the model alone
    made_up = torch.stack([prior[f"notes_{t}"][0, 0] for t in range(1, chorale.shape[1] + 1)])
    rolls = {
        "a test chorale": chorale[0],
        "what the states say of it": torch.sigmoid(model.emitter(states)).mean(0),
        "made up": made_up,
    }
    figure, axes = canvas(1, 3, width=12, height=3.2, sharey=True)
    for ax, (name, roll) in zip(axes, rolls.items(), strict=True):
        ax.imshow(roll.T.numpy(), origin="lower", aspect="auto", cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=name, xlabel="quarter note", ylim=(30, 85))
    axes[0].set_ylabel("note")
    save(figure, options, "chorales")


def main(options):
    """Train, test, draw."""
    epochs = 1 if options.short else 24
    data, test = chorales("train"), chorales("test")
    if options.short:
        data, test = ((notes[:20, :5], lengths[:20].clamp(max=5)) for notes, lengths in (data, test))
    alone, before = baselines(data, test)
    model = DeepMarkovModel()
    guide = AmortizedGuide(model, family=DiagonalNormal())
    guide.setup(data[0][:20], data[1][:20])
    svi = train(model, guide, data, epochs)
    total = sum(svi.evaluate_loss(*batch) for _ in range(4) for batch in batches(test))
    print(
        f"Test chorales, nats per step: notes alone {alone:.2f}, given the step before {before:.2f}, ", end=""
    )
    print(f"deep Markov model at most {total / 4 / int(test[1].sum()):.2f}")
    draw(model, guide, test[0][:1, : min(60, int(test[1][0]))], options)


if __name__ == "__main__":
    main(begin(__doc__))
