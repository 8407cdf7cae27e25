"""What `mama predict` and `mama embed` are given -> images: files, those below folders, rows of tables, shards."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.predict.arguments import Paths, paths
from mama.predict.pictures import ImageFile, Input, ShardImage
from mama.predict.results import PREDICTIONS
from shards.errors import did_you_mean
from shards.files import legible
from shards.image.dicom_file import bare_name, holds_dicom, is_named_dicom
from shards.read.manifest import MANIFEST
from shards.read.reader import ShardReader
from shards.schema import LATERALITIES, SPLITS
from shards.sources.headers import INDEX
from shards.sources.table.cell_words import whole
from shards.sources.table.studies import ROUNDED
from shards.sources.tables import column_names, read_table, rows
from shards.spellings import UNKNOWN, read_view

log = logging.getLogger(__name__)

TABLES, OTHER_TABLES = (".csv", ".tsv"), (".parquet", ".xlsx", ".xls")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".ppm", ".bmp", ".jp2", ".j2k", ".webp")
COLUMNS = ("image", "study", "patient", "laterality", "view")  # of a table; the first must be there
NAMED = 3  # files of a folder that are no images, in a log line


def find_images(inputs: Paths, split: str | None, cache: Path) -> list[Input]:
    """The images that files, folders (at any depth), tables and folders of shards name, in the order given.

    A file that is given twice is refused the second time. Raises `ConfigError` for an input that is none of these, that
    names no image, or for a `split` without shards; `ShardError` for a table that cannot be read.
    """
    given_paths = paths("input", inputs)
    if not given_paths:
        raise ConfigError("no input; name image files, folders, tables or shards")
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    found: list[Input] = []
    for given in given_paths:
        images = list(_images_of(given, split, cache))
        if not images:
            what = f"hold no image of the split {split!r}" if _is_shards(given) and split else "holds no image"
            raise ConfigError(f"{given}: {what}")
        found += images
    if split is not None and not any(isinstance(image, ShardImage) for image in found):
        raise ConfigError(f"split: {split}, but none of the inputs is a folder of shards; leave it out")
    return _once(found)


def _images_of(given: str, split: str | None, cache: Path) -> Iterator[Input]:
    path = Path(os.path.expanduser(given))
    if _is_shards(given):
        yield from _of_shards(given, split, cache)
    elif path.is_dir():
        yield from _below(path)
    elif not path.exists() and not path.is_symlink():
        raise ConfigError(f"{given}: no such file or folder")
    elif path.suffix.lower() in OTHER_TABLES:
        raise ConfigError(f"{given}: tables are read as CSV; save it as a .csv file")
    elif path.suffix.lower() in TABLES:
        yield from _of_table(path)
    else:
        yield ImageFile(given, path)


def _is_shards(given: str) -> bool:
    return "://" in given or (Path(os.path.expanduser(given)) / MANIFEST).is_file()


def _of_shards(folder: str, split: str | None, cache: Path) -> Iterator[ShardImage]:
    reader = ShardReader(folder, split, cache)
    for number, count in enumerate(reader.view_counts):
        for position in range(count):
            yield ShardImage(f"{folder}/{reader.key(number)}/{position}", folder, split, cache, number, position)


def _below(folder: Path) -> Iterator[ImageFile]:
    """DICOM files by suffix or content, pictures by suffix; a log line names others. Raises `OSError`."""
    others = []
    for path in sorted(_files(folder)):
        suffix = Path(bare_name(path) if path.suffix.lower() == ".gz" else path.name).suffix.lower()
        if is_named_dicom(path) or suffix in PICTURES or (path.name != INDEX and path.is_file() and holds_dicom(path)):
            yield ImageFile(str(path), path)
        else:
            others.append(path.relative_to(folder).as_posix())
    if others:
        named = ", ".join(map(legible, others[:NAMED])) + ", ..." * (len(others) > NAMED)
        log.warning("%s: %d files are no images and are not read: %s", folder, len(others), named)


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth, also behind links to folders, each folder once; none of an earlier prediction.

    Unlike `rglob`, raises `OSError` for a folder that cannot be read, whose images would silently be missing.
    """

    def fail(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if PREDICTIONS in names:  # its maps are no mammograms
            log.info("%s: an earlier prediction, whose files are not read", place)
            names, folders[:] = [], []
        yield from (Path(place) / name for name in names)
        new = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in new.items() if real not in entered]
        entered.update(new.values())


def _of_table(path: Path) -> Iterator[ImageFile]:
    """A row for each image, with its path from the table's folder. Raises `ConfigError` for a column it cannot use."""
    table = read_table(path, {name: name for name in _columns(path)}, as_written=COLUMNS)
    for number, row in zip(table.index + 2, rows(table), strict=True):
        yield _of_row(path, number, row)


def _columns(path: Path) -> tuple[str, ...]:
    names = column_names(path, COLUMNS)
    for name in names:
        if name not in COLUMNS:
            hint = did_you_mean(name, [column for column in COLUMNS if column not in names])
            raise ConfigError(f"{path}: column {name!r} is none of {', '.join(COLUMNS)}; rename or remove it{hint}")
    if COLUMNS[0] not in names:
        raise ConfigError(f"{path}: has no column {COLUMNS[0]!r}, the paths of the images from the table's folder")
    return names


def _of_row(path: Path, number: int, row: Any) -> ImageFile:
    """The image of a row. An unknown word for a side is a reason to refuse it; one for a view names another view."""
    facts = {name: _stated(getattr(row, name, None)) for name in COLUMNS}
    if facts["image"] is None:
        return ImageFile(
            f"{path} row {number}", path, refused=("identifier", f"column image: is empty in row {number}")
        )
    place = path.parent / os.path.expanduser(facts["image"].replace("\\", "/"))
    image = ImageFile(str(place), place, facts["patient"], facts["study"])
    for name in ("patient", "study"):
        if ROUNDED.fullmatch(facts[name] or ""):
            message = f"column {name}: {facts[name]!r} has lost its last digits; export the column as text"
            return replace(image, refused=("identifier", message))
    side, view = facts["laterality"], facts["view"]
    try:
        laterality, _ = read_view(side or "")
        if side and laterality not in LATERALITIES:
            raise ValueError(side)
        of_view, position = _view(view)
    except ValueError:
        message = f"column laterality: {str(side)[:40]!r} in row {number} is neither left nor right"
        return replace(image, refused=("label", message))
    if laterality and of_view and laterality != of_view:
        message = f"columns laterality and view name different sides in row {number}"
        return replace(image, refused=("label-conflict", message))
    return replace(image, laterality=laterality or of_view, view=position)


def _view(text: str | None) -> tuple[str | None, str | None]:
    """(side, view) of the column `view`, such as LCC."""
    try:
        return read_view(text or "")
    except ValueError:
        return None, str(text).casefold()


def _stated(text: str | None) -> str | None:
    return None if text is None or text.casefold() in UNKNOWN else whole(text)


def _once(images: Sequence[Input]) -> list[Input]:
    """The images, of which a file that occurs again is refused."""
    first: dict[str, str] = {}
    found: list[Input] = []
    for image in images:
        place = image.file if isinstance(image, ShardImage) else os.path.realpath(image.path)
        if place in first and not (isinstance(image, ImageFile) and image.refused):
            message = f"the file is given twice; the first time as {first[place]}"
            image = ImageFile(image.file, Path(place), refused=("duplicate", message))
        first.setdefault(place, image.file)
        found.append(image)
    return found
