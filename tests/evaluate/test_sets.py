"""Evaluation on shards that a model was not trained on, of a run and of a model folder by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mama.cli.main import cli
from mama.data.held_out import Split
from mama.evaluate import evaluation, retrieval
from mama.evaluate.evaluation import evaluate
from mama.evaluate.task_data import Predictions
from mama.export.training_data import write_training_data
from mama.run.portable import save_portable
from mama.settings.load import save
from mama.settings.schema import Config
from tests.support.cohort import write_shards
from tests.support.oracle_run import install_oracle, oracle_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    config = oracle_config(tmp_path)
    config = replace(config, eval=replace(config.eval, tasks=["cancer"], intensity_baseline=False))
    install_oracle(config, monkeypatch)
    save(config, config.run_folder / "config.yaml")
    save_portable(config, config.run_folder / "model" / "config.yaml")
    write_training_data(config, config.run_folder / "model")
    return config


@pytest.fixture
def others(tmp_path: Path) -> tuple[str, str]:
    """One set without a train split, and one with all splits, whose patients have other numbers."""
    for name, patients in (("abroad", {"test": 5}), ("near", {"train": 6, "val": 3, "test": 6})):
        write_shards(tmp_path / name, patients)
    return str(tmp_path / "abroad"), str(tmp_path / "near")


def mama(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def metrics(folder: Path, task: str) -> dict[str, object]:
    (file,) = folder.glob(f"{task}/metrics.json")
    found: dict[str, object] = json.loads(file.read_text())
    return found


def test_a_model_folder_alone_is_evaluated_on_several_sets(
    config: Config, others: tuple[str, str], tmp_path: Path
) -> None:
    """In one table; and the report is of these results."""
    bare = tmp_path / "alone" / "oracle-5"
    shutil.copytree(config.run_folder / "model", bare)
    files = set(bare.rglob("*"))
    shutil.rmtree(config.run_folder)
    shutil.rmtree(config.data.shards[0])
    near = ["eval.known_patients=allow"]  # its training patients have the hashes of the run's
    said = mama("eval", str(bare), "--on", others[0], "--on", others[1], *near)
    assert said.exit_code == 0
    beside = bare.with_name("oracle-5-eval")
    assert {path.name for path in beside.iterdir()} == {".eval.lock", "eval-on", "features"}
    assert set(bare.rglob("*")) == files
    abroad, of_near = sorted((beside / "eval-on").iterdir())
    assert {row["protocol"] for row in metrics(abroad, "cancer")["rows"]} == {"zero-shot"}  # type: ignore[attr-defined]
    assert [one["reason"].partition(",")[0] for one in metrics(abroad, "cancer")["not_measured"]] == [  # type: ignore[attr-defined]
        "a model folder by itself has neither the recipe of the run nor the weights that it began with",
        "the shards have no train split",
    ]
    rows = [(row["protocol"], row["model"]) for row in metrics(of_near, "cancer")["rows"]]  # type: ignore[attr-defined]
    assert list(dict.fromkeys(rows)) == [("zero-shot", "trained"), ("linear probe", "trained")]
    lines = said.output.splitlines()
    assert lines.count("on abroad:") == lines.count("on near:") == 3, "above task, retrieval, localisation"
    assert "no linear probe: the shards have no train split, on which it would be fitted" in lines
    named = [line.split("  ")[0] for line in lines if ": cancer  " in line]
    assert named == ["abroad: cancer"] * 2 + ["near: cancer"] * 4, "on images and on breasts"
    mama("report", str(bare))
    page = (beside / "report.html").read_text()
    assert "On other images: abroad" in page
    assert "On other images: near" in page
    assert "older model" not in page
    assert "not recorded" not in page


def test_a_run_is_evaluated_on_other_shards_beside_its_own(
    config: Config, others: tuple[str, str], tmp_path: Path
) -> None:
    run = str(config.run_folder)
    assert mama("eval", run).exit_code == 0
    assert mama("eval", run, "--on", others[0]).exit_code == 0
    assert mama("eval", run, f"eval.on=[{config.data.shards[0]}]", "eval.tasks=[density]").exit_code == 0
    assert {path.name for path in (config.run_folder / "eval").iterdir()} >= {"cancer", "density"}, "its own shards"
    (abroad,) = (config.run_folder / "eval-on").iterdir()
    rows = [(row["protocol"], row["model"]) for row in metrics(abroad, "cancer")["rows"]]  # type: ignore[attr-defined]
    assert list(dict.fromkeys(rows)) == [("zero-shot", "trained"), ("zero-shot", "untrained")]
    page = (mama("report", run), config.run_folder / "report.html")[1].read_text()
    assert "and on none of these patients" in page


def test_a_model_folder_needs_shards_and_its_own_settings(config: Config, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(config.run_folder / "model", bare)
    with pytest.raises(ValueError, match=r"^\S+bare: is a model folder by itself; name shards .*--on SHARDS$"):
        mama("eval", str(bare))
    (bare / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"^\S+bare: has no config\.yaml; copy the whole folder"):
        mama("eval", str(bare), "--on", "shards")


def test_all_sets_are_looked_at_before_the_first_is_measured(
    config: Config, others: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mama.evaluate.sets.evaluate", lambda *_: pytest.fail("nothing may be measured"))
    run, (abroad, near) = str(config.run_folder), others
    with pytest.raises(ValueError, match=rf"^eval.on: {tmp_path}/none: no manifest.json, so this is not a finished "):
        mama("eval", run, "--on", near, "--on", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=rf"^eval.on: {abroad} has no image of eval.split=val; it has test$"):
        mama("eval", run, "--on", near, "--on", abroad, "eval.split=val")


def test_two_sets_of_one_name_are_told_apart(config: Config) -> None:
    from mama.evaluate.sets import sets_of

    both = replace(config, eval=replace(config.eval, on=["/a/abroad", "/b/abroad", "/c/near"]))
    assert {name: one.data.shards for name, one in sets_of(both).items()} == {
        "/a/abroad": ["/a/abroad"],
        "/b/abroad": ["/b/abroad"],
        "near": ["/c/near"],
    }


def test_predictions_of_val_are_those_of_an_evaluation_of_val(
    config: Config, others: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of its labelled images, by the same probe."""
    made: list[dict[tuple[str, str], Predictions]] = []
    document = evaluation.results.document

    def seen(data: evaluation.TaskData, *rest: object) -> object:
        made.append({(one.protocol, one.model): one for one in data.predictions})
        return document(data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation.results, "document", seen)
    config = replace(config, data=replace(config.data, shards=[others[1]]))
    for split in ("test", "val"):
        measured = replace(config.eval, split=split, known_patients="allow")
        evaluate(replace(config, eval=measured), config.run_folder)
    of_test, of_val = made
    assert len(of_test) == 4
    for key, one in of_test.items():
        assert one.scores.shape == (12, 2)
        np.testing.assert_array_equal(one.val_scores, of_val[key].scores)
        assert of_val[key].val_scores is None, "val is what is evaluated"


def test_recall_is_that_of_a_loop_over_all_reports(config: Config) -> None:
    """Also where texts are shared by images, and cosines are equal: then the wrong one comes first."""
    split = Split(config, "test")
    _, own = retrieval.distinct_texts(split.items, "report")
    rng = np.random.default_rng(0)
    texts = len(set(own))
    assert 5 < texts < len(own)
    images, words = (rng.normal(size=(n, 3)).round().astype(np.float32) for n in (len(own), texts))
    blind = np.ones_like(images), np.ones_like(words)
    found = retrieval.recall(split.items, own, {"x": (images, words), "blind": blind}, config)
    for row, (asked, others, right) in zip(
        found["rows"][:2],
        [
            (images, words, [{text} for text in own]),
            (words, images, [{i for i, text in enumerate(own) if text == t} for t in range(texts)]),
        ],
        strict=True,
    ):
        for k in (1, 5, 10):
            hits = 0
            for query, of_query in zip(asked, right, strict=True):
                order = sorted(range(len(others)), key=lambda j: (-float(query @ others[j]), j in of_query))
                hits += bool(set(order[:k]) & of_query)
            assert row["metrics"][f"recall@{k}"]["value"] == pytest.approx(hits / len(asked)), (row["direction"], k)
    assert [row["metrics"]["recall@1"]["value"] for row in found["rows"][2:]] == [0.0, 0.0]
    assert (found["images"], found["texts"], found["patients"]) == (24, texts, 12)
    assert found["chance"]["image to text"]["recall@5"] == pytest.approx(5 / texts)
    drawn = [set(rng.permutation(24)[:5].tolist()) for _ in range(4000)]
    met = [[any(own[i] == t for i in some) for t in range(texts)] for some in drawn]
    assert found["chance"]["text to image"]["recall@5"] == pytest.approx(np.mean(met), abs=0.02)
