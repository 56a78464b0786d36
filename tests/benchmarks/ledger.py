"""The file of figures: one JSON with what each benchmark found, and the same as a page of Markdown.

Benchmarks are run together or one at a time: each writes its own entry, with the versions, the machine and
the tier that it ran with, and leaves the others as they are.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_guides
from tests.benchmarks.clock import SEED
from tests.benchmarks.report import Report, Result, Tier, markdown, table

__all__ = ["entry", "page", "read", "record"]

INTRODUCTION = """# Benchmarks

Every section names the command that measures it; a note says so if it was run in parts or is not complete.
`make bench-full` runs them all and writes this page and `benchmarks.json`, `make bench` a quick version
of both into `build/`. Spreads (±) are half the distance between quartiles, or standard errors of an ELBO.
A *target* is what the figure was meant to reach; those that were missed are shown like the others.
"""


def entry(name: str, about: str, tier: Tier, seconds: float | None, report: Report) -> dict[str, Any]:
    """What the ledger keeps of one benchmark; without seconds if its parts were run one at a time."""
    return {
        "command": f"python -m tests.benchmarks --tier {tier} --only {name}",
        "about": about.strip(),
        "tier": tier,
        "seconds": None if seconds is None else round(seconds),
        "versions": {
            "pyro_guides": pyro_guides.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": 1,
        "seed": SEED,
        "results": [_finite(asdict(result) | {"verdict": result.verdict}) for result in report.results],
        "tables": [_finite(asdict(shown)) for shown in report.tables],
    }


def read(path: Path) -> dict[str, Any]:
    """All entries so far, by name."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(path: Path, name: str, found: dict[str, Any], order: list[str]) -> None:
    """Put one entry among the others, in the order of the benchmarks, and write the page beside it."""
    entries = read(path) | {name: found}
    entries = {name: entries[name] for name in order if name in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(page(entries))


def page(entries: dict[str, Any]) -> str:
    """The entries as Markdown."""
    return "\n".join([INTRODUCTION, *(_section(name, found) for name, found in entries.items())])


def _section(name: str, found: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    took = "" if found["seconds"] is None else f"{found['seconds'] / 60:.1f} minutes, "
    parts = [
        f"## {name.capitalize()}",
        found["about"],
        f"`{found['command']}`: {took}{found['machine']}, one thread per run, seed {found['seed']}; "
        f"{versions}.",
    ]
    if found["results"]:
        parts.append(markdown([_result(kept) for kept in found["results"]]))
    for shown in found["tables"]:
        parts += [f"### {shown['title']}", table(shown["columns"], shown["rows"])]
        parts += [shown["note"]] * bool(shown["note"])
    return "\n\n".join(parts) + "\n"


def _result(kept: dict[str, Any]) -> Result:
    fields = {name: kept[name] for name in Result.__dataclass_fields__}
    return Result(**fields | {"value": math.nan if kept["value"] is None else kept["value"]})


def _finite(tree: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
