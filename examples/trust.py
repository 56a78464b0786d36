"""Can I trust it? Amortized posteriors of handwritten digits, judged as if nobody knew the exact answer.

It is known: this is the factor model of quickstart.py, so that every verdict can be compared with the truth.

1. *Check* two guides image by image: a diagonal family must cost 2.133 nats, a full-rank one nothing.
2. *Calibrate* both on images that the model itself draws.
3. Show one of them images unlike those of training.
4. *Refine* what an encoder that was hardly trained says of single images.
5. Hand draws, predictions and the prior to ArviZ, and draw everything.

    python examples/trust.py             # about a minute
    python examples/trust.py --short     # 20 steps only
"""

import argparse
from pathlib import Path

import pyro
import torch
from quickstart import FactorModel, family_name, load_images

from pyro_guides import (
    AmortizedGuide,
    DiagonalNormal,
    Familiarity,
    FullRankNormal,
    calibrate,
    check,
    fit,
    plots,
    to_arviz,
)

DIAGONAL, FULL = DiagonalNormal(), FullRankNormal()
JUDGED, SHOWN = 100, 20  # of the images that training never saw


def trained(model, family, x, steps):
    """A guide, and how its training went; images held out of ``x`` choose the weights."""
    guide = AmortizedGuide(model, family=family)
    return guide, fit(model, guide, x, max_steps=steps, seed=0)


def check_report(model, x_train, x_test, steps):
    """A verdict on each image from both guides, and what they find beside the exact answer."""
    evidence, _, _ = model.exact(x_test)
    exact_gaps = {DIAGONAL: model.best_diagonal_gap(), FULL: 0.0}
    guides, results, checks = {}, {}, {}
    for family, exact_gap in exact_gaps.items():
        name = family_name(family)
        print(f"\n--- {name}, {len(x_test)} held-out images")
        guides[name], results[name] = trained(model, family, x_train, steps)
        posterior = guides[name].posterior(x_test, num_draws=1000)
        checks[name] = found = check(posterior, training=Familiarity(guides[name], x_train))
        bound, gap = (found.columns[column].mean() for column in ("bound", "family_gap"))
        print(f"Log p(x): {bound:.3f} found, {evidence:.3f} exact. ", end="")
        print(f"Family gap: {gap:.3f} found, {exact_gap:.3f} exact.")
    return guides, results, checks


def calibration_report(guides, x):
    """Are true latents of images that the model draws where each guide says?"""
    print("\n--- Images that the model draws, so that their latents are known")
    calibrations = {name: calibrate(guide.posterior(x)) for name, guide in guides.items()}
    for name, calibration in calibrations.items():
        print(f"{name}: {calibration}")
    return calibrations


def inversion_report(model, guide, x_train, x_test):
    """A verdict on images unlike those of training."""
    print(f"\n--- FullRankNormal(), {len(x_test)} of these images inverted")
    inverted = 16.0 - x_test
    posterior = guide.posterior(inverted, num_draws=1000)
    found = check(posterior, training=Familiarity(guide, x_train))
    print(f"Log p(x): {found.columns['bound'].mean():.3f} found, {model.exact(inverted)[0]:.3f} exact.")


def refinement_report(model, x_train, x_test, steps):
    """What the best q of the same family gains for images that an encoder reads badly."""
    print(f"\n--- FullRankNormal() after {steps} steps of training, {len(x_test)} held-out images")
    guide, _ = trained(model, FULL, x_train, steps)
    amortized = guide.posterior(x_test, num_draws=1000)
    refined = amortized.refine()
    evidence, _, _ = model.exact(x_test)
    for name, posterior in (("encoder", amortized), ("refined", refined)):
        below, k_hat = evidence - posterior.elbo.mean(), posterior.k_hat.max()
        print(f"{name}: {below:.3f} nats below the exact log p(x), worst k_hat {k_hat:.2f}")
    print(f"gain as measured: {refined.gain.value.mean():.3f} nats per image")


def draw_figure(result, checks, exact_gap, calibration, posterior, path):
    """Training, trust, calibration, and what was learned, in one figure."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, 4)
    result.plot(axes[0, 0])
    for ax, (name, found) in zip(axes[0, 1:3], checks.items(), strict=True):
        plots.k_hat(found, ax).set_title(name)
    plots.gaps(checks, axes[0, 3]).axhline(exact_gap, color="k", linestyle=":")
    axes[0, 3].set_title("dotted: the exact family gap", fontsize="medium")
    plots.ranks(calibration, axes[1, 0])
    plots.coverage(calibration, axes[1, 1])
    place = axes[1, 2].get_subplotspec()
    axes[1, 2].remove()
    plots.prior_posterior(posterior, [f"z[{i}]" for i in range(4)], figure=figure.add_subfigure(place))
    plots.predictive(posterior, ax=axes[1, 3])
    figure.savefig(path, dpi=75)
    plt.close(figure)


def main(steps, output):
    """Run everything; files go to ``output``."""
    pyro.set_rng_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    train_pixels, test_pixels, inked = load_images()
    x_train, x_test = (torch.tensor(p[:, inked], dtype=torch.float32) for p in (train_pixels, test_pixels))
    x_test, x_few = x_test[:JUDGED], x_test[:SHOWN]
    model, name = FactorModel.fit(x_train.numpy()), family_name(FULL)

    guides, results, checks = check_report(model, x_train, x_test, steps)
    calibrations = calibration_report(guides, x_test)
    inversion_report(model, guides[name], x_train, x_few)
    refinement_report(model, x_train, x_few, max(1, steps // 50))

    posterior = guides[name].posterior(x_few, num_draws=1000)
    to_arviz(posterior, posterior.predict(), posterior.prior(200)).to_netcdf(str(output / "trust.nc"))
    gap = model.best_diagonal_gap()
    draw_figure(results[name], checks, gap, calibrations[name], posterior, output / "trust.png")
    print(f"\nSaved in {output}: trust.nc (posterior, predictions and prior, for ArviZ) and trust.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="training steps per fit")
    parser.add_argument("--output", type=Path, default=Path("examples/output"))
    parser.add_argument("--short", action="store_true", help="20 steps only: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # layers this small are slower on several threads
    main(20 if arguments.short else arguments.steps, arguments.output)
