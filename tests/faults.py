"""Faults planted on purpose, each of which a test must catch: ``python -m tests.faults``.

A fault is one small change of the package's text. It is planted in a copy, and the fast tests named with it
(or, with ``--all``, all fast tests up to the first failure) are run against the copy. A fault that survives
means that a test is missing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "Fault"]

ROOT = Path(__file__).parents[1]
COPIED = ("pyro_guides", "tests", "docs", "examples", "conftest.py", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Fault:
    """A change of one place of the package, and the fast tests that are to notice.

    Attributes:
        name: what goes wrong.
        file: where, inside of the package.
        right: the text there, which occurs once.
        wrong: what takes its place.
        tests: arguments of pytest.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the text to change does not occur once.
        """
        if (count := text.count(self.right)) != 1:
            raise ValueError(f"{self.name}: the text to change occurs {count} times in {self.file}")
        return text.replace(self.right, self.wrong)


# fmt: off
FAULTS = (
    Fault("dropped Jacobian", "distributions/sites.py",
        "return jacobian.flatten(batch_dim).sum(-1) if jacobian.dim() > batch_dim else jacobian",
        "return 0.0 * (jacobian.flatten(batch_dim).sum(-1) if jacobian.dim() > batch_dim else jacobian)",
        ("tests/test_elbo.py",)),
    Fault("Jacobian dropped from given values", "distributions/sites.py",
        "        log_prob = -self._log_jacobian(value)\n",
        "        log_prob = 0.0 * self._log_jacobian(value)\n", ("tests/test_posterior.py",)),
    Fault("wrong sign of log q", "posterior/posterior.py",
        "log_weights = self.log_p - self.log_q", "log_weights = self.log_p + self.log_q",
        ("tests/test_posterior.py", "tests/test_repair.py")),
    Fault("missing plate scale", "structure/description.py",
        "return self.size / self.batch if self.subsampled else 1.0", "return 1.0",
        ("tests/test_posterior.py", "tests/test_elbo.py")),
    Fault("detached context", "calls.py",
        "context = joined(contexts) if contexts else None",
        "context = joined(contexts).detach() if contexts else None",
        ("tests/test_gradients.py", "tests/test_encoders.py")),
    Fault("swapped slices", "distributions/sites.py",
        "return u if len(self.bounds) == 1 else u[..., slice(*self.bounds[name])]",
        "return u if len(self.bounds) == 1 else u.flip(-1)[..., slice(*self.bounds[name])]",
        ("tests/test_elbo.py",)),
    Fault("a mixture's score function left out", "distributions/mixture.py",
        "score if self.control is None else self.control(score), entropy_term)", "0.0, entropy_term)",
        ("tests/test_contract.py",)),
    Fault("landing stuck at the wrong term", "distributions/vector.py",
        "return score_parts(log_prob, self.path_log_prob(detach_provenance(value), origin, log_prob))",
        "return score_parts(log_prob, log_prob.detach())", ("tests/test_contract.py",)),
    Fault("stale draw reused", "distributions/vector.py",
        "if self._drawn is not None and self._drawn[0].matches(value):", "if self._drawn is not None:",
        ("tests/test_contract.py",)),
    Fault("biased initialization", "families/normal.py",
        "[loc, raw_scale(torch.full_like(loc, scale))", "[loc + 0.1, raw_scale(torch.full_like(loc, scale))",
        ("tests/test_families.py",)),
    Fault("rank off by one", "diagnostics/comparison.py",
        "return self.below + (chance * (self.equal + 1)).long()",
        "return self.below + 1 + (chance * (self.equal + 1)).long()", ("tests/test_calibration.py",)),
    Fault("tail of k-hat too short", "statistics/psis.py",
        "3 * math.sqrt(num_draws / r_eff)", "2 * math.sqrt(num_draws / r_eff)", ("tests/test_psis.py",)),
    Fault("mask ignored", "distributions/vector.py",
        "        if self.scored is not None:\n            terms = torch.where",
        "        if self.scored is None:\n            terms = torch.where", ("tests/test_masks.py",)),
    Fault("resampling without weights", "posterior/weighing.py",
        "weights = smoothed(posterior.log_weights)[0].double().exp()",
        "weights = torch.ones_like(posterior.log_weights).double()", ("tests/test_repair.py",)),
    Fault("inputs not standardized", "encoders/standardize.py",
        "        self.mean = mean\n", "        self.mean = torch.zeros_like(mean)\n",
        ("tests/test_encoders.py",)),
    Fault("checkpoint forgets the random state", "training/randomness.py",
        '    _restore({**saved, "numpy": numpy, ', '    _ = ({**saved, "numpy": numpy, ',
        ("tests/test_survival.py",)),
)
# fmt: on


def main() -> int:
    """Plant every fault in turn, and tell which tests notice."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--all", action="store_true", help="run all fast tests, not those named")
    options.add_argument("--only", default="", help="a part of the names of faults")
    chosen = options.parse_args()
    faults = [fault for fault in FAULTS if chosen.only in fault.name]
    print("| fault | caught by | seconds |\n| --- | --- | ---: |")
    caught = 0
    for fault in faults:
        begun = time.perf_counter()
        by = caught_by(fault, () if chosen.all else fault.tests)
        caught += bool(by)
        print(f"| {fault.name} | {by or '**nothing**'} | {time.perf_counter() - begun:.0f} |", flush=True)
    print(f"\n{caught}/{len(faults)} caught")
    return int(caught < len(faults))


def caught_by(fault: Fault, tests: tuple[str, ...]) -> str:
    """The first test that fails once the fault is planted; empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            clone = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            clone(ROOT / name, copy / name)
        target = copy / "pyro_guides" / fault.file
        target.write_text(fault.planted(target.read_text()))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        run = subprocess.run([*command, *tests], cwd=copy, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"the tests against '{fault.name}' did not run:\n{run.stdout[-2000:]}")
    failed = re.findall(r"^FAILED (?:tests/)?(\S+)", run.stdout, flags=re.MULTILINE)
    return f"`{failed[0].split('[')[0]}`" if run.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
