"""Heartbeats: each rank writes a file to `alive/` in the run folder, and reads those of the others.

A rank whose file no longer changes is stopped or dead; a run in which no rank makes progress hangs. Files, because
every rank sees the run folder, and neither a stopped process nor a dead machine can block them. Clocks of machines
differ, so a rank is alive if its file has changed since the last look, whatever its time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mama.errors import TrainingError
from mama.run.files import make_folder
from mama.runtime.collectives import node_name
from mama.train.hang import end_hung
from shards.progress import repeated

log = logging.getLogger(__name__)

FOLDER = "alive"
BEAT = 10.0  # seconds between two heartbeats
LATE = 30.0  # seconds after which a rank says for whom it waits
MEETING = "waiting for the other ranks"
SHOWN = 4  # ranks that a message describes


class Heartbeat:
    """Writes the heartbeat of this rank, and watches those of the others.

    A rank is dead after `limit` seconds without one, and the run hangs after `patience` seconds without progress on
    any rank; 0: it may take as long as it likes. `reads_itself`: the rank has no loader processes with a timeout.
    """

    def __init__(
        self, run: Path, rank: int, ranks: int, limit: float, reads_itself: bool, patience: float = 0.0
    ) -> None:
        self.run, self.files = run, [run / FOLDER / f"rank-{number}.json" for number in range(ranks)]
        self.rank, self.limit, self.reads_itself, self.patience = rank, limit, reads_itself, patience
        self.every = min(BEAT, limit / 5, patience / 5 or BEAT)
        self.number = self.count = self.step = 0
        self.activity, self.steady, self.now_patience = "starting", False, patience
        self.since = self.moved = self.looked = time.monotonic()
        self.place: object = None  # where the main thread was at the last heartbeat
        self.main = threading.main_thread()
        self.seen: dict[int, tuple[str, float]] = {}  # by rank: its last heartbeat, and when that was first seen
        self.came: set[int] = set()  # ranks that have shown a sign of life in this start
        self.said = 0.0
        make_folder(self.files[rank].parent)
        self._write()

    def doing(self, activity: str, steady: bool = False, patience: float = 0.0) -> None:
        """Record what the main thread does from now on, which is progress.

        `steady`: until it is done nothing else counts, as in a step. Otherwise it may take as long as the main thread
        moves: to compile, to read weights from a slow disk, to validate. `patience`: seconds, instead of the run's.
        """
        self.activity, self.steady, self.now_patience = activity, steady, patience or self.patience
        self.since = self.moved = time.monotonic()
        self.count += 1

    def met(self) -> None:
        """Record that all ranks are here, and check their nodes."""
        self.came = set(range(len(self.files)))
        self.doing("checking its node")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Write and watch heartbeats within the block."""
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
        if now - self.looked > 3 * self.every:  # this process was stopped itself, and has missed heartbeats
            self.seen = {}
            self.since += now - self.looked
            self.moved += now - self.looked
        self.looked = now
        self._notice_movement(now)
        with suppress(OSError):
            self._write()
        if self.reads_itself and self.activity.endswith("data") and now - self.since > self.limit:
            self._end(f"train.timeout: {self._describe(self.rank)}; look at the disk or network of data.shards")
        changed = {number: self._changed(number, now) for number in range(len(self.files)) if number != self.rank}
        for number, when in changed.items():
            if now - when > self.limit * (1 if number in self.came else 3):
                self._end(
                    f"rank {number} has given no sign of life for {now - when:.0f} s; the last: "
                    f"{self._describe(number)}; look for a stopped process or a dead machine"
                )
        if self.activity == MEETING:
            self._say_who_is_missing(now)
        self._end_if_nothing_moves(now)

    def _notice_movement(self, now: float) -> None:
        """Count it as progress if the main thread is elsewhere or has read or written, but not within a step."""
        place = _place(sys._current_frames().get(self.main.ident or 0)), _traffic(self.main.native_id)
        if place != self.place and not self.steady:
            self.moved = now
        self.place = place

    def _end_if_nothing_moves(self, now: float) -> None:
        """End the run if all ranks have stood still for too long; names first those that are furthest behind."""
        limit = self.now_patience
        if not limit or now - self.moved <= limit:
            return
        self._changed(self.rank, now)
        beats = [_parsed(text, now - when) for text, when in (self.seen[number] for number in range(len(self.files)))]
        if any(still < limit - 2 * self.every for still, _ in beats):
            return
        behind = min(count for _, count in beats)
        named = [number for number, (_, count) in enumerate(beats) if count == behind]
        others = f" (and {len(named) - SHOWN} more)" if len(named) > SHOWN else ""
        last = f"the last step was {self.step - 1}" if self.step else "no step was taken"
        silent = {number: now - self.seen[number][1] for number in named}
        whom = [
            self._describe(number) + (f", and is silent for {silent[number]:.0f} s" if silent[number] > LATE else "")
            for number in named[:SHOWN]
        ]
        self._end(
            f"train.patience: no rank has made progress for {limit / 60:.3g} minutes, {last}: {'; '.join(whom)}{others}"
        )

    def _say_who_is_missing(self, now: float) -> None:
        """Of the ranks that wait, the first says every `LATE` seconds, and later less often, whom it waits for."""
        waited = now - self.since
        if waited < max(LATE, 2 * self.said) or any(number < self.rank for number in self.came):
            return
        self.said = waited
        ranks = len(self.files)
        missing = [str(number) for number in range(ranks) if number != self.rank and number not in self.came]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        log.warning(
            "rank %d on %s has waited %.0f s for the other ranks at %s; %s",
            *(self.rank, node_name(), waited, where),
            f"no sign of life yet from rank {', '.join(missing[:SHOWN])}{', ...' if missing[SHOWN:] else ''} of {ranks}"
            + (f" (nodes: {nodes})" if nodes else "")
            if missing
            else f"all {ranks} are alive: can each node reach that address?",
        )

    def _end(self, message: str) -> None:
        end_hung(self.run, self.rank, self.step, message)

    def _changed(self, number: int, now: float) -> float:
        """When the present heartbeat of a rank was first seen."""
        beat = self._read(number)
        if number not in self.seen or self.seen[number][0] != beat:
            if number in self.seen and beat:
                self.came.add(number)
            self.seen[number] = (beat, now)
        return self.seen[number][1]

    def _write(self) -> None:
        self.number += 1
        now = time.monotonic()
        beat = {
            "host": node_name(),
            "pid": os.getpid(),
            "number": self.number,
            "doing": self.activity,
            "seconds": round(now - self.since),
            "still": round(now - self.moved, 1),
            "count": self.count,
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


def _parsed(beat: str, age: float) -> tuple[float, int]:
    """For how long a rank has stood still, given its heartbeat of `age` seconds ago, and how far it is."""
    try:
        found = json.loads(beat)
        return float(found["still"]) + age, int(found["count"])
    except (ValueError, KeyError, TypeError):
        return 0.0, 0  # a rank that has ended, or is of another release


def _traffic(thread: int | None) -> str:
    """What a thread has read and written so far, where the system counts it."""
    try:
        return Path(f"/proc/self/task/{thread}/io").read_text()
    except OSError:
        return ""


def _place(frame: FrameType | None) -> object:
    """Where a thread is: the code and the instruction of each of its frames."""
    found = []
    while frame:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found
