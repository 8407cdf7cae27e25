"""The quality page (`mama check --html`): contents and problems of folders of shards in one self-contained HTML file.

The page can be shared: it has no path, no file name of the archive and no text of an option. Its images and counts
are those of the archive, so the licence of the archive applies to the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from shards.check.quality_charts import Chart, label_charts, study_charts
from shards.check.quality_sides import Sides
from shards.check.quality_studies import Shown, sampled
from shards.errors import ShardError
from shards.files import atomic_write, legible
from shards.pages import page_template
from shards.progress import progress
from shards.read.manifest import Manifest, SplitBy, load_manifest
from shards.read.reader import ShardReader
from shards.schema import CONFLICTS, EXCLUDED_REASONS, FALLBACKS, REFUSED_REASONS, SPLITS, Study

TEMPLATE = Path(__file__).parent / "templates" / "quality.html.j2"
STUDIES = 60  # of each set; fewer of many sets, so that the page stays below 10 MB
ALL_STUDIES = 180


@dataclass
class _Set:
    name: str
    problems: list[str]
    manifest: Manifest | None = None
    splits: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    labels: list[Chart] = field(default_factory=list)
    pictures: list[Chart] = field(default_factory=list)
    people: list[Chart] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    sides: Sides = field(default_factory=Sides)
    unread: bool = False  # a shard could not be read, so charts and images of the studies are missing


def quality_page(
    folders: Iterable[Path], out: Path, problems: Mapping[Path, Sequence[str]] | None = None, sample: int | None = None
) -> Path:
    """Write the page about `folders` to `out`. `problems` is the result of `check_all(folders, sample)`, if called."""
    paths = list(dict.fromkeys(map(Path, folders)))
    names = _names(paths)
    studies = min(STUDIES, ALL_STUDIES // max(1, len(paths)))
    sets = [_set(path, names[path], _renamed((problems or {}).get(path, ()), names), studies) for path in paths]
    page = page_template(TEMPLATE, number=_number, bytes=_bytes, share=_share).render(
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        checked=problems is not None,
        sample=sample,
        sets=sets,
        problems=sum(len(found.problems) for found in sets),
        all_splits=SPLITS,
        reasons=REFUSED_REASONS | EXCLUDED_REASONS,
        conflicts=CONFLICTS,
        fallbacks=FALLBACKS,
        by_hash=SplitBy("hash", {}),  # of manifests that do not say
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, legible(page).encode())
    return out


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The last part of each path, numbered if it repeats."""
    names: dict[Path, str] = {}
    for path in paths:
        name = path.resolve().name
        same = sum(other.resolve().name == name for other in names)
        names[path] = f"{name} ({same + 1})" if same else name
    return names


def _renamed(problems: Sequence[str], names: Mapping[Path, str]) -> list[str]:
    """The problems with names of sets in place of their paths."""
    texts = list(problems)
    for path in sorted(names, key=lambda path: -len(str(path))):
        if path.name and str(path) != ".":
            texts = [text.replace(str(path), names[path]) for text in texts]
    return texts


def _set(folder: Path, name: str, problems: list[str], studies: int) -> _Set:
    found = _Set(name, problems)
    try:
        manifest = load_manifest(folder)
    except ShardError:
        return found
    found.manifest = manifest
    found.splits = _splits(manifest)
    found.left_out = _left_out(manifest)
    found.settings = _settings(manifest)
    found.labels = label_charts(manifest)
    try:
        reader = ShardReader(folder)
        found.pictures, found.people = study_charts(found.sides.counted(_studies(reader)))
        found.shown = sampled(reader, studies)
    except (ShardError, IndexError, TypeError):
        found.unread = True
    return found


def _studies(reader: ShardReader) -> Iterator[Study]:
    return (reader.study(i) for i in progress(range(len(reader)), len(reader), "quality page", "studies"))


def _splits(manifest: Manifest) -> list[dict[str, Any]]:
    of_split = {split: [shard for shard in manifest.shards if shard.split == split] for split in SPLITS}
    return [
        {
            "name": split,
            "patients": len({patient for shard in shards for patient in shard.patients}),
            "studies": sum(shard.samples for shard in shards),
            "images": sum(sum(shard.view_counts) for shard in shards),
            "shards": len(shards),
            "bytes": sum(shard.bytes for shard in shards),
        }
        for split, shards in of_split.items()
        if shards
    ]


def _left_out(manifest: Manifest) -> list[dict[str, Any]]:
    """Rows for the reasons of refused, then of excluded images, the most frequent first."""
    kinds = {"refused": manifest.images_refused, "excluded": manifest.images_excluded}
    most = max((n for reasons in kinds.values() for n in reasons.values()), default=1) or 1
    return [
        {"kind": kind, "reason": reason, "count": n, "width": 100 * n / most}
        for kind, reasons in kinds.items()
        for reason, n in sorted(reasons.items(), key=lambda item: -item[1])
    ]


def _settings(manifest: Manifest) -> dict[str, str]:
    """The settings to show. Texts of source options are withheld, as they may name columns and files of the archive."""
    settings = {name: value for name, value in manifest.settings.items() if name not in ("options", "root", "key_file")}
    shown = {name: _shown(value) for name, value in settings.items()}
    options = manifest.settings.get("options")
    for name, value in (options if isinstance(options, dict) else {}).items():
        shown[f"options.{name}"] = _shown(value) if isinstance(value, bool | int | float | None) else "given"
    return shown


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: int) -> str:
    """Digits in groups of three, separated by thin spaces."""
    return f"{value:,}".replace(",", "\u202f")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _share(share: float) -> str:
    """A percentage that is rounded to 0 or 100 only if it is exactly that."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{share:.0%}".replace("%", " %")
