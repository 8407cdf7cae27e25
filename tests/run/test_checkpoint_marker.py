"""Which checkpoints are whole, which of them is taken, and which are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mama.errors import ConfigError
from mama.run import checkpoint_marker, checkpoints
from mama.run.checkpoint_marker import FROZEN, MARKER, read_marker
from mama.run.run_folder import prepare
from mama.train import checkpoint
from tests.support.checkpoint_folder import saved, weights_of
from tests.support.tiny_model import tiny


def steps_of(run: Path) -> list[int]:
    return [read_marker(path).step for path in checkpoints.checkpoints(run)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for number, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.1), (5, None), (6, None)):
        saved(tmp_path, number, score)
    assert checkpoints.best(tmp_path) == tmp_path / "checkpoints" / "step-000003"
    checkpoint.add_score(tmp_path, 6, 0.2, keep=2)
    assert steps_of(tmp_path) == [3, 5, 6]
    checkpoint.add_score(tmp_path, 6, 1.0, keep=1)
    assert steps_of(tmp_path) == [6]
    assert checkpoints.newest(tmp_path) == checkpoints.best_whole(tmp_path) == tmp_path / "checkpoints" / "step-000006"


def test_checkpoints_are_sorted_by_their_number(tmp_path: Path) -> None:
    for number in (999_999, 1_000_000, 1_000_001):
        saved(tmp_path, number, score=0.5)
    assert steps_of(tmp_path) == [999_999, 1_000_000, 1_000_001]
    assert checkpoints.best(tmp_path) == checkpoints.newest(tmp_path) == tmp_path / "checkpoints" / "step-1000001"
    checkpoint.add_score(tmp_path, 1_000_000, 0.6, keep=1)
    assert steps_of(tmp_path) == [1_000_000, 1_000_001], "the best and the newest"


def test_a_link_is_pruned_and_what_it_points_to_stays(tmp_path: Path) -> None:
    elsewhere = saved(tmp_path / "other", 1)
    saved(tmp_path, 2)
    (tmp_path / "checkpoints" / "step-000001").symlink_to(elsewhere)
    assert steps_of(tmp_path) == [1, 2]
    checkpoint.add_score(tmp_path, 2, 0.5, keep=1)
    assert steps_of(tmp_path) == [2]
    assert steps_of(tmp_path / "other") == [1]


@pytest.mark.parametrize("name", [MARKER, FROZEN, "state-00000.safetensors"])
def test_any_byte_that_changed_is_noticed_and_the_one_before_is_taken(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = saved(tmp_path, 1, score=0.1), saved(tmp_path, 2, score=0.2)
    content = (last / name).read_bytes()
    for place in range(len(content)):
        (last / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        caplog.clear()
        assert checkpoints.newest(tmp_path) == before, place
        assert caplog.messages[-1].startswith(str(last / name)), caplog.messages
    assert checkpoints.best_whole(tmp_path) == before
    (before / "state-00000.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^\S+/checkpoints: none of 2 checkpoints is whole, the last: [^\n]+again$"):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_while_a_checkpoint_is_proved_waits_for_no_further_file(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved(tmp_path, 1)
    read, begun, go_on = [], Event(), Event()

    def slowly(path: Path) -> str:
        read.append(path)
        begun.set()
        go_on.wait(60)
        return "0"

    def fail() -> None:
        begun.wait(60)
        Timer(0.2, go_on.set).start()
        raise error

    monkeypatch.setattr(checkpoint_marker, "sha256_or_reason", slowly)
    monkeypatch.setattr(checkpoint_marker, "HASHERS", 1)
    with pytest.raises(type(error)), checkpoints.proved(place):
        fail()
    assert len(read) == 1 < len(read_marker(place).sha256 or {})


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"}, {"step": 3}, {"step": True}, {"step": None}, {"score": "1"}, {"score": float("nan")},
        {"facts": []}, {"facts": {"skipped_steps": "0"}}, {"bytes": {}}, {"bytes": {"frozen.json": 2}}, {"bytes": [1]},
        {"bytes": {"frozen.json": 2, "state-00000.safetensors": "80"}}, {"adam_steps": {"a": "1.0"}}, {"more": 1},
    ],
)  # fmt: skip
def test_markers_of_earlier_versions_are_read_and_nonsense_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    """They have no digests: what stands in them must be what is meant."""
    before, last = saved(tmp_path, 1), saved(tmp_path, 2)
    document = json.loads((last / MARKER).read_text())
    del document["sha256"], document["digest"]
    (last / MARKER).write_text(json.dumps(document))
    assert checkpoints.newest(tmp_path) == last
    (last / MARKER).write_text(json.dumps(document | change))
    assert checkpoints.newest(tmp_path) == before


@pytest.mark.parametrize("content", ["", "null", "[]", '"done"', "2", "{}", "[" * 100_000, "\udc80"])
def test_a_marker_that_is_no_object_is_no_marker(tmp_path: Path, content: str) -> None:
    before, last = saved(tmp_path, 1), saved(tmp_path, 2)
    (last / MARKER).write_bytes(content.encode(errors="surrogateescape"))
    assert checkpoints.newest(tmp_path) == before


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    place = saved(tmp_path, 1)
    save_file({"weight/w": torch.tensor([float("nan")])}, place / "state-00000.safetensors")
    with pytest.raises(ConfigError, match=r"00\.safetensors: weight/w is not finite; remove \S+step-000001 to"):
        weights_of(place)
    (place / "state-00000.safetensors").write_bytes(b"\xff" * 80)
    with pytest.raises(ConfigError, match=r"^\S+state-00000\.safetensors: [^\n]+; remove \S+ to take the one before$"):
        weights_of(place)


def test_moments_are_not_read_where_weights_are_wanted(tmp_path: Path) -> None:
    place = saved(tmp_path, 1)
    tensors = {"weight/w": torch.ones(1), "exp_avg/w": torch.tensor([float("nan")])}
    save_file(tensors, place / "state-00000.safetensors")
    assert list(weights_of(place)) == ["w"]


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    config = replace(tiny(1), runs=str(tmp_path))
    config.run_folder.mkdir()
    (config.run_folder / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"^\S+/checkpoints: cannot be made a folder \(File exists\); [^\n]+$"):
        prepare(config)
