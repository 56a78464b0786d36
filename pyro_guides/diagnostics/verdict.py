"""Says in a few lines what a check has found, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_guides.diagnostics.check import Check

__all__ = ["verdict"]

_LARGE = 0.1  # nats of gap that are worth a word
_RICHER = {
    "DiagonalNormal": "FullRankNormal() or LowRankNormal(r)",
    "LowRankNormal": "FullRankNormal()",
    "FullRankNormal": "NormalMixture(4) or NormalizingFlow()",
    "NormalMixture": "more components, or a NormalizingFlow()",
    "NormalizingFlow": "more transforms",
}


def verdict(check: Check) -> str:
    """A few lines: how many rows can be trusted, what holds the others back, what to do next."""
    lines = [_headline(check)]
    if not check.trained:
        lines.append("The guide was never trained: nothing below is about what it can do.")
    lines += _gaps(check) + _modes(check) + _unfamiliar(check) + _shared(check)
    lines += [f"Note: {note}." for note in check.notes]
    return "\n".join(lines)


def _headline(check: Check) -> str:
    k_hat = check.columns["k_hat"]
    good, count = int(check.trusted.sum()), check.trusted.numel()
    what = f"row{'s' * (count != 1)}" if check.rows else "posterior"
    given = f" given {', '.join(check.held)}" if check.held else ""
    exact = int((k_hat == -torch.inf).sum())
    as_exact = f"; {exact} as good as exact" if exact else ""
    worst = f"worst k_hat {float(k_hat.max()):.2f}, below {check.threshold:.2f} is good"
    if not check.rows:
        return f"The {what}{given} {'can' if good else 'cannot'} be trusted ({worst}{as_exact})."
    return f"{good} of {count} {what}{given} can be trusted ({worst}{as_exact})."


def _gaps(check: Check) -> list[str]:
    possible = check.columns["elbo"].isfinite()
    columns = {name: values[possible] for name, values in check.columns.items()}
    lines = []
    if not bool(possible.all()):
        count = int((~possible).sum())
        lines.append(f"In {count} of {possible.numel()} rows q draws what the model rules out: ELBO −inf.")
    if not bool(possible.any()):
        return lines
    gap = _mean(columns["gap"])
    errors = torch.hypot(columns["bound_error"], columns["elbo_error"]).double()  # of independent rows
    error = float(errors.square().sum().sqrt()) / errors.numel()
    blind = "amortization_gap" not in columns and bool((columns["k_hat"] > check.threshold).any())
    least = "at least " if blind else ""  # a bound from such weights is too low
    unit = "nats per row" if check.rows else "nats"
    elbo = _mean(columns["elbo"])
    line = f"ELBO {elbo:.3f} {unit}, {least}{gap:.3f} below log p(x) (error {error:.3f})"
    if "amortization_gap" not in columns:
        return [*lines, line + "."]
    amortization, family = _mean(columns["amortization_gap"]), _mean(columns["family_gap"])
    lines.append(f"{line}: amortization costs {amortization:.3f}, the family {family:.3f}.")
    if check.settled is False:
        lines.append("Refinement had not settled: the amortization gap is at least that.")
    if max(amortization, family) < _LARGE:
        return lines
    if amortization > family:
        return [*lines, "Next: train longer or with a larger encoder, or posterior.refine() these rows."]
    richer = dict.fromkeys(_RICHER[name] for name in check.families if name in _RICHER)
    return [*lines, f"Next: a richer family, guide.promote({' / '.join(richer)}), or posterior.resample()."]


def _modes(check: Check) -> list[str]:
    missing = check.columns.get("missing")
    if missing is None or not bool((missing > 0).any()):
        return []
    rows = int((missing > 0).sum())
    share = float(missing[missing > 0].mean())
    who = f"In {rows} of {missing.numel()} rows q" if check.rows else "q"
    return [
        f"{who} has lost modes that hold {share:.0%} of the posterior; k_hat cannot see it.",
        "Next: NormalMixture(K) with at least as many components as modes, or restarts.",
    ]


def _unfamiliar(check: Check) -> list[str]:
    p_values = check.columns.get("familiarity")
    if p_values is None:
        return []
    strange = torch.nonzero(p_values.reshape(-1) < 0.01).reshape(-1).tolist()
    if not strange:
        return []
    first = ", ".join(map(str, strange[:5])) + (" and more" if len(strange) > 5 else "")
    are = "row is" if len(strange) == 1 else "rows are"
    return [
        f"{len(strange)} {are} unlike those of training (1 % would be by chance): {first}.",
        "Next: refine them, or train on such rows, too.",
    ]


def _shared(check: Check) -> list[str]:
    if not check.shared:
        return []
    k_hat, size, count = (check.shared[name] for name in ("k_hat", "effective_size", "num_draws"))
    names = ", ".join(check.held)
    line = f"Shared latents ({names}): k_hat {k_hat:.2f}, {size:.0f} of {count} draws effective."
    if k_hat < check.threshold:
        return [line]
    return [
        line,
        "Next: train longer, or a richer family for these. This compares q with their posterior given these "
        "rows: if they are not those of training, judge the rows alone, and these on training rows.",
    ]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
