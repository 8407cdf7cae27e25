from __future__ import annotations

import logging

import pytest

from shards import progress as module
from shards.progress import progress


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


def test_the_length_may_be_unknown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        list(progress(iter("ab"), None, "reading", "files"))
    assert "reading: 2 files" in caplog.messages[0]
