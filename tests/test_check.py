from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import tiny_source
from PIL import Image

from shards import pack as module
from shards.check import check
from shards.pack import PackConfig, pack
from shards.sheet import contact_sheet


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.SOURCES, "tiny", tiny_source)
        pack(
            PackConfig(
                source="tiny",
                root=str(base / "archive"),
                out=str(base / "out"),
                long_side=100,
                samples_per_shard=3,
                workers=1,
                key_file=str(base / "key"),
            )
        )
    return base / "out"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


SHARD = "train-000000.tar"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Change the members of the first shard and make size and hash in the manifest agree, as an editor would."""
    path = folder / SHARD
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def agree(document: dict[str, Any]) -> None:
        shard = next(shard for shard in document["shards"] if shard["name"] == SHARD)
        shard["bytes"] = path.stat().st_size
        shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    edit_manifest(folder, agree)


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
    assert check(folder) == [f"{SHARD}: is missing"]


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


def test_members_that_are_not_adjacent(folder: Path) -> None:
    rewrite(folder, lambda members: members.insert(2, members.pop()))
    (problem,) = check(folder)
    assert "expected" in problem


def test_an_image_that_does_not_decode(folder: Path) -> None:
    rewrite(folder, lambda members: members.__setitem__(4, (members[4][0], b"x" * len(members[4][1]))))
    (problem,) = check(folder)
    assert "does not decode" in problem


def test_a_label_changed_in_the_shard(folder: Path) -> None:
    def swap(members: list[tuple[str, bytes]]) -> None:
        name, data = members[0]
        study = json.loads(data)
        labels = study["views"][0]["labels"]
        labels["birads"] = 6 if labels["birads"] != 6 else 0
        members[0] = (name, json.dumps(study, sort_keys=True).encode())

    rewrite(folder, swap)
    assert check(folder) == ["manifest.json: its label histograms differ from the labels in the shards"]


def test_a_shard_that_the_manifest_does_not_know(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "train-000777.tar")
    assert check(folder) == ["train-000777.tar: not in the manifest"]


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


def test_counts_of_an_edited_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda document: document.__setitem__("images", 47))
    assert check(folder) == ["manifest.json: says 47 images, the shards hold 48"]


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    (problem,) = check(tmp_path)
    assert "no manifest.json" in problem


def test_contact_sheet_shows_images_boxes_and_text(folder: Path, tmp_path: Path) -> None:
    path = contact_sheet(folder, tmp_path / "new" / "sheet.png", studies=3)
    with Image.open(path) as image:
        colours = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}
        assert image.width >= 1000
    assert (255, 176, 32) in colours  # boxes
    assert max(min(colour) for colour in colours) > 200  # text and bright tissue
    assert len(colours) > 100
