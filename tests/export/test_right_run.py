"""A model is made of a checkpoint of its own run, and of the shards that it was trained on; else the log says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mama.errors import ConfigError
from mama.export.consolidate import Export, consolidate
from mama.export.model_folder import read_model
from mama.run import checkpoints
from mama.run.checkpoint_marker import RUN, run_digest, steps_taken
from mama.run.run_folder import prepare, warn_of_other_shards
from mama.settings.schema import Config
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of


@pytest.fixture
def run(tmp_path: Path) -> Config:
    write_shards(tmp_path / "shards", {"train": 2, "test": 1})
    config = config_of(tmp_path, "tiny")
    return replace(config, runs=str(tmp_path / "runs"), data=replace(config.data, workers=0))


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_is_taken(
    run: Config, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(run, name="other", seed=run.seed + 1)
    save_run(run)
    save_run(other, step=5)
    (run.run_folder / "data.json").write_text('{"elsewhere": "0"}')
    place = run.run_folder / "checkpoints" / "step-000005"
    shutil.copytree(other.run_folder / "checkpoints" / "step-000005", place)
    assert read_model(consolidate(run)).step == steps_taken(run.run_folder) == 3
    assert f"{place}/complete.json: is that of another run; this checkpoint is skipped" in caplog.messages
    assert any("shards: its training shards have changed since" in message for message in caplog.messages)
    (run.run_folder / "data.json").write_bytes((other.run_folder / "data.json").read_bytes())
    assert prepare(run) == place.with_name("step-000003"), "nor is it resumed from"
    with pytest.raises(ConfigError, match=rf"^{place}/complete\.json: is that of another run; name another step, or "):
        consolidate(run, Export(step=5))
    (run.run_folder / RUN).unlink()
    assert checkpoints.newest(run.run_folder) == place, "a run that an earlier release started is not compared"


def test_a_run_is_the_same_on_other_ranks_and_elsewhere(run: Config, tmp_path: Path) -> None:
    def identity(config: Config) -> str | None:
        prepare(config)
        return run_digest(config.run_folder)

    first = identity(run)
    shutil.copytree(tmp_path / "shards", tmp_path / "moved" / "shards")
    moved = replace(run.data, shards=[str(tmp_path / "moved" / "shards")], cache="/elsewhere", workers=3)
    assert first == identity(replace(run, runs=str(tmp_path / "a"), data=moved, train=replace(run.train, ranks=1)))
    write_shards(tmp_path / "others" / "shards", {"train": 3, "test": 1})
    trained_on_others = replace(run.data, shards=[str(tmp_path / "others" / "shards")])
    for number, changed in enumerate(
        (replace(run, seed=9), replace(run, name="b"), replace(run, data=trained_on_others))
    ):
        assert identity(replace(changed, runs=str(tmp_path / str(number)))) != first


def test_the_log_names_training_shards_that_changed_since(
    run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = tmp_path / "second"
    write_shards(second, {"train": 1, "test": 1})
    run = replace(run, data=replace(run.data, shards=[*run.data.shards, str(second)]))
    prepare(run)
    shutil.move(second, tmp_path / "moved")
    moved = replace(run, data=replace(run.data, shards=[run.data.shards[0], str(tmp_path / "moved")]))
    warn_of_other_shards(moved)
    assert not caplog.messages
    shutil.rmtree(tmp_path / "shards")
    write_shards(tmp_path / "shards", {"train": 4, "test": 1})
    warn_of_other_shards(moved)
    assert [message.partition(":")[0] for message in caplog.messages] == [run.data.shards[0]]
    caplog.clear()
    warn_of_other_shards(replace(run, data=replace(run.data, shards=[str(tmp_path / "moved")])))
    assert caplog.messages == [
        f"{run.data.shards[0]}: {run.run_folder} was trained on it, and data.shards does not name it"
    ]
