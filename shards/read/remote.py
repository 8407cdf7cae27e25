"""Folders of shards at an http(s) URL: each file is downloaded on first use, verified and cached."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from shards.errors import FetchError
from shards.files import atomic_file
from shards.read.cache import cached
from shards.read.manifest import MANIFEST, Shard

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 5
PAUSE = 0.5  # seconds before the second try; doubles for each further one
TIMEOUT = 60.0  # seconds without data
CHUNK = 2**20
LARGEST_MANIFEST = 2**30  # bytes
TRANSIENT = (408, 425, 429)  # client errors worth another try (RFC 9110, RFC 8470, RFC 6585)


def local_folder(address: str | Path, cache: Path) -> Path:
    """A local folder with the current manifest of `address`: the folder itself, or for a URL one in `cache`.

    Raises `FetchError` if the download fails.
    """
    remote = Remote.at(address, cache)
    return remote.manifest() if remote else Path(os.path.expanduser(address))


@dataclass(frozen=True)
class Remote:
    """A folder of shards at `url`, with its downloads in the folder `cache`."""

    url: str
    cache: Path

    @staticmethod
    def at(address: str | Path, cache: Path | None) -> Remote | None:
        """None if `address` is a local folder. Raises `FetchError` for a URL without a cache."""
        if not str(address).startswith(("http://", "https://")):
            return None
        if cache is None:
            raise FetchError(f"{address}: a URL needs a folder for its downloads; give a cache")
        return Remote(str(address).rstrip("/"), cache)

    def manifest(self) -> Path:
        """Download the current manifest, to which a build may have added shards, and return its folder."""
        folder = self.cache / "manifests" / hashlib.sha256(self.url.encode()).hexdigest()
        url = f"{self.url}/{MANIFEST}"
        content = b"".join(_retried(url, lambda: list(_chunks(url, LARGEST_MANIFEST))))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / MANIFEST, f".{secrets.token_hex(8)}") as file:  # other ranks write it, too
                file.write(content)
        except OSError as error:
            raise FetchError(
                f"{folder}: cannot be written ({error.strerror}); set another folder for the cache"
            ) from None
        return folder

    def shard(self, shard: Shard) -> Path:
        """The path of the tar in `cache`, downloaded if missing. Raises `FetchError`, and `ShardError` as `cached`."""
        return cached(self.cache / "shards", shard.sha256, ".tar", lambda file: self._download(shard, file))

    def _download(self, shard: Shard, file: BinaryIO) -> None:
        log.info("fetching %s/%s, %.1f MB", self.url, shard.name, shard.bytes / 1e6)
        url = f"{self.url}/{shard.name}"

        def write() -> None:
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            for chunk in _chunks(url, shard.bytes):
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != shard.sha256:
                raise FetchError("the SHA-256 differs from the manifest")

        _retried(url, write)


def _retried(url: str, fetch: Callable[[], T]) -> T:
    """The result of `fetch`, which is called again after an error that may pass, with growing pauses."""
    for number in range(TRIES):
        try:
            return fetch()
        except FetchError as error:
            if number == TRIES - 1 or isinstance(error, _Final):
                raise FetchError(f"{url}: {error}; check the address and the server") from None
            log.warning("%s: %s; trying again", url, error)
        time.sleep(PAUSE * 2**number)
    raise AssertionError("the last try returns or raises")


class _Final(FetchError):
    """An error that another try would not cure."""


def _chunks(url: str, largest: int) -> Iterator[bytes]:
    """Yield the content at `url`. Raises `FetchError` for an error of network or server, and a cut transfer."""
    request = urllib.request.Request(url, headers={"User-Agent": "mama"})
    received = 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                received += len(chunk)
                if received > largest:
                    raise _Final(f"holds more than the expected {largest} bytes")
                yield chunk
            expected = response.headers["Content-Length"]
    except urllib.error.HTTPError as error:
        transient = error.code >= 500 or error.code in TRANSIENT
        raise (FetchError if transient else _Final)(f"HTTP status {error.code}, {error.reason}") from None
    except FetchError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"{getattr(error, 'reason', None) or str(error) or type(error).__name__}") from None
    if expected is not None and received != int(expected):
        raise FetchError(f"cut after {received} of {expected} bytes")
