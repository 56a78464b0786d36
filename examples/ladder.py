"""How rich must the family be? A ladder climbs until the family no longer holds q back.

Thirty young rats were weighed in five weeks (Gelfand and others 1990). Each grows towards a limit,
``weight = start + gain * (1 - exp(-rate * day))``, but five weeks show little of it: a high limit that is
approached slowly looks like a low one that is approached fast. So the posterior of each rat is a curved
ridge. The guide learns from simulated rats and is judged on the real ones.

Look at the family gap at each rung. Start and gain are normal given the rate, so that the exact log
evidence of each rat is an integral over one number: the true gap stands beside the one that ``fit``
measures. The picture shows draws for three rats, on the exact posterior, before and after the climb.

    python examples/ladder.py           # three minutes
    python examples/ladder.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, NormalizingFlow, fit

DAYS = torch.tensor([8.0, 15.0, 22.0, 29.0, 36.0])
NOISE = 5.0  # grams
START, GAIN, LOG_RATE = (80.0, 20.0), (400.0, 150.0), (-3.5, 0.6)  # means and sds of the priors
LADDER = [FullRankNormal(), NormalizingFlow()]


def model(weight):
    """A curve per rat."""
    with pyro.plate("rat", len(weight)):
        start = pyro.sample("start", dist.Normal(*START))
        gain = pyro.sample("gain", dist.Normal(*GAIN))
        rate = pyro.sample("rate", dist.LogNormal(*LOG_RATE))
        grown = 1 - (-rate.unsqueeze(-1) * DAYS).exp()
        curve = start.unsqueeze(-1) + gain.unsqueeze(-1) * grown
        pyro.sample("weight", dist.Normal(curve, NOISE).to_event(1), obs=weight)


def simulated(rats):
    """Weights of rats that the priors draw."""
    trace = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(torch.zeros(rats, 5))
    return trace.nodes["weight"]["value"]


def given_rate(weight, log_rate):
    """Log p(weight, log rate) on a grid (rats, rates), and the normal of the gain there: means and sds."""
    grown = 1 - (-log_rate.exp().unsqueeze(-1) * DAYS.double()).exp()
    covariance = NOISE**2 * torch.eye(5).double() + START[1] ** 2
    gains = GAIN[1] ** 2 * grown
    covariance = covariance + gains.unsqueeze(-1) * grown.unsqueeze(-2)
    rest = weight.double().unsqueeze(1) - START[0] - GAIN[0] * grown
    marginal = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    joint = marginal.log_prob(rest) + dist.Normal(*LOG_RATE).log_prob(log_rate)
    pull = torch.linalg.solve(covariance, gains.unsqueeze(-1)).squeeze(-1)
    variance = GAIN[1] ** 2 - (pull * gains).sum(-1)
    return joint, GAIN[0] + (rest * pull).sum(-1), variance.sqrt()


def exact_evidence(weight):
    """Log p(weight) per rat, by quadrature over the log rate."""
    log_rate = torch.linspace(-9.0, 2.0, 2001, dtype=torch.float64)
    return given_rate(weight, log_rate)[0].logsumexp(-1) + (log_rate[1] - log_rate[0]).log()


def draw(before, after, weight, options):
    """Draws for three rats on the exact density of gain and log rate."""
    log_rate, gain = torch.linspace(-6.0, -1.5, 200).double(), torch.linspace(0.0, 1000.0, 200).double()
    joint, mean, sd = given_rate(weight, log_rate)
    density = (joint.unsqueeze(-1) + dist.Normal(mean.unsqueeze(-1), sd.unsqueeze(-1)).log_prob(gain)).exp()
    figure, axes = canvas(2, 3, width=10, height=6, sharex=True, sharey=True)
    for row, (name, posterior) in zip(axes, (("first", before), ("last", after)), strict=True):
        for rat, ax in enumerate(row):
            exact = density[rat] / density[rat].max()
            ax.contour(log_rate.numpy(), gain.numpy(), exact.T.numpy(), levels=[0.02, 0.2, 0.6], colors="k")
            draws = posterior.draws
            ax.plot(
                draws["rate"][:500, rat].log().numpy(), draws["gain"][:500, rat].numpy(), ".", markersize=2
            )
            ax.set(title=f"rat {rat + 1}, {name} rung", xlim=(-6, -1.5), ylim=(0, 1000))
    axes[1, 1].set_xlabel("log rate")
    axes[1, 0].set_ylabel("gain, grams")
    save(figure, options, "ladder")


def main(options):
    """One guide with the first family, one that climbs."""
    steps, rats, draws = (4, 200, 100) if options.short else (2000, 4000, 2000)
    weight, data = load("rats")["weight"].float(), simulated(rats)
    evidence = exact_evidence(weight)
    settings = {"max_steps": steps, "validation": weight, "learning_rate": 3e-3, "seed": 0}
    first = AmortizedGuide(model, family=DiagonalNormal())
    fit(model, first, data, **settings)
    climbing = AmortizedGuide(model, family=DiagonalNormal())
    result = fit(model, climbing, data, ladder=LADDER[: 1 if options.short else 2], **settings)
    print(f"{'rung':18s}{'steps':>8s}{'ELBO':>10s}{'gap':>8s}  found")
    for rung in result.rungs:
        name, found = rung.family.partition("(")[0], rung.verdict.partition(":")[0]
        print(f"{name:18s}{rung.steps:8d}{rung.elbo:10.3f}{rung.gap:8.3f}  {found}")
    print(f"\nThirty real rats, {result.seconds:.0f} s of climbing; nats below the exact log evidence")
    posteriors = [guide.posterior(weight, num_draws=draws) for guide in (first, climbing)]
    for name, posterior in zip(("first rung alone", "after the climb"), posteriors, strict=True):
        below, worst = evidence - posterior.elbo, posterior.k_hat.max()
        print(f"{name:18s}{below.mean():8.3f}, worst rat {below.max():.3f}, worst k_hat {worst:.2f}")
    draw(*posteriors, weight[:3], options)


if __name__ == "__main__":
    main(begin(__doc__))
