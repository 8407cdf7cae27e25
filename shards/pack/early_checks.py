"""Stop a build that is bound to fail: before the first image is read, or after the first hundred."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from shards.errors import Refused, ShardError
from shards.files import atomic_write
from shards.pack.archive_changes import Archive
from shards.pack.plan import PlannedShard
from shards.pack.sample import Refusal, Sample, refusal, refusal_lines
from shards.pack.settings import PackConfig
from shards.pack.shard_record import Record
from shards.read.manifest import BUILD, REFUSED
from shards.schema import EXCLUDED, SourceStudy, SourceView

FIRST = 100  # images
MISSING = ("missing", "no such file")


def refuse_own_files(studies: Mapping[str, SourceStudy], root: Path, out: Path) -> None:
    """Raise `ShardError` if `out` lies in the archive and the source reads files in it as images."""
    for real in (os.path.abspath, os.path.realpath):
        inside = os.path.relpath(real(out), real(root))
        if inside.split(os.sep)[0] == os.pardir:
            continue
        prefix = str(root / inside) + os.sep
        for study in studies.values():
            if found := next((view.path for view in study.views if str(view.path).startswith(prefix)), None):
                raise ShardError(f"pack.out: {found} is read as part of the archive; give an `out` outside {root}")


def limit_ahead(
    config: PackConfig, root: Path, archive: Archive, pending: Sequence[PlannedShard], written: Sequence[Record]
) -> None:
    """Raise `ShardError` if missing files and images refused by the source already exceed `max_refused`.

    Otherwise the build would end in that error after hours. `build/refused.jsonl` lists these images.
    """
    views = [found for shard in pending for key, _ in shard.studies for found in _views(archive, key)]
    lost = [(view, refused) for view, refused in views if refused]
    counted = len(views) + sum(record.images + _bad(record.refusals) for record in written)
    file = Path(os.path.expanduser(config.out)) / BUILD / REFUSED
    if len(lost) <= config.max_refused * counted:
        file.unlink(missing_ok=True)
        return
    refusals = [refusal(root, view, Refused(*refused)) for view, refused in lost]
    atomic_write(file, refusal_lines(refusals))
    (reason, number), *_ = Counter(line.reason for line in refusals).most_common(1)
    view, (_, message) = next((view, refused) for view, refused in lost if refused[0] == reason)
    what = f"{len(lost)} of {counted} images would be refused, {number} of them as {reason}"
    what += f", such as {view.path} ({message}); {config.max_refused:.1%} are allowed"
    field, fix = ("root", "name another root") if reason == "missing" else ("max_refused", "fix archive or options")
    raise ShardError(f"pack.{field}: {what}: see {file}, {fix}, or raise pack.max_refused")


def _views(archive: Archive, key: str) -> Iterator[tuple[SourceView, tuple[str, str] | None]]:
    """(view, certain refusal or None) of the views of a study that are not excluded."""
    sizes = iter(archive.sizes[key])
    for view in archive.studies[key].views:
        if view.refused is None:
            yield view, MISSING if next(sizes) is None else None
        elif view.refused[0] not in EXCLUDED:
            yield view, view.refused


def stop_if_none_is_usable(samples: Iterable[Sample], root: str) -> Iterator[Sample]:
    """Pass samples on. Raises `ShardError` if the first `FIRST` images are all refused for the same reason.

    So common a cause is a setting or a decoder, and would affect the rest of the archive, too.
    """
    bad: list[Refusal] = []
    usable = False
    for sample in samples:
        usable = usable or bool(sample.images)
        if not usable:
            bad += [line for line in sample.refusals if line.reason not in EXCLUDED]
            if len(bad) >= FIRST and len({line.reason for line in bad}) == 1:
                raise ShardError(
                    f"pack.root: the first {len(bad)} images of {root} are all refused as {bad[0].reason}, such as "
                    f"{bad[0].file} ({bad[0].message}); fix that, or set pack.max_refused=1 to leave such images out"
                )
        yield sample


def _bad(refusals: Iterable[Refusal]) -> int:
    return sum(line.reason not in EXCLUDED for line in refusals)
