"""An archive of more shards than files may be open, and errors that are the machine's and not a sample's."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mama.data.pairs import Pairs
from shards.errors import FetchError, ShardError
from shards.pack import sample
from shards.read import open_files
from shards.read import reader as read
from shards.read.open_files import OpenFiles
from shards.read.reader import ShardReader
from shards.schema import SourceStudy, SourceView
from shards.sources.headers import dicom_files, read_header
from tests.support.archives import breast, write_dicom
from tests.support.letter_shards import config_of, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("open") / "shards", {"train": ["LR"] * 10})  # five tars


def open_tars(folder: Path) -> int:
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


@contextmanager
def at_most(files: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_quarter_of_the_open_files_are_shards(folder: Path) -> None:
    with at_most(256):
        assert open_files.limit() == 64
    with at_most(2**14):
        assert open_files.limit() == open_files.MOST


def test_few_shards_are_open_whatever_their_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "limit", lambda: 3)
    readers = [ShardReader(folder) for _ in range(2)]
    alone = [readers[0].study(i) for i in range(10)]
    for i in (9, 0, 5, 3, 7, 1):
        for reader in readers:
            assert reader.study(i) == alone[i]
            assert reader.image(i, 1).shape == (24, 16)
            assert open_tars(folder) <= 3
    del reader
    readers.clear()
    gc.collect()
    assert open_tars(folder) == 0


def test_the_file_that_was_used_longest_ago_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "limit", lambda: 2)
    path = tmp_path / "file"
    path.touch()
    files, opened = OpenFiles(), ""
    for key in "abacab":
        before = len(os.listdir("/proc/self/fd"))
        file = files.get(key, lambda: path.open("rb"))
        opened += key if file.tell() == 0 else ""
        file.seek(1)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert opened == "abcb"


def test_too_many_open_files_are_not_a_corrupt_sample(folder: Path) -> None:
    pairs = Pairs(config_of(folder, max_corrupt=100))
    with at_most(3), pytest.raises(FetchError, match=r"train-00000\d\.tar: Too many open files; the samples are not"):
        pairs[0]
    assert not pairs.unreadable.errors
    assert pairs[0].unreadable == 0


def test_a_copy_in_another_process_shares_no_file_with_a_reader_made_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reader = ShardReader(folder).image(0, 0), ShardReader(folder)
    copied = pickle.dumps(reader)
    monkeypatch.setattr(read, "_NUMBERS", itertools.count(reader._number))  # as another process may count
    made_there = ShardReader(write(tmp_path / "other", {"train": ["LR"]}, first_grey=200))
    assert made_there._number == reader._number
    assert not (made_there.image(0, 0) == expected).all()
    assert (pickle.loads(copied).image(0, 0) == expected).all()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, ShardError), (errno.EACCES, ShardError), (errno.ESTALE, FetchError), (errno.ENOMEM, FetchError)],
)
def test_a_bad_file_is_passed_over_and_a_bad_machine_is_not(
    folder: Path, number: int, kind: type[ShardError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ShardError, match=os.strerror(number)) as caught:
        ShardReader(folder).study(0)
    assert type(caught.value) is kind


def test_a_network_disk_that_came_back_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(folder)
    expected = reader.study(0)
    read, calls = os.pread, []

    def stale_once(*arguments: int) -> bytes:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(*arguments)

    monkeypatch.setattr(os, "pread", stale_once)
    assert reader.study(0) == expected


def test_a_build_ends_where_the_machine_fails_and_refuses_no_image_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "a.dcm")

    monkeypatch.setattr(sample, "_build_image", failing)
    study = SourceStudy("patient", "study", (SourceView(tmp_path / "a.dcm"),))
    config = sample.SampleConfig("invented", tmp_path, b"key", sample.PictureConfig(), None)
    number = errno.EIO
    assert [refusal.reason for refusal in sample.build_sample(config, study).refusals] == ["unreadable"]
    number = errno.EMFILE
    with pytest.raises(OSError, match="Too many open files"):
        sample.build_sample(config, study)


def test_a_list_of_files_is_not_made_where_the_machine_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a suffix would be missing in it, and a header without its patient, for good."""
    for name in ("a.dcm", "b"):
        write_dicom(tmp_path / name, breast("L"), PatientID="7")
    assert [path.name for path in dicom_files(tmp_path)] == ["a.dcm", "b"]
    assert read_header(tmp_path / "a.dcm", "PatientID") == {"PatientID": "7"}

    def failing(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", failing)
    number = errno.EIO
    assert [path.name for path in dicom_files(tmp_path)] == ["a.dcm"]
    assert read_header(tmp_path / "a.dcm", "PatientID") == {"PatientID": ""}
    number = errno.EMFILE
    for call in (lambda: dicom_files(tmp_path), lambda: read_header(tmp_path / "a.dcm", "PatientID")):
        with pytest.raises(OSError, match="Too many open files"):
            call()
