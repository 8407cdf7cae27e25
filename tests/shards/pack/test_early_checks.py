"""Builds that cannot end well end early, in one line, and leave nothing behind that is in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.check.check import check
from shards.errors import ShardError
from shards.pack import pack as module
from shards.pack.pack import make_plan, pack
from shards.pack.settings import PackConfig
from shards.schema import SourceStudy, SourceView
from shards.sources.all_sources import SOURCES
from tests.support.archives import write_png


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    """130 patients of one image each in a source that names files without looking for them."""

    def named(root: Path, refused: int = 0, other: int = 0) -> Iterator[SourceStudy]:
        for number in range(130):
            why = ("label", "column B: 'x' is not understood") if number < refused else None
            why = why or (("spot", "a spot view") if number >= 130 - other else None)
            yield SourceStudy(str(number), "1", (SourceView(root / f"{number:03d}.png", "L", "CC", refused=why),))

    monkeypatch.setitem(SOURCES, "named", named)
    root, out, key = (str(tmp_path / name) for name in ("archive", "out", "key"))
    return PackConfig("named", root, out, {}, workers=1, key_file=key, long_side=32)


def fill(config: PackConfig, numbers: range, pixels: bytes | None = None) -> None:
    image = np.full((40, 32), 3, np.uint8)
    image[8:32, :20] = np.random.default_rng(0).integers(90, 200, (24, 20))
    path = write_png(Path(config.root) / "some.png", image)
    data = path.read_bytes() if pixels is None else pixels
    path.unlink()
    for number in numbers:
        (Path(config.root) / f"{number:03d}.png").write_bytes(data)


def test_a_wrong_root_is_told_before_anything_is_read_and_may_be_corrected(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(config, range(130))
    wrong = replace(config, root=config.root + "-wrong")
    with monkeypatch.context() as patch:
        patch.setattr(module, "in_order", None)  # nothing is read
        for call in (pack, make_plan):
            line = rf"^pack.root: 130 of 130 images would be refused, 130 of them as missing, such as {wrong.root}/"
            with pytest.raises(ShardError, match=line):
                call(wrong)
    refused = (Path(config.out) / "build" / "refused.jsonl").read_text().splitlines()
    assert len(refused) == 130
    assert {"file": "000.png", "reason": "missing", "message": "no such file"} in map(json.loads, refused)
    assert pack(config).images == 130
    assert not (Path(config.out) / "build" / "refused.jsonl").exists()


def test_the_limit_counts_what_is_stored_and_not_what_is_excluded(config: PackConfig) -> None:
    """Of 100 images that count, 5 are missing: 5 % are allowed. Then 4 more are refused by the source."""
    fill(config, range(100 - 5))
    excluded = replace(config, options={"other": 30})
    assert pack(replace(excluded, out=config.out + "2")).images_refused == {"missing": 5}
    (Path(config.root) / "094.png").unlink()
    line = r"^pack.root: 6 of 100 images would be refused, 6 of them as missing, such as .*5.0% are allowed"
    with pytest.raises(ShardError, match=line):
        pack(excluded)
    fill(config, range(99))
    line = r"^pack.max_refused: 10 of 100 images would be refused, 9 of them as label, such as .*png \(column B:"
    with pytest.raises(ShardError, match=line):
        pack(replace(excluded, options={"other": 30, "refused": 9}))
    assert pack(replace(excluded, options={"other": 30, "refused": 9}, max_refused=1.0)).images == 90


def test_a_hundred_unreadable_images_and_nothing_else_end_a_build(config: PackConfig) -> None:
    fill(config, range(130), b"damaged")
    with pytest.raises(
        ShardError, match=r"^pack.root: the first 100 images of .* are all refused as unreadable, such as 0"
    ):
        pack(config)
    assert not (Path(config.out) / "manifest.json").exists()
    with pytest.raises(
        ShardError, match=r"holds no usable image: 130 are left out, \d+ of them as .*run the same `mam"
    ):
        pack(replace(config, max_refused=1.0))
    fill(config, range(100, 130))
    assert pack(replace(config, max_refused=1.0)).images_refused == {"unreadable": 100}
    fill(config, range(50))
    manifest = pack(replace(config, max_refused=0.5))
    assert (manifest.images, manifest.listed, manifest.images_refused) == (80, 130, {"unreadable": 50})
    assert check(Path(config.out)) == []


def test_out_must_not_hold_the_archive_nor_be_read_as_part_of_it(config: PackConfig, tmp_path: Path) -> None:
    fill(config, range(130))
    root = Path(config.root)
    (tmp_path / "link").symlink_to(root)
    for out in (root, tmp_path, tmp_path / "link", root / "new" / ".."):
        with pytest.raises(ShardError, match=rf"^pack.out: {out} is or contains the archive {root}; give"):
            pack(replace(config, out=str(out)))
    assert not (root / "build").exists()
    assert not (tmp_path / "build").exists()
    inside = replace(config, out=str(tmp_path / "link" / "shards"))
    assert pack(inside).images == 130  # nothing in it is read

    def walking(root: Path) -> Iterator[SourceStudy]:
        for path in sorted(root.rglob("*.png")):
            yield SourceStudy(path.name, "1", (SourceView(path, "L", "CC"),))

    SOURCES["named"] = walking
    os.link(root / "000.png", root / "shards" / "sheet.png")
    for again in (inside.out, str(root / "shards")):
        line = rf"^pack.out: {root}/shards/sheet.png is read as part of the archive; give an `out` outside"
        with pytest.raises(ShardError, match=line):
            pack(replace(config, out=again))
