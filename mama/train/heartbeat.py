"""Signs of life: each rank writes one to `alive/` of the run folder, and names another that gives none any more.

Files, as every rank sees the run folder, and neither a stopped process nor a dead machine can hold them up.
Clocks of machines differ: what counts is whether a file has changed between two looks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mama.runtime.errors import TrainingError
from shards.progress import repeated

FOLDER = "alive"
BEAT = 10.0  # seconds between two signs of life


class Heartbeat:
    """This rank's sign of life, and what it has seen of the others'. `limit` is in seconds."""

    def __init__(self, run: Path, rank: int, ranks: int, limit: float, reads_itself: bool) -> None:
        self.files = [run / FOLDER / f"rank-{number}.json" for number in range(ranks)]
        self.rank, self.limit, self.reads_itself = rank, limit, reads_itself
        self.every = min(BEAT, limit / 5)
        self.number = 0
        self.words, self.since = "starting", time.monotonic()
        self.looked = time.monotonic()
        self.seen: dict[int, tuple[str, float]] = {}  # by rank its last sign, and when it was first seen
        self.files[rank].parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def doing(self, words: str) -> None:
        """What the main thread does from now on."""
        self.words, self.since = words, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Give signs of life and watch those of the others, who must have given theirs before."""
        try:
            with repeated(self.every, self._beat):
                yield
        finally:
            with suppress(OSError):
                self.files[self.rank].unlink()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where the ranks wait too long for each other, say what each does."""
        try:
            yield
        except TrainingError:
            raise
        except RuntimeError as error:
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise
            said = "; ".join(self._describe(number) for number in range(len(self.files)))
            raise TrainingError(f"the ranks have waited too long for each other: {said}") from error

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self.looked > self.limit / 2:  # this process was stopped itself, and has missed their signs
            self.seen = {}
            self.since += now - self.looked
        self.looked = now
        with suppress(OSError):
            self._write()
        if self.reads_itself and self.words.endswith("data") and now - self.since > self.limit:
            end_process(f"train.timeout: {self._describe(self.rank)}; look at the disk or network of data.shards")
        for number in range(len(self.files)):
            if number != self.rank and now - self._changed(number, now) > self.limit:
                end_process(
                    f"rank {number} has given no sign of life for {self.limit:.0f} s; the last: "
                    f"{self._describe(number)}; look for a stopped process or a dead machine, then run again"
                )

    def _changed(self, number: int, now: float) -> float:
        """When the sign that this rank gives was first seen."""
        sign = self._read(number)
        if number not in self.seen or self.seen[number][0] != sign:
            self.seen[number] = (sign, now)
        return self.seen[number][1]

    def _write(self) -> None:
        self.number += 1
        sign = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "number": self.number,
            "doing": self.words,
            "seconds": round(time.monotonic() - self.since),
        }
        self.files[self.rank].write_text(json.dumps(sign))

    def _read(self, number: int) -> str:
        try:
            return self.files[number].read_text()
        except OSError:
            return ""

    def _describe(self, number: int) -> str:
        try:
            sign = json.loads(self._read(number))
            return f"rank {number} ({sign['host']}, pid {sign['pid']}) was {sign['doing']} for {sign['seconds']} s"
        except (ValueError, KeyError):
            return f"rank {number} has left no sign of life"


def end_process(words: str) -> None:
    """End this process with one line, from whichever thread, while the main one hangs.

    The launcher finds the line in the file that it gave this rank; where there is none, it goes to stderr.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # takes seconds to import

        get_error_handler().record_exception(TrainingError(words))
    else:
        print(f"mama: {words}", file=sys.stderr, flush=True)
    os._exit(1)
