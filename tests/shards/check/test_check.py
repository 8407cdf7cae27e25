from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from shards.check.check import check, check_all
from shards.check.contact_sheet import contact_sheet
from shards.errors import ShardError
from shards.pack.pack import pack
from shards.pack.sample import Sample
from shards.pack.settings import PackConfig
from shards.read.tar import decode_image
from shards.schema import Labels, Study, View
from shards.sources.all_sources import SOURCES
from tests.support.archives import tiny_source
from tests.support.shard_folder import write_folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("check")
    run_pack(base, base / "out")
    return base / "out"


def run_pack(base: Path, out: Path, **settings: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "tiny", tiny_source)
        config = PackConfig(
            source="tiny",
            root=str(base / "archive"),
            out=str(out),
            long_side=100,
            samples_per_shard=3,
            workers=1,
            key_file=str(base / "key"),
        )
        pack(replace(config, **settings))


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


SHARD = "train-000000.tar"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def members_of(folder: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(folder / SHARD) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Change the members of the first shard and make size and hash in the manifest agree, as an editor would."""
    path = folder / SHARD
    members = members_of(folder)
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    agree(folder)


def agree(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()

    def change(document: dict[str, Any]) -> None:
        shard = next(shard for shard in document["shards"] if shard["name"] == SHARD)
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(folder, change)


def test_a_good_folder_has_no_problem(folder: Path) -> None:
    assert check(folder) == []


def test_a_flipped_byte(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / SHARD).write_bytes(data)
    (problem,) = check(folder)
    assert problem.startswith(f"{SHARD}: its SHA-256")


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    (problem,) = check(folder)
    assert problem.startswith(f"{SHARD}: is missing; copy it again, or run the same `mama pack`")


def test_a_tar_cut_at_a_member_boundary(folder: Path) -> None:
    with tarfile.open(folder / SHARD) as tar:
        boundary = tar.getmembers()[-1].offset
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:boundary])
    (problem,) = check(folder)
    assert problem.startswith(f"{SHARD}: has {boundary} bytes")


def test_a_member_removed_and_the_manifest_adjusted(folder: Path) -> None:
    rewrite(folder, lambda members: members.__delitem__(-1))
    (problem,) = check(folder)
    assert problem.endswith("found the end of the file")


def test_what_check_advises_for_a_lost_shard_brings_it_back(packed: Path, tmp_path: Path) -> None:
    """`folder` was copied from where its archive lies beside it, so the same `pack` can run again."""
    folder = Path(shutil.copytree(packed, tmp_path / "out"))
    before = (folder / SHARD).read_bytes()
    damages: dict[str, Callable[[], object]] = {
        "is missing; copy it again, or run the same `mama pack`": (folder / SHARD).unlink,
        "cut or overwritten; copy it again, or run the same `mama pack`": lambda: os.truncate(folder / SHARD, 999),
        "manifest.json: 47 images": lambda: edit_manifest(folder, lambda d: d.update(images=47)),
        "manifest.json: cannot be read (": lambda: (folder / "manifest.json").write_text("{"),
        "refused.jsonl: was edited or damaged": lambda: (folder / "refused.jsonl").write_text("{"),
    }
    for words, damage in damages.items():
        damage()
        (problem,) = check(folder)
        assert words in problem
        run_pack(packed.parent, folder)
        assert (folder / SHARD).read_bytes() == before
        assert check(folder) == []


def test_pack_and_check_say_the_same_about_records_and_plan(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "out"))
    for name, fix in (
        ("train-000000", "remove it and run the same `mama pack` again"),
        ("plan", "restore it from a copy"),
    ):
        (folder / "build" / f"{name}.json").write_text("{}")
        (problem,) = check(folder)
        assert re.match(rf"build/{name}.json: was edited or damaged .*{fix}", problem)
        with pytest.raises(ShardError) as caught:
            run_pack(packed.parent, folder)
        assert str(caught.value) == f"{folder}/{problem}"
        if name == "train-000000":
            (folder / "build" / f"{name}.json").unlink()
            run_pack(packed.parent, folder)
            assert check(folder) == []


def test_members_that_are_not_adjacent(folder: Path) -> None:
    rewrite(folder, lambda members: members.insert(2, members.pop()))
    (problem,) = check(folder)
    assert "expected" in problem


def test_an_image_that_does_not_decode(folder: Path) -> None:
    rewrite(folder, lambda members: members.__setitem__(4, (members[4][0], b"x" * len(members[4][1]))))
    (problem,) = check(folder)
    assert "does not decode" in problem


def test_a_picture_of_one_grey_value(folder: Path) -> None:
    """As earlier releases stored it where a window lay beside all values."""
    size = json.loads(members_of(folder)[0][1])["views"][0]["size"]
    white = cv2.imencode(".jpg", np.full(size, 255, np.uint8))[1].tobytes()
    rewrite(folder, lambda members: members.__setitem__(1, (members[1][0], white)))
    problems = check(folder)
    assert "0.jpg is blank, all pixels have one grey value" in problems[0]


def test_a_label_changed_in_the_shard(folder: Path) -> None:
    def swap(members: list[tuple[str, bytes]]) -> None:
        name, data = members[0]
        study = json.loads(data)
        labels = study["views"][0]["labels"]
        labels["birads"] = 6 if labels["birads"] != 6 else 0
        members[0] = (name, json.dumps(study, sort_keys=True).encode())

    rewrite(folder, swap)
    (problem,) = check(folder)
    assert problem.startswith("manifest.json: its label histograms differ from the labels in the shards")


def test_a_shard_that_the_manifest_does_not_know(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "train-000777.tar")
    (problem,) = check(folder)
    assert problem.startswith("train-000777.tar: not in the manifest; remove it")


def test_a_patient_in_two_splits(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first, *_, last = document["shards"]
        assert first["split"] != last["split"]
        last["patients"][0] = first["patients"][0]

    edit_manifest(folder, change)
    problems = check(folder)
    assert [problem for problem in problems if "is in the splits" in problem]
    assert [problem for problem in problems if "differs from the manifest in key, patient" in problem]


def test_a_key_in_two_shards(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["shards"][1]["keys"][0] = document["shards"][0]["keys"][0]

    edit_manifest(folder, change)
    assert [problem for problem in check(folder) if "is also in" in problem]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "images": (lambda d: d.update(images=47), "47 images, but the shards hold 48"),
    "listed": (lambda d: d.update(listed=50), "listed differs from what the build recorded"),
    "images_refused": (lambda d: d["images_refused"].update(blank=2), "images_refused differs"),
    "images_excluded": (lambda d: d["images_excluded"].update(spot=2), "images_excluded differs"),
    "conflicts": (lambda d: d["conflicts"].update(view=1), "its conflicts differ"),
    "fallbacks": (lambda d: d["fallbacks"].update(stretch=1), "its fallbacks differ"),
    "duplicates": (lambda d: d.update(duplicates=3), "number of duplicates differs"),
    "studies_dropped": (lambda d: d.update(studies_dropped=3), "studies_dropped differs"),
    "labels": (lambda d: d["labels"]["train"]["density"].update(A=99), "its label histograms differ"),
    "versions": (lambda d: d["versions"].update(numpy="1.0"), "versions differs"),
    "deidentification": (
        lambda d: d["deidentification"].clear(),
        "deidentification differs from what this release does",
    ),
    "quality": (lambda d: d["settings"].update(quality=100), "settings differs from what the build recorded"),
    "a number as text": (lambda d: d.update(images="48"), r"was edited or damaged \(images: '48' is not a count\)"),
    "a negative offset": (
        lambda d: d["shards"][0].update(offsets=[-1, 0, 0]),
        r"was edited or damaged \(shards.offsets: -1 is not a count\)",
    ),
    "a split": (lambda d: d["shards"][0].update(split="test"), "its entry in the manifest was edited"),
    "samples": (lambda d: d["shards"][0].update(samples=2), "its entry in the manifest was edited"),
    "bytes": (lambda d: d["shards"][0].update(bytes=1), "1 in the manifest: cut or overwritten"),
    "sha256": (lambda d: d["shards"][0].update(sha256="0" * 64), "its SHA-256 differs"),
    "an offset": (lambda d: d["shards"][0]["offsets"].__setitem__(1, 512), "at byte 512, found"),
    "a patient": (lambda d: d["shards"][0]["patients"].__setitem__(0, "0" * 16), "differs from the manifest in key"),
    "view counts": (lambda d: d["shards"][0].update(view_counts=[4, 4, 3]), "differs from the manifest in key"),
    "a shard left out": (lambda d: d["shards"].pop(), "a build is unfinished, 5 of 5 shards are written"),
    "a shard twice": (lambda d: d["shards"].append(d["shards"][0]), "has a second entry in the manifest"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest(folder: Path, edit: str) -> None:
    change, words = EDITS[edit]
    edit_manifest(folder, change)
    problems = check(folder)
    assert re.search(words, problems[0])
    if edit not in ("a shard left out", "a shard twice"):  # those change totals too
        assert len(problems) == 1, problems


@pytest.mark.parametrize("edit", ["codec", "bits", "long_side", "listed", "source"])
def test_an_edited_manifest_whose_build_stayed_behind(folder: Path, edit: str) -> None:
    shutil.rmtree(folder / "build")
    assert check(folder) == []
    values = {"codec": "png", "bits": 16, "long_side": 50}

    def change(document: dict[str, Any]) -> None:
        if edit in values:
            document["settings"][edit] = values[edit]
        else:
            document[edit] = {"listed": 50, "source": "other"}[edit]

    edit_manifest(folder, change)
    problems = check(folder)
    assert problems
    if edit in values:
        assert f"setting {edit}" in problems[0]
        assert sum(SHARD in problem for problem in problems) == 6  # five, and how many more
        assert f"{SHARD}: and 7 more like these" in problems


def test_refused_lines_that_are_gone(folder: Path) -> None:
    line = json.dumps({"file": "archive/SECRET.dcm", "reason": "blank", "message": "SECRET"})
    (folder / "refused.jsonl").write_text(line + "\n")
    (problem,) = check(folder)
    assert problem.startswith("refused.jsonl: its 1 lines differ from the manifest's")
    assert "SECRET" not in problem
    (folder / "refused.jsonl").write_text("[]\n")
    assert check(folder)[0].startswith("refused.jsonl: was edited or damaged")


def change_facts(folder: Path, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    def edit(members: list[tuple[str, bytes]]) -> None:
        study = json.loads(members[0][1])
        change(study)
        members[0] = (members[0][0], json.dumps(study).encode().ljust(len(members[0][1])))

    rewrite(folder, edit)
    return check(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(laterality="left"), "its laterality or view is not one of"),
        (lambda v: v.update(crop=[0, 0, 9999, 10]), "its crop lies outside"),
        (lambda v: v.update(flipped=not v["flipped"]), "its crop contradicts its affine"),
        (lambda v: v["findings"][0].update(box=[0, 0, 500, 10]), "the box of a finding lies outside the image"),
        (lambda v: v.update(conflicts=[1]), "another type"),
        (lambda v: v.update(fallbacks=[1]), "another type"),
        (lambda v: v.update(implant="NO"), "another type"),
        (lambda v: v.update(implant=0), "another type"),
        (lambda v: v.update(size="ab"), "another type"),
        (lambda v: v.update(member="../0.jpg"), "its member is not 0.jpg"),
        (lambda v: v["labels"].update(birads=9), "birads: 9"),
        (lambda v: v.pop("crop"), "JSON cannot be read"),
    ],
)
def test_facts_that_cannot_be(folder: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    (problem,) = change_facts(folder, lambda study: change(study["views"][0]))
    assert words in problem


def test_a_study_of_another_schema(folder: Path) -> None:
    (problem,) = change_facts(folder, lambda study: study.update(schema=1))
    assert "schema: version 1" in problem


def raw_member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (raw_member("../../evil.json"), "is not one of a study's members"),
        (raw_member("/etc/evil.json"), "is not one of a study's members"),
        (raw_member("a.0.jpg", tarfile.SYMTYPE), "is not a regular file but a link"),
        (raw_member("a.0.jpg", tarfile.DIRTYPE), "not one of a study's members|is not a regular file"),
        (raw_member("a.0.jpg", tarfile.CHRTYPE), "is not a regular file"),
        (raw_member("a.0.jpg", size=2**40), "at most 268435456 are read"),
        (raw_member("a.0.jpg", size=2**20), "the file ends before"),
        (b"\x7f" * 512, "no tar header"),
        (raw_member("a.0.jpg"), "a.0.jpg is not in the manifest"),
    ],
)
def test_a_member_that_does_not_belong(folder: Path, block: bytes, words: str) -> None:
    path = folder / SHARD
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
    at = end.offset_data + -(-end.size // 512) * 512
    path.write_bytes(path.read_bytes()[:at] + block + bytes(1024))
    agree(folder)
    (problem,) = check(folder)
    assert problem.startswith(f"{SHARD}: ")
    assert re.search(words, problem)
    assert "\n" not in problem


def test_data_behind_the_end_mark(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"hidden")
    agree(folder)
    assert check(folder) == [f"{SHARD}: holds data after its end mark"]


def test_a_tar_without_an_end_mark_and_a_pipe(folder: Path) -> None:
    data = (folder / SHARD).read_bytes().rstrip(b"\0")
    (folder / SHARD).write_bytes(data.ljust(-(-len(data) // 512) * 512, b"\0"))
    agree(folder)
    (problem,) = check(folder)
    assert "without an end mark" in problem
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    assert check(folder) == [f"{SHARD}: is not a regular file"]


def test_a_sample_of_images_is_the_same_every_time_and_spread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(data: bytes) -> np.ndarray:
        decoded.append(len(data))
        return decode_image(data)

    monkeypatch.setattr("shards.check.check_shard.decode_image", counted)
    assert check(folder, sample=2) == []
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert len(decoded) == sum(min(2, sum(shard["view_counts"])) for shard in shards)
    first = sorted(decoded)
    decoded.clear()
    assert check(folder, sample=2) == []
    assert sorted(decoded) == first
    damage = lambda members: members.__setitem__(4, (members[4][0], b"x" * len(members[4][1])))  # noqa: E731
    rewrite(folder, damage)
    assert check(folder, sample=1) == []  # another image is looked at; the hash is still compared
    assert len(check(folder)) == 1
    assert check(folder, sample=0) == []


def test_a_build_that_is_not_finished(folder: Path) -> None:
    plan = folder / "build" / "plan.json"
    document = json.loads(plan.read_text())
    document["shards"].append({"name": "train-000009.tar", "split": "train", "studies": [["k", "d"]]})
    plan.write_text(json.dumps(document))
    (folder / "train-000009.tar").write_bytes(b"")
    assert check(folder) == ["a build is unfinished, 6 of 6 shards are written; run the same `mama pack` again"]
    plan.write_text("{}")
    assert check(folder)[0].startswith("build/plan.json: was edited or damaged")


def test_the_same_image_in_two_studies(tmp_path: Path) -> None:
    views = {key: made_view(instance="11" * 8) for key in ("a1", "b2")}
    write(
        tmp_path / "set",
        {"train": [made_sample("a1", "p1", views["a1"])], "test": [made_sample("b2", "p2", views["b2"], "test")]},
    )
    assert check(tmp_path / "set") == [
        "image b2.0.jpg is the same as a1.0.jpg, which is in the split train; keep one of them in the archive"
    ]


def test_several_sets_together(folder: Path, tmp_path: Path) -> None:
    view = made_view(instance="22" * 8)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    write(one, {"train": [made_sample("a1", "p1", view), made_sample("a2", "p2", made_view())]})
    write(two, {"train": [made_sample("a1", "p1", view)]})
    write(three, {"test": [made_sample("c3", "p1", view, "test")]})
    problems = check_all([one, two, three, folder, one])
    assert list(problems) == [one, two, three, folder]
    assert problems[one] == problems[folder] == []
    assert problems[two] == [f"1 studies are also in {one} (a1); use one of the two"]
    assert problems[three] == [
        f"1 patients are in another split in {one} (p1, test here and train there); use one of the two",
        f"1 images are also in {one} (c3.0.jpg is a1.0.jpg); use one of the two",
        f"1 patients are in another split in {two} (p1, test here and train there); use one of the two",
        f"1 images are also in {two} (c3.0.jpg is a1.0.jpg); use one of the two",
    ]
    link = tmp_path / "link"
    link.symlink_to(one)
    assert check_all([one, link])[link] == [f"is the same folder as {one}; name it once"]


def test_what_is_no_folder_of_shards_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("x")
    Path("bad").mkdir()
    Path("bad/manifest.json").write_text("{")
    expected = {
        "empty": "no manifest.json, so this is not a finished folder of shards; run `mama pack`",
        "file": "is a file; give a folder that `mama pack` wrote",
        "gone": "no such folder; give a folder that `mama pack` wrote",
        "bad": "manifest.json: cannot be read (",
    }
    for name, words in expected.items():
        (problem,) = check(Path(name))
        assert problem.startswith(words)


def made_view(instance: str | None = None) -> View:
    size = (64, 48)
    return View(
        "0.jpg", "L", "CC", size, size, None, (0, 0, 48, 64), False, (1, 0, 0, 0, 1, 0), Labels(), instance=instance
    )


def made_sample(key: str, patient: str, view: View, split: str = "train") -> Sample:
    _, data = cv2.imencode(".jpg", np.add.outer(*map(np.arange, view.size)).astype(np.uint8))
    return Sample(Study(key, patient, "invented", split, (view,)), (data.tobytes(),), ())


def write(folder: Path, samples: dict[str, list[Sample]]) -> None:
    write_folder(folder, samples, per_shard=4)


def test_contact_sheet_shows_images_boxes_and_text(folder: Path, tmp_path: Path) -> None:
    path = contact_sheet(folder, tmp_path / "new" / "sheet.png", studies=3)
    with Image.open(path) as image:
        colours = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}
        assert image.width >= 1000
    assert (255, 176, 32) in colours  # boxes
    assert max(min(colour) for colour in colours) > 200  # text and bright tissue
    assert len(colours) > 100
