"""Shards from a real HTTP server on this machine: fetched when needed, checked, kept, and shared by processes."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import multiprocessing
import os
import shutil
import stat
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mama.data.pairs import Pairs
from shards.errors import FetchError, ShardError
from shards.read import remote
from shards.read.reader import ShardReader
from shards.read.remote import local_folder
from tests.support.letter_shards import STUDIES, config_of, content, write


@dataclass
class Server:
    """What is served, how often each file was asked for, and how many answers each file still gets wrong."""

    url: str
    folder: Path
    asked: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, server_state: Server, **more: Any) -> None:
        self.state = server_state
        super().__init__(*arguments, directory=str(server_state.folder), **more)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.state.asked[name] += 1
        wrong = self.state.wrong.get(name)
        if not wrong:
            super().do_GET()
            return
        data, kind = (self.state.folder / name).read_bytes(), wrong.pop(0)
        if kind.isdigit():
            self.send_error(int(kind))
            return
        self.send_response(200)
        if kind != "unannounced":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind != "flipped" else bytes([data[0] ^ 1]) + data[1:])
        self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    state = Server("", write(tmp_path / "served", STUDIES))
    handler = functools.partial(Handler, server_state=state)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}/"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def test_pairs_from_an_address_are_those_from_the_folder(server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    config = config_of(Path("x"), cache=cache)
    here = Pairs(config_of(server.folder))
    there = Pairs(type(config)(seed=1, data=type(config.data)([server.url], cache=cache, image_size=(32, 16))))
    assert [content(there[g]) for g in range(15)] == [content(here[g]) for g in range(15)]
    assert {name for name in server.asked if name.startswith("train")} == {
        path.name for path in server.folder.glob("train*.tar")
    }
    assert set(server.asked.values()) == {1}
    assert not any(name.startswith(("val", "test")) for name in server.asked)
    kept = sorted(path.read_bytes() for path in (tmp_path / "cache" / "shards").glob("*.tar"))
    assert kept == sorted(path.read_bytes() for path in server.folder.glob("train*.tar"))
    assert not list((tmp_path / "cache").rglob("*.part"))
    mask = os.umask(0o077)
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}, "a cache may be a group's"


def test_a_shard_is_fetched_when_it_is_needed_and_never_again(server: Server, tmp_path: Path) -> None:
    reader = ShardReader(server.url, "train", tmp_path / "cache")
    assert server.asked == Counter({"manifest.json": 1})
    np.testing.assert_array_equal(reader.image(4, 0), ShardReader(server.folder, "train").image(4, 0))
    assert server.asked == Counter({"manifest.json": 1, "train-000002.tar": 1})
    again = ShardReader(server.url.rstrip("/"), "train", tmp_path / "cache")
    assert again.study(4) == reader.study(4)
    assert server.asked == Counter({"manifest.json": 2, "train-000002.tar": 1})


def test_a_shard_that_was_built_anew_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    old = ShardReader(server.url, "train", tmp_path / "cache").image(0, 0)
    shutil.rmtree(server.folder)
    write(server.folder, STUDIES, first_grey=100)
    new = ShardReader(server.url, "train", tmp_path / "cache").image(0, 0)
    assert new.mean() > old.mean() + 50


@pytest.mark.parametrize("kinds", [["cut"], ["unannounced", "cut"], ["flipped"], ["503", "429", "cut", "flipped"]])
def test_a_transfer_that_goes_wrong_is_tried_again(
    server: Server, tmp_path: Path, kinds: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    server.wrong["train-000000.tar"] = list(kinds)
    reader = ShardReader(server.url, "train", tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        assert reader.study(0) == ShardReader(server.folder, "train").study(0)
    assert server.asked["train-000000.tar"] == len(kinds) + 1
    assert caplog.text.count("trying again") == len(kinds)


def test_a_manifest_that_is_cut_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.wrong["manifest.json"] = ["cut", "500"]
    folder = local_folder(server.url, tmp_path / "cache")
    assert (folder / "manifest.json").read_bytes() == (server.folder / "manifest.json").read_bytes()
    assert local_folder(tmp_path, tmp_path / "cache") == tmp_path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", r"cut after \d+ of \d+ bytes"),
        ("flipped", r"the SHA-256 differs from the manifest"),
        ("503", r"HTTP status 503, Service Unavailable"),
    ],
)
def test_what_stays_wrong_ends_the_run_in_one_line_and_leaves_nothing(
    server: Server, tmp_path: Path, kind: str, said: str
) -> None:
    for shard in server.folder.glob("train*.tar"):
        server.wrong[shard.name] = [kind] * 100
    config = config_of(Path("x"))
    pairs = Pairs(type(config)(data=type(config.data)([server.url], cache=str(tmp_path / "cache"))))
    with pytest.raises(
        FetchError, match=rf"^{server.url}train-00000\d\.tar: {said}; check the address and the server$"
    ):
        pairs[0]
    assert sum(server.asked.values()) == 1 + remote.TRIES, "another sample is not tried instead"
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_what_is_not_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"^http://.*/absent/manifest\.json: HTTP status 404, .*$"):
        ShardReader(f"{server.url}absent", "train", tmp_path / "cache")
    assert server.asked == Counter({"manifest.json": 1})
    with pytest.raises(FetchError, match=r"^http://127\.0\.0\.1:1/manifest\.json: .*refused.*$"):
        ShardReader("http://127.0.0.1:1", None, tmp_path / "cache")
    with pytest.raises(FetchError, match=r"^http://x: a URL needs a folder for its downloads; .*$"):
        ShardReader("http://x")


def test_a_server_that_falls_silent_is_not_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    monkeypatch.setattr(remote, "TRIES", 2)
    with http.server.socketserver.socket.create_server(("127.0.0.1", 0)) as silent:  # type: ignore[attr-defined]
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FetchError, match=r"^http://.*/manifest\.json: timed out; .*$"):
            ShardReader(address, None, tmp_path / "cache")


def test_a_larger_file_than_the_manifest_says_is_not_taken(server: Server, tmp_path: Path) -> None:
    reader = ShardReader(server.url, "train", tmp_path / "cache")
    with (server.folder / "train-000000.tar").open("ab") as file:
        file.write(b"x" * 10)
    with pytest.raises(FetchError, match=r"holds more than the expected \d+ bytes"):
        reader.study(0)
    assert server.asked["train-000000.tar"] == 1


def test_a_manifest_does_not_lead_out_of_the_cache(server: Server, tmp_path: Path) -> None:
    document = json.loads((server.folder / "manifest.json").read_text())
    for shard in document["shards"]:
        shard["sha256"] = "../../evil"
    (server.folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"'\.\./\.\./evil' is not a SHA-256"):
        ShardReader(server.url, "train", tmp_path / "cache").study(0)


def read_all(url: str, cache: Path, start: Any) -> None:
    start.wait()
    reader = ShardReader(url, "train", cache)
    for i in range(len(reader)):
        reader.image(i, 0)


def test_processes_that_want_the_same_shard_fetch_it_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=read_all, args=(server.url, tmp_path / "cache", start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    tars = {path.name for path in server.folder.glob("train*.tar")}
    assert server.asked == Counter({"manifest.json": 4, **dict.fromkeys(tars, 1)})


def test_a_cache_that_cannot_be_written_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match=r"^.*cache.*: cannot be written \(Not a directory\); set another folder.*$"):
        ShardReader(server.url, "train", tmp_path / "cache")
    assert urllib.request.urlopen(f"{server.url}manifest.json").status == 200
