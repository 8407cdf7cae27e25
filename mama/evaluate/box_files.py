"""Boxes of any detector: the CSV files of `eval.boxes`, each of which is measured beside the maps of the model.

A line is one box: the name of its image as in predictions.csv, x0, y0, x1, y1 in pixels of the stored image, as the
boxes of findings are, and a score. Other columns are ignored; an image without a line has no box.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mama.data.held_out import Item, Split
from mama.data.images import fit_box
from mama.errors import ConfigError
from mama.evaluate import detection
from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.detection import Marks
from mama.settings.schema import Config
from shards.read.manifest import load_manifest
from shards.read.remote import local_folder
from shards.sources.tables import read_table

log = logging.getLogger(__name__)

CORNERS = ["x0", "y0", "x1", "y1"]
NUMBERS = [*CORNERS, "score"]
COLUMNS = ["image", *NUMBERS]
BEYOND = 1.0  # pixels that a box may reach out of its image: coordinates are rounded


def read_box_files(entries: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The tables of `eval.boxes` by the names of their rows: `image`, `CORNERS` and `score`, a line a box.

    Raises `ConfigError`, or `ShardError` for what is no table, with file, row, value and fix.
    """
    found: dict[str, pd.DataFrame] = {}
    for entry in entries:
        name = Path(entry).stem
        if entries.count(entry) > 1:
            raise ConfigError(f"eval.boxes: {entry} is named twice; name it once")
        of_file = name.casefold() in {other.casefold() for other in found}
        if of_file or name.casefold() in detection.OWN_ROWS:
            taken = "another file has that name" if of_file else "our own results have such a row"
            raise ConfigError(f"eval.boxes: {entry}: its row would be called {name!r}, but {taken}; rename the file")
        found[name] = _read(Path(entry).expanduser())
    return found


def marks(config: Config, split: Split) -> dict[str, list[Marks]]:
    """The boxes in pixels of the canvas, and their scores, in each image of `split`, by the name of the file.

    Lines of other splits, and of other sets in `eval.on`, are passed over. Raises as `read_box_files`, and
    `ConfigError` for an image that is in none of these shards, a box outside of its image, and a file without a line
    for any image of the split.
    """
    tables = read_box_files(config.eval.boxes)
    if not tables:
        return {}
    addresses = list(dict.fromkeys([*config.data.shards, *config.eval.on]))
    others = _studies(addresses, config) - {item.study.key for item in split.items}
    found = {}
    for entry, (name, table) in zip(config.eval.boxes, tables.items(), strict=True):
        _require_known(entry, table, split, others, addresses)
        found[name] = _in_images(entry, table, split)
    return found


def _read(path: Path) -> pd.DataFrame:
    if path.is_dir():
        raise ConfigError(f"eval.boxes: {path}: is a folder; name the CSV files in it")
    if not path.is_file():
        raise ConfigError(f"eval.boxes: {path}: no such file; name CSV files with the columns {', '.join(COLUMNS)}")
    written = read_table(path, {name: name for name in COLUMNS})
    _refuse(path, written, written["image"].isna(), ["image"], "name it as predictions.csv does")
    table = written.copy()
    for name in NUMBERS:
        table[name] = pd.to_numeric(written[name], errors="coerce").astype(np.float64)
        _refuse(path, written, ~np.isfinite(table[name]), [name], "no finite number; give one, or leave the box out")
    for pair in (["x0", "x1"], ["y0", "y1"]):
        wrong = table[pair[0]] >= table[pair[1]]
        _refuse(path, written, wrong, pair, f"the box is empty; {pair[0]} must be less than {pair[1]}")
    return table


def _refuse(
    path: Path | str, table: pd.DataFrame, wrong: pd.Series[bool] | Flags, columns: list[str], what: str
) -> None:
    """Raise `ConfigError` for the first line that is `wrong`, if there is one, with the number of them."""
    if not wrong.any():
        return
    line = table[wrong].iloc[0].fillna("(empty)")
    values = ", ".join(f"{column} {line[column]}" for column in columns)
    others = f" ({wrong.sum()} such rows of {len(table)})" if wrong.sum() > 1 else ""
    raise ConfigError(f"{path}: row {line.name + 2}: {values}: {what}{others}")


def _studies(addresses: Sequence[str], config: Config) -> set[str]:
    """The keys of all studies of these shards, whatever their split."""
    manifests = [load_manifest(local_folder(address, config.data.cache_folder)) for address in addresses]
    return {key for manifest in manifests for shard in manifest.shards for key in shard.keys}


def _require_known(path: str, table: pd.DataFrame, split: Split, others: set[str], addresses: list[str]) -> None:
    """Raise `ConfigError` for an image that is neither in the split nor in one of the `others` among the studies."""
    inside = table["image"].isin({item.key for item in split.items})
    studies = table["image"].map(lambda image: image.rpartition("/")[0])
    what = (
        f"in no split of {', '.join(addresses)}; name images as predictions.csv does, those of other shards not at all"
    )
    _refuse(path, table, ~inside & ~studies.isin(others), ["image"], what)
    if not inside.any():
        raise ConfigError(
            f"{path}: has no box in an image of the split {split.name} of {', '.join(split.data.shards)}; "
            "leave the file out, or evaluate the split that it is of (eval.split)"
        )


def _in_images(path: str, table: pd.DataFrame, split: Split) -> list[Marks]:
    """The boxes of one file in each image of the split. Raises `ConfigError` for one that reaches out of its image."""
    lines: dict[str, Ints] = table.groupby("image").indices
    own = [lines.get(item.key, np.zeros(0, np.int64)) for item in split.items]
    corners, scores = table[CORNERS].to_numpy(np.float64), table["score"].to_numpy(np.float64)
    beyond = np.zeros(len(table), bool)
    for item, rows in zip(split.items, own, strict=True):
        most = np.array(item.view.size[::-1]) + BEYOND
        beyond[rows] |= (corners[rows, :2] < -BEYOND).any(1) | (corners[rows, 2:] > most).any(1)
    _refuse(path, table, beyond, ["image", *CORNERS], "reaches out of the image; give pixels of the stored one")
    log.info("%s: %d boxes in %d of %d images", path, sum(map(len, own)), sum(len(rows) > 0 for rows in own), len(own))
    return [(_on_canvas(corners[rows], item, split), scores[rows]) for item, rows in zip(split.items, own, strict=True)]


def _on_canvas(corners: Float64s, item: Item, split: Split) -> Float64s:
    boxes = [fit_box((x0, y0, x1, y1), item.view.size, split.size, split.images.fit) for x0, y0, x1, y1 in corners]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
