"""README, docs and the heads of the recipes: their commands parse and resolve, their links and paths exist."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mama.cli.main import HELP, cli
from mama.errors import ConfigError
from mama.evaluate.tasks import load_task
from mama.settings.load import find, is_shipped, load, load_profile
from mama.sweep.definition import load_sweep
from mama.sweep.recognised import is_sweep
from mama.train.dry_run import dry_run
from slurm.submit import Request
from tests.support.checkout import CHECKOUT

DOCS = [f"docs/{path.name}" for path in sorted((CHECKOUT / "docs").glob("*.md"))]
PAGES = ["README.md", *DOCS]
RECIPES = [path.relative_to(CHECKOUT).as_posix() for path in sorted((CHECKOUT / "configs").rglob("*.yaml"))]
# (language, text); blocks of commands name no language.
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)", re.MULTILINE)
PATH = re.compile(r"(?<![\w./-])(?:mama|shards|slurm|configs|tests|docs|\.ci)/[\w./*-]*[\w/]")
ENDS = {"&&", ";", "|", "(", ")"}  # of a command
OWN = re.compile(r"\w+\.yaml|runs/[\w-]+|[A-Z]+(\.yaml)?")  # names of the reader's own files and folders
README_LINES, WIDTH = 130, 120


def read(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its fenced blocks; of a recipe its comments."""
    text = read(page)
    if page.endswith(".yaml"):
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    return FENCE.sub("", text)


def spans(page: str) -> list[str]:
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def shell_lines(page: str) -> Iterator[str]:
    """Fenced lines and indented lines of a recipe's comments, and spans."""
    if page.endswith(".yaml"):
        yield from re.findall(r"^#? {3}(\S.*)$", prose(page), re.MULTILINE)
    for language, block in FENCE.findall(read(page)):
        if not language:
            yield from block.replace("\\\n", " ").splitlines()
    yield from (span.replace('"$(', " ").replace(')"', "") for span in spans(page))


def calls(program: str) -> list[tuple[str, list[str]]]:
    """(page, arguments) of every call of a program, also by a launcher that starts it."""
    found = []
    for page in (*PAGES, *RECIPES):
        for line in shell_lines(page):
            if not re.search(rf"(^|[ /]){program} ", line):
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] | None = None
            for token in lexer:
                if token in ENDS:
                    command = None
                elif command is not None:
                    command.append(token)
                elif token == program or token.endswith(f"/{program}"):
                    command = []
                    found.append((page, command))
    return found


COMMANDS = calls("mama")


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of the arguments; nothing runs. Empty for a verb that is only named."""
    command: click.Command = cli
    context = click.Context(cli, **HELP)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
        if not arguments:
            return {}
    return command.make_context(name, list(arguments), parent=context).params


def profile_of(name: str) -> str:
    """A profile that is not there is the reader's own: a copy of configs/slurm/cluster.yaml or cpu.yaml."""
    try:
        return str(find(name, "slurm"))
    except ConfigError:
        return "cpu" if "cpu" in name else "cluster"


def test_commands_are_found() -> None:
    """Of every verb, and in the head of every recipe."""
    verbs = {command[0] for _, command in COMMANDS}
    assert verbs >= {"quickstart", "pack", "check", "train", "consolidate", "eval", "report", "bench", "completion"}
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/tutorial.md", *RECIPES} - {"configs/slurm/local.yaml"}


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda n: f"{COMMANDS[n][0]}: {' '.join(COMMANDS[n][1])}")
def test_a_command_parses_and_its_settings_resolve(number: int) -> None:
    """The reader's own CONFIG (my_recipe.yaml, runs/longer, RUN) is taken for a copy of configs/table.yaml."""
    _, command = COMMANDS[number]
    if command[0] == "VERB":
        return
    given = parsed(command)
    if (name := given.get("sweep")) and not OWN.fullmatch(name):
        assert load_sweep(name, given["overrides"]).points
    if not given.get("config"):
        return
    if command[0] == "report" and is_sweep(given["config"]):
        assert load_sweep(given["config"], given["overrides"]).points
        return
    own = OWN.fullmatch(given["config"])
    config = load("table" if own else given["config"], given["overrides"])
    if "profile" not in given:
        return
    profile = load_profile(profile_of(given["profile"]))
    if given.get("jobs"):
        profile.require_cluster()
        profile.require_one_task()
    if profile.cluster == "slurm":
        assert "#SBATCH --partition" in Request(profile=profile, folder="runs").script(1)
    if command[0] == "train":
        config.train.accumulation(profile.tasks if given["as_job"] and profile.tasks > 1 else config.train.ranks)


DRY_RUNS = {
    shlex.join(words) for _, words in COMMANDS if words[0] == "train" and "--dry-run" in words and is_shipped(words[1])
}


@pytest.mark.parametrize("command", sorted(DRY_RUNS))
def test_a_dry_run_of_a_shipped_recipe_runs(command: str) -> None:
    given = parsed(shlex.split(command))
    config = load(given["config"], given["overrides"])
    assert list(dry_run(config, config.train.ranks))


@pytest.mark.parametrize("page", PAGES)
def test_recipes_in_a_page_load(page: str, tmp_path: Path) -> None:
    """On the page about sweeps: the sweeps, on that about evaluation: the tasks."""
    readers: dict[str, Callable[[str], Any]] = {"docs/sweeps.md": load_sweep, "docs/evaluation.md": load_task}
    for language, block in FENCE.findall(read(page)):
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(block)
            assert readers.get(page, load)(str(tmp_path / "recipe.yaml"))


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """The site holds docs/ alone: its pages do not link out of it."""
    links = [inline or reference for inline, reference in LINK.findall(prose(page))]
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (CHECKOUT / page).parent / path if path else CHECKOUT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        assert page == "README.md" or target.resolve().is_relative_to(CHECKOUT / "docs"), link


@pytest.mark.parametrize("page", [*PAGES, *RECIPES])
def test_paths_exist(page: str) -> None:
    assert [path for path in PATH.findall(re.sub(r"\S+://\S+", "", read(page))) if not exists(path)] == []


def exists(path: str) -> bool:
    return any(CHECKOUT.glob(path.rstrip("/.")))


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    named = {words[0] for _, words in calls("make")}
    assert named >= {"quickstart", "test"}
    assert named <= targets


def test_the_readme_is_short() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", DOCS)
def test_only_tables_and_links_are_wide(page: str) -> None:
    wide = [line for line in read(page).splitlines() if len(line) > WIDTH]
    assert [line for line in wide if not line.startswith("|")] == []


def test_every_page_is_in_the_index_and_on_the_site() -> None:
    site = read("mkdocs.yml")
    for page in DOCS:
        name = page.removeprefix("docs/")
        assert name in site, name
        assert name == "index.md" or f"({name})" in read("docs/index.md"), name


def test_the_design_names_every_room() -> None:
    rooms = {path.parent for top in ("mama", "shards") for path in (CHECKOUT / top).glob("*/__init__.py")}
    names = {room.relative_to(CHECKOUT).as_posix() for room in rooms}
    assert names - set(spans("docs/DESIGN.md")) == set()


def test_settings_are_current() -> None:
    document = runpy.run_path(str(CHECKOUT / "docs" / "generate_settings.py"))["document"]
    assert read("docs/settings.md") == document(), "run `python docs/generate_settings.py`"
