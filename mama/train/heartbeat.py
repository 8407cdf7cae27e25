"""Heartbeats: each rank writes a file to `alive/` in the run folder, and reports ranks whose file no longer changes.

Files, because every rank sees the run folder, and neither a stopped process nor a dead machine can block them.
Clocks of machines differ, so a rank is alive if its file has changed since the last look, whatever its time.
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

from mama.errors import TrainingError
from shards.progress import repeated

FOLDER = "alive"
BEAT = 10.0  # seconds between two heartbeats


class Heartbeat:
    """Writes the heartbeat of this rank, and watches those of the others.

    A rank is dead after `limit` seconds without one. `reads_itself`: it has no loader processes with a timeout.
    """

    def __init__(self, run: Path, rank: int, ranks: int, limit: float, reads_itself: bool) -> None:
        self.files = [run / FOLDER / f"rank-{number}.json" for number in range(ranks)]
        self.rank, self.limit, self.reads_itself = rank, limit, reads_itself
        self.every = min(BEAT, limit / 5)
        self.number = 0
        self.activity, self.since = "starting", time.monotonic()
        self.looked = time.monotonic()
        self.seen: dict[int, tuple[str, float]] = {}  # by rank: its last heartbeat, and when that was first seen
        self.files[rank].parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def doing(self, activity: str) -> None:
        """Record what the main thread does from now on."""
        self.activity, self.since = activity, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Write and watch heartbeats within the block; all ranks must have made their `Heartbeat` before."""
        try:
            with repeated(self.every, self._beat):
                yield
        finally:
            with suppress(OSError):
                self.files[self.rank].unlink()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the timeout of a collective into a `TrainingError` that lists what each rank was doing."""
        try:
            yield
        except TrainingError:
            raise
        except RuntimeError as error:
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise
            activities = "; ".join(self._describe(number) for number in range(len(self.files)))
            raise TrainingError(f"the ranks have waited too long for each other: {activities}") from error

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self.looked > self.limit / 2:  # this process was stopped itself, and has missed heartbeats
            self.seen = {}
            self.since += now - self.looked
        self.looked = now
        with suppress(OSError):
            self._write()
        if self.reads_itself and self.activity.endswith("data") and now - self.since > self.limit:
            end_process(f"train.timeout: {self._describe(self.rank)}; look at the disk or network of data.shards")
        for number in range(len(self.files)):
            if number != self.rank and now - self._changed(number, now) > self.limit:
                end_process(
                    f"rank {number} has given no sign of life for {self.limit:.0f} s; the last: "
                    f"{self._describe(number)}; look for a stopped process or a dead machine, then run again"
                )

    def _changed(self, number: int, now: float) -> float:
        """When the present heartbeat of a rank was first seen."""
        beat = self._read(number)
        if number not in self.seen or self.seen[number][0] != beat:
            self.seen[number] = (beat, now)
        return self.seen[number][1]

    def _write(self) -> None:
        self.number += 1
        beat = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "number": self.number,
            "doing": self.activity,
            "seconds": round(time.monotonic() - self.since),
        }
        self.files[self.rank].write_text(json.dumps(beat))

    def _read(self, number: int) -> str:
        try:
            return self.files[number].read_text()
        except OSError:
            return ""

    def _describe(self, number: int) -> str:
        try:
            beat = json.loads(self._read(number))
            return f"rank {number} ({beat['host']}, pid {beat['pid']}) was {beat['doing']} for {beat['seconds']} s"
        except (ValueError, KeyError):
            return f"rank {number} has left no sign of life"


def end_process(message: str) -> None:
    """End this process with a one-line message, from any thread, while the main one hangs.

    The message goes to the error file that the launcher reads, or to stderr if there is none.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # the import takes seconds

        get_error_handler().record_exception(TrainingError(message))
    else:
        print(f"mama: {message}", file=sys.stderr, flush=True)
    os._exit(1)
