from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from archives import tiny_source

from shards import pack as module
from shards.pack import PackConfig, pack
from shards.read import ShardReader, load_manifest
from shards.schema import ShardError, Study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("read")
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
    (tmp_path / "manifest.json").write_text('{"schema": 1, "shards": [{"nome": "x"}]}')
    with pytest.raises(ShardError, match="edited or damaged"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(ShardError, match=r"No such file.*mama check"):
        ShardReader(tmp_path).study(0)
    with pytest.raises(IndexError, match="no view 4"):
        ShardReader(folder).image(0, 4)


def test_a_damaged_member_is_told_and_not_decoded(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = ShardReader(tmp_path)
    path = tmp_path / reader.shards[0].name
    data = bytearray(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        image = tar.getmembers()[1]
    data[image.offset] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged at byte"):
        reader.image(0, 0)
