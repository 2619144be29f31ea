"""The house: who may import whom, what importing costs, and that the documentation's code runs."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import adafactor

PACKAGE = Path(adafactor.__file__).parent
ROOT = Path(__file__).parent.parent

# Each module and what it may import of this package: the ladder of the design.
LADDER = {
    "_hyper": set(),
    "_schedule": {"_hyper"},
    "_plan": {"_hyper", "_rounding"},
    "_rounding": set(),
    "_distributed": {"_hyper", "_plan"},
    "_checks": {"_distributed", "_hyper", "_plan"},
    "_state": {"_distributed", "_hyper", "_plan", "_rounding"},
    "_reports": {"_plan", "backends"},
    "_slot": {"_checks", "_distributed", "_hyper", "_plan", "_rounding", "_state", "backends"},
    "backends": {
        "_hyper",
        "_plan",
        "backends.cpu",
        "backends.reference",
        "backends.sparse",
        "backends.triton",
        "backends.waves",
    },  # the choice is made when it is asked for
    "backends._records": {"_hyper", "_plan", "backends"},
    "backends.cpu": {"_plan", "backends", "backends._records"},
    "backends._triton_kernels": {"backends._records"},
    "backends.triton": {"_hyper", "_plan", "backends", "backends._records", "backends._triton_kernels"},
    "backends.reference": {"_plan", "_rounding", "_schedule", "backends"},
    "backends.sparse": {"backends", "backends.reference"},
    "backends.waves": {"backends", "backends.reference"},
    "_in_backward_guards": set(),
    "_in_backward_turns": set(),
    "_in_backward_ddp": {"_in_backward_turns"},
    "_in_backward_fsdp": {"_distributed", "_in_backward_guards", "_in_backward_turns"},
    "_in_backward": {"_distributed", "_in_backward_ddp", "_in_backward_fsdp", "_in_backward_guards"},
    "_optimizer": {
        "_checks",
        "_distributed",
        "_hyper",
        "_schedule",
        "_plan",
        "_rounding",
        "_state",
        "_reports",
        "_slot",
        "_in_backward",
        "backends",
        "backends.reference",
    },
    "memory": {"_hyper", "_plan"},
    "recipes": set(),
    "compat": {"_hyper", "_optimizer"},
    "integrations": set(),
    "integrations.transformers": {"_optimizer", "compat"},
    "integrations.lightning": {"_in_backward", "_optimizer"},
    "": {"_optimizer", "_plan", "memory", "recipes", "compat"},
}
COMMAND_LINE_ONLY = {"typer", "rich", "matplotlib", "jinja2", "numpy", "safetensors", "PIL", "transformers"}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(path):
    """What a file imports, anywhere in it: (modules of this package, top-level names of others)."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] != "adafactor":
                others.add(name.split(".")[0])
                continue
            inner = name.removeprefix("adafactor").strip(".")
            known = [module for module in LADDER if module and (inner == module or inner.startswith(module + "."))]
            ours.add(max(known, key=len, default=inner))
    return ours, others


LIBRARY = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: module_name(path) or "__init__")
def test_the_import_ladder_holds(path):
    ours, others = imports(path)
    assert ours <= LADDER[module_name(path)]
    trainer = {path.stem} if path.parent.name == "integrations" else set()
    assert not others & COMMAND_LINE_ONLY - trainer


def test_the_ladder_has_no_rung_too_many():
    assert {module_name(path) for path in LIBRARY} == set(LADDER)
    used = {module_name(path): imports(path)[0] for path in LIBRARY}
    assert used == LADDER


def test_importing_adafactor_imports_torch_and_nothing_else():
    code = "import sys, torch; before = set(sys.modules); import adafactor; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in loaded} <= {"adafactor", "torch", "hashlib", "_hashlib", "_blake2"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: module_name(path) or "__init__")
def test_docstring_examples_run(path):
    if path.parent.name == "integrations" and path.stem != "__init__":
        pytest.importorskip(path.stem, reason=f"needs the package {path.stem}")
    module = importlib.import_module(f"adafactor.{module_name(path)}".rstrip("."))
    assert doctest.testmod(module).failed == 0


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


CODE = [
    pytest.param(block, id=f"{page.name}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("block", CODE)
def test_the_documentation_s_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


def test_no_page_has_code_that_no_test_runs():
    fences = {
        (page.name, words) for page in PAGES for words in re.findall(r"^ *```python ?(.*)$", page.read_text(), re.M)
    }
    marked = {(page, words) for page, words in fences if words}
    trainers = {("trainers.md", "accelerate"), ("trainers.md", "lightning")}  # test_trainer_examples.py
    ranks = {
        ("distributed.md", f"torchrun {package}".strip()) for package in ("", "accelerate", "lightning", "torchtitan")
    }
    models = {("models.md", "models")}  # test_cli_models.py
    assert marked == trainers | models | ranks  # test_documentation_ranks.py
    indented = [
        page.name for page in PAGES if re.search(r"^ +```python|^```(py|python3|pycon)\b", page.read_text(), re.M)
    ]
    assert not indented


LINKS = [
    pytest.param(page.parent / target, id=f"{page.name}: {target}")
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for target in sorted(set(re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())))
]


@pytest.mark.parametrize("path", LINKS)
def test_links_of_the_documentation_lead_to_files(path):
    assert path.exists()


def test_the_version_is_that_of_what_is_installed():
    assert adafactor.__version__ == metadata.version("adafactor")
    assert re.match(r"\d+\.\d+\.\d+", adafactor.__version__)


def test_a_source_tree_that_is_not_installed_has_no_version_and_works():
    code = (
        "import torch; from importlib import metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version; import adafactor; print(adafactor.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0+unknown"


def test_public_names():
    for name in ("Adafactor", "plan", "memory", "recipes", "compat"):
        assert hasattr(adafactor, name)
