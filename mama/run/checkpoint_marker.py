"""The marker of a checkpoint: its last file, which lists the others, so that an incomplete one is recognised."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

from mama.errors import ConfigError
from mama.run.files import document_digest, read_object, sha256_or_reason, write_with_digest
from shards.from_json import from_json

log = logging.getLogger(__name__)

MARKER = "complete.json"
FROZEN = "frozen.json"
RUN = "run.json"  # in the run folder: what tells its checkpoints from those of other runs
HASHERS = 4  # files that are read and hashed at a time
STEP = re.compile(r"step-(\d{6,})")  # the name of a checkpoint


@dataclass(frozen=True)
class Marker:
    """The content of a marker file; earlier versions wrote no `sha256`, or no `run`."""

    step: int  # steps taken before it
    ranks: int
    score: float | None  # of validation
    adam_steps: dict[str, float]  # by parameter group
    facts: dict[str, int]  # counts that a resumed run continues from
    bytes: dict[str, int]  # by file
    sha256: dict[str, str] | None = None  # by file
    run: str | None = None  # `run_digest` of the run that saved it

    @property
    def pieces(self) -> list[str]:
        """The names of the files that hold tensors, in their order."""
        return sorted(name for name in self.bytes if name.startswith("state-"))


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def damage(
    checkpoint: Path, contents: bool = False, only: Collection[str] | None = None, stop: Event | None = None
) -> str | None:
    """Describe what is wrong with the marker, the sizes of the files or, with `contents`, their digests; else None.

    The digests of `only` these files, if they are named; once `stop` is set, of no further file. A marker of another
    run is wrong too.
    """
    try:
        marker = read_marker(checkpoint)
        if marker.run and run_digest(checkpoint.parent.parent) not in (marker.run, None):
            return f"{checkpoint / MARKER}: is that of another run"
        for name, size in marker.bytes.items():
            if (there := (checkpoint / name).stat().st_size) != size:
                return f"{checkpoint / name}: has {there} bytes, its marker says {size}"
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if contents and marker.sha256 is None:
        log.info("%s: was written without digests by an earlier version; only sizes are compared", checkpoint)
    expected = {name: digest for name, digest in (marker.sha256 or {}).items() if only is None or name in only}
    if contents:

        def hashed(name: str) -> str:
            return "not read" if stop and stop.is_set() else sha256_or_reason(checkpoint / name)

        with ThreadPoolExecutor(HASHERS) as pool:
            found = pool.map(hashed, expected)
            for (name, digest), own in zip(expected.items(), found, strict=True):
                if own != digest:
                    return f"{checkpoint / name}: its content has changed since it was written"
    return None


def run_digest(run: Path) -> str | None:
    """What a run's checkpoints are known by; None if an earlier version started it. Raises `ConfigError` for damage."""
    return str(read_object(run / RUN).get("sha256")) if (run / RUN).exists() else None


def steps_taken(run: Path) -> int:
    """The steps before the newest complete checkpoint of a run; 0 without one."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: (len(folder.name), folder.name))
    return next((read_marker(folder).step for folder in reversed(folders) if not damage(folder)), 0)


def read_marker(checkpoint: Path) -> Marker:
    """Return the marker of a checkpoint. Raises `ConfigError` if it is missing, was edited or is damaged."""
    document = read_object(checkpoint / MARKER)
    try:
        digest = document.pop("digest", None)
        if "sha256" in document or digest is not None:
            _require(digest == document_digest(document), "its own digest")
        marker = from_json(Marker, document)
        _require(checkpoint.name == folder_name(marker.step), "step")
        _require(FROZEN in marker.bytes and bool(marker.pieces), "bytes")
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{checkpoint / MARKER}: was edited or damaged ({error}); restore it from a copy") from None
    return marker


def write_marker(folder: Path, marker: Marker) -> None:
    """Write the marker and its own digest, atomically."""
    write_with_digest(folder / MARKER, asdict(marker))


def _require(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
