"""Who may import whom: read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import LONG
from tests.support.checkout import CHECKOUT

ROOMS = ("shards", "slurm", "mama")
FORBIDDEN = {
    "shards": {"mama", "slurm", "tests", "torch", "deepspeed", "transformers", "peft", "submitit"},
    "slurm": {"mama", "shards", "tests", "torch", "deepspeed", "transformers", "peft"},
    "mama": {"tests"},
}
# From the command line down: a room may know those that stand below it, and no other of its own line. Of `shards` the
# rest (schema, files, ...) is below all rooms, and `bench` above; rooms of one line do not know each other.
LINES = {
    "mama": (
        ("__main__",),
        ("cli",),
        ("jobs", "compare", "predict"),
        ("sweep", "quickstart", "bench"),
        ("report",),
        ("finetune",),
        ("evaluate", "train"),
        ("export",),
        ("run",),
        ("objective",),
        ("model",),
        ("data",),
        ("runtime",),
        ("settings",),
        ("errors",),
    ),
    "shards": (
        ("bench", "check"),
        ("pack",),
        ("sources", "read"),
        ("image",),
        ("errors", "files", "from_json", "pages", "processes", "progress", "schema", "spellings"),
    ),
}
ONLY_IN = {
    "xformers": {"mama/model/attention.py"},
    "yaml": {f"mama/settings/{name}.py" for name in ("load", "typed_values", "values", "yaml_text")},
    "submitit": {"slurm/submit.py", "slurm/rank_environment.py"},
}


def modules(source: str) -> set[str]:
    """The modules that a file imports, wherever in it, also by `import_module("name")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def imports(source: str) -> set[str]:
    """The top-level names of them."""
    return {name.partition(".")[0] for name in modules(source)}


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


@pytest.mark.parametrize("top", LINES)
def test_rooms_know_only_those_below_them(top: str) -> None:
    lines = LINES[top]
    level = {room: height for height, rooms in enumerate(lines) for room in rooms}
    present = {p.stem for p in (CHECKOUT / top).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert present - {"__init__"} == set(level), "every room has its place"
    wrong = []
    for path in sorted((CHECKOUT / top).rglob("*.py")):
        own = path.relative_to(CHECKOUT / top).parts[0].removesuffix(".py")
        known = {name.split(".")[1] for name in modules(path.read_text(encoding="utf-8")) if name.startswith(f"{top}.")}
        for other in known & level.keys() - {own}:
            if level.get(own, -1) >= level[other] and len(lines) - 1 != level[other]:
                wrong.append(f"{path.relative_to(CHECKOUT)} imports {top}.{other}")
    assert wrong == []


def test_packages_are_empty() -> None:
    """So that importing one module imports no other. `shards` names what readers of shards import from it, and `mama`
    has `load` alone, which imports nothing before it is called (tests/predict/test_predict.py)."""
    packages = [path for room in ROOMS for path in (CHECKOUT / room).rglob("__init__.py")]
    assert {p.relative_to(CHECKOUT).as_posix() for p in packages if p.stat().st_size} == {
        "shards/__init__.py",
        "mama/__init__.py",
    }
    names = ast.parse((CHECKOUT / "mama/__init__.py").read_text(encoding="utf-8")).body
    assert [node.name for node in names if isinstance(node, ast.FunctionDef | ast.ClassDef)] == ["load"]


def test_test_files_are_no_libraries() -> None:
    """What several of them use stands in tests/support."""
    tests = sorted((CHECKOUT / "tests").rglob("*.py"))
    imported = {name for path in tests for name in modules(path.read_text(encoding="utf-8"))}
    assert [name for name in sorted(imported) if name.startswith("tests.") and ".test_" in name] == []


def test_the_files_that_begin_are_there() -> None:
    """A renamed file that takes long would begin last, and one process be left alone with it."""
    assert set(LONG) - {path.stem for path in (CHECKOUT / "tests").rglob("test_*.py")} == set()


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_has_one_importer(package: str) -> None:
    importers = {file for room in ROOMS for file, names in files(room).items() if package in names}
    assert importers == ONLY_IN[package]


def test_the_command_line_is_there_before_the_heavy_libraries() -> None:
    """Its answers come at once; and every worker of `mama pack` imports it anew."""
    heavy = {"pandas", "torch", "transformers", "deepspeed", "submitit"}
    program = f"import sys, mama.cli.main; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
