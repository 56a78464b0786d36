"""Eight schools: how does one see that a family is too simple, and what helps?

Effects of coaching in eight schools (Rubin 1981), in the *centred* form whose posterior has a funnel:
where the spread ``tau`` between schools is small, all effects are pulled together. All ten latents have
one data set, so none is amortized; they are drawn jointly in one family where possible.

Look at k-hat of the log weights: above 0.7 the draws are not to be trusted, and no exact answer is needed
to know it. The first four guides do not stay below that: a diagonal normal that ignores how effects hang
on ``tau``, a diagonal and a full-rank normal given ``tau``, a flow. The cure is to write the model without
a centre (Pyro's ``LocScaleReparam``), for which a normal is enough to be weighted, though its tails are
still short. Quadrature over ``mu`` and ``tau``, and NUTS started from the last guide, are the referees.

    python examples/eight_schools.py           # a minute
    python examples/eight_schools.py --short
"""

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, save
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.reparam import LocScaleReparam

from pyro_guides import AmortizedGuide, DiagonalNormal, FullRankNormal, NormalizingFlow, check, fit

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GUIDES = {
    "diagonal, independent": {"family": DiagonalNormal(), "condition_on_upstream": False},
    "diagonal, given tau": {"family": DiagonalNormal()},
    "full rank, given tau": {"family": FullRankNormal()},
    "flow, given tau": {"family": NormalizingFlow()},
    "full rank, not centred": {"family": FullRankNormal()},
}


def model(effects, errors):
    """Schools differ by tau around mu."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effects", dist.Normal(theta, errors), obs=effects)


# The same model with theta = mu + tau * theta_decentered, and a normal of its own for the latter.
not_centred = poutine.reparam(model, {"theta": LocScaleReparam(0.0)})


def exact():
    """Log evidence, and quantiles of tau, by quadrature over mu and log tau; effects are integrated out."""
    mu = torch.linspace(-30.0, 30.0, 401, dtype=torch.float64)[:, None, None]
    log_tau = torch.linspace(-9.0, 6.5, 1501, dtype=torch.float64)[:, None]
    tau = log_tau.exp()
    prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    seen = dist.Normal(mu, (tau**2 + ERRORS**2).sqrt()).log_prob(EFFECTS).sum(-1, keepdim=True)
    joint = (prior + seen).squeeze(-1)
    evidence = joint.flatten().logsumexp(0)
    below = (joint - evidence).exp().sum(0).cumsum(0)
    steps = (mu[1] - mu[0]) * (log_tau[1] - log_tau[0])
    quantiles = tau.squeeze(-1)[torch.searchsorted(below, torch.tensor([0.05, 0.5, 0.95]).double())]
    return float(evidence + steps.log()), quantiles.tolist()


def trained(name, steps):
    """A guide of one of the kinds, trained on all schools at once."""
    pyro.set_rng_seed(0)
    what = not_centred if "not centred" in name else model
    guide = AmortizedGuide(what, amortize=[], **GUIDES[name])
    rate = 3e-3 if name.startswith("flow") else 1e-2
    fit(what, guide, (EFFECTS, ERRORS), batch_size=None, max_steps=steps, learning_rate=rate, seed=0)
    return guide


def funnel(draws):
    """Draws of tau, and of the effect in the first school."""
    if "theta" not in draws:
        return draws["tau"], draws["mu"] + draws["tau"] * draws["theta_decentered"][:, 0]
    return draws["tau"], draws["theta"][:, 0]


def nuts(posterior, draws):
    """Draws by NUTS, which begins at weighted draws of q, with the covariance of q."""
    start = posterior.nuts(full_mass=True)
    mcmc = MCMC(start.kernel, draws, draws // 3, initial_params=start.initial_params, disable_progbar=True)
    mcmc.run(EFFECTS, ERRORS)
    return mcmc.get_samples()


def row(name, tau, elbo=None, k_hat=None):
    """One line of the table."""
    low, middle, high = (float(x) for x in tau)
    judged = f"{elbo:10.3f}{k_hat:8.2f}" if elbo is not None else " " * 18
    print(f"{name:24s}{judged}{low:9.2f}{middle:8.2f}{high:8.2f}", flush=True)


def draw(found, options):
    """Funnels: log tau against the effect of the first school."""
    figure, axes = canvas(1, len(found), width=13, height=2.8, sharex=True, sharey=True)
    for ax, (name, draws) in zip(axes, found.items(), strict=True):
        tau, theta = funnel(draws)
        ax.plot(theta[:1500].numpy(), tau[:1500].log().numpy(), ".", markersize=1.5)
        ax.set_title(name, fontsize="small")
        ax.set(xlabel="theta[0]", xlim=(-30, 50), ylim=(-4, 5))
    axes[0].set_ylabel("log tau")
    save(figure, options, "eight_schools")


def main(options):
    """Each guide against the exact answer."""
    steps, draws, chain = (5, 200, 6) if options.short else (1000, 4000, 300)
    evidence, quantiles = exact()
    print(f"Exact log evidence {evidence:.3f}. Quantiles of tau: 5 %, median, 95 %")
    print(f"{'':24s}{'ELBO':>10s}{'k_hat':>8s}{'5 %':>9s}{'50 %':>8s}{'95 %':>8s}")
    levels = torch.tensor([0.05, 0.5, 0.95])
    found, posteriors = {}, {}
    for name in list(GUIDES)[-1 if options.short else 0 :]:
        posteriors[name] = posterior = trained(name, steps).posterior(EFFECTS, ERRORS, num_draws=draws)
        found[name] = posterior.draws
        row(name, posterior.draws["tau"].quantile(levels), float(posterior.elbo), float(posterior.k_hat))
    found["NUTS"] = nuts(posterior, chain)
    row(f"NUTS, {chain} draws", found["NUTS"]["tau"].quantile(levels))
    row("exact", quantiles)
    for name in sorted(posteriors.keys() & {"full rank, given tau", "full rank, not centred"}):
        print(f"\nWhat check() says of '{name}':", flush=True)
        check(posteriors[name], modes=False, gaps=False)
    draw(found, options)


if __name__ == "__main__":
    main(begin(__doc__))
