"""Builds that are killed, run out of disk, are extended, or are started twice: the bytes must not show it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset

from shards.check.check import check
from shards.errors import ShardError
from shards.pack import pack as module
from shards.pack.archive_changes import survey
from shards.pack.identity import keyed_hash
from shards.pack.pack import make_plan, pack, pack_part
from shards.pack.plan import digest_of
from shards.pack.settings import PackConfig
from shards.pack.workers import CRASH
from shards.read.manifest import load_manifest
from shards.schema import Finding, SourceStudy, SourceView
from shards.sources.all_sources import SOURCES
from tests.support.archives import breast, contents, tiny_source, write_dicom
from tests.support.checkout import CHECKOUT

# Runs one build in a process of its own. `limit` is the largest file that it may write, in bytes; at the first file
# that it opens or renames while `fatal` exists it kills itself.
BUILD = """
import json, os, resource, signal, sys
from tests.support.archives import tiny_source
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.sources.all_sources import SOURCES
SOURCES["tiny"] = tiny_source
limit, arguments, fatal = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
if fatal:
    die = lambda event, _: event in ("open", "os.rename") and os.path.exists(fatal) and os.kill(os.getpid(), 9)
    sys.addaudithook(die)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("started", flush=True)
pack(PackConfig(**arguments))
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process, after it has said its first line."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def build(config: PackConfig, limit: int = 0, fatal: Path | str = "") -> subprocess.Popen[str]:
    return child(BUILD, str(limit), json.dumps(asdict(config)), str(fatal))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackConfig:
    monkeypatch.setitem(SOURCES, "tiny", tiny_source)
    return PackConfig(
        source="tiny",
        root=str(tmp_path / "archive"),
        out=str(tmp_path / "out"),
        long_side=100,
        samples_per_shard=2,
        workers=1,
        key_file=str(tmp_path / "hash.key"),
    )


@pytest.fixture
def whole(config: PackConfig) -> dict[str, bytes]:
    """The bytes of a build that nothing disturbed."""
    undisturbed = replace(config, out=config.out + "-whole")
    pack(undisturbed)
    return contents(undisturbed.out)


def test_a_build_killed_again_and_again_ends_in_the_same_bytes(config: PackConfig, whole: dict[str, bytes]) -> None:
    """Killed when a file of that name is there, or the half-written one before it is renamed."""
    shards = [shard["name"] for shard in json.loads(whole["build/plan.json"])["shards"]]
    for name in (
        "build/plan.json.part",
        "build/plan.json",
        f"{shards[0]}.part",
        shards[1],
        f"{shards[2]}.part",
        shards[3],
    ):
        process = build(config, fatal=Path(config.out) / name)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the build was over before it was killed at {name}"
        assert (Path(config.out) / name).exists()
        assert not (Path(config.out) / "manifest.json").exists()
    assert 0 < len(list(Path(config.out).glob("*.tar"))) < len(shards)
    pack(config)
    assert contents(config.out) == whole


def test_a_full_disk_ends_in_one_error_and_the_next_run_continues(config: PackConfig, whole: dict[str, bytes]) -> None:
    largest = max(len(data) for name, data in whole.items() if name.endswith(".tar"))
    plan = len(whole["build/plan.json"])
    for limit in (plan // 2, plan + 1, largest // 2, largest - 1):
        _, error = build(config, limit).communicate()
        assert "ShardError: pack.out: cannot write to" in error.splitlines()[-1], limit
        assert "File too large" in error.splitlines()[-1]
        assert not (Path(config.out) / "manifest.json").exists()
    pack(config)
    assert contents(config.out) == whole


def test_studies_that_come_later_add_shards_and_touch_none(config: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(config)
    first = contents(config.out)
    before = load_manifest(Path(config.out))

    def grown(root: Path, patients: int = 12) -> Iterator[SourceStudy]:
        yield from tiny_source(root, patients + 5)

    monkeypatch.setitem(SOURCES, "tiny", grown)
    manifest = pack(config)
    second = contents(config.out)
    tars = [name for name in first if name.endswith(".tar")]
    assert {name: second[name] for name in tars} == {name: first[name] for name in tars}
    assert len([name for name in second if name.endswith(".tar")]) > len(tars)
    assert manifest.shards[: len(before.shards)] == before.shards
    assert (manifest.studies, manifest.images, manifest.listed) == (17, 68, 68)
    assert check(Path(config.out)) == []


def test_an_interrupted_extension_leaves_the_old_shards_readable(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(config)
    monkeypatch.setitem(SOURCES, "tiny", lambda root, patients=12: tiny_source(root, patients + 3))
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    assert load_manifest(Path(config.out)).studies == 12
    assert pack(config).studies == 15


def test_changed_labels_are_told_and_do_not_change_shards(
    config: PackConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(config)
    first = contents(config.out)

    def relabelled(root: Path, patients: int = 12) -> Iterator[SourceStudy]:
        for number, study in enumerate(tiny_source(root, patients)):
            yield replace(study, age=99) if number == 3 else study

    monkeypatch.setitem(SOURCES, "tiny", relabelled)
    pack(config)
    assert "1 packed studies have other files or labels now, such as that of " in caplog.text
    assert contents(config.out) == first


def test_an_archive_that_changes_under_a_half_finished_build_is_an_error(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(config)
    monkeypatch.setitem(SOURCES, "tiny", lambda root, patients=12: tiny_source(root, patients - 1))
    line = r"^pack.root: 1 studies have changed or disappeared since .*out was planned; run the same `mama pack` again"
    with pytest.raises(ShardError, match=line):
        pack_part(config, 0, 1)
    assert pack(config).studies == 11
    (Path(config.out) / "manifest.json").unlink()
    monkeypatch.setitem(SOURCES, "tiny", lambda root, patients=12: tiny_source(root, patients - 2))
    with pytest.raises(
        ShardError, match=r"^pack.root: 1 packed studies are gone; undo that, or, .*remove build/\w+-0000\d\d.json"
    ):
        pack(config)


def test_parts_in_any_order_give_the_same_bytes(config: PackConfig, whole: dict[str, bytes]) -> None:
    shards = make_plan(config)
    assert shards == len([name for name in whole if name.endswith(".tar")])
    for part in (2, 0):  # the job of part 1 is lost
        pack_part(config, part, 3)
    assert 0 < len(list(Path(config.out).glob("*.tar"))) < shards
    pack(config)
    assert contents(config.out) == whole


HOLD = """
import sys
from pathlib import Path
from shards.pack.lock import locked
with locked(Path(sys.argv[1]), [0]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_builder_of_a_folder_refuses(config: PackConfig) -> None:
    make_plan(config)
    holder = child(HOLD, str(Path(config.out) / "build" / "lock"))
    for call in (pack, make_plan, lambda c: pack_part(c, 0, 1)):
        with pytest.raises(ShardError, match=r"^pack.out: another process is building .*out"):
            call(config)
    pack_part(config, 1, 10_000)  # only shard 0 is held: other parts may be built
    holder.kill()
    holder.communicate()
    assert pack(config).studies == 12


class Bomb(str):
    """Ends the process that unpickles it, as a crashing decoder would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_decoder_that_crashes_costs_its_own_study_only(config: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def hostile(root: Path, patients: int = 12) -> Iterator[SourceStudy]:
        for number, study in enumerate(tiny_source(root, patients)):
            bomb = tuple(replace(view, report=Bomb("boom")) for view in study.views)
            yield replace(study, views=bomb) if number in (4, 7) else study

    monkeypatch.setitem(SOURCES, "tiny", hostile)
    manifest = pack(replace(config, workers=2, max_refused=1.0))
    assert manifest.images_refused == {CRASH[0]: 8}
    assert (manifest.studies, manifest.images, manifest.listed) == (10, 40, 48)


def test_the_same_image_twice(
    config: PackConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def doubled(root: Path) -> Iterator[SourceStudy]:
        image = write_dicom(root / "a.dcm", breast("L"))
        copy = root / "b.dcm"
        copy.write_bytes(image.read_bytes())
        yield SourceStudy("1", "1", (SourceView(image), SourceView(copy)))
        yield SourceStudy("2", "2", (SourceView(copy),))

    monkeypatch.setitem(SOURCES, "doubled", doubled)
    manifest = pack(replace(config, source="doubled", max_refused=1.0))
    assert manifest.images_refused == {"duplicate": 1}
    assert (manifest.images, manifest.duplicates) == (2, 1)
    assert "1 images are stored in two studies" in caplog.text


def test_what_a_source_leaves_out_is_counted(config: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def choosy(root: Path) -> Iterator[SourceStudy]:
        image = write_dicom(root / "a.dcm", breast("L"))
        spot = SourceView(root / "b.dcm", refused=("spot", "spot_mag is 1"))
        torn = SourceView(root / "c.dcm", refused=("label-conflict", "two rows disagree about cancer"))
        yield SourceStudy("1", "1", (SourceView(image), spot, torn))

    monkeypatch.setitem(SOURCES, "choosy", choosy)
    manifest = pack(replace(config, source="choosy", max_refused=0.5))
    assert manifest.images_excluded == {"spot": 1}
    assert manifest.images_refused == {"label-conflict": 1}
    assert manifest.listed == manifest.images + 2 == 3
    assert manifest.refused_share == 0.5
    lines = [json.loads(line) for line in (Path(config.out) / "refused.jsonl").read_text().splitlines()]
    assert lines[0] == {"file": "b.dcm", "reason": "spot", "message": "spot_mag is 1"}


@pytest.mark.parametrize(("codec", "bits", "suffix"), [("png", 8, "png"), ("png", 16, "png"), ("jpeg", 8, "jpg")])
def test_codecs(config: PackConfig, codec: Any, bits: Any, suffix: str) -> None:
    manifest = pack(replace(config, codec=codec, bits=bits))
    urls = [str(Path(config.out) / shard.name) for shard in manifest.shards]
    sample = next(iter(webdataset.WebDataset(urls, shardshuffle=False)))
    image = cv2.imdecode(np.frombuffer(sample[f"0.{suffix}"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert image.dtype == (np.uint16 if bits == 16 else np.uint8)
    assert image.max() > 0.9 * (2**bits - 1)


def test_jpeg_has_no_sixteen_bits(config: PackConfig) -> None:
    with pytest.raises(ShardError, match=r"^pack.bits: JPEG holds 8"):
        pack(replace(config, bits=16))


def test_a_study_without_masks_and_known_implants_has_the_digest_of_earlier_releases() -> None:
    """Else builds of them, when continued, would report every study as changed."""
    study = SourceStudy("p", "s", (SourceView(Path("/in/1.dcm"), findings=(Finding(1, "mass"),)),))
    view = repr(study.views[0]).replace(", masks=(), implant=None", "")
    earlier = f"SourceStudy(patient_id='p', study_id='s', views=({view},), age=None, race=None, ethnicity=None, "
    earlier = (earlier + "reason=None)").replace("/in", "")
    assert "masks" not in earlier
    assert "implant" not in earlier
    assert digest_of(study, Path("/in"), b"k") == keyed_hash(b"k", "digest", earlier)
    with_mask = replace(study, views=(replace(study.views[0], masks=((1, Path("/in/2.dcm")),)),))
    implants = [replace(study, views=(replace(study.views[0], implant=known),)) for known in (False, True)]
    assert len({digest_of(one, Path("/in"), b"k") for one in (study, with_mask, *implants)}) == 4


def test_another_mask_is_another_file_of_the_study(tmp_path: Path) -> None:
    mask = tmp_path / "mask.dcm"
    study = SourceStudy("p", "s", (SourceView(tmp_path / "1.dcm", masks=((1, mask),)),))
    sizes = []
    for content in (None, b"12", b"123"):
        if content:
            mask.write_bytes(content)
        archive = survey({"s": study}, tmp_path, b"k", "sizes")
        sizes.append((archive.sizes["s"], archive.entries["s"].files))
    assert [of_study for of_study, _ in sizes] == [(None, None), (None, 2), (None, 3)]
    assert len({files for _, files in sizes}) == 3
