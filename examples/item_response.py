"""Five questions of a law school test: how able is a student with this pattern of answers?

1,000 students answered (Bock and Lieberman 1970), in 32 different patterns. Questions have a difficulty
and a slope, learned from all students; each student has an ability, and an encoder reads it off the five
answers. An ability is drawn *given* the questions.

Look at two things. Given the questions at the centre of q, each pattern's exact posterior is an integral
over one number: how far is the encoder off, with a normal and with a flow? And what does the encoder say
of the patterns that training never saw? (The rarest are left out of training.)

    python examples/item_response.py           # two minutes
    python examples/item_response.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save

from pyro_guides import AmortizedGuide, FullRankNormal, NormalizingFlow, fit

RARE = 3  # patterns given by at most so many students are kept from training


def model(answers):
    """Log odds of a right answer: slope * (ability - difficulty)."""
    students = pyro.plate("student", answers.shape[0], dim=-2)
    questions = pyro.plate("question", answers.shape[1], dim=-1)
    with questions:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    with students:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with students, questions:
        pyro.sample("answers", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)


def exact(patterns, difficulty, slope):
    """Log p(answers), mean and sd of the ability of each pattern, given the questions, by quadrature."""
    ability = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    odds = slope * (ability.unsqueeze(-1) - difficulty)
    likelihood = dist.Bernoulli(logits=odds).log_prob(patterns.unsqueeze(1).double()).sum(-1)
    joint = likelihood + dist.Normal(0.0, 1.0).log_prob(ability) + (ability[1] - ability[0]).log()
    evidence = joint.logsumexp(-1)
    weight = (joint - evidence.unsqueeze(-1)).exp()
    mean = weight @ ability
    return evidence, mean, (weight @ ability.square() - mean.square()).sqrt()


def compare(name, local, truth, rare):
    """Errors of the encoder over all patterns, and over those that it never saw."""
    evidence, mean, sd = truth
    gap = evidence - local.elbo.squeeze(-1)
    off = (local.mean()["ability"].squeeze(-1) - mean).abs() / sd
    wrong = (local.sd()["ability"].squeeze(-1) / sd - 1).abs()
    for which, rows in (("seen", ~rare), ("never seen", rare)):
        print(
            f"{name:18s}{which:>12s}{int(rows.sum()):>10d}{float(gap[rows].mean()):>12.4f}"
            f"{float(off[rows].max()):>12.3f}{float(wrong[rows].max()):>10.1%}",
            flush=True,
        )


def draw(local, truth, posterior, patterns, options):
    """Abilities by pattern, least able first, and the questions."""
    _, mean, sd = truth
    order = mean.argsort()
    names = ["".join(str(int(a)) for a in patterns[i]) for i in order]
    figure, (left, right) = canvas(1, 2, width=12, height=4, width_ratios=(3, 1))
    found, spread = (x["ability"].squeeze(-1)[order].numpy() for x in (local.mean(), local.sd()))
    left.errorbar(range(len(names)), mean[order].numpy(), sd[order].numpy(), fmt="k_", label="exact")
    left.errorbar([i + 0.3 for i in range(len(names))], found, spread, fmt=".", label="encoder")
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set(xlabel="answers to five questions, 1 is right", ylabel="ability, mean ± sd")
    left.legend()
    middle, spread = (x["difficulty"].flatten().numpy() for x in (posterior.mean(), posterior.sd()))
    right.errorbar(range(1, 6), middle, spread, fmt="o")
    right.set(xlabel="question", ylabel="difficulty, mean ± sd")
    save(figure, options, "item_response")


def main(options):
    """Train with a normal and a flow, and compare pattern by pattern."""
    data = load("lsat")
    patterns, counts = data["patterns"].float(), data["counts"]
    rare = counts <= RARE
    answers = patterns[~rare].repeat_interleave(counts[~rare], dim=0)
    steps, draws = (3, 100) if options.short else (600, 2000)
    print(f"{len(answers)} students gave {sum(~rare)} patterns; {sum(rare)} rare ones are kept back")
    columns = ("patterns", "number", "gap, nats", "worst mean", "worst sd")
    print("{:18s}{:>12s}{:>10s}{:>12s}{:>12s}{:>10s}".format("family", *columns))
    for family, rate in ((FullRankNormal(), 0.01), (NormalizingFlow(), 0.003)):
        guide = AmortizedGuide(model, family={"student": family, "question": FullRankNormal()})
        fit(model, guide, answers, batch_size=None, max_steps=steps, learning_rate=rate, seed=0)
        posterior = guide.posterior(patterns, num_draws=draws)
        questions = {name: posterior.mean()[name] for name in ("difficulty", "slope")}
        local = posterior.local(questions)
        truth = exact(patterns, questions["difficulty"].double(), questions["slope"].double())
        compare(type(family).__name__, local, truth, rare)
    draw(local, truth, posterior, patterns, options)


if __name__ == "__main__":
    main(begin(__doc__))
