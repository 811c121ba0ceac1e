"""The architecture, enforced: imports go down the floors only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "plaudit"
FLOORS = {
    0: "errors records turns memory pairing rows config settings run checks machine watching feedback statistics "
    "__init__",
    1: "batch numerics losses advantages preferences offline_losses",
    2: "templates data attention layout layers fused backbone reference heads policy loading decoding slots sampler "
    "rewards sources sharding world scratch seq2seq speed budget",
    3: "algorithms comparing asking",
    4: "checkpoint trainer hooks",
    5: "encoding families recipes inference pipeline explain wording outcome plots report cli rm_train bench "
    "trl_arguments trl_shapes people feedback_report labelling versus looping loop_plan loop_page",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
CONFINED = {
    "accelerate": {"world"},
    "peft": {"loading"},
    "matplotlib": {"plots", "feedback_report"},
    "starlette": {"feedback"},
    "uvicorn": {"feedback"},
    "playwright": set(),
    "datasets": {"data"},
    "tyro": {"config"},
    "vaderSentiment": set(),
    "wandb": set(),
    "trl": set(),
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_only: bool = False) -> list[tuple[str, int]]:
    """Dotted names that a file imports, with their lines; type-checking imports count too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [
                (f"{module}.{alias.name}" if module == "plaudit" else module, node.lineno) for alias in node.names
            ]
    return found


def violations(path: Path, found: list[tuple[str, int]]) -> list[str]:
    own = FLOOR[module_of(path)]
    wrong = []
    for name, line in found:
        parts = name.split(".")
        if parts[0] == "plaudit" and len(parts) > 1 and FLOOR.get(parts[1], 0) > own:
            wrong.append(f"{path.name}:{line} (floor {own}) imports {name} (floor {FLOOR[parts[1]]})")
        if parts[0] in CONFINED and module_of(path) not in CONFINED[parts[0]]:
            wrong.append(f"{path.name}:{line} imports {parts[0]}, which is confined")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_floors_and_confined_libraries_stay_home(path):
    if path == ROOT / "__init__.py":
        return  # the front door opens onto every floor, lazily
    assert violations(path, imports(path)) == []


def test_an_upward_import_and_an_escaped_library_are_caught():
    path = ROOT / "batch.py"
    assert len(violations(path, [("plaudit.trainer", 3), ("peft", 4), ("torch", 5), ("plaudit.errors", 6)])) == 2


@pytest.mark.parametrize("path", [p for p in FILES if FLOOR.get(module_of(p)) == 0], ids=lambda p: p.name)
def test_floor_zero_does_not_import_torch_at_the_top(path):
    top = {name.split(".")[0] for name, _ in imports(path, top_only=True)}
    assert not top & {"torch", "transformers", "accelerate", "datasets"}


def test_help_answers_without_loading_anything_heavy():
    code = (
        "import sys; from plaudit.cli import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'tyro', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: plaudit VERB" in result.stdout
    assert time.perf_counter() - start < 5  # a hang, not a timing: the figure is in benchmarks/


def test_help_of_a_verb_does_not_load_torch():
    code = (
        "import sys; from plaudit.cli import main\n"
        "try: main(['ppo', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--kl-target" in result.stdout
    assert "--noise" not in result.stdout
