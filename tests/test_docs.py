"""The docs' promises: pages run, quotes are real, the reference has all names, links lead somewhere."""

import ast
import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
NAMESPACES = ("pyro_guides", "pyro_guides.objectives", "pyro_guides.optim", "pyro_guides.plots")

# Fast runs look whether every line runs; what is printed after full training is left to the slow ones.
SHORTER = {
    r"max_steps=\d+": "max_steps=4",
    r"for _ in range\(\d+\)": "for _ in range(2)",
    r"num_simulations=1000, num_draws=1000": "num_simulations=100, num_draws=100",
    r", ladder=\[.*?\]": "",
    r"refine\(\)": "refine(max_steps=2)",
    r"MCMC\(start.kernel, 1000, 200": "MCMC(start.kernel, 2, 2",
    r"\bcheck\((.*?)\)( *#.*)?$": r"check(\1, gaps=False, modes=False)",
}


# --- code


def blocks(page):
    """Blocks of Python that run, each with what the page says it prints, if it says so."""
    found = re.findall(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", page, re.DOTALL | re.MULTILINE)
    return [(code, shown or None) for code, shown in found]


def run(page, change=lambda code: code):
    """Run the blocks of a page in one namespace; return what each was said to print, and did print."""
    names, prints = {"__name__": "page"}, []
    for code, shown in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(change(code), "page", "exec"), names)  # noqa: S102
        prints.append((shown, out.getvalue()))
    return prints


def shortened(code):
    return functools.reduce(
        lambda text, rule: re.sub(rule[0], rule[1], text, flags=re.MULTILINE), SHORTER.items(), code
    )


def differences(shown, printed):
    """Where words differ, or numbers by more than a quarter and more than 0.05."""
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    if re.sub(number, "#", shown).split() != re.sub(number, "#", printed).split():
        return [f"said:\n{shown}\nprinted:\n{printed}"]
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    close = lambda a, b: abs(float(a) - float(b)) <= max(0.25 * abs(float(a)), 0.05)  # noqa: E731
    return [f"said {a}, printed {b}" for a, b in pairs if not close(a, b)]


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Figures stay in memory, and files in a folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with mpl.rc_context({"backend": "agg"}):
        yield


WITH_CODE = [name for name, page in PAGES.items() if blocks(page) and name != "index.md"]
TRAINED = ["tutorial.md", "which-family.md"]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", WITH_CODE)
def test_pages_run(name):
    for shown, printed in run(PAGES[name], shortened):
        assert shown is None or printed
        assert shown is None or name in TRAINED or not differences(shown, printed)


def test_home_shows_the_example_that_readme_runs():
    assert blocks(PAGES["index.md"]) == blocks((ROOT / "README.md").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", TRAINED)
def test_pages_print_what_they_say(name):
    for shown, printed in run(PAGES[name]):
        assert shown is None or not differences(shown, printed)


def test_blocks_that_fail_or_print_otherwise_are_told():
    excerpt = "```python no-run\nthis is none\n```\n\n"
    page = f"```python\nx = 1\n```\n\n{excerpt}```python\nprint(x)\n```\n\n```text\n2\n```\n"
    [_, (shown, printed)] = run(page)
    assert differences(shown, printed)
    assert not differences("1.00 nats", "1.04 nats")
    assert differences("1.00 nats", "1.00 bits")
    with pytest.raises(NameError):
        run("```python\nprint(unheard_of)\n```\n")


# --- names


def public_names():
    """Where the package offers each name: in full, but for modules."""
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in getattr(module, "__all__", vars(module)):
            own = getattr(getattr(module, name), "__module__", "").startswith("pyro_guides")
            if own and not name.startswith("_"):
                yield f"{namespace}.{name}"


def documented():
    return set(re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE))


def test_reference_has_every_public_name():
    names = set(public_names())
    assert {"pyro_guides.AmortizedGuide", "pyro_guides.objectives.IWELBO", "pyro_guides.plots.k_hat"} < names
    assert not names - documented()


def test_reference_names_nothing_else():
    for name in documented():
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


# --- messages


def text_of(node):
    """A string as its reader sees it, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages():
    trees = (ast.parse(path.read_text()) for path in (ROOT / "pyro_guides").rglob("*.py"))
    return "\n".join(filter(None, (text_of(node) for tree in trees for node in ast.walk(tree))))


def quotes(page):
    return re.findall(r"^> (.*)$", page, re.MULTILINE)


def test_quoted_messages_are_those_of_the_package():
    said, source = quotes(PAGES["troubleshooting.md"]), messages()
    assert len(said) > 40
    assert not [quote for quote in said if quote not in source]
    assert "a message that nobody gives" not in source


# --- pages


def test_links_lead_to_files():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page):
            assert target.startswith("http") or (DOCS / name).parent.joinpath(target).exists(), (name, target)


def test_every_page_is_in_a_table_of_contents():
    listed = {"index.md"}
    for name, page in PAGES.items():
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
            entries = [line for line in toctree.split() if not line.startswith(":")]
            listed |= {str(Path(name).parent / f"{entry}.md") for entry in entries}
    assert not set(PAGES) - listed


@pytest.mark.slow  # imports all of Sphinx, and torch, in a process of its own
def test_docs_build_without_a_warning(tmp_path):
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "doctrees"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "html"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "IWELBO" in (tmp_path / "html" / "api" / "objectives.html").read_text()
