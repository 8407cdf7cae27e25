from __future__ import annotations

import logging
import re
import threading
import time

import pytest

from shards import progress as module
from shards.progress import progress, waiting


def test_items_pass_and_a_log_gets_one_last_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(progress(iter("abc"), 3, "reading", "files")) == ["a", "b", "c"]
    assert len(caplog.messages) == 1
    assert "reading: 3/3 files" in caplog.messages[0]


def test_lines_come_at_most_once_per_interval_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))  # every item takes four seconds
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        list(progress(range(9), 9, "reading", "files"))
    assert [message.split(" files")[0] for message in caplog.messages] == [
        "reading: 3/9",
        "reading: 6/9",
        "reading: 9/9",
        "reading: 9/9",
    ]
    assert "24 s left" in caplog.messages[0]


def test_work_that_cannot_be_counted_is_named_and_said_to_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.001)
    with caplog.at_level(logging.INFO):
        with waiting("reading tables"):
            assert caplog.messages[0] == "reading tables"
            for _ in range(1000):
                time.sleep(0.001 * (len(caplog.messages) < 3))
        lines = list(caplog.messages)
    assert {re.sub(r"\d+ s$", "0 s", line) for line in lines[1:]} == {"reading tables, 0 s"}
    assert [thread.name for thread in threading.enumerate() if "repeat" in thread.name] == []
    assert caplog.messages == lines


def test_it_is_silent_beside_a_loop_that_is_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = progress(range(2), 2, "drawing", "phantoms")
    next(loop)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.001)
    with caplog.at_level(logging.INFO), waiting("reading tables"):
        time.sleep(0.05)
    assert caplog.messages == ["reading tables"]
    loop.close()  # type: ignore[attr-defined]
    assert module._loops == []


def test_the_length_may_be_unknown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        list(progress(iter("ab"), None, "reading", "files"))
    assert "reading: 2 files" in caplog.messages[0]
