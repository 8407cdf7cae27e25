"""Where a model is written: a model is replaced as a whole, and nothing of anybody else's is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from mama.cli.options import configured_model
from mama.errors import ConfigError
from mama.export.consolidate import Export, consolidate
from mama.export.figures import Calibration, Data, Metrics, read_metrics, weights_of, write_figures
from mama.export.model_folder import model_folder, read_model
from mama.settings.schema import Config
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of


@pytest.fixture
def run(tmp_path: Path) -> Config:
    write_shards(tmp_path / "shards", {"train": 2, "test": 1})
    config = config_of(tmp_path, "tiny")
    config = replace(config, runs=str(tmp_path / "runs"), data=replace(config.data, workers=0))
    save_run(config)
    return config


def test_only_a_model_is_replaced_and_nothing_else_is_lost(run: Config, tmp_path: Path) -> None:
    own = [tmp_path / f"out.{name}" for name in ("partial", "old")]
    for folder in own:
        folder.mkdir()
        (folder / "mine").write_text("kept")
    out = tmp_path / "out"
    for folder in (consolidate(run, Export(out=out)), consolidate(run)):
        (folder / "README.md.part").write_text("of a killed evaluation")
        (folder / "vision" / "mine.txt").write_text("kept")
        export = Export(out=out) if folder == out else Export()
        with pytest.raises(
            ConfigError, match=rf"^{folder}: [^\n]*did not write \(vision/mine\.txt\); move it, [^\n]*$"
        ):
            consolidate(run, export)
        assert (folder / "vision" / "mine.txt").read_text() == "kept"
        (folder / "vision" / "mine.txt").unlink()
        consolidate(run, export)
    (out / "digests.json").write_text("damaged")
    consolidate(run, Export(out=out))
    assert [(folder / "mine").read_text() for folder in own] == ["kept", "kept"]


def test_a_model_is_written_to_no_place_where_it_does_harm(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"^--out: \S+/model/x is inside of the model folder \S+/model; name another$"
    ):
        consolidate(run, Export(out=run.run_folder / "model" / "x"))
    out = consolidate(run, Export(out=tmp_path / "out"))
    with pytest.raises(ConfigError, match=rf"^--out: {out}/text/x is inside of the model folder {out}; name another$"):
        consolidate(run, Export(out=out / "text" / "x"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", str(tmp_path / "here")):
        with pytest.raises(ConfigError, match=rf"^--out: {name} is the folder that this command runs in, or above it"):
            consolidate(run, Export(out=Path(name)))
    for target in (out, tmp_path / "new"):
        link = tmp_path / f"to-{target.name}"
        link.symlink_to(target)
        assert consolidate(run, Export(out=link)) == target
        assert link.readlink() == target, "the link stays"
        assert read_model(target).step == 3


def test_an_error_leaves_nothing_behind(run: Config, tmp_path: Path) -> None:
    (run.run_folder / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer"):
        consolidate(run, Export(out=tmp_path / "places" / "out"))
    assert not [*tmp_path.glob("places/*")]


def test_a_model_is_found_by_its_own_path_after_a_kill_between_two_renames(run: Config) -> None:
    folder = consolidate(run)
    data = Data(("shards",), ("invented",), "test", 1, 2, 0)
    figures = Metrics(**vars(weights_of(folder)), data=data, tasks={}, pointing=None)
    write_figures(figures, Calibration(**vars(weights_of(folder)), tasks={}), folder)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == folder:
            raise KeyboardInterrupt
        return rename(path, target)

    with patch.object(Path, "rename", killed), pytest.raises(KeyboardInterrupt):
        consolidate(run)
    assert not folder.exists()
    for path in (folder, run.run_folder):
        assert read_model(model_folder(path)).step == 3
    config, place = configured_model(str(folder), ())
    assert config.run_folder == run.run_folder / "model-eval"
    assert read_model(place).step == 3
    consolidate(run)
    assert read_metrics(folder) == figures


def test_what_is_evaluated_is_the_model_that_was_trained(run: Config) -> None:
    wrong = ("vision.tokens=tissue", "text.config.n_layer=3", "vision.config={hidden_size: 24}", "loss.local=0")
    right = ("vision.tokens=all", "text.packing=false", "text.config.n_layer=2", "data.image_size=[64,64]", "seed=9")
    folder = consolidate(run)
    for place in (run.run_folder, folder):
        for change in wrong:
            key = change.partition("=")[0]
            with pytest.raises(ConfigError, match=rf"^{key}[^\n]*, but {place} was trained with [^\n]*; leave it out$"):
                configured_model(str(place), ("seed=9", change))
        configured_model(str(place), right)
