"""Archives that change between two starts of a build: nothing is mixed, nothing is lost, and every count is right."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.check.check import check
from shards.errors import ShardError
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.read.manifest import load_manifest
from shards.read.reader import ShardReader
from tests.support.archives import breast, write_dicom, write_png

COLUMNS = {"patient": "pid", "image": "path", "laterality": "side", "view": "view", "birads": "birads", "age": "age"}


@pytest.fixture
def config(tmp_path: Path) -> PackConfig:
    """Eight patients of two images each, all in the table; p7 has none of its files, and p6 one."""
    rows = [f"p{n},p{n}/{view}.png,L,{view},{n % 5},{40 + n}" for n in range(8) for view in ("CC", "MLO")]
    write_table(tmp_path / "archive", rows)
    for patient in range(7):
        draw(tmp_path / "archive" / f"p{patient}" / "CC.png", patient)
        if patient < 6:
            draw(tmp_path / "archive" / f"p{patient}" / "MLO.png", patient)
    options = {"file": "t.csv", "columns": COLUMNS}
    root, out, key = (str(tmp_path / name) for name in ("archive", "out", "key"))
    return PackConfig(
        "table", root, out, options, samples_per_shard=3, workers=1, max_refused=1.0, key_file=key, long_side=64
    )


def write_table(root: Path, rows: Iterable[str]) -> None:
    root.mkdir(exist_ok=True)
    (root / "t.csv").write_text("\n".join(["pid,path,side,view,birads,age", *rows]) + "\n")


def draw(path: Path, seed: int) -> None:
    """A noisy half disc: files of different seeds have different sizes."""
    y, x = np.mgrid[:100, :80]
    inside = ((y - 50) / 40) ** 2 + (x / 50) ** 2 < 1
    noise = np.random.default_rng(seed).integers(0, 60 + 5 * seed, inside.shape)
    write_png(path, np.where(inside, 120 + noise, noise // 20).astype(np.uint8))


def tars(config: PackConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(config.out).glob("*.tar"))}


def refused(config: PackConfig) -> list[tuple[str, str]]:
    lines = map(json.loads, (Path(config.out) / "refused.jsonl").read_text().splitlines())
    return sorted((line["file"], line["reason"]) for line in lines)


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_files_that_come_late_are_taken_up_and_counted_once(
    config: PackConfig, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(config.root)
    manifest = pack(config)
    first = tars(config)
    missing = [("p6/MLO.png", "missing"), ("p7/CC.png", "missing"), ("p7/MLO.png", "missing")]
    assert (manifest.studies, manifest.images, manifest.studies_dropped, manifest.listed) == (7, 13, 1, 16)
    assert refused(config) == missing
    assert pack(config) == manifest  # as long as the files are not there, nothing is tried again
    draw(root / "p7" / "CC.png", 7)
    manifest = pack(config)
    assert (manifest.studies, manifest.images, manifest.studies_dropped, manifest.listed) == (8, 14, 0, 16)
    assert refused(config) == [missing[0], missing[2]]
    assert {name: data for name, data in tars(config).items() if name in first} == first
    assert len(tars(config)) == len(first) + 1
    assert check(Path(config.out)) == []
    draw(root / "p6" / "MLO.png", 6)  # of a study that is stored already
    second = tars(config)
    assert pack(config) == manifest
    assert "1 packed studies have other files or labels now, such as that of " in caplog.text
    assert tars(config) == second
    record = next(word for word in caplog.text.split() if word.startswith("build/"))
    (Path(config.out) / record).unlink()  # as the message says
    manifest = pack(config)
    assert (manifest.studies, manifest.images, manifest.images_refused) == (8, 15, {"missing": 1})
    assert check(Path(config.out)) == []


def test_late_labels_and_rows_that_go_of_a_study_without_images(config: PackConfig) -> None:
    root = Path(config.root)
    table = (root / "t.csv").read_text()
    (root / "t.csv").write_text(table.replace("p3/CC.png,L,CC,3", "p3/CC.png,L,CC,three"))
    (root / "p3" / "MLO.png").unlink()
    manifest = pack(config)
    assert (manifest.studies, manifest.images, manifest.images_refused) == (6, 11, {"label": 1, "missing": 4})
    config = replace(config, options={**config.options, "values": {"birads": {"three": 3}}})  # a spelling is added
    table = (root / "t.csv").read_text()
    (root / "t.csv").write_text("\n".join(line for line in table.splitlines() if "p7/MLO" not in line) + "\n")
    manifest = pack(config)
    assert manifest.settings["options"]["values"] == config.options["values"]
    assert (manifest.studies, manifest.images, manifest.images_refused) == (7, 12, {"missing": 3})
    assert manifest.listed == 15
    (root / "t.csv").write_text("\n".join(line for line in table.splitlines() if "p7" not in line) + "\n")
    manifest = pack(config)
    assert (manifest.listed, manifest.studies_dropped, manifest.images_refused) == (14, 0, {"missing": 2})
    assert check(Path(config.out)) == []


def numbers(config: PackConfig) -> list[int]:
    """The patients, in the order of the shards."""
    reader = ShardReader(Path(config.out))
    return [int(reader.study(number).age or 0) - 40 for number in range(len(reader))]


def half(config: PackConfig) -> tuple[str, list[int], list[int]]:
    """Forget the manifest and all shards but the first; returns it, and which patients are in it and are not."""
    out = Path(config.out)
    packed, *lost = [shard.name for shard in pack(config).shards]
    patients = numbers(config)
    inside = load_manifest(out).shards[0].samples
    (out / "manifest.json").unlink()
    for name in lost:
        (out / name).unlink()
        (out / "build" / f"{Path(name).stem}.json").unlink()
    return packed, patients[:inside], patients[inside:]


def test_a_half_built_folder_takes_changes_up_only_where_nothing_is_packed(config: PackConfig) -> None:
    packed, inside, outside = half(config)
    draw(Path(config.root) / f"p{outside[0]}" / "CC.png", 20)
    pack(config)
    fresh = replace(config, out=config.out + "2")
    pack(fresh)
    assert tars(config) == tars(fresh)
    half(config)
    draw(Path(config.root) / f"p{inside[0]}" / "CC.png", 21)
    before = tars(config)
    record = f"build/{Path(packed).stem}.json"
    with pytest.raises(
        ShardError, match=rf"^pack.root: 1 packed studies have other files .*, remove {record} in .*out and run"
    ):
        pack(config)
    assert tars(config) == before
    (Path(config.out) / record).unlink()
    pack(config)
    pack(replace(config, out=config.out + "3"))
    assert tars(config) == tars(replace(config, out=config.out + "3"))


def test_a_copied_archive_continues_wherever_it_lies(config: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    pack(config)
    before = tars(config)
    half(config)
    copy = shutil.copytree(config.root, config.root + "-copy", copy_function=shutil.copyfile)
    for path in Path(copy).rglob("*.png"):
        os.utime(path, (2_000_000_000, 2_000_000_000))
    manifest = pack(replace(config, root=str(copy)))
    assert tars(config) == before
    assert "packed studies have files of the same size but another modification time" in caplog.text
    assert pack(replace(config, root=str(copy))) == manifest
    assert check(Path(config.out)) == []
    lacking = Path(copy) / "p0" / "CC.png"
    lacking.rename(lacking.with_name("elsewhere"))
    assert pack(replace(config, root=str(copy))) == manifest
    assert caplog.messages[-1].startswith("1 packed studies lack files now, such as that of ")
    draw(Path(config.root) / "p0" / "CC.png", 30)
    with pytest.raises(
        ShardError, match=r"^pack.root: .*out was packed with another one, and 1 packed studies have .*; set it back"
    ):
        pack(config)


def test_a_lost_or_cut_tar_is_written_again_and_never_with_other_contents(config: PackConfig) -> None:
    manifest = pack(config)
    before, out = tars(config), Path(config.out)
    name, first = manifest.shards[0].name, numbers(config)[0]
    for damage in ((out / name).unlink, lambda: os.truncate(out / name, 700)):
        damage()
        assert pack(config) == manifest
        assert tars(config) == before
    (out / "manifest.json").unlink()
    (out / name).unlink()
    draw(Path(config.root) / f"p{first}" / "CC.png", 40)
    with pytest.raises(
        ShardError, match=rf"{name}: is missing or truncated, and 1 of its studies .*remove .*build/train-000000.json"
    ):
        pack(config)
    (out / "build" / "train-000000.json").unlink()
    assert pack(config).images == manifest.images
    assert tars(config) != before


def test_a_build_of_an_earlier_release_continues(config: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    pack(config)
    before = tars(config)
    half(config)
    build = Path(config.out) / "build"
    edit(build / "plan.json", lambda plan: [shard.pop("files") for shard in plan["shards"]])
    for path in build.glob("*-*.json"):
        edit(path, lambda record: record.pop("refused_studies"))
    pack(config)
    assert tars(config) == before
    assert not caplog.messages or "other files" not in caplog.text
    draw(Path(config.root) / "p7" / "CC.png", 7)
    pack(config)
    assert check(Path(config.out)) == []


def test_what_an_earlier_release_left_out_is_not_taken_up_in_silence(
    config: PackConfig, caplog: pytest.LogCaptureFixture
) -> None:
    images = pack(config).images
    build = Path(config.out) / "build"
    edit(build / "plan.json", lambda plan: [shard.pop("files") for shard in plan["shards"]])
    for path in build.glob("*-*.json"):
        edit(path, lambda record: record.pop("refused_studies"))
    draw(Path(config.root) / "p7" / "CC.png", 7)
    assert pack(config).images == images
    assert "1 studies have no stored image, and an earlier release did not record why" in caplog.text
    (name,) = set(re.findall(r"remove build/(\S+) in", caplog.text))
    (build / name).unlink()
    assert pack(config).images == images + 1
    assert check(Path(config.out)) == []


def test_a_file_that_lies_there_in_gzip_is_no_missing_one(tmp_path: Path) -> None:
    """The archive was compressed after its table was written: that is no reason to stop before the first image."""
    root = tmp_path / "archive"
    write_table(root, ["p0,a.dcm,L,CC,1,40"])
    write_dicom(tmp_path / "a.dcm", breast("L"))
    (root / "a.dcm.gz").write_bytes(gzip.compress((tmp_path / "a.dcm").read_bytes()))
    config = PackConfig(
        "table", str(root), str(tmp_path / "out"), {"file": "t.csv", "columns": COLUMNS}, long_side=64, workers=1,
        max_refused=0.0, key_file=str(tmp_path / "key"),
    )  # fmt: skip
    assert pack(config).images == 1


def test_a_table_that_is_saved_anew_with_other_line_ends_changes_nothing(config: PackConfig) -> None:
    options = {**config.options, "columns": {**COLUMNS, "report": "report"}}
    config = replace(config, options=options)
    found: list[Any] = []
    for end in ("\r\n", "\n"):
        rows = [f'p{n},p{n}/CC.png,L,CC,1,40,"Mass.{end}BI-RADS 4."' for n in range(6)]
        text = "\n".join(["pid,path,side,view,birads,age,report", *rows]) + "\n"
        (Path(config.root) / "t.csv").write_bytes(text.encode())
        found.append(pack(config))  # where a packed study had changed, a setting is another one, or a log line says so
        found.append(tars(config))
    assert found[:2] == found[2:]


def test_a_packed_study_that_changed_is_named_by_a_file(config: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    pack(config)
    draw(Path(config.root) / "p3" / "MLO.png", 33)
    pack(config)
    assert f"1 packed studies have other files or labels now, such as that of {config.root}/p3/" in caplog.text


def test_a_box_beside_the_image_is_counted_and_words_that_are_not_understood_are_named(
    config: PackConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    boxes = {"x0": "x0", "y0": "y0", "x1": "x1", "y1": "y1", "kind": "kind"}
    config = replace(config, options={**config.options, "columns": {**COLUMNS, **boxes}})
    rows = [
        "p0,p0/CC.png,L,CC,1,40,90,10,99,20,mass",  # the image is 80 wide
        "p1,p1/CC.png,L,CC,1,41,10,10,20,20,mass",
        "p2,p2/CC.png,L,CC,many,42,,,,,",
        "p3,p3/CC.png,L,MOL,1,43,,,,,",
    ]
    text = "\n".join(["pid,path,side,view,birads,age,x0,y0,x1,y1,kind", *rows]) + "\n"
    (Path(config.root) / "t.csv").write_text(text)
    manifest = pack(config)
    assert (manifest.images, manifest.conflicts) == (2, {"box": 1})
    assert check(Path(config.out)) == []
    for line in (
        "1 images: the box of a finding lies outside the image; the finding is stored without it",
        "label, 1 images: column birads: 'many' is not understood; map it in pack.options.values.birads",
        "other-view, 1 images: the view is 'mol', not one of CC, MLO",
    ):
        assert line in caplog.messages
