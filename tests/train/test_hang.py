"""A run that hangs: when it is one, who is named, and whether it is started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mama.errors import HungError, LaterError, TrainingError
from mama.run import checkpoints
from mama.runtime import preemption
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from mama.train import hang, loop, pretraining
from mama.train.heartbeat import MEETING, Heartbeat
from tests.support.cohort import write_shards
from tests.support.tiny_run import config_of


def start_number(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))


def test_a_run_goes_on_after_a_hang_only_if_it_came_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[tuple[int, type[Exception]]] = [
        (7, LaterError),
        (9, LaterError),
        (9, TrainingError),  # it would hang there for ever
        (9, LaterError),  # the user has started it again
        (8, TrainingError),
    ]
    for number, (step, expected) in enumerate(came):
        start_number(monkeypatch, number)
        for _ in range(2):  # each of its ranks
            error = hang.judged(tmp_path, step, "it hangs")
            assert type(error) is expected, number
            assert str(error).startswith("it hangs. ")
    (tmp_path / hang.FILE).write_text("torn")
    assert isinstance(hang.judged(tmp_path, 1, "it hangs"), LaterError)


RANK = """
import sys, threading, time
from pathlib import Path
from mama.train.heartbeat import Heartbeat
from mama.train import heartbeat

run, number, doing = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
heart = Heartbeat(run, number, 2, 60, False, 1.5)
while not heart._read(1 - number):
    time.sleep(0.01)
heart.met()
with heart.watching():
    heart.step = 7
    heart.doing("in step 7, waiting for data", steady=True)
    if "late" not in doing:
        heart.doing("in step 7", steady="busy" not in doing)
    print("beating", flush=True)
    end = time.monotonic() + 6
    while "busy" in doing and time.monotonic() < end:
        Path(sys.executable).open("rb").read(100)
    threading.Event().wait(60)
"""


def ranks(run: Path, *doing: str) -> list[subprocess.Popen[str]]:
    found = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(run), str(number), each],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, each in enumerate(doing)
    ]
    for rank in found:
        assert rank.stdout
        assert rank.stdout.readline() == "beating\n"
    return found


def test_a_run_in_which_no_rank_moves_ends_and_names_the_one_that_is_behind(tmp_path: Path) -> None:
    both = ranks(tmp_path, "", "late")
    for rank in both:
        said = rank.communicate(timeout=180)[1]
        pattern = (
            r"mama: train\.patience: no rank has made progress for 0\.025 minutes, the last step was 6: rank 1 "
            rf"\(\S+, pid {both[1].pid}\) was in step 7, waiting for data for \d s\. Run again, it continues .*\n"
        )
        assert re.fullmatch(pattern, said), said
        assert rank.returncode == 75
    for rank in ranks(tmp_path, "", ""):
        assert rank.communicate(timeout=180)[1].count("rank ") == 3, "none is behind: both are named"


def test_a_run_in_which_one_rank_works_on_is_left_alone(tmp_path: Path) -> None:
    """As rank 0 does while it saves and the others wait for it; but a step that takes too long is a hang."""
    both = ranks(tmp_path, "busy", "")
    time.sleep(4)
    assert [rank.poll() for rank in both] == [None, None]
    for rank in both:  # it has stopped working, and only waits
        assert "no rank has made progress" in rank.communicate(timeout=180)[1]


def test_a_rank_says_for_whom_it_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "alive").mkdir()
    old = json.dumps({"host": "gone", "pid": 1, "number": 5, "doing": "in step 3", "seconds": 1})
    (tmp_path / "alive" / "rank-2.json").write_text(old)  # of an earlier start
    heart = Heartbeat(tmp_path, 1, 4, 600, False)
    heart.doing(MEETING)
    other = Heartbeat(tmp_path, 3, 4, 600, False)

    def beat(seconds: float) -> str:
        caplog.clear()
        heart.since -= seconds
        other._write()
        heart._beat()
        return caplog.text

    assert beat(0) == "", "not at once"
    said = beat(31)
    assert re.search(r"rank 1 on \S+ has waited 31 s for the other ranks at .*; no sign of life yet from", said)
    assert "from rank 0, 2 of 4" in said
    assert beat(5) == "", "not every ten seconds"
    heart.met()
    heart.doing(MEETING)
    heart.came.discard(0)
    heart.said = 0
    assert "rank 0 of 4" in beat(31)


def hanging(config: Config) -> int:
    """Train, but rank 1 does not come back from its fourth step."""
    step = pretraining.training_step

    def hang(engine: Any, batches: Any, config: Config, number: int) -> Any:
        if number == 3 and os.environ["RANK"] == "1":
            threading.Event().wait()
        return step(engine, batches, config, number)

    with patch.object(pretraining, "training_step", hang):
        return loop.train_rank(config)


@pytest.mark.ranks
def test_a_run_of_two_ranks_that_hangs_can_go_on_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"train": 10})
    config = config_of(tmp_path, "hangs", steps=4)
    train = replace(config.train, patience=0.1, validate_every=0)
    config = replace(config, train=train, data=replace(config.data, workers=0))  # a loader would have to start first
    for kind, fate in ((LaterError, "Run again, it continues"), (TrainingError, "It hung at step 3 before")):
        said = rf"^train\.patience: .* for 0\.1 minutes, the last step was 2: rank .* in step 3 .*\. {fate}"
        with pytest.raises(kind, match=said) as end:
            run_on_ranks(hanging, config)
        assert type(end.value) is kind
        assert "\n" not in str(end.value)
        assert [path.name for path in checkpoints.checkpoints(config.run_folder)] == ["step-000002"]
    loop.train(config)
    assert checkpoints.checkpoints(config.run_folder)[-1].name == "step-000004"


def test_a_loader_that_hangs_is_a_run_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(name="run", runs=str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in preemption.REQUEST_OF}

    def hang(*_: Any) -> None:
        raise HungError("no batch from the loader process 7")

    monkeypatch.setattr(loop.start_check, "join", hang)
    monkeypatch.setattr(loop, "require_shared_memory", lambda *_: None)
    try:
        for number, kind in enumerate((LaterError, TrainingError)):
            start_number(monkeypatch, number)
            with pytest.raises(kind, match=r"^no batch from the loader process 7\. ") as end:
                loop.train_rank(config)
            assert type(end.value) is kind
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
