"""Runs the benchmarks: ``python -m tests.benchmarks [--tier full] [--only NAME] [--out FILE.json]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any, get_args

from tests.benchmarks import ledger
from tests.benchmarks.report import Tier, markdown, table

# In the order of the page.
BENCHMARKS = [
    "accuracy",
    "sbibm",
    "rows",
    "speed",
    "flows",
    "judgement",
    "training",
    "gallery",
    "chorales",
]


def main() -> None:
    """Measure, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--tier", choices=get_args(Tier), default="quick", help="ten minutes, or hours")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.json"), help="where the JSON goes")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run these alone")
    options = parser.parse_args()
    failed = [name for name in options.only or BENCHMARKS if not _measure(name, options.tier, options.out)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _measure(name: str, tier: Tier, out: Path) -> bool:
    """Whether a benchmark came to its end; one that does not leaves the others' figures alone."""
    module = _module(name)
    start = time.monotonic()
    try:
        report = module.run(tier)
    except Exception as error:  # noqa: BLE001 - hours of others' work are not lost to one
        print(f"\n## {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    seconds = time.monotonic() - start
    print(f"\n## {name}: {seconds:.0f} s\n\n{markdown(report.results)}", flush=True)
    for shown in report.tables:
        print(f"\n{shown.title}\n\n{table(shown.columns, shown.rows)}\n\n{shown.note}", flush=True)
    if report.results or report.tables:
        ledger.record(out, name, ledger.entry(name, module.__doc__, tier, seconds, report), BENCHMARKS)
    return True


def _module(name: str) -> Any:
    """A benchmark is imported when it runs: some need packages that others do not."""
    return importlib.import_module(f"tests.benchmarks.{name}")


if __name__ == "__main__":
    main()
