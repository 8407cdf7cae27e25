"""What a step records of itself, and when it counts as done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mama.errors import HungError, StoppedError
from mama.runtime import ending
from mama.sweep import status, work
from mama.sweep.sweep import Sweep
from mama.sweep.work import run_step, work_of
from tests.support.study import begun, study


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return study(tmp_path, ["seed-0"])


def test_a_task_that_is_not_the_first_leaves_the_word_of_an_earlier_job(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may fail before the first task has recorded this job."""
    begun(sweep, "seed-0", "train", "stopped", job="70_0")
    step = work_of(sweep, sweep.points[0], "train", in_job=True)
    monkeypatch.setattr(work, "first_task", lambda: False)
    monkeypatch.setattr(work, "job_id", lambda: "77_0")

    def fail(*_: object) -> NoReturn:
        raise ValueError("no disk")

    monkeypatch.setattr(work, "_do", fail)
    with pytest.raises(ValueError, match="no disk"):
        run_step(step)
    found = status.read(step.status)
    assert found
    assert (found.job, found.state) == ("70_0", "stopped")

    status.start(step.status, step.settings, "77_0")
    with pytest.raises(ValueError, match="no disk"):
        run_step(step)
    found = status.read(step.status)
    assert found
    assert (found.job, found.state, found.cause) == ("77_0", "failed", "ValueError: no disk")


def test_a_training_is_still_done_when_a_later_release_has_more_settings(sweep: Sweep) -> None:
    """Its digest is then another one, and without its checkpoints it would be trained from the first step."""
    begun(sweep, "seed-0", "train", "done")
    step = work_of(sweep, sweep.points[0], "train")
    found = status.read(step.status)
    assert found
    status.end(step.status, replace(found, settings="of the release before"), "done")
    assert step.is_done()
    loss = replace(step.config.loss, view=0.25)
    assert not replace(step, config=replace(step.config, loss=loss)).is_done()


@pytest.mark.parametrize(
    ("error", "word"), [(StoppedError("before its first step"), "stopped"), (HungError("rank 1 hangs"), "failed")]
)
def test_a_process_that_is_ended_from_a_thread_leaves_its_word(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, error: Exception, word: str
) -> None:
    """A rank that is stopped before its first step, or that hangs, never comes back from its main thread."""

    class Ended(BaseException):
        pass

    def leave(code: int) -> NoReturn:
        raise Ended

    def hang(*_: Any) -> None:
        ending.end_process(error, 75)

    monkeypatch.setattr(ending.os, "_exit", leave)
    monkeypatch.setattr(work, "_do", hang)
    step = work_of(sweep, sweep.points[0], "train")
    with pytest.raises(Ended):
        run_step(step)
    found = status.read(step.status)
    assert found
    assert (found.state, found.cause) == (word, str(error))


def test_an_evaluation_with_other_boxes_in_the_same_file_is_not_done(sweep: Sweep, tmp_path: Path) -> None:
    step = work_of(sweep, sweep.points[0], "eval")
    step = replace(step, config=replace(step.config, eval=replace(step.config.eval, boxes=[str(tmp_path / "a.csv")])))
    digests = []
    for content in ("image", "image,x0"):
        (tmp_path / "a.csv").write_text(content)
        digests.append(step.settings)
    assert digests[0] != digests[1]
