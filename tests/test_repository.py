"""Promises about the repository itself: imports, side effects, safety and size."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_guides"

# layer -> the layers it may import when it is imported itself
ARROWS = {
    "distributions": set(),
    "layers": set(),
    "naming": set(),
    "optim": set(),
    "variables": set(),
    "export": {"variables"},
    "netcdf": {"export", "variables"},
    "statistics": set(),
    "arguments": {"statistics"},
    "vectorized": set(),
    "structure": {"distributions"},
    "encoders": {"arguments", "layers"},
    "heads": {"layers"},
    "refinement": {"heads"},
    "families": {"arguments", "distributions", "layers"},
    "enumeration": set(),
    "conditional": {"distributions", "families", "heads"},
    "inputs": {"structure"},
    "particles": set(),
    "plates": {"structure"},
    "groups": {"distributions", "structure"},
    "turns": {"groups", "structure"},
    "links": {"groups", "structure", "turns"},
    "encoding": {"encoders", "inputs", "structure"},
    "amortizing": {"encoders", "encoding", "groups", "inputs", "structure", "turns"},
    "network": {
        "conditional",
        "distributions",
        "encoding",
        "families",
        "groups",
        "heads",
        "layers",
        "links",
        "refinement",
        "structure",
        "turns",
    },
    "controls": {"distributions", "network", "structure"},
    "planning": {
        "amortizing",
        "arguments",
        "controls",
        "distributions",
        "encoding",
        "families",
        "groups",
        "heads",
        "inputs",
        "links",
        "network",
        "structure",
        "turns",
    },
    "promotion": {"controls", "families", "heads", "network", "planning"},
    "calls": {
        "conditional",
        "distributions",
        "encoding",
        "enumeration",
        "families",
        "groups",
        "network",
        "particles",
        "plates",
        "refinement",
        "structure",
        "turns",
    },
    "blocks": {"structure"},
    "scoring": {"blocks", "structure", "vectorized"},
    "posterior": {
        "blocks",
        "distributions",
        "encoding",
        "refinement",
        "scoring",
        "statistics",
        "structure",
        "turns",
        "variables",
    },
    "diagnostics": {
        "distributions",
        "encoding",
        "groups",
        "inputs",
        "posterior",
        "simulating",
        "statistics",
        "structure",
        "variables",
    },
    "simulating": {"inputs", "structure"},
    "objectives": {
        "distributions",
        "guide",
        "inputs",
        "particles",
        "scoring",
        "simulating",
        "structure",
        "turns",
    },
    "plots": {"diagnostics", "posterior", "statistics"},
    "storage": set(),
    "module": {"naming", "network", "planning", "structure"},
    "saving": {"network", "planning", "storage", "structure"},
    "guide": {
        "calls",
        "families",
        "inputs",
        "module",
        "naming",
        "network",
        "planning",
        "plates",
        "promotion",
        "saving",
        "structure",
    },
    "starting": {
        "arguments",
        "distributions",
        "families",
        "groups",
        "guide",
        "heads",
        "network",
        "posterior",
        "structure",
    },
}
# Training is sugar: nothing else may need it.
ARROWS["training"] = {
    "diagnostics",
    "families",
    "groups",
    "guide",
    "heads",
    "layers",
    "network",
    "objectives",
    "planning",
    "plots",
    "promotion",
    "starting",
    "statistics",
    "storage",
    "structure",
    "turns",
}
ARROWS["__init__"] = set(ARROWS)
# layer -> the layers it may also import inside a function, where a cycle does no harm
LAZY_ARROWS = {"guide": {"posterior"}}

NO_TORCH = {"export", "netcdf", "statistics", "variables"}  # it turns NumPy arrays into ArviZ objects
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}
OPTIONAL_PACKAGES = {"arviz", "lightning", "lightning_fabric", "matplotlib", "pandas", "sklearn", "zuko"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def package_files():
    files = {path.relative_to(ROOT): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert files, f"no Python files under {PACKAGE.name}/: these tests would pass on nothing"
    return files


def run_python(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)


# --- the guard of conftest.py

LEAKS = {
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(2)",
    "grad": "torch.set_grad_enabled(False)",
    "torch_validation": "torch.distributions.Distribution.set_default_validate_args(False)",
    "pyro_validation": "pyro.enable_validation(False)",
    "pyro_settings": "pyro.settings.set(module_local_params=True)",
    "handler": "pyro.poutine.block().__enter__()",
    "plate": "pyro.plate('rows', 3).__enter__()",
    "filters": "warnings.simplefilter('ignore')",
}


def test_guard_fails_each_leak_and_only_those(tmp_path):
    tests = LEAKS | {"nothing": "pass"}
    lines = [f"def test_{name}(): {code}" for name, code in tests.items()]
    lines.insert(0, "import pyro, torch, warnings")
    (tmp_path / "test_leaks.py").write_text("\n".join(lines))
    shutil.copy(ROOT / "conftest.py", tmp_path)

    run = run_python("-m", "pytest", "-rE", "-p", "no:cacheprovider", cwd=tmp_path)

    failed = {line.split()[1] for line in run.stdout.splitlines() if line.startswith("ERROR ")}
    assert failed == {f"test_leaks.py::test_{name}" for name in LEAKS}, run.stdout


# --- the direction of imports


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node, package, lazy=False):
    """Yield `(module, lazy)` for all imports below `node` but those for type checkers."""
    for child in node.orelse if is_type_checking(node) else ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else ()
            module = ".".join([*base, *filter(None, [child.module])])
            # `from package import name` may import a module: the name decides.
            yield from ((f"{module}.{alias.name}", lazy) for alias in child.names)
        else:
            yield from imports(child, package, lazy or isinstance(child, FUNCTIONS))


def layer_of(path):
    return path.relative_to("pyro_guides").parts[0].removesuffix(".py")


def forbidden_imports(path, source):
    """List the imports of the file that its layer does not allow."""
    layer = layer_of(path)
    if layer not in ARROWS:
        return [f"{path}: add the layer {layer!r} to ARROWS"]
    found = []
    for module, lazy in imports(ast.parse(source), path.parent.parts):
        top, *rest = module.split(".")
        target = rest[0] if rest and rest[0] in ARROWS else "__init__"
        allowed = {layer} | ARROWS[layer] | (LAZY_ARROWS.get(layer, set()) if lazy else set())
        if top == "pyro_guides" and target not in allowed:
            found.append(f"{path}: {layer} must not import {module}")
        if top in {"torch", "pyro"} and layer in NO_TORCH:
            found.append(f"{path}: {layer} must not import {top}")
    return found


def test_imports_go_one_way():
    files = package_files().items()
    assert not [line for path, source in files for line in forbidden_imports(path, source)]


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("guide.py", "from pyro_guides.structure import a", 0),
        ("guide.py", "from pyro_guides.posterior import Posterior", 1),
        ("guide.py", "from pyro_guides import posterior", 1),
        ("guide.py", "from .posterior import Posterior", 1),
        ("guide.py", "def f():\n  from pyro_guides.posterior import Posterior", 0),
        ("guide.py", "if TYPE_CHECKING:\n  from pyro_guides.posterior import Posterior", 0),
        ("guide.py", "if TYPE_CHECKING:\n  pass\nelse:\n  import pyro_guides.posterior", 1),
        ("guide.py", "from pyro_guides import AmortizedGuide", 1),
        ("families/normal.py", "from .base import Family\nfrom ..distributions import a", 0),
        ("families/normal.py", "from ..guide import AmortizedGuide", 1),
        ("export.py", "import numpy as np", 0),
        ("export.py", "def f():\n  import torch.nn", 1),
        ("__init__.py", "from pyro_guides.guide import AmortizedGuide", 0),
        ("posterior/query.py", "from pyro_guides.training import fit", 1),
        ("unheard_of.py", "", 1),
    ],
)
def test_import_checker_sees_violations(path, source, count):
    assert len(forbidden_imports(Path("pyro_guides", path), source)) == count


IMPORT_PROBE = f"""
import sys
from conftest import snapshot
before = snapshot()
import pyro_guides
after = snapshot()
print(*[name for name in before if before[name] != after[name]])
print(*sorted({OPTIONAL_PACKAGES} & set(sys.modules)))
"""


def test_import_has_no_side_effects():
    run = run_python("-c", IMPORT_PROBE)
    assert run.returncode == 0, run.stderr
    changed, imported = run.stdout.splitlines()
    assert (changed, imported) == ("", "")


# --- safety


def unsafe_code(path, source):
    """List what could run code hidden in a file or a string."""
    tree = ast.parse(source)
    modules = {module for module, _ in imports(tree, path.parent.parts)}
    found = {m for m in modules if m.split(".")[0] in FORBIDDEN_MODULES or m == "torch.load"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.add("torch.load")
        # A bare name only: `network.eval()` is the evaluation mode of a PyTorch module.
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            found.add(node.id)
    return [f"{path}: {name}" for name in sorted(found)]


def test_package_runs_no_hidden_code():
    files = package_files().items()
    assert not [line for path, source in files for line in unsafe_code(path, source)]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("torch.load(path)", 1),
        ("from torch import load", 1),
        ("eval('1')", 1),
        ("exec('1')", 1),
        ("network.eval()\nstore.load(path)", 0),
    ],
)
def test_safety_checker_sees_violations(source, count):
    assert len(unsafe_code(Path("pyro_guides/guide.py"), source)) == count


# --- size


def code_lines(function):
    """Count the lines of a function without its docstring."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return length
    docstring = function.body[0]
    return length - (docstring.end_lineno - docstring.lineno + 1)


def oversized(path, source):
    """List the file and the functions in it that are too long."""
    lines = len(source.splitlines())
    found = [f"{path}: {lines} lines"] if lines > MAX_FILE_LINES else []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    return found + [
        f"{path}:{node.lineno}: {node.name} has {code_lines(node)} lines"
        for node in functions
        if code_lines(node) > MAX_FUNCTION_LINES
    ]


def test_files_and_functions_are_short():
    files = package_files().items()
    assert not [line for path, source in files for line in oversized(path, source)]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 1\n" * MAX_FILE_LINES, 0),
        ("x = 1\n" * (MAX_FILE_LINES + 1), 1),
        ("def f():\n" + "  x = 1\n" * (MAX_FUNCTION_LINES - 1), 0),
        ("def f():\n" + "  x = 1\n" * MAX_FUNCTION_LINES, 1),
        ('def f():\n  """' + "\n" * 80 + '"""\n' + "  x = 1\n" * (MAX_FUNCTION_LINES - 1), 0),
    ],
)
def test_size_checker_sees_violations(source, count):
    assert len(oversized(Path("pyro_guides/guide.py"), source)) == count
