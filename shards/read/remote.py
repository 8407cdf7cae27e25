"""Folders of shards at an http(s) address: each file is fetched when it is first needed, checked and kept."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.files import atomic_file
from shards.read.cache import cached
from shards.read.manifest import MANIFEST, Shard
from shards.schema import FetchError

log = logging.getLogger(__name__)

TRIES = 5
PAUSE = 0.5  # seconds before the second try, doubled before each further one
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 2**20
LARGEST_MANIFEST = 2**30  # bytes
LATER = (408, 425, 429)  # client errors that may pass (RFC 9110, RFC 8470, RFC 6585)


def local_folder(address: str | Path, cache: Path) -> Path:
    """The folder in which the manifest of `address` lies: itself, or for a URL one in `cache`, fetched afresh.

    Raises `FetchError` where it cannot be fetched.
    """
    remote = Remote.at(address, cache)
    return remote.manifest() if remote else Path(os.path.expanduser(address))


@dataclass(frozen=True)
class Remote:
    """A folder of shards at `url`, of which `cache` keeps what was fetched."""

    url: str
    cache: Path

    @staticmethod
    def at(address: str | Path, cache: Path | None) -> Remote | None:
        """None where `address` is a folder here."""
        if not str(address).startswith(("http://", "https://")):
            return None
        if cache is None:
            raise FetchError(f"{address}: no folder is given to keep what is fetched from there")
        return Remote(str(address).rstrip("/"), cache)

    def manifest(self) -> Path:
        """The folder with the manifest as it is now: a build may have added shards since it was last fetched."""
        folder = self.cache / "manifests" / hashlib.sha256(self.url.encode()).hexdigest()
        content = b"".join(_fetch_whole(f"{self.url}/{MANIFEST}"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / MANIFEST, f".{secrets.token_hex(8)}") as file:  # other ranks write it, too
                file.write(content)
        except OSError as error:
            raise FetchError(
                f"{folder}: cannot be written ({error.strerror}); name another folder for the cache"
            ) from None
        return folder

    def shard(self, shard: Shard) -> Path:
        """The tar in `cache`. Raises `FetchError`, and `ShardError` where the cache cannot be written."""
        return cached(self.cache / "shards", shard.sha256, ".tar", lambda file: self._download(shard, file))

    def _download(self, shard: Shard, file: BinaryIO) -> None:
        log.info("fetching %s/%s, %.1f MB", self.url, shard.name, shard.bytes / 1e6)
        url = f"{self.url}/{shard.name}"
        for last in _tries():
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            try:
                for chunk in _chunks(url, shard.bytes):
                    digest.update(chunk)
                    file.write(chunk)
            except FetchError as error:
                _give_up(url, error, last)
                continue
            if digest.hexdigest() == shard.sha256:
                return
            _give_up(url, FetchError("the content is not the one whose SHA-256 the manifest says"), last)


def _fetch_whole(url: str) -> list[bytes]:
    for last in _tries():
        try:
            return list(_chunks(url, LARGEST_MANIFEST))
        except FetchError as error:
            _give_up(url, error, last)
    raise AssertionError("the last try returns or raises")


def _tries() -> Iterator[bool]:
    """Whether it is the last one, for each try; pauses between them."""
    for number in range(TRIES):
        yield number == TRIES - 1
        time.sleep(PAUSE * 2**number)


def _give_up(url: str, error: FetchError, last: bool) -> None:
    if last or isinstance(error, _Final):
        raise FetchError(f"{url}: {error}; is the address right, and the server there?") from None
    log.warning("%s: %s; trying again", url, error)


class _Final(FetchError):
    """Another try would fail in the same way."""


def _chunks(url: str, largest: int) -> Iterator[bytes]:
    """The content at `url`. Raises `FetchError` for what the network or the server does, and for a cut transfer."""
    request = urllib.request.Request(url, headers={"User-Agent": "mama"})
    received = 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                received += len(chunk)
                if received > largest:
                    raise _Final(f"holds more than the {largest} bytes that are expected")
                yield chunk
            expected = response.headers["Content-Length"]
    except urllib.error.HTTPError as error:
        passing = error.code >= 500 or error.code in LATER
        raise (FetchError if passing else _Final)(f"HTTP status {error.code}, {error.reason}") from None
    except FetchError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"{getattr(error, 'reason', None) or str(error) or type(error).__name__}") from None
    if expected is not None and received != int(expected):
        raise FetchError(f"cut after {received} of {expected} bytes")
