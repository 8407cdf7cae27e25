"""Provenance: results of other images or weights are never shown as those of this run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from mama.errors import ConfigError
from mama.evaluate import evaluation as module
from mama.evaluate import provenance, result_folders
from mama.evaluate.evaluation import evaluate
from mama.report.page import write_report
from mama.report.pictures import open_pictures
from mama.run.run_folder import shards_digest
from mama.settings.load import save
from mama.settings.schema import Config
from shards.read.manifest import load_manifest
from tests.support.cohort import Oracle, write_shards
from tests.support.oracle_run import consolidated, install_oracle, oracle_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    every_task = oracle_config(tmp_path)
    return replace(every_task, eval=replace(every_task.eval, tasks=["cancer"], bootstrap=10, intensity_baseline=False))


@pytest.fixture
def oracle(config: Config, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    return install_oracle(config, monkeypatch)


def on(config: Config, *folders: Path, split: Literal["train", "val", "test"] = "test") -> Config:
    data = replace(config.data, shards=[str(folder) for folder in folders])
    return replace(config, data=data, eval=replace(config.eval, split=split))


def other_shards(folder: Path, patients: int, source: str) -> Path:
    """Shards with another number of patients, and so with other contents."""
    write_shards(folder, {"train": 8, "val": 4, "test": patients})
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": source}))
    return folder


def page(config: Config) -> str:
    text = write_report(config, config.run_folder).read_text()
    return re.sub(r'"data:[^"]*"', '""', text)


def part(text: str, heading: str) -> str:
    """From this heading of the page to the next of its rank."""
    found = re.search(rf'<h2 id="[^"]*">{heading}</h2>(.*?)<h2', text, re.DOTALL)
    assert found, heading
    return found[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_on_other_shards_have_a_folder_and_a_heading_of_their_own(
    config: Config,
    oracle: Oracle,
    tmp_path: Path,
) -> None:
    run = config.run_folder
    evaluate(config, run)
    before = contents(run / "eval")
    other = other_shards(tmp_path / "elsewhere" / "abroad", 5, "phantom")
    found = evaluate(on(config, other), run)
    assert contents(run / "eval") == before
    (folder,) = (run / "eval-on").iterdir()
    assert re.fullmatch(r"abroad-test-[0-9a-f]{8}", folder.name)
    written = json.loads((folder / "cancer" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(found["cancer"]))
    assert written["shards"]["folders"][0]["source"] == "phantom"
    assert [row["patients"] for row in written["shards"]["folders"][0]["splits"]] == [8, 4, 5]
    assert written["model"]["step"] == 240

    for settings in (config, on(config, other)):  # whatever data.shards is, each set is shown as what it is
        text = page(settings)
        own, abroad = part(text, "Results"), part(text, "On other images: abroad")
        assert "24 images of 12 patients" in own
        assert "10 images" not in own
        assert "The model was trained on the train split." in own
        assert "10 images of 5 patients" in abroad
        assert "24 images" not in abroad
        assert "The model was trained on other shards" in abroad
        assert "synthetic phantoms" in abroad
        assert "synthetic phantoms" not in own
        assert "say nothing about real mammograms" in text
        assert abroad.count('alt="mammogram"') == 2
        assert part(text, "Local alignment: where a sentence points").count('alt="mammogram"') == 6
        assert "issing" not in re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
        assert str(tmp_path) not in text
    assert str(tmp_path) not in (folder / "cancer" / "metrics.json").read_text()

    shutil.rmtree(run / "eval")
    text = page(config)
    assert "own shards has not been evaluated" in part(text, "Results")
    assert "images of" not in part(text, "Results")
    shutil.rmtree(other)  # and something else takes its place
    other_shards(other, 6, "phantom")
    shutil.rmtree(config.data.shards[0])
    text = page(config)
    abroad = part(text, "On other images: abroad")
    assert "10 images of 5 patients" in abroad
    assert "Pictures are missing" in abroad
    assert "picture missing" in abroad
    assert "<img" not in re.sub(
        r'<img src="" alt="(confusion|ROC|FROC|precision|reliability|subgroups|training)[^>]*>', "", text
    )
    assert "shards cannot be read" in part(text, "Data")


def test_an_evaluation_replaces_the_last_one_as_a_whole_or_not_at_all(
    config: Config,
    oracle: Oracle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = config.run_folder
    both = replace(config, eval=replace(config.eval, tasks=["cancer", "density"]))
    evaluate(both, run)
    moved = Path(config.data.shards[0]).rename(tmp_path / "moved")
    evaluate(on(replace(config, eval=replace(config.eval, tasks=["birads"])), moved), run)
    marker = provenance.object_in(run / "eval" / "complete.json") or {}
    assert marker["tasks"] == ["birads", "cancer", "density"], "of the same provenance: all are kept"
    text = page(config)
    assert text.count('alt="mammogram"') == 6, "where they were measured"
    moved.rename(config.data.shards[0])
    assert all(title in text for title in ("BI-RADS category", "Cancer in the breast", "Breast density"))

    before = contents(run / "eval")
    reseeded = replace(config, seed=7)
    write = module.results.write

    def interrupted(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(module.results, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(reseeded, run)
    assert contents(run / "eval") == before
    assert {path.name for path in run.iterdir()} == {
        *(".eval.lock", "data.json", "eval", "features", "model", "report.html")
    }
    monkeypatch.undo()


def test_results_of_other_settings_or_weights_are_not_mixed_with_new_ones(
    config: Config,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = config.run_folder
    evaluate(replace(config, eval=replace(config.eval, tasks=["cancer", "density"])), run)
    assert "older model" not in page(config)
    consolidated(config, step=480)
    text = page(config)
    assert "Of an older model" in part(text, "Results")
    assert "of step 480" in part(text, "Results")
    assert "after step 240" in part(text, "Results")
    shutil.copytree(run / "eval" / "density", run / "old")
    evaluate(config, run)
    assert {path.name for path in (run / "eval").iterdir()} == {"cancer", "alignment", "retrieval", "complete.json"}
    assert "removing the earlier results of density" in caplog.text
    assert "older model" not in page(config)
    save(config, run / "config.yaml")
    with pytest.raises(ConfigError, match=r"^data\.tell_pathology: True, but .* was trained with False"):
        evaluate(replace(config, data=replace(config.data, tell_pathology=True)), run)
    built: list[Config] = []
    blind = module.build

    def build(known: Config, *rest: Any) -> Any:
        built.append(known)
        return blind(known, *rest)

    monkeypatch.setattr(module, "build", build)
    evaluate(replace(config, seed=7, eval=replace(config.eval, tasks=["birads"])), run)
    assert built == [config], "the untrained model is this run's own before its first step"
    assert not (run / "eval" / "cancer").exists(), "measured with another seed"

    # What another release left there, or somebody copied: it is not what the folder says.
    marker = json.loads((run / "eval" / "complete.json").read_text())
    shutil.copytree(run / "old", run / "eval" / "density")
    (run / "eval" / "complete.json").write_text(json.dumps(marker | {"tasks": ["birads", "density", "cancer"]}))
    (run / "eval" / "alignment" / "maps.npz").write_bytes(b"torn")
    (run / "eval" / "retrieval" / "examples.json").write_text("[")
    text = page(config)
    assert "Left out, as missing, damaged or measured on other images, weights or settings: cancer, density" in text
    assert "Breast density" not in text
    assert "the picture or its map is missing" in text
    assert "no retrieval examples" in text


def test_settings_that_change_figures_are_compared_and_pictures_are_fitted_as_they_were(
    config: Config,
    oracle: Oracle,
) -> None:
    changes: list[dict[str, Any]] = [{}, {"fit": "stretch"}, {"tell_pathology": True}, {"style": "caption"}]
    others = [replace(config, data=replace(config.data, **change)) for change in changes]
    settings = [provenance.identity(other, config.run_folder)["settings"] for other in others]
    assert all(settings.count(one) == 1 for one in settings)
    evaluate(others[1], config.run_folder)
    ((_, marker),) = result_folders.evaluations(config.run_folder)
    pictures = open_pictures(config, marker)
    assert pictures
    assert pictures.split.images.fit == "stretch"


def test_missing_files_are_reported_and_results_without_provenance_are_not_shown(
    config: Config,
    oracle: Oracle,
) -> None:
    evaluate(config, config.run_folder)
    path = config.run_folder / "eval" / "cancer" / "predictions.csv"
    for damage in (path.read_text()[:300], None):
        path.unlink() if damage is None else path.write_text(damage)
        assert "predictions.csv is missing or damaged" in page(config)
    (config.run_folder / "eval" / "complete.json").unlink()
    text = page(config)
    assert "do not record on which images" in part(text, "Results")
    assert "24 images" not in text


def test_own_shards_are_recognised_by_their_contents_and_not_by_their_place(config: Config, tmp_path: Path) -> None:
    run = config.run_folder
    consolidated(config, step=1)
    here = Path(config.data.shards[0])

    def where(*folders: Path, split: Literal["train", "val", "test"] = "test") -> str:
        return str(
            result_folders.folder_of(provenance.shard_set(on(config, *folders, split=split)), run).relative_to(run)
        )

    def seen(*folders: Path, split: Literal["train", "val", "test"] = "test") -> str:
        return provenance.training(provenance.shard_set(on(config, *folders, split=split)), run)

    moved = tmp_path / "moved"
    shutil.copytree(here, moved)
    assert where(here) == where(moved) == "eval"
    assert seen(moved) == "The model was trained on the train split."
    assert where(here, split="train").startswith("eval-on/shards-train-")
    assert (
        seen(here, split="train") == "The model was trained on the train split, on which these figures were measured."
    )

    one, two = (other_shards(tmp_path / n / "abroad", patients, "x") for n, patients in (("a", 3), ("b", 4)))
    assert len({where(one), where(two), where(one, split="val"), where(one, two), where(here, one)}) == 5
    assert where(one, two) == where(two, one)
    assert seen(here, one) == "The model was trained on the train split of shards only."
    assert seen(one).startswith("The model was trained on other shards")
    assert where(tmp_path / "a" / ".." / "b" / "abroad") == where(two)
    (run / where(two)).mkdir(parents=True)
    renamed = two.rename(tmp_path / "b" / "renamed")
    assert where(renamed).startswith("eval-on/abroad-test-")

    grown = json.loads((here / "manifest.json").read_text())
    more = {**next(s for s in grown["shards"] if s["split"] == "train"), "name": "train-000009.tar", "sha256": "0" * 64}
    (here / "manifest.json").write_text(json.dumps(grown | {"shards": [*grown["shards"], more]}))
    assert where(here).startswith("eval-on/shards-test-")
    assert seen(here).startswith("The model was trained on other shards")

    digests = {str(f): shards_digest(load_manifest(f), {"train"}) for f in (moved, one)}
    (run / "data.json").write_text(json.dumps(digests))
    assert where(one, moved) == "eval"
    assert where(moved).startswith("eval-on/")
    assert seen(moved) == "The model was trained on the train split."
    for damaged in ("[]", "{", ""):
        (run / "data.json").write_text(damaged)
        assert where(moved).startswith("eval-on/")
        assert "not recorded" in seen(moved)


def test_of_two_concurrent_evaluations_the_last_one_wins_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    with result_folders.replaced_results(folder) as one:
        (one / "of-one").touch()
        with result_folders.replaced_results(folder) as two:
            (two / "of-two").touch()
        assert [path.name for path in folder.iterdir()] == ["of-two"]
    assert [path.name for path in folder.iterdir()] == ["of-one"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
