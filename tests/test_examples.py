"""Every example runs from top to bottom in short mode, prints what it promises, and writes its pictures."""

import re
import runpy
import sys
from pathlib import Path

import pyro
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = {"common.py"}  # what scripts import
ELSEWHERE = {"trust.py": "test_trust.py", "distributed.py": "test_processes.py"}  # tests that run these
# How the line begins that a reader looks for, in regular expressions, and what is written.
NUMBER = r"-?\d+\.\d+"
SCRIPTS = {
    "cells": (rf" +8 states, posterior means +{NUMBER}%", {"cells.png"}),
    "chorales": (rf"Test chorales, .* deep Markov model at most {NUMBER}", {"chorales.png"}),
    "eight_schools": (rf"full rank, not centred +{NUMBER} +{NUMBER}", {"eight_schools.png"}),
    "item_response": (rf"NormalizingFlow +never seen +11 +{NUMBER}", {"item_response.png"}),
    "ladder": (rf"after the climb +{NUMBER}, worst rat {NUMBER}", {"ladder.png"}),
    "plain_svi": (rf"drawn, no baseline +{NUMBER} +{NUMBER}", {"plain_svi.png"}),
    "quickstart": (rf"FullRankNormal\(\) +{NUMBER}", {"digits.png", "digits.nc"}),
    "radon": (rf"worst county +{NUMBER} +{NUMBER}%", {"radon.png"}),
    "semi_supervised": (rf" +30 +{NUMBER}% +{NUMBER}%", {"semi_supervised.png"}),
    "two_moons": (rf"flow +{NUMBER}( +\d+){{6}}", {"two_moons.png"}),
    "vae": (rf"flow +{NUMBER} +{NUMBER} +{NUMBER} +\d of 5", {"vae.png"}),
}
SLOW = {"ladder", "plain_svi", "quickstart", "radon", "two_moons"}


@pytest.fixture
def alone(monkeypatch):
    """Scripts find what they share, and leave nothing of it behind."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def marked(name):
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", [marked(name) for name in SCRIPTS])
def test_example(name, alone, monkeypatch, tmp_path, capsys):
    pyro.set_rng_seed(7)  # scripts set their own seed
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--short", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    line, files = SCRIPTS[name]
    printed = capsys.readouterr().out
    assert re.search(f"^{line}", printed, re.MULTILINE), printed
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_every_script_is_run_and_in_the_gallery():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - SHARED
    assert scripts == {f"{name}.py" for name in SCRIPTS} | set(ELSEWHERE)
    for name, test in ELSEWHERE.items():
        assert Path(name).stem in (EXAMPLES.parent / "tests" / test).read_text()
    for page in (EXAMPLES / "README.md", EXAMPLES.parent / "docs" / "examples.md"):
        assert scripts <= set(re.findall(r"\w+\.py", page.read_text())), page
