"""Radon in 919 houses of 85 counties: what does a hierarchy know that single counties do not?

Counties have between one house and 116. An index says in which county each house lies; nothing is padded,
and the guide pools the houses of each county with a set encoder (``inputs`` returns the tensors *and* the
index). Means, slopes and spreads that all counties share are learned; the 85 levels are amortized, given
these.

Look at the forest plot. Counties on the left have few houses: least squares per county (no pooling) is
all over the place or has no error at all, while the hierarchy pulls them towards the mean. Stan's long
NUTS run of the same model (posteriordb) is the referee: how far off are means and sds, in its sds?

    python examples/radon.py           # two minutes
    python examples/radon.py --short
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from common import begin, canvas, load, save
from pyro.infer.autoguide import init_to_median, init_to_value

from pyro_guides import AmortizedGuide, DeepSet, fit


def model(floor, uranium, log_radon, county, counties):
    """Each county has its own level; uranium and floor act alike in all of them."""
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    noise = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    mean = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("county", counties):
        alpha = pyro.sample("alpha", dist.Normal(mean, spread))
    with pyro.plate("house", len(county)):
        expected = alpha[..., county] + beta[..., 0] * uranium + beta[..., 1] * floor
        pyro.sample("log_radon", dist.Normal(expected, noise), obs=log_radon)


def houses_by_county(floor, uranium, log_radon, county, counties):
    """What the encoder reads of each house, and where the house lies."""
    return {"floor": floor, "uranium": uranium, "log_radon": log_radon}, county


def no_pooling(beta, floor, uranium, log_radon, county, counties):
    """Mean and standard error of each county's own houses, less what floor and uranium explain."""
    rest = log_radon - beta[0] * uranium - beta[1] * floor
    houses = county.bincount(minlength=counties)
    mean = torch.zeros(counties).index_add(0, county, rest) / houses
    squares = torch.zeros(counties).index_add(0, county, (rest - mean[county]) ** 2)
    return mean, (squares / (houses - 1) / houses).sqrt()  # NaN where there is one house


def stan(data):
    """Stan's means and sds of ``{name: [...]}``."""
    known = zip(data["intercept_names"], data["intercept_mean"], data["intercept_sd"], strict=True)
    return {name.replace("[", " ").strip("]"): (float(mean), float(sd)) for name, mean, sd in known}


def compare(posterior, known):
    """Print the errors of q, in Stan's sds, for what is shared and for the worst county."""
    mean, sd = posterior.mean(), posterior.sd()
    print(f"{'':14s}{'guide':>16s}{'Stan':>16s}{'off by, sd':>12s}{'sd off by':>11s}")
    worst = (0.0, 0.0)
    for name, (exact, exact_sd) in known.items():
        site, _, index = name.partition(" ")
        at = (int(index) - 1,) if index else ()
        found, found_sd = float(mean[site][at]), float(sd[site][at])
        errors = abs(found - exact) / exact_sd, abs(found_sd / exact_sd - 1)
        if site == "alpha":
            worst = tuple(map(max, worst, errors))
        else:
            values = f"{found:8.3f} ± {found_sd:.3f}", f"{exact:8.3f} ± {exact_sd:.3f}"
            print(f"{name:14s}{values[0]:>16s}{values[1]:>16s}{errors[0]:12.2f}{errors[1]:11.1%}")
    print(f"{'worst county':14s}{'':32s}{worst[0]:12.2f}{worst[1]:11.1%}")


def draw(posterior, raw, known, county, options):
    """Every county, those with the fewest houses first."""
    houses = county.bincount()
    order = houses.argsort(stable=True)
    places = torch.arange(len(order)).numpy()
    figure, ax = canvas(1, 1, width=13, height=4)
    low, middle, high = posterior.quantiles([0.05, 0.5, 0.95])["alpha"][:, order].numpy()
    ax.errorbar(places - 0.15, raw[0][order].numpy(), 1.645 * raw[1][order].nan_to_num().numpy(),
                fmt=".", color="0.75", label="no pooling")  # fmt: skip
    ax.errorbar(places + 0.15, middle, (middle - low, high - middle), fmt=".", label="guide, 90 %")
    reference = [known[f"alpha {int(i) + 1}"][0] for i in order]
    ax.plot(places + 0.15, reference, "k_", markersize=5, label="Stan, mean")
    ax.set(xlabel="county, those with few houses first", ylabel="level of log radon", ylim=(-1, 4))
    ax.set_xticks(places[::6], [f"{int(n)}" for n in houses[order][::6]])
    ax.legend(ncols=3)
    save(figure, options, "radon")


def main(options):
    """Fit once, with all houses in every step."""
    data = load("radon")
    houses = data["floor"].float(), data["log_uppm"], data["log_radon"], data["county"], 85
    known = stan(data)
    # Starts where the data are: a level of 1.3 is far from the prior's median, in units of its spread.
    rough = {"mu_alpha": data["log_radon"].mean(), "sigma_y": data["log_radon"].std()}
    begin_at = partial(init_to_value, values=rough, fallback=init_to_median)
    guide = AmortizedGuide(model, DeepSet(16, depth=0), inputs=houses_by_county, init_loc_fn=begin_at)
    steps, draws = (3, 200) if options.short else (2500, 5000)
    result = fit(model, guide, houses, batch_size=None, max_steps=steps, learning_rate=0.02, seed=0)
    posterior = guide.posterior(*houses, num_draws=draws)
    print(f"{sum(p.numel() for p in guide.parameters()):,} parameters, {result.seconds:.0f} s of training")
    compare(posterior, known)
    raw = no_pooling(posterior.mean()["beta"], *houses)
    inside = ((raw[0] - posterior.mean()["alpha"]).abs() / posterior.sd()["alpha"])[
        data["county"].bincount() < 4
    ]
    print(f"Counties of fewer than four houses: their own mean lies {inside.mean():.1f} posterior sds away")
    draw(posterior, raw, known, data["county"], options)


if __name__ == "__main__":
    main(begin(__doc__))
