"""Who is told to stop by which signal, and who hears of it afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from mama import stop
from slurm import env


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stop.MEANING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop._told = 0


def wait_until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.01)


def press_again() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    wait_until(lambda: False)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, stop.END), (signal.SIGINT, stop.END), (signal.SIGUSR2, stop.REQUEUE)],
)
def test_a_signal_is_noted(number: signal.Signals, code: int) -> None:
    stop.listen()
    assert stop.told() == 0
    os.kill(os.getpid(), number)
    assert stop.told() == code
    stop.listen()
    assert stop.told() == 0, "another run in the same process"


def test_what_one_rank_was_told_holds_for_all_and_a_requeue_counts_more() -> None:
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.agree(stop.REQUEUE)
    assert stop.told() == stop.REQUEUE
    stop.agree(0)
    stop.agree(stop.END)
    assert stop.told() == stop.REQUEUE


def test_a_job_hears_of_its_signal_when_everything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: heard.append(number))
    waited: list[float] = []
    monkeypatch.setattr(stop.time, "sleep", waited.append)
    monkeypatch.setattr(env, "being_preempted", lambda: True)
    stop.listen()
    assert not stop.requeued()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.requeued(), "the cluster did not end it after all"
    assert (heard, waited) == ([signal.SIGTERM], [stop.PATIENCE])
    stop.agree(stop.REQUEUE)  # by another rank: this one's own signal may be on its way
    assert stop.requeued()
    assert heard == [signal.SIGTERM, signal.SIGUSR2]
    assert waited == [stop.PATIENCE]
    # The user sent it, or the job runs on this machine: nobody will end it.
    monkeypatch.setattr(env, "being_preempted", lambda: False)
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.requeued()
    assert waited == [stop.PATIENCE]


def test_where_no_job_listened_nobody_is_called_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop.time, "sleep", lambda seconds: pytest.fail("waited"))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    for code in (stop.END, stop.REQUEUE):
        stop.listen()
        stop.agree(code)
        assert not stop.requeued()


def test_the_launcher_listens_only_while_it_waits_and_a_second_interrupt_is_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop.passed_on():
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(stop.told)
        assert stop.told() == stop.END
        with pytest.raises(KeyboardInterrupt):
            press_again()
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.is_ours(signal.SIGTERM)
    assert not stop.is_ours(signal.SIGKILL)
