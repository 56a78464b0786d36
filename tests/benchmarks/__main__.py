"""Runs all benchmarks: ``python -m tests.benchmarks [--out benchmarks.json]``."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import pyro
import torch

import pyro_guides
from tests.benchmarks import chorales, flows, gallery, judgement, speed, training
from tests.benchmarks.clock import SEED
from tests.benchmarks.report import markdown

BENCHMARKS = {
    "speed": speed.run,
    "flows": flows.run,
    "judgement": judgement.run,
    "chorales": chorales.run,
    "gallery": gallery.run,
    "training": training.run,
}


def main() -> None:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the JSON goes")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run these alone")
    options = parser.parse_args()
    report = {
        "versions": {
            "pyro_guides": pyro_guides.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seed": SEED,
        "threads": 1,
        "results": {},
    }
    for name in options.only or BENCHMARKS:
        results = BENCHMARKS[name]()
        print(f"\n## {name}\n\n{markdown(results)}", flush=True)
        report["results"][name] = [asdict(result) | {"verdict": result.verdict} for result in results]
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
