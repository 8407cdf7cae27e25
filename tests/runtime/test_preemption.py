"""Signals: recorded by ranks, forwarded by the launcher, passed on to submitit when everything is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from mama.errors import StoppedError
from mama.runtime import preemption
from slurm import blocked_signals, rank_environment
from slurm.profile import SlurmError


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in preemption.REQUEST_OF}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    preemption._received = 0


def wait_until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.01)


def press_again() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    wait_until(lambda: False)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, preemption.END), (signal.SIGINT, preemption.END), (signal.SIGUSR2, preemption.REQUEUE)],
)
def test_a_signal_is_recorded(number: signal.Signals, code: int) -> None:
    preemption.record_signals()
    assert preemption.signal_received() == 0
    os.kill(os.getpid(), number)
    assert preemption.signal_received() == code
    preemption.record_signals()
    assert preemption.signal_received() == 0, "another run in the same process"


BEFORE = """
import os, signal, sys
from mama.errors import StoppedError
from mama.runtime import preemption
from slurm.submit import Resumable

def train():
    os.kill(os.getpid(), signal.SIGTERM)  # before the run has a handler
    preemption.record_signals()

def mask():  # which processes that it starts would inherit, and could then not be ended
    sys.exit(f"{{signal.pthread_sigmask(signal.SIG_BLOCK, [])}}")

def launch():
    os.kill(os.getpid(), signal.SIGTERM)
    with preemption.forwarded_to_ranks():
        if preemption.signal_received():
            raise StoppedError("told to stop")

signal.signal(signal.SIGTERM, lambda number, frame: print("forgotten"))
try:
    Resumable({call})()
except StoppedError as error:
    sys.exit(f"{{error}}, request {{preemption.signal_received()}}")
"""


def test_a_call_blocks_no_signal() -> None:
    command = [sys.executable, blocked_signals.__file__, sys.executable, "-c", BEFORE.format(call="mask")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "set()\n")


@pytest.mark.parametrize(("call", "line"), [("train", preemption.BEFORE_FIRST_STEP), ("launch", "told to stop")])
def test_a_signal_that_came_while_a_job_imported_is_not_lost(call: str, line: str) -> None:
    """submitit forgets SIGTERM, so that a job which is preempted in its first seconds would never come back."""
    command = [sys.executable, blocked_signals.__file__, sys.executable, "-c", BEFORE.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", f"{line}, request {preemption.END}\n")


def test_the_largest_request_of_all_ranks_counts() -> None:
    preemption.record_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.adopt_request(preemption.REQUEUE)
    assert preemption.signal_received() == preemption.REQUEUE
    preemption.adopt_request(0)
    preemption.adopt_request(preemption.END)
    assert preemption.signal_received() == preemption.REQUEUE


def test_submitits_handler_is_called_when_everything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a job that Slurm preempts goes back in the queue at once: waiting out the grace would keep its nodes idle."""
    called: list[int | str] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: called.append(number))
    answers: Iterator[SlurmError | None] = iter((None, SlurmError("Slurm refuses")))

    def requeue() -> None:
        called.append("requeue")
        if answer := next(answers):
            raise answer

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(rank_environment, "requeue", requeue, raising=False)
    monkeypatch.setattr(preemption.time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr(rank_environment, "job_state", lambda: "preempted", raising=False)
    preemption.record_signals()
    assert not preemption.let_cluster_requeue()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        preemption.let_cluster_requeue()
    assert end.value.code == preemption.EXIT_CODE, "and no result is written, as if the job were over"
    assert called == [signal.SIGTERM, "requeue"]
    assert not preemption.let_cluster_requeue(), "the cluster does not take it back"
    monkeypatch.setenv("RANK", "1")
    assert preemption.let_cluster_requeue()
    assert called == [*[signal.SIGTERM, "requeue"] * 2, signal.SIGTERM], "the first task requeues"
    preemption.adopt_request(preemption.REQUEUE)  # by another rank: this one's own signal may be on its way
    assert preemption.let_cluster_requeue()
    assert called.pop() == signal.SIGUSR2
    for state in ("running", "ended"):  # the user sent it, or the job runs on this machine; or it was cancelled
        monkeypatch.setattr(rank_environment, "job_state", lambda state=state: state)
        preemption.record_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not preemption.let_cluster_requeue(), state
    monkeypatch.setattr(rank_environment, "job_state", lambda: "requeued")
    with pytest.raises(SystemExit):
        preemption.let_cluster_requeue()
    assert called.count("requeue") == 2


def test_a_job_that_slurm_does_not_take_back_is_not_put_back_by_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been cancelled, and would start again."""

    def requeue() -> None:
        raise SlurmError("job 7 was cancelled")

    signal.signal(signal.SIGUSR2, lambda number, frame: pytest.fail("submitit requeues it"))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(rank_environment, "requeue", requeue)
    preemption.record_signals()
    assert not preemption.requeue_later()


def test_without_a_job_no_handler_is_called_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption.time, "sleep", lambda seconds: pytest.fail("waited"))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    for code in (preemption.END, preemption.REQUEUE):
        preemption.record_signals()
        preemption.adopt_request(code)
        assert not preemption.let_cluster_requeue()


def test_the_launcher_forwards_while_it_waits_and_a_second_interrupt_ends_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption.forwarded_to_ranks():
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(preemption.signal_received)
        assert preemption.signal_received() == preemption.END
        with pytest.raises(KeyboardInterrupt):
            press_again()
    assert signal.getsignal(signal.SIGINT) is before
    assert preemption.was_forwarded(signal.SIGTERM)
    assert not preemption.was_forwarded(signal.SIGKILL)


WAITING = """
import os, sys
from datetime import timedelta
from mama.runtime import preemption
from mama.runtime.ending import cleaned_up
from torch.distributed import TCPStore

os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
preemption.record_signals()
with cleaned_up(lambda: print("cleaned up", flush=True)), preemption.ending_at_once():
    store = TCPStore("127.0.0.1", 0, 1, True)
    print("waiting", flush=True)
    store.wait(["never"], timedelta(seconds=600))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_a_rank_that_waits_for_its_partners(number: signal.Signals) -> None:
    """Within C code, to which no handler of Python's comes."""
    rank = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout
    assert rank.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    rank.send_signal(number)
    out, said = rank.communicate(timeout=180)
    assert (rank.returncode, out, said) == (
        75, "cleaned up\n", "mama: a signal ended it before its first step; run it again to continue\n"
    )  # fmt: skip


def test_after_that_signals_are_recorded_again() -> None:
    preemption.record_signals()
    with preemption.ending_at_once():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.signal_received() == preemption.END
    with pytest.raises(StoppedError, match="before its first step"), preemption.ending_at_once():
        pytest.fail("nobody would see a signal that came before")
