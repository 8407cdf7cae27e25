"""Signals: recorded by ranks, forwarded by the launcher, passed on to submitit when everything is saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from mama.runtime import preemption
from slurm import rank_environment


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in preemption.REQUEST_OF}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    preemption._received = 0


def wait_until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
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


def test_the_largest_request_of_all_ranks_counts() -> None:
    preemption.record_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.adopt_request(preemption.REQUEUE)
    assert preemption.signal_received() == preemption.REQUEUE
    preemption.adopt_request(0)
    preemption.adopt_request(preemption.END)
    assert preemption.signal_received() == preemption.REQUEUE


def test_submitits_handler_is_called_when_everything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: called.append(number))
    waited: list[float] = []
    monkeypatch.setattr(preemption.time, "sleep", waited.append)
    monkeypatch.setattr(rank_environment, "being_preempted", lambda: True)
    preemption.record_signals()
    assert not preemption.let_cluster_requeue()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not preemption.let_cluster_requeue(), "the cluster did not end it after all"
    assert (called, waited) == ([signal.SIGTERM], [preemption.PREEMPTION_TIMEOUT])
    preemption.adopt_request(preemption.REQUEUE)  # by another rank: this one's own signal may be on its way
    assert preemption.let_cluster_requeue()
    assert called == [signal.SIGTERM, signal.SIGUSR2]
    assert waited == [preemption.PREEMPTION_TIMEOUT]
    # The user sent it, or the job runs on this machine: nobody will end it.
    monkeypatch.setattr(rank_environment, "being_preempted", lambda: False)
    preemption.record_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not preemption.let_cluster_requeue()
    assert waited == [preemption.PREEMPTION_TIMEOUT]


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
