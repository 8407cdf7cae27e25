"""Folders of results: `<run>/eval/` for the test split of the training shards, `<run>/eval-on/*/` for other images.

A folder holds one evaluation and is replaced as a whole; its `complete.json` records what was measured.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, EAGAIN, EEXIST, ENOTDIR, ENOTEMPTY
from pathlib import Path

from mama.evaluate.provenance import IDENTITY, Document, is_own, object_in, same
from mama.evaluate.tasks import task_name
from mama.run.files import write_json
from mama.settings.schema import Config

log = logging.getLogger(__name__)

MARKER, METRICS = "complete.json", "metrics.json"
LOCK = ".eval.lock"  # in the run folder


def folder_of(shards: Document, run: Path) -> Path:
    """The folder for results on these images. The name that a set first got stays when its shards are moved."""
    if is_own(shards, run) and shards["split"] == "test":
        return run / "eval"
    return on_others(run / "eval-on", shards, f"{shards['split']}-{shards['digest'][:8]}")


def on_others(parent: Path, shards: Document, images: str) -> Path:
    """The folder below `parent` for these `images` of other shards than the run's own."""
    if known := sorted(parent.glob(f"*-{images}")):
        return known[0]
    names = re.sub(r"[^\w.+-]+", "_", "+".join(folder["name"] for folder in shards["folders"]))[:60]
    return parent / f"{names}-{images}"


def evaluations(run: Path) -> list[tuple[Path, Document]]:
    """The complete evaluations of a run and their markers, the one of its own test split first."""
    folders = [run / "eval", *sorted(path for path in (run / "eval-on").glob("*") if path.suffix != ".partial")]
    found = [(folder, object_in(folder / MARKER) or {}) for folder in folders]
    return [(folder, marker) for folder, marker in found if {*IDENTITY, "tasks", "places"} <= marker.keys()]


@contextmanager
def replaced_results(folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `folder` if the block ends without an error.

    Two processes at the same time do not mix their files: the later one wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent) as partial:
        new, old = Path(partial) / "new", Path(partial) / "old"
        new.mkdir()
        yield new
        while new.exists():
            try:
                os.rename(new, folder)  # replaces an empty folder at most
            except OSError as error:
                if error.errno not in (ENOTEMPTY, EEXIST, ENOTDIR):
                    raise
                shutil.rmtree(old, ignore_errors=True)
                with suppress(FileNotFoundError):  # another evaluation has just moved it
                    os.rename(folder, old)


@contextmanager
def one_writer(run: Path) -> Iterator[None]:
    """Hold the lock on the results of a run, in its folders and in its model; another evaluation waits for its end.

    What is there already is read, merged and written again: two at a time would lose each other's tasks. A POSIX lock,
    which network file systems support, too. Where there are no locks, a warning is logged and nothing is held.
    """
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            file = held.enter_context((run / LOCK).open("ab"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (EACCES, EAGAIN):
                    raise
                log.info("%s: another evaluation is writing its results; waiting for it", run)
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: cannot be locked (%s): evaluate one set of tasks at a time", run / LOCK, error.strerror)
        yield


def finish(config: Config, measured: Document, folder: Path, new: Path) -> None:
    """Complete the results in `new`, which are about to replace those in `folder`.

    Tasks in `folder` that were not measured again are kept if they have the same provenance as `measured`.
    """
    before = object_in(folder / MARKER) or {}
    tasks = list(dict.fromkeys(map(task_name, config.eval.tasks)))
    if same(before, measured):
        for name in before.get("tasks", []):
            if name not in tasks and same(object_in(folder / name / METRICS) or {}, measured):
                shutil.copytree(folder / name, new / name)
                tasks.append(name)
    if dropped := [name for name in before.get("tasks", []) if name not in tasks]:
        log.warning(
            "%s: removing the earlier results of %s, which were measured with other settings or weights; "
            "evaluate all tasks together to compare them",
            *(folder, ", ".join(dropped)),
        )
    places = [a if "://" in a else str(Path(os.path.expanduser(a)).absolute()) for a in config.data.shards]
    write_json(new / MARKER, {**measured, "tasks": tasks, "places": places})
