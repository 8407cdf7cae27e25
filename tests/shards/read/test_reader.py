from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from shards.errors import ShardError
from shards.pack.pack import pack
from shards.pack.plan import load_plan
from shards.pack.sample import Sample
from shards.pack.settings import PackConfig
from shards.pack.shard_record import load_record
from shards.read.manifest import load_manifest
from shards.read.reader import ShardReader
from shards.schema import Labels, Study, View
from shards.sources.all_sources import SOURCES
from tests.support.archives import tiny_source
from tests.support.shard_folder import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "tiny", tiny_source)
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


def test_random_access_equals_reading_the_tars_in_order(folder: Path) -> None:
    expected: dict[str, bytes] = {}
    for shard in load_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                expected[info.name] = file.read()
    reader = ShardReader(folder)
    assert len(reader) == 12
    assert reader.view_counts == [4] * 12
    for i in reversed(range(len(reader))):
        study = reader.study(i)
        assert study == Study.from_json(expected.pop(f"{study.key}.json"))
        for n in (2, 0, 3, 1):
            data = expected.pop(f"{study.key}.{n}.jpg")
            image = reader.image(i, n)
            assert image.shape == study.views[n].size
            assert image.dtype == np.uint8
            np.testing.assert_array_equal(image, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE))
    assert not expected


def test_a_split_holds_its_own_studies_only(folder: Path) -> None:
    lengths = {split: len(ShardReader(folder, split)) for split in ("train", "val", "test")}
    assert sum(lengths.values()) == 12
    for split, length in lengths.items():
        reader = ShardReader(folder, split)
        assert {reader.study(i).split for i in range(length)} <= {split}


def test_copies_in_other_processes_do_not_disturb_each_other(folder: Path) -> None:
    reader = ShardReader(folder)
    expected = [reader.study(i).key for i in range(len(reader))]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.study(i).key for i in range(len(copy))] == expected
    child = os.fork()
    if child == 0:
        good = all(reader.study(i).key == expected[i] for _ in range(50) for i in range(12))
        os._exit(0 if good else 1)
    assert all(reader.study(i).key == expected[i] for _ in range(50) for i in reversed(range(12)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_cannot_be_read_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no manifest.json.*run `mama pack`"):
        ShardReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="cannot be read"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(ShardError, match="schema 99"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 2, "shards": [{"nome": "x"}]}')
    with pytest.raises(ShardError, match="edited or damaged"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(ShardError, match=r"No such file.*mama check"):
        ShardReader(tmp_path).study(0)
    with pytest.raises(IndexError, match="no view 4"):
        ShardReader(folder).image(0, 4)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_damaged_member_is_told_and_not_decoded(copied: Path) -> None:
    reader = ShardReader(copied)
    path = copied / reader.shards[0].name
    data = bytearray(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        image = tar.getmembers()[1]
    data[image.offset] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"damaged at byte.*run `mama check"):
        reader.image(0, 0)


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def picture(suffix: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def with_first_image(copied: Path, block: bytes) -> ShardReader:
    """The first shard with another first image member."""
    shard = load_manifest(copied).shards[0]
    path = copied / shard.name
    with tarfile.open(path) as tar:
        first, second = tar.getmembers()[1:3]
    data = path.read_bytes()
    path.write_bytes(data[: first.offset] + block + data[second.offset :])
    return ShardReader(copied)


GREY = picture(".jpg", np.full((20, 10), 80, np.uint8))
PNG = picture(".png", np.full((20, 10), 80, np.uint16))


def bomb(suffix: str) -> bytes:
    """An image whose header claims 60000 x 60000 pixels."""
    side = (60000).to_bytes(2, "big")
    if suffix == ".png":
        return PNG[:16] + 2 * (b"\0\0" + side) + PNG[24:]
    at = GREY.index(b"\xff\xc0") + 5
    return GREY[:at] + 2 * side + GREY[at + 4 :]


def hidden_bomb() -> bytes:
    """The JPEG with a decoy before its frame header: decoders skip it as garbage, and find the frame header in it."""
    image = bomb(".jpg")
    length = 5 + image.index(b"\xff\xda")
    return image[:2] + b"\0\xc0" + length.to_bytes(2, "big") + b"\x08\0\x14\0\x0a" + image[2:]


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("0.jpg", bomb(".jpg"), "claims 60000 x 60000 pixels"),
        ("0.png", bomb(".png"), "claims 60000 x 60000 pixels"),
        ("0.jpg", hidden_bomb(), "claims 60000 x 60000 pixels"),
        ("0.jpg", b"", "is not a JPEG or PNG"),
        ("0.jpg", b"\xff\xd8" + b"\xff\xe0\0\0" * 10, "is not a JPEG or PNG"),
        ("0.jpg", GREY[:-2], "the image is cut"),
        ("0.png", PNG[:-4], "the image is cut"),
        ("0.png", PNG[:60] + PNG[-8:], "does not decode to a grey image"),
        ("0.jpg", picture(".jpg", np.zeros((8, 8, 3), np.uint8)), "to a grey image"),
        ("0.webp", GREY, "not one of a study's members"),
    ],
)
def test_an_image_made_to_do_harm_is_an_error_and_never_allocated(
    copied: Path, suffix: str, content: bytes, words: str
) -> None:
    key = load_manifest(copied).shards[0].keys[0]
    reader = with_first_image(copied, member(f"{key}.{suffix}", content))
    tracemalloc.start()
    with pytest.raises(ShardError, match=words):
        reader.image(0, 0)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (member("../../../tmp/evil.0.jpg"), "not one of a study's members"),
        (member("KEY.0.jpg", kind=tarfile.SYMTYPE), "not a regular file but a link"),
        (member("KEY.0.jpg", kind=tarfile.LNKTYPE), "not a regular file but a link"),
        (member("KEY.0.jpg", kind=tarfile.GNUTYPE_SPARSE), "not a regular file|no tar header"),
        (member("KEY.0.jpg", kind=tarfile.XHDTYPE), "not a regular file"),
        (member("KEY.0.jpg", size=2**60), "at most 268435456 are read"),
        (member("KEY.0.jpg", size=2**27), "the file ends before"),
        (member("other.0.jpg", GREY), "expected KEY.0.jpg, found other.0.jpg"),
        (member("KEY.1.jpg", GREY), "expected KEY.0.jpg, found KEY.1.jpg"),
        (bytes(512), "ends at byte|found the end"),
    ],
)
def test_a_member_made_to_do_harm_is_an_error(copied: Path, block: bytes, words: str) -> None:
    key = load_manifest(copied).shards[0].keys[0]
    if block.startswith(b"KEY"):
        info = tarfile.TarInfo.frombuf(block[:512], "utf-8", "strict")
        info.name = info.name.replace("KEY", key)
        block = info.tobuf(tarfile.GNU_FORMAT) + block[512:]
    before = sorted(path.name for path in copied.parent.rglob("*"))
    reader = with_first_image(copied, block)
    with pytest.raises(ShardError, match=words.replace("KEY", key)):
        reader.image(0, 0)
    assert sorted(path.name for path in copied.parent.rglob("*")) == before


def test_png_of_8_and_16_bits_come_back_as_they_were_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = [rng.integers(0, 2**bits, (30, 20)).astype(f"uint{bits}") for bits in (8, 16)]
    views = tuple(
        View(f"{n}.png", "L", "CC", (30, 20), (30, 20), None, (0, 0, 20, 30), False, (1, 0, 0, 0, 1, 0), Labels())
        for n in range(2)
    )
    study = Study("k1", "p1", "invented", "train", views)
    sample = Sample(study, tuple(picture(".png", pixels) for pixels in stored), ())
    write_folder(tmp_path / "shards", {"train": [sample]}, per_shard=2)
    reader = ShardReader(tmp_path / "shards")
    assert reader.study(0) == study
    for n, pixels in enumerate(stored):
        image = reader.image(0, n)
        assert image.dtype == pixels.dtype
        np.testing.assert_array_equal(image, pixels)


Change = Callable[[dict[str, Any]], Any]
HARM: list[tuple[Change, str]] = [
    (lambda d: d["shards"][0]["offsets"].__setitem__(0, -512), "shards.offsets: -512 is not a count"),
    (lambda d: d["shards"][0]["offsets"].__setitem__(0, 2**70), "is no integer between -2"),
    (lambda d: d["shards"][0]["offsets"].__setitem__(0, 1.5), "shards.offsets: 1.5 is not a count"),
    (lambda d: d["shards"][0]["offsets"].__setitem__(0, True), "shards.offsets: True is not a count"),
    (lambda d: d["shards"][0].update(offsets=[0]), "its entry in the manifest was edited"),
    (lambda d: d["shards"][0].update(samples=2**50), "its entry in the manifest was edited"),
    (lambda d: d["shards"][0].update(bytes=2**70), "is no integer between -2"),
    (lambda d: d["shards"][0].update(keys="x"), "shards.keys: 'x' is not a list"),
    (lambda d: d["shards"][0]["view_counts"].__setitem__(0, 2**50), "at most 10000 are read"),
    (lambda d: d["shards"][0].update(name="../train-000000.tar"), "is not the name of a shard"),
    (lambda d: d["shards"][0].update(name=5), "shards.name: 5 is not a text"),
    (lambda d: d["shards"][0].update(more=5), "shards.more: is missing, or there is no such field"),
    (lambda d: d["shards"][0].pop("sha256"), "shards.sha256: is missing"),
    (lambda d: d.update(shards={}), "shards: {} is not a list"),
    (lambda d: d.update(shards=[5]), "shards: 5 is not a mapping"),
    (lambda d: d.update(images=float("nan")), "NaN is no number of JSON"),
    (lambda d: d.update(images=float("inf")), "Infinity is no number of JSON"),
    (lambda d: d.update(labels={"train": []}), "labels.train: [] is not a mapping"),
    (lambda d: d["settings"].update(long_side="x"), "long_side: 'x' is not a count"),
    (lambda d: d.update(schema=10**300), "is no integer between -2"),
]


@pytest.mark.parametrize(("change", "message"), HARM)
def test_a_manifest_made_to_do_harm(copied: Path, change: Change, message: str) -> None:
    path = copied / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=re.escape(message)) as caught:
        ShardReader(copied)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(copied)) + 200


@pytest.mark.parametrize("content", ["[" * 10**6, '{"a":' * 10**6, "1e999", "1" * 10**5, "pipe", "/dev/zero", "folder"])
def test_a_manifest_that_is_none_is_refused_at_once(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content.startswith("/"):
        path.symlink_to(content)
    else:
        path.write_text(content)
    with pytest.raises(ShardError, match=r"manifest\.json: cannot be read \([^\n]{1,90}\); copy it again, or run"):
        load_manifest(tmp_path)


def test_plan_and_records_made_to_do_harm_are_one_line(tmp_path: Path) -> None:
    for name, read in (
        ("plan.json", lambda: load_plan(tmp_path)),
        ("train-000000.json", lambda: load_record(tmp_path, "train-000000.tar")),
    ):
        assert read() is None
        for text in ("[]", "5", "{}", '{"schema": 2, "settings": {}, "versions": {}, "shards": [[1]]}', "[" * 10**5):
            (tmp_path / name).write_text(text)
            with pytest.raises(ShardError, match=rf"^[^\n]*/{name}: [^\n]+$"):
                read()
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(ShardError, match="is not a regular file"):
            read()
