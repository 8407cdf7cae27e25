from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from shards.check.check import check
from shards.check.quality import quality_page
from shards.errors import ShardError
from shards.pack import pack as module
from shards.pack.identity import keyed_hash, load_key, split_of
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.read.manifest import Manifest
from shards.read.reader import ShardReader
from shards.schema import FALLBACKS, SPLITS, SourceStudy, SourceView
from shards.sources.all_sources import SOURCES
from tests.support.archives import ACCESSION, NAME, NUMBER, breast, contents, tiny_source, write_dicom


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    monkeypatch.setitem(SOURCES, "tiny", tiny_source)
    return PackConfig(
        source="tiny",
        root=str(tmp_path / "archive"),
        out=str(tmp_path / "out"),
        long_side=100,
        samples_per_shard=3,
        workers=1,
        key_file=str(tmp_path / "keys" / "hash.key"),
    )


def test_the_bytes_do_not_depend_on_the_workers(config: PackConfig) -> None:
    pack(config)
    other = replace(config, out=config.out + "2", workers=2)
    pack(other)
    first, second = contents(config.out), contents(other.out)
    assert {name for name in first if name.endswith(".tar")} >= {"train-000000.tar", "train-000001.tar"}
    assert first == second


def test_no_identifier_reaches_shards_or_manifest(config: PackConfig) -> None:
    pack(config)
    planted = [text.encode() for text in (NAME, "PLANTEDNAME", NUMBER, ACCESSION, str(Path(config.root)))]
    for name, data in contents(config.out).items():
        assert not [text for text in planted if text in data], name
        assert not re.search(rb"(?<![0-9a-f])4711(?![0-9a-f])", data), f"{name}: beside the digests, which may hold it"


def test_facts_survive(config: PackConfig) -> None:
    manifest = pack(config)
    assert (manifest.studies, manifest.images, manifest.images_refused) == (12, 48, {})
    reader = ShardReader(Path(config.out))
    by_age = {reader.study(i).age: reader.study(i) for i in range(len(reader))}
    assert sorted(filter(None, by_age)) == list(range(40, 52))
    study = by_age[45]
    assert [(v.laterality, v.view) for v in study.views] == [("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]
    assert [v.flipped for v in study.views] == [False, False, True, True]
    assert {(v.labels.birads, v.labels.density, v.labels.cancer) for v in study.views} == {(5, "B", False)}
    assert study.views[0].report == "Eine Masse.\nSonst nichts."
    assert study.split == split_of("tiny", f"{NUMBER}-5")
    assert manifest.labels[study.split]["density"]["B"] > 0


def test_splits_and_keys_belong_to_the_patient(config: PackConfig) -> None:
    pack(config)
    pack(replace(config, out=config.out + "2", key_file=config.key_file + "2"))
    one, two = ShardReader(Path(config.out)), ShardReader(Path(config.out + "2"))
    assert [one.study(i).split for i in range(12)] == [two.study(i).split for i in range(12)]
    assert not {one.study(i).patient for i in range(12)} & {two.study(i).patient for i in range(12)}
    shares = [split_of("tiny", str(number)) for number in range(20000)]
    assert abs(shares.count("train") / 20000 - 0.7) < 0.02
    assert abs(shares.count("val") / 20000 - 0.1) < 0.01


def test_plain_webdataset_reads_the_shards(config: PackConfig) -> None:
    manifest = pack(config)
    reader = ShardReader(Path(config.out))
    urls = [str(Path(config.out) / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [reader.study(i).key for i in range(len(reader))]
    for sample in samples:
        assert set(sample) >= {"json", "0.jpg", "1.jpg", "2.jpg", "3.jpg"}
        assert json.loads(sample["json"])["source"] == "tiny"


def test_a_bad_file_is_refused_and_the_rest_is_kept(config: PackConfig) -> None:
    studies = list(tiny_source(Path(config.root)))
    studies[0].views[1].path.write_bytes(b"damaged")
    for view in studies[3].views:
        view.path.unlink()
        write_dicom(view.path.with_name("x.dcm"), breast("L"), Modality="MR").rename(view.path)
    with pytest.raises(ShardError, match=r"pack.max_refused: 10.4% of the images"):
        pack(config)
    manifest = pack(replace(config, max_refused=0.2))  # finished: the looser limit needs no second build
    assert manifest.images_refused == {"modality": 4, "unreadable": 1}
    assert (manifest.images, manifest.studies, manifest.studies_dropped) == (43, 11, 1)
    lines = [json.loads(line) for line in (Path(config.out) / "refused.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0]["file"] == f"{NUMBER}-0/L_MLO.dcm"
    assert lines[0]["reason"] == "unreadable"
    assert check(Path(config.out)) == []


def test_missing_laterality_or_view_is_refused(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bare(root: Path) -> Iterator[SourceStudy]:
        side = write_dicom(root / "a.dcm", breast("L"), ImageLaterality=None)
        view = write_dicom(root / "b.dcm", breast("L"), ViewPosition="XCCL")
        told = SourceView(side, laterality="R")
        yield SourceStudy("1", "1", (SourceView(side), SourceView(view), told))

    monkeypatch.setitem(SOURCES, "bare", bare)
    with caplog.at_level("INFO"):
        manifest = pack(replace(config, source="bare", max_refused=1.0))
    assert manifest.images_refused == {"laterality": 1}
    assert manifest.images_excluded == {"other-view": 1}
    assert "other-view, 1 images: the view is 'xccl', not one of CC, MLO" in caplog.messages
    assert manifest.listed == 3
    assert manifest.images == 1


def test_a_finished_folder_is_not_built_again(config: PackConfig, caplog: pytest.LogCaptureFixture) -> None:
    manifest = pack(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir() if path.is_file()}
    with caplog.at_level(logging.INFO):
        assert pack(replace(config, workers=2)) == manifest
    assert "is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": 80}, r"^pack.quality: .*out was packed with 95, now it is 80; set it back, or give another `out`"),
        (
            {"options": {"patients": 3}},
            r"^pack.options\.patients: .*out was packed with 12, now it is 3, and 9 packed studies are gone; set it",
        ),
        (
            {"key_file": "other.key"},
            r"^pack.key_file: .*out was packed with another one; set it back, or give another `out`",
        ),
    ],
)
def test_a_folder_of_other_settings_is_an_error(
    config: PackConfig, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack(config)
    with pytest.raises(ShardError, match=message):
        pack(replace(config, **change))


def test_an_interrupted_build_starts_over_and_ends_in_the_same_bytes(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(config)

    def broken(*_: Any) -> Manifest:
        raise KeyboardInterrupt

    other = replace(config, out=config.out + "2")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_manifest", broken)
        with pytest.raises(KeyboardInterrupt):
            pack(other)
    assert not (Path(other.out) / "manifest.json").exists()
    pack(other)
    assert contents(other.out) == contents(config.out)


def test_pictures_by_a_fallback_are_counted_told_and_marked(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def windowed(root: Path) -> Iterator[SourceStudy]:
        for number, center in enumerate((2048, 10**6, "NaN")):
            path = root / f"{number}.dcm"
            write_dicom(path, breast("L", number), WindowCenter=center, WindowWidth=4096, VOILUTFunction="")
            yield SourceStudy(str(number), "1", (SourceView(path),))

    monkeypatch.setitem(SOURCES, "windowed", windowed)
    assert pack(replace(config, source="windowed")).fallbacks == {"function": 1, "stretch": 2}
    assert f"2 images were rendered by {FALLBACKS['stretch']}" in caplog.text
    reader = ShardReader(Path(config.out))
    assert sorted(reader.study(i).views[0].fallbacks for i in range(3)) == [("function",), ("stretch",), ("stretch",)]
    assert check(Path(config.out)) == []


def test_shards_without_fallbacks_say_nothing_of_them(config: PackConfig) -> None:
    """So that they are the same bytes as those of earlier releases, whose records and manifests are read too."""
    pack(config)
    files = contents(config.out)
    assert not [name for name, data in files.items() if name.endswith(".tar") and b"fallbacks" in data]
    for name, data in files.items():
        if name.endswith(".json"):
            document = json.loads(data)
            document.pop("fallbacks", None)
            (Path(config.out) / name).write_text(json.dumps(document))
    assert check(Path(config.out)) == []


def test_tars_of_something_else_are_not_touched(config: PackConfig) -> None:
    foreign = Path(config.out) / "train-000000.tar"
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    with pytest.raises(ShardError, match=r"shards without their build/plan.json; give another `out`"):
        pack(config)
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "tinny"}, r"pack.source: 'tinny' is not one of .*tiny"),
        ({"options": {"patient": 3}}, r"pack.options.patient: source 'tiny' has patients"),
        ({"root": ""}, r"pack.root: is empty"),
        ({"out": ""}, r"pack.out: is empty"),
        ({"long_side": 0}, r"pack.long_side: 0 is less than 1"),
        ({"workers": -1}, r"pack.workers: -1 is less than 0"),
        ({"quality": 101}, r"pack.quality: 101 is not in 1..100"),
        ({"max_refused": 2.0}, r"pack.max_refused: 2.0 is not a share"),
        ({"options": {"patients": 0}}, r"holds no study"),
        ({"options": {"patients": True}}, r"pack.options.patients: True is not a whole number"),
        ({"source": "table", "options": {"file": 1.1}}, r"pack.options.file: 1.1 is not a text; write it in quotes"),
        ({"source": "embed", "options": {"prefix": 7}}, r"pack.options.prefix: 7 is not a text; write it in quotes"),
    ],
)
def test_a_mistake_is_one_line(config: PackConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardError, match=message) as caught:
        pack(replace(config, **change))
    assert "\n" not in str(caught.value)


def test_a_study_twice_is_an_error(config: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(root: Path) -> Iterator[SourceStudy]:
        yield from tiny_source(root, 1)
        yield from tiny_source(root, 1)

    monkeypatch.setitem(SOURCES, "twice", twice)
    with pytest.raises(ShardError, match="twice"):
        pack(replace(config, source="twice"))


def test_names_that_are_not_utf_8(config: PackConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every place where a name may stand; and names that are UTF-8 have the keys that they always had."""
    bad = os.fsdecode(b"m\xfcller")

    def walking(root: Path, note: str = bad) -> Iterator[SourceStudy]:
        for folder in sorted(root.iterdir()):
            views = tuple(SourceView(path, "L", "CC") for path in sorted(folder.iterdir()))
            yield SourceStudy(folder.name, folder.name, views, race=bad if folder.name == "race" else None)

    monkeypatch.setitem(SOURCES, "walking", walking)
    root = tmp_path / bad
    for folder in ("m\u00fcller", bad, "race"):
        write_dicom(root / folder / f"{bad}.dcm", breast("L"))
    (root / bad / f"x{bad}.dcm").write_bytes(b"damaged")
    out, key_file = str(tmp_path / f"out-{bad}"), str(tmp_path / f"key-{bad}")
    told = replace(config, source="walking", root=str(root), out=out, key_file=key_file, max_refused=0.5)
    manifest = pack(told)
    assert pack(replace(told, workers=2)) == manifest
    key = load_key(Path(key_file))
    texts = [b"study\0walking\0" + name + b"\0" + name for name in (b"m\xc3\xbcller", b"m\xfcller")]
    expected = {hmac.new(key, text, hashlib.sha256).hexdigest()[:16] for text in texts}
    assert {name for shard in manifest.shards for name in shard.keys} == expected
    lines = (Path(out) / "refused.jsonl").read_bytes().decode().splitlines()
    assert [(json.loads(line)["file"], json.loads(line)["reason"]) for line in lines] == [
        (r"m\xfcller/xm\xfcller.dcm", "unreadable"),
        (r"race/m\xfcller.dcm", "hostile"),
    ]
    assert check(Path(out)) == []
    page = quality_page([Path(out)], tmp_path / f"{bad}.html", {Path(out): [f"{bad}: a problem"]}).read_bytes().decode()
    assert r"out-m\xfcller" in page
    # Where the locale is ASCII, Python has such names for all that is not ASCII.
    assert keyed_hash(key, "m\udcc3\udcbcller") == keyed_hash(key, "m\u00fcller")
    assert keyed_hash(key, "\ud800") != keyed_hash(key, "?")
    assert split_of("s", bad) in SPLITS
    moved = root.rename(tmp_path / "moved")
    assert pack(replace(told, root=str(moved))).shards == manifest.shards


def test_the_key_file_is_private_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "hash.key"
    key = load_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key
    assert [p.name for p in path.parent.iterdir()] == ["hash.key"]
    path.chmod(0o644)
    with pytest.raises(ShardError, match="chmod 600"):
        load_key(path)
    path.chmod(0o600)
    path.write_text("not a key")
    with pytest.raises(ShardError, match="hexadecimal"):
        load_key(path)


def test_tar_headers_hold_no_clock_and_no_user(config: PackConfig) -> None:
    manifest = pack(config)
    for shard in manifest.shards:
        with tarfile.open(Path(config.out) / shard.name) as tar:
            facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar.getmembers()}
        assert facts == {(0, 0, 0, "", "", 0o644)}
