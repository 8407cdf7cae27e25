"""The log and the TensorBoard files, read back by their own readers, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mama.monitor import Monitor


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def log_steps(run: Path, first: int, steps: range, value: float) -> None:
    monitor = Monitor(run, first)
    for step in steps:
        monitor.log(step, {"loss/total": value + step, "lr": 1e-3}, global_batch=8)
    monitor.close()


def test_values_are_read_back_from_the_log_and_from_tensorboard(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(3), 0.5)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [line["loss/total"] for line in lines(tmp_path)] == [0.5, 1.5, 2.5]
    assert set(lines(tmp_path)[0]) == {"step", "loss/total", "lr", "pairs_per_second"}
    assert scalars(tmp_path, "loss/total") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert [value for _, value in scalars(tmp_path, "lr")] == pytest.approx([1e-3] * 3)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0)
    monitor.log(0, {"loss/total": 1.0}, global_batch=8)
    assert [line["loss/total"] for line in lines(tmp_path)] == [1.0]
    monitor.close()


def test_the_rate_counts_the_pairs_of_all_steps_since_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("mama.monitor.time.perf_counter", lambda: clock[0])
    monitor = Monitor(tmp_path, 20)
    for step, seconds in ((20, 2.0), (25, 10.0), (26, 0.5)):  # 1, 5 and 1 steps of 8 pairs
        clock[0] += seconds
        monitor.log(step, {}, global_batch=8)
    monitor.close()
    assert [line["pairs_per_second"] for line in lines(tmp_path)] == pytest.approx([4.0, 4.0, 16.0])


def test_a_resume_rewrites_the_later_steps_without_a_fork(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(8), 0.0)  # this process died after step 7; its checkpoint is from before step 5
    log_steps(tmp_path, 5, range(5, 10), 100.0)
    expected = [(step, float(step)) for step in range(5)] + [(step, 100.0 + step) for step in range(5, 10)]
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path, "loss/total") == expected


def test_a_run_that_starts_again_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(4), 0.0)
    log_steps(tmp_path, 0, range(2), 50.0)
    assert [line["loss/total"] for line in lines(tmp_path)] == [50.0, 51.0]
    assert scalars(tmp_path, "loss/total") == [(0, 50.0), (1, 51.0)]


@pytest.mark.parametrize("torn", ['{"step": 3, "loss/to', '{"step"', "{"])
def test_a_torn_last_line_is_dropped_on_a_resume(tmp_path: Path, torn: str) -> None:
    log_steps(tmp_path, 0, range(3), 0.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(torn)
    log_steps(tmp_path, 4, range(4, 5), 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 4]


def test_a_whole_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, range(3), 0.0)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(tmp_path, 3, range(3, 4), 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}


def test_a_pair_is_shown_side_by_side_with_its_text(tmp_path: Path) -> None:
    import cv2

    anchor, partner = torch.full((1, 6, 4), -1.0), torch.full((1, 6, 4), 1.0)
    anchor[0, 2, 1] = 0.0
    monitor = Monitor(tmp_path, 0)
    monitor.show_pair(0, anchor, partner, "study/0.jpg")
    monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (shown,) = board.Images("pair")
    picture = cv2.imdecode(np.frombuffer(shown.encoded_image_string, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    expected = np.zeros((6, 8))
    expected[2, 1], expected[:, 4:] = 127.5, 255
    np.testing.assert_allclose(picture, expected, atol=1)
    (text,) = board.Tensors("pair/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "study/0.jpg"
