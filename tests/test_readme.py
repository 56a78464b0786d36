"""The README's promises: its example runs as written, its links lead somewhere, and it is short."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)  # noqa: S102
    assert names["losses"][-1] < names["losses"][0]
    assert dict(names["idata"].posterior["z"].sizes) == {"chain": 1, "draw": 1000, "row": 7, "z_dim_1": 2}


def test_files_it_links_to_exist():
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_is_short():
    assert len(README.splitlines()) <= 120
