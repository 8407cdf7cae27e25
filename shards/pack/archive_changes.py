"""Compare an archive with the plan of its build: studies added, changed or removed since, and what to pack again.

1. A study whose shard is not written yet is packed as it is now.
2. A study without stored images (all were refused) leaves its shard when it changes, and is planned again as if it
   were new; the tar stays.
3. A stored study stays as it is, and its changes are reported.

A study has changed if the source yields other facts or its files have other sizes. Another modification time alone is
not a change, as copying an archive may set new ones; it only makes studies without stored images be tried again.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from shards.errors import ShardError, is_machine_error
from shards.files import legible
from shards.image.dicom_file import find_file
from shards.pack.identity import keyed_hash
from shards.pack.plan import Entry, Plan, PlannedShard, digest_of
from shards.pack.shard_record import Record
from shards.progress import progress
from shards.read.manifest import BUILD, MANIFEST
from shards.schema import SourceStudy

log = logging.getLogger(__name__)

THREADS = 16  # a network disk serves many requests at a time
CHUNK = 64  # studies
MOST_NAMED = 5  # shards in one message

Sizes = tuple[int | None, ...]  # bytes, one per view that the source does not refuse, then masks; None: no file


@dataclass(frozen=True)
class Archive:
    """The studies of a source, all by the key of the study."""

    studies: Mapping[str, SourceStudy]
    entries: Mapping[str, Entry]
    sizes: Mapping[str, Sizes]


@dataclass
class Changes:
    """Shard -> number of its packed studies that have changed, lack files, or are gone.

    `touched` counts studies of which only modification times differ. `unattributed` counts studies without stored
    images in records of earlier releases, which do not attribute refusals to studies.
    """

    changed: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    gone: Counter[str] = field(default_factory=Counter)
    touched: int = 0
    unattributed: Counter[str] = field(default_factory=Counter)
    example: str = ""  # a file of one of them

    @property
    def by_shard(self) -> Counter[str]:
        """Shard -> number of its studies with any change."""
        return self.changed + self.absent + self.gone

    def __str__(self) -> str:
        kinds = {"have other files or labels now": self.changed, "lack files now": self.absent, "are gone": self.gone}
        text = ", ".join(f"{shards.total()} packed studies {what}" for what, shards in kinds.items() if shards)
        return f"{text}, such as that of {self.example}" if self.example else text


def survey(studies: Mapping[str, SourceStudy], root: Path, key: bytes, label: str) -> Archive:
    """Look up sizes and times of the files of the studies, by one `stat` an image. Raises `OSError` of the machine."""
    names = list(studies)
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    entries: dict[str, Entry] = {}
    sizes: dict[str, Sizes] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        found = chain.from_iterable(pool.map(lambda chunk: [_files(studies[name]) for name in chunk], chunks))
        for name, (of_study, newest) in zip(names, progress(found, len(names), label, "studies"), strict=True):
            files = keyed_hash(key, "sizes", repr(of_study)), newest
            entries[name] = Entry(name, digest_of(studies[name], root, key), files)
            sizes[name] = of_study
    return Archive(studies, entries, sizes)


def _files(study: SourceStudy) -> tuple[Sizes, int]:
    """The sizes of the files in bytes, and the newest modification time in seconds."""
    paths = [view.path for view in study.views if not view.refused]
    found = [_stat(path) for path in (*paths, *(path for view in study.views for _, path in view.masks))]
    newest = max((int(status.st_mtime) for status in found if status), default=0)
    return tuple(status.st_size if status else None for status in found), max(0, newest)


def _stat(path: Path) -> os.stat_result | None:
    try:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            status = os.stat(find_file(path))  # under another suffix or spelling, as the reader of images does
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        if is_machine_error(error):
            raise
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def renew(plan: Plan, records: Mapping[str, Record], archive: Archive) -> tuple[Plan, Changes]:
    """The plan without studies that are gone or to be tried again, and the changes in packed studies.

    New studies are not in it yet, see `plan.extend`.
    """
    changes = Changes()
    shards = []
    for shard in plan.shards:
        record = records.get(shard.name)
        if record is None:
            now = (archive.entries.get(entry.key) for entry in shard.entries)
            shards.append(shard.with_entries(entry for entry in now if entry))
        else:
            shards.append(shard.with_entries(_kept(shard, record, archive, changes)))
    return replace(plan, shards=tuple(shards)), changes


def _kept(shard: PlannedShard, record: Record, archive: Archive, changes: Changes) -> Iterator[Entry]:
    """The entries that stay in a written shard: those with stored images, and those that did not change."""
    stored = set(record.shard.keys)
    for entry in shard.entries:
        found = archive.entries.get(entry.key)
        if entry.key not in stored and record.has_refused_studies:
            if found and differs(entry, found) is None:
                yield entry
            continue
        yield entry
        changes.unattributed[shard.name] += entry.key not in stored
        if found is None:
            changes.gone[shard.name] += 1
        elif (difference := differs(entry, found)) == "time":
            changes.touched += 1
        elif difference:
            absent = difference == "size" and None in archive.sizes[entry.key]
            (changes.absent if absent else changes.changed)[shard.name] += 1
            changes.example = changes.example or legible(str(archive.studies[entry.key].views[0].path))


def differs(planned: Entry, found: Entry) -> str | None:
    """What has changed in a study: "labels" (or paths), "size", "time", or None."""
    if planned.digest != found.digest:
        return "labels"
    if planned.files is None or found.files is None or planned.files == found.files:
        return None
    return "time" if planned.files[0] == found.files[0] else "size"


def is_whole(folder: Path, record: Record | None) -> bool:
    """Whether a shard is written and its tar has the recorded size."""
    if record is None:
        return False
    status = _stat(folder / record.shard.name)
    return status is not None and status.st_size == record.shard.bytes


def report_changes(changes: Changes, records: Mapping[str, Record], out: Path, because: str) -> None:
    """Log the changes in packed studies of a finished folder, whose shards stay as they are.

    Raises `ShardError` if the folder is half-built, as its shards would then mix two states of the archive; if packed
    studies are gone; and if a missing tar cannot be rewritten with its content. `because` names the setting that
    differs.
    """
    shards = changes.by_shard
    for name in shards:
        if not is_whole(out, records[name]):
            raise ShardError(
                f"{out / name}: is missing or truncated, and {shards[name]} of its studies have changed since; copy it "
                f"back, or remove {out / BUILD / Path(name).stem}.json as well to pack them as they are now"
            )
    if changes.touched:
        log.warning(
            "%d packed studies have files of the same size but another modification time (a copy, or an edit that "
            "keeps the size); their shards stay as they are",
            changes.touched,
        )
    if changes.unattributed.total():
        log.warning(
            "%d studies have no stored image, and an earlier release did not record why: they are not tried again; if "
            "their files have arrived since, %s",
            changes.unattributed.total(),
            _repack_advice(+changes.unattributed, out),
        )
    if shards and (because or changes.gone or not (out / MANIFEST).exists()):
        problem = f"{because}, and {changes}; set it back" if because else f"pack.root: {changes}; undo that"
        raise ShardError(f"{problem}, or, {_repack_advice(shards, out)}")
    if shards:
        fix = f": {_repack_advice(changes.changed, out)}" if changes.changed else ""
        log.warning("%s; their shards stay as they are%s", changes, fix)


def _repack_advice(shards: Mapping[str, int], out: Path) -> str:
    """How to pack the studies of these shards again."""
    if len(shards) > MOST_NAMED:
        return f"to pack those shards from the archive as it is, remove {out} or give another `out`"
    records = ", ".join(f"{BUILD}/{Path(name).stem}.json" for name in sorted(shards))
    return f"to pack those shards from the archive as it is, remove {records} in {out} and run `mama pack` again"
