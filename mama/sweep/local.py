"""A sweep on this machine: `at_once` points at a time, each step in a process of its own, in the foreground."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mama.errors import StoppedError
from mama.run.environment import copy_code
from mama.runtime import console
from mama.runtime.preemption import EXIT_CODE
from mama.sweep import status
from mama.sweep.batches import one_at_a_time
from mama.sweep.plan import BROKEN, require_same_settings
from mama.sweep.progress import duration, read_progress
from mama.sweep.saved import save_sweep
from mama.sweep.state import Reader, StepState
from mama.sweep.sweep import Point, Sweep
from mama.sweep.work import Work, run_step, work_of

log = logging.getLogger(__name__)

Say = Callable[[str], None]
ELSEWHERE = "is at work elsewhere"
NOT_BEGUN = "stopped before it began"
STOPPED = "stopped; run it again to continue"
INTERVAL = 30.0  # seconds between two lines on the progress of a training
CHILD = "import pickle, sys; from mama.sweep.local import work_here; work_here(pickle.load(sys.stdin.buffer))"


class LocalRun:
    """One run of a sweep on this machine; `say` is given a line for each change."""

    def __init__(self, sweep: Sweep, retry: bool, say: Say) -> None:
        self.sweep, self.retry, self.say = sweep, retry, say
        self.outcome: dict[str, str] = {}
        self.stopping = threading.Event()
        self.running: dict[subprocess.Popen[bytes], Work] = {}
        self.guard = threading.Lock()  # of `running`
        self.locks: dict[Path, threading.Lock] = {}  # by status file: points share some steps
        self.tried: set[Path] = set()  # status files of the steps that were begun in this run
        self.code = Path()
        self.said = time.monotonic()  # when progress was last said

    def run(self) -> dict[str, str]:
        """Run what the points lack. Returns, by point, "done" or why it is not; after a signal everything is saved."""
        with one_at_a_time(self.sweep), self._signals():
            reader = Reader(self.sweep)
            require_same_settings(
                self.sweep.points, {p.name: reader.of_point(p) for p in self.sweep.points}, reader.batches
            )
            save_sweep(self.sweep)
            self.code = copy_code(self.sweep.own / "code")
            with ThreadPoolExecutor(self.sweep.at_once or 1) as pool:
                futures: list[Future[None]] = [pool.submit(self._point, point) for point in self.sweep.points]
                while not all(future.done() for future in futures):
                    time.sleep(0.2)  # signals are handled in this thread
                    self._say_progress()
                for future in futures:
                    future.result()
        return {point.name: self.outcome[point.name] for point in self.sweep.points}

    def _say_progress(self) -> None:
        """From time to time, a line for each training that runs."""
        if time.monotonic() - self.said < INTERVAL:
            return
        self.said = time.monotonic()
        for work in list(self.running.values()):
            found = read_progress(work.config) if work.step == "train" else None
            if found and found.loss is not None and found.seconds_left is not None:
                self.say(
                    f"{work.unit}: step {found.taken} of {found.steps}, loss {found.loss:.3f}, "
                    f"{found.pairs_per_second:.3g} pairs/s, {duration(found.seconds_left)} left"
                )

    def _point(self, point: Point) -> None:
        for step in self.sweep.steps():
            if self.stopping.is_set():
                self.outcome[point.name] = f"{step} {NOT_BEGUN}"
                return
            why = self._step(work_of(self.sweep, point, step))
            if why:
                self.outcome[point.name] = f"{step} {why}"
                if not step.startswith("eval"):  # evaluations do not need each other
                    return
        self.outcome.setdefault(point.name, "done")

    def _step(self, work: Work) -> str:
        """Do a step that is not done; returns why it is not done afterwards, or ""."""
        with self.guard:
            lock = self.locks.setdefault(work.status, threading.Lock())
        with lock:
            found = self._when_free(work)
            if found.state == "done":
                return ""
            if found.job and found.state in ("running", "queued"):
                return f"{ELSEWHERE} (job {found.job})"
            if found.state == "running":
                return f"{ELSEWHERE} ({found.node}); if it is not, delete {work.status}"
            if found.state in BROKEN and (not self.retry or work.status in self.tried):
                return f"failed: {found.reason}; --retry runs it again"
            self.tried.add(work.status)
            return self._call(work)

    def _when_free(self, work: Work) -> StepState:
        """The state of a step; of one that a process of this machine is at, left by a killed sweep, when that ends."""
        found = Reader(self.sweep).of(work)
        if found.state == "running" and found.job is None:
            self.say(f"{work.unit}: {work.step} is at work in another process of {found.node}; waiting for it")
            while found.state == "running" and not self.stopping.wait(1.0):
                found = Reader(self.sweep).of(work)
        return found

    def _call(self, work: Work) -> str:
        """Do a step in a process of its own; returns why it is not done afterwards, or ""."""
        began = time.monotonic()
        self.say(f"{work.unit}: {work.step} started")
        code = self._wait_for_child(work)
        if code == 0:
            self.say(f"{work.unit}: {work.step} done in {time.monotonic() - began:.0f} s")
            return ""
        left = status.read(work.status)
        if self.stopping.is_set() and left and left.state == "running":  # a step without signal handlers of its own
            status.end(work.status, left, "stopped")
        if code == EXIT_CODE or self.stopping.is_set():
            self.say(f"{work.unit}: {work.step} stopped")
            return STOPPED
        cause = left.cause if left and left.cause else f"its process ended with {code}"
        if left and left.state == "running":
            status.end(work.status, left, "failed", cause)
        self.say(f"{work.unit}: {work.step} failed: {cause}; log: {work.status.with_suffix('.log')}")
        return f"failed: {cause}"

    def _wait_for_child(self, work: Work) -> int:
        log = work.status.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = filter(None, (str(self.code.absolute()), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", CHILD]
        with log.open("ab") as file, self.guard:
            # A session of its own: Ctrl-C reaches this process alone, which asks each child once to save and stop.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            self.running[child] = work
            if self.stopping.is_set():
                child.send_signal(signal.SIGTERM)
        child.communicate(pickle.dumps(work))
        with self.guard:
            del self.running[child]
        return child.returncode

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: every step that runs saves and stops, and no other begins."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self.stopping.is_set():
            return
        self.stopping.set()
        self.say("stopping: what runs saves first")
        for child in list(self.running):
            child.send_signal(signal.SIGTERM)


def work_here(work: Work) -> None:
    """Do the work in this process, which exists for nothing else; the exit codes are those of the command line."""
    console.configure_logging()
    try:
        run_step(work)
    except StoppedError as error:
        log.warning("%s", error)
        sys.exit(EXIT_CODE)
