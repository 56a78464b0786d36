"""The report, the file of figures, and the command that writes it."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import ledger, report, workers

DOCS = Path(__file__).parents[1] / "docs"


def results():
    return [
        report.Result("a", "X", 0.5, 0.01, target=1.0),
        report.Result("b", "X", 2.0, target=1.0),
        report.Result("c", "X", math.nan, target=1.0),
        report.Result("d", "X", 3.0),
        report.Result("e", "X", 3.0, floor=4.0),
        report.Result("f", "X", 1.0, target=1.05, floor=0.95),
    ]


def test_the_table_shows_every_number_and_verdict():
    assert [result.verdict for result in results()] == ["met", "missed", "missed", "", "missed", "met"]
    lines = report.markdown(results()).splitlines()
    assert lines[2] == "| a | X | 0.5 | 0.01 | ≤ 1 | met |"
    assert lines[6:] == ["| e | X | 3 |  | ≥ 4 | missed |", "| f | X | 1 |  | 0.95 to 1.05 | met |"]


def test_columns_of_numbers_stand_to_the_right():
    shown = report.table(("name", "number"), [("a", 0.123456), ("b", None)])
    assert shown.splitlines()[1:] == ["| --- | ---: |", "| a | 0.1235 |", "| b |  |"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command with two benchmarks, one of which fails."""

    def fail(tier):
        raise RuntimeError("no data")

    shown = report.Table("All", ("a", "b"), [("x", math.inf)], "A note.")
    modules = {
        "good": SimpleNamespace(__doc__="What it is.", run=lambda tier: report.Report(results(), [shown])),
        "bad": SimpleNamespace(__doc__="", run=fail),
    }
    monkeypatch.setattr(command, "BENCHMARKS", list(modules))
    monkeypatch.setattr(command, "_module", modules.get)
    out = tmp_path / "new" / "numbers.json"

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(out), *options])
        command.main()
        return out

    return run


def test_the_command_writes_what_it_measured(run, capsys):
    out = run("--only", "good", "--tier", "full")
    assert "| a | X | 0.5 |" in capsys.readouterr().out
    found = json.loads(out.read_text())["good"]
    assert {"versions", "machine", "seed", "threads", "seconds", "command"} <= found.keys()
    assert found["tier"] == "full"
    assert [kept["value"] for kept in found["results"]] == [0.5, 2.0, None, 3.0, 3.0, 1.0]
    assert "| x |  |" in out.with_suffix(".md").read_text()


def test_one_benchmark_leaves_the_figures_of_others_alone(run):
    out = run("--only", "good")
    kept = json.loads(out.read_text())["good"]
    ledger.record(out, "bad", kept, ["bad", "good"])
    assert list(ledger.read(out)) == ["bad", "good"]
    assert ledger.read(out)["good"] == kept


def test_one_that_fails_is_named_and_does_not_stop_the_rest(run, capsys):
    with pytest.raises(SystemExit, match="failed: bad"):
        run()
    assert "RuntimeError: no data" in capsys.readouterr().err


def test_the_page_of_the_docs_is_that_of_its_figures():
    entries = ledger.read(DOCS / "benchmarks.json")
    assert entries
    assert (DOCS / "benchmarks.md").read_text() == ledger.page(entries)
    assert {found["tier"] for found in entries.values()} == {"full"}


@pytest.mark.slow  # new processes import torch
def test_processes_answer_in_order():
    assert workers.each(math.sqrt, [9.0, 4.0, 1.0], processes=2) == [3.0, 2.0, 1.0]
