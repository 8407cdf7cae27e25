"""Who may import whom: read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = ("shards", "slurm", "mama")
FORBIDDEN = {
    "shards": {"mama", "slurm", "tests", "torch", "deepspeed", "transformers", "peft", "submitit"},
    "slurm": {"mama", "shards", "tests", "torch", "deepspeed", "transformers", "peft"},
    "mama": {"tests"},
}
ONLY_IN = {
    "xformers": {"mama/attention.py"},
    "yaml": {"mama/loading.py", "mama/typed.py", "mama/yaml_text.py"},
    "submitit": {"slurm/submit.py", "slurm/env.py"},
}


def imports(source: str) -> set[str]:
    """The top-level names that a file imports, wherever in it, also by `import_module("name")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return {name.partition(".")[0] for name in found}


def files(room: str) -> dict[str, set[str]]:
    found = {
        path.relative_to(CHECKOUT).as_posix(): imports(path.read_text(encoding="utf-8"))
        for path in sorted((CHECKOUT / room).rglob("*.py"))
    }
    assert found, f"{room}/ has no source file"
    return found


def test_the_walker_sees_every_kind_of_import() -> None:
    source = """
import a.b as c
from d.e import f
from . import own
def g():
    import h
    importlib.import_module("i.j")
    __import__("k")
"""
    assert imports(source) == {"a", "d", "h", "i", "k"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_what_it_must_not_know(room: str) -> None:
    wrong = {file: sorted(names & FORBIDDEN[room]) for file, names in files(room).items() if names & FORBIDDEN[room]}
    assert wrong == {}


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_has_one_importer(package: str) -> None:
    importers = {file for room in ROOMS for file, names in files(room).items() if package in names}
    assert importers == ONLY_IN[package]


def test_the_command_line_is_there_before_the_heavy_libraries() -> None:
    """Its answers come at once; and every worker of `mama pack` imports it anew."""
    program = "import sys, mama.cli; print(*{'pandas', 'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
