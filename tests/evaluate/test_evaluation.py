from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mama.data import report_text
from mama.data.held_out import Split
from mama.data.images import fit_box
from mama.data.wording import Wording
from mama.evaluate import localisation, pointing, retrieval
from mama.evaluate.embeddings import embed_images
from mama.evaluate.evaluation import evaluate
from mama.evaluate.results import (
    localisation_lines,
    predictions_file,
    read_predictions,
    results_table,
    rows_of,
    shown_rows,
)
from mama.evaluate.task_data import task_data
from mama.evaluate.tasks import load_task
from mama.export.figures import Estimate, Pointing, read_metrics
from mama.report import pictures
from mama.report.page import write_report
from mama.settings.load import save
from mama.settings.schema import Config, Fit
from tests.support.cohort import BOX, PATCH, SIZE, Oracle, write_shards
from tests.support.oracle_run import install_oracle, oracle_config
from tests.support.smooth import naive_smooth


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return oracle_config(tmp_path)


@pytest.fixture
def oracle(config: Config, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    return install_oracle(config, monkeypatch)


@pytest.mark.parametrize("style", get_args(report_text.Style))
def test_a_model_that_knows_scores_high_and_one_that_does_not_scores_chance(
    config: Config, oracle: Oracle, style: report_text.Style
) -> None:
    """In every style the oracle finds density, BI-RADS and mass in the words of the prompts."""
    config = replace(config, data=replace(config.data, style=style))
    found = evaluate(config, config.run_folder)
    prompted = {name: found["density"]["prompts"][name] for name in "AD"}
    starts = {"report": "Procedure: ", "sentence": "This is a mammogram", "caption": "Mammogram, side unknown"}
    assert all(text[0].startswith(starts[style]) for text in prompted.values())
    for name in ("cancer", "malignancy", "density"):
        rows = {(r["protocol"], r["model"]): r["metrics"] for r in rows_of(found[name], "image")}
        for protocol in ("zero-shot", "linear probe"):
            assert rows[protocol, "trained"]["auc"]["value"] == 1.0, (name, protocol)
            assert rows[protocol, "trained"]["balanced_accuracy"]["value"] == 1.0
        assert rows["zero-shot", "untrained"]["auc"]["value"] == pytest.approx(0.5)
        assert rows["linear probe", "31 intensity percentiles"]["auc"]["value"] > 0.9
    assert found["cancer"]["images"] == 24
    assert found["cancer"]["patients"] == 12
    assert found["cancer"]["classes"] == [{"name": "no cancer", "images": 18}, {"name": "cancer", "images": 6}]
    hits = {row["model"]: row["hit_rate"]["value"] for row in found["alignment"]["rows"]}
    assert hits == {"trained": 1.0, "untrained": 0.0, "brightest patch": 1.0}
    assert found["alignment"]["findings"] == 6
    strict = {row["model"]: row["strict_hit_rate"]["value"] for row in found["alignment"]["rows"]}
    assert strict == hits
    assert found["alignment"]["chance"] == pytest.approx(9 / 40)  # 3 x 3 of the 8 x 5 patches with tissue
    assert found["alignment"]["strict_chance"] == pytest.approx(1 / 40)
    areas = {row["model"]: row["box_auc"]["value"] for row in found["alignment"]["rows"]}
    white = np.zeros((8, 6))
    white[3, 2], white[:, 5] = 1, np.nan
    pixels = naive_smooth(white, SIZE)[:, :40]
    known = roc_auc_score(np.kron(white[:, :5], np.ones((8, 8))).ravel(), pixels.ravel())  # its corners are as its rim
    assert areas == pytest.approx({"trained": known, "untrained": 0.5, "brightest patch": known}, abs=1e-6)
    assert known > 0.999
    (gained,) = found["alignment"]["differences"]
    assert [gained[key]["value"] for key in ("hit_rate", "strict_hit_rate", "box_auc")] == [0, 0, 0]
    asked = found["alignment"]["controls"]
    missing = {one["name"] for one in asked["missing"]}
    if style == "report":
        assert [(row["name"], row["hit_rate"]["value"], row["difference"]["hit_rate"]["value"]) for row in asked["rows"]
                ] == [("no finding", 0, 1), ("against no finding", 1, 0)]  # fmt: skip
        assert missing == {"other finding"}
    else:
        assert (asked["rows"], missing) == ([], {"other finding", "no finding", "against no finding"})
    assert [one["name"] for one in found["alignment"]["strata"] if one["by"] == "pathology"] == ["malignant"]
    retrieved = found["alignment"]["local_retrieval"]
    assert [retrieved[key] for key in ("targets", "patients", "lesion_free", "lesion_free_patients")] == [6, 6, 18, 12]
    areas = {(row["model"], row["by"]): row["auc"]["value"] for row in retrieved["rows"]}
    # To the oracle it is the darkest patch that answers, which is as dark in every image.
    assert areas.pop(("trained", "normal sentence")) == 0.5
    assert areas == {
        ("trained", "own sentence"): 1.0,
        ("untrained", "own sentence"): 0.5,
        ("trained", "whole text"): 1.0 if style == "report" else areas["trained", "whole text"],
        ("untrained", "whole text"): 0.5,
    }
    (mass,) = retrieved["strata"]
    assert (mass["name"], mass["targets"], mass["rows"][0]["auc"]["value"]) == ("mass", 6, 1.0)
    said = localisation_lines(json.loads(json.dumps(found["alignment"])))
    first, second, third = said[said.index(next(line for line in said if "lesion-free" in line)) :][:3]
    area = r"\d\.\d{3} \[.*\]"
    assert re.fullmatch(r"6 sentences against 18 lesion-free images: AUC 1\.000 \[.*\]", first)
    assert re.fullmatch(rf"beside it: normal sentence {area}, untrained 0\.500 \[.*\]", second)
    assert re.fullmatch(rf"whole text by the global embeddings: {area}, untrained 0\.500 \[.*\]", third)
    detected = found["alignment"]["detection"]
    assert [detected[key] for key in ("images", "without_lesion", "lesions", "left_out")] == [24, 18, 6, 0]
    for row in detected["rows"]:
        figures = [one["value"] for one in row["ap"].values()] + [one["sensitivity"]["value"] for one in row["froc"]]
        assert len(figures) == 8
        if row["model"] == "random map":
            assert max(figures) < 0.9
            assert row["curve"]["false_positives"][-1] > 1
        else:
            assert figures == [float(row["model"] != "untrained")] * 8, row["model"]
            assert (row["marks"], row["curve"]["false_positives"]) == (6 * (row["model"] != "untrained"), [0])


def test_files_hold_what_was_returned_and_the_predictions_give_the_metrics(config: Config, oracle: Oracle) -> None:
    found = evaluate(config, config.run_folder)
    folder = config.run_folder / "eval"
    for name, document in found.items():
        assert json.loads((folder / name / "metrics.json").read_text()) == json.loads(json.dumps(document))
    with (folder / "cancer" / "predictions.csv").open(newline="") as file:
        lines = [row for row in csv.DictReader(file) if row["model"] == "31 intensity percentiles"]
    assert len({row["image"] for row in lines}) == 24
    area = roc_auc_score([row["label"] == "cancer" for row in lines], [float(row["cancer"]) for row in lines])
    baseline = next(r for r in found["cancer"]["rows"] if r["model"] == "31 intensity percentiles")
    assert baseline["metrics"]["auc"]["value"] == pytest.approx(area)
    with np.load(folder / "alignment" / "maps.npz") as file:
        assert file["maps"].shape == (6, SIZE[0] // PATCH, SIZE[1] // PATCH)
    assert not list(folder.rglob("*.partial"))
    rate = next(row for row in found["alignment"]["rows"] if row["model"] == "trained")["hit_rate"]
    travels = read_metrics(config.run_folder / "model")
    assert travels is not None
    expected = Estimate(1.0, rate["low"], rate["high"])
    assert travels.pointing == Pointing(expected, 1.0, found["alignment"]["chance"], 6, 6)


def test_every_unit_has_rows_of_its_own_and_a_file_of_its_predictions(config: Config, oracle: Oracle) -> None:
    """Images first; of the other units those that are asked for, and that of the task."""
    config = replace(config, eval=replace(config.eval, tasks=["cancer", "density"], units=["patient"], pool="max"))
    found = evaluate(config, config.run_folder)
    folder = config.run_folder / "eval"
    for name, own, counts in (("cancer", "breast", {"no cancer": 18, "cancer": 6}), ("density", "exam", None)):
        document = found[name]
        assert list(dict.fromkeys(row["unit"] for row in document["rows"])) == ["image", own, "patient"]
        assert {row["pool"] for row in document["rows"]} == {None, "max"}
        assert not (folder / name / f"predictions-{'exam' if own == 'breast' else 'breast'}.csv").exists()
        for row in document["rows"]:
            unit = row["unit"]
            one = read_predictions(folder / name / predictions_file(unit), row["protocol"], row["model"])
            assert (row["n"], row["patients"]) == (len(one.images), 12)
            assert row["incomplete"] == (0 if unit == "image" else row["n"]), "they have no MLO"
            if unit == own and counts:
                assert row["counts"] == counts
            if document["binary"] and row["metrics"]["auc"]["value"] is not None:
                area = roc_auc_score(one.labels, one.scores[:, 1])
                assert row["metrics"]["auc"]["value"] == pytest.approx(area, abs=1e-3)
        with (folder / name / "subgroups.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        rows = document["subgroups"]["rows"]
        assert [(line["by"], line["group"], line["n"]) for line in lines] == [
            (row["by"], row["group"], str(row["n"])) for row in rows
        ]
        assert {line["unit"] for line in lines} == {own}
        assert document["prompt_sensitivity"][0]["auc"] == rows_of(document, "image")[0]["metrics"]["auc"]["value"]
        assert document["definition"]["label"] == name
    table = results_table(found).splitlines()
    assert [line.split()[:4] for line in table[2:4]] == [
        ["cancer", "zero-shot", "trained", "image"], ["cancer", "zero-shot", "trained", "breast"],
    ]  # fmt: skip
    assert max(map(len, table)) <= 115  # of the longest name of a model; 100 without it


def test_birads_has_the_categories_of_the_data_set_as_classes(config: Config, oracle: Oracle) -> None:
    found = evaluate(config, config.run_folder)["birads"]
    assert [c["name"] for c in found["classes"]] == ["BI-RADS 1", "BI-RADS 2", "BI-RADS 5"]
    assert found["absent"] == ["BI-RADS 0", "BI-RADS 3", "BI-RADS 4", "BI-RADS 6"]
    assert found["chance"] == pytest.approx(1 / 3)


def test_a_task_without_labels_says_so_instead_of_failing(config: Config, oracle: Oracle) -> None:
    items = Split(config, "test").items
    bare = [replace(i, study=replace(i.study, views=tuple(
        replace(v, labels=replace(v.labels, density=None)) for v in i.study.views))) for i in items]  # fmt: skip
    data = task_data(load_task("density"), bare, bare, [], Wording())
    assert (len(data.rows), data.classes, data.absent) == (0, [], ["A", "B", "C", "D"])


def test_without_boxes_the_pointing_game_is_not_played(config: Config, tmp_path: Path, oracle: Oracle) -> None:
    write_shards(tmp_path / "words", {"train": 8, "test": 4}, words="Heterogenously enhancing mass")
    config = replace(config, data=replace(config.data, shards=[str(tmp_path / "words")]))
    found = evaluate(config, config.run_folder)
    assert found["alignment"]["rows"] == []
    assert found["alignment"]["reason"] == "no finding of this split has a box"
    retrieved = found["alignment"]["local_retrieval"]
    assert [(row["model"], row["by"]) for row in retrieved["rows"][:2]] == [
        ("trained", "own sentence"),
        ("untrained", "own sentence"),
    ]
    assert retrieved["strata"] == []  # no sentence of a radiologist is linked to a kind
    assert [e["sentence"] for e in found["alignment"]["examples"]] == ["Findings: Heterogenously enhancing mass."] * 2
    findings = [s for s in found["malignancy"]["prompts"]["malignant"] if s.startswith("Findings")]
    assert "enhanc" in findings[0]


def test_the_table_names_every_row_and_prints_no_interval_that_is_not_there(config: Config, oracle: Oracle) -> None:
    found = evaluate(config, config.run_folder)
    found["cancer"]["rows"][0]["metrics"]["auc"] = {"value": None, "low": None, "high": None, "reason": "why"}
    *lines, pointing, strict, gained, apart, beside, texts, detection = results_table(found).splitlines()
    assert re.fullmatch(
        r"pointing at 6 findings: hits 1\.000 \[.*\] \(chance 0\.225\), box AUC 0\.999 \[.*\]", pointing
    )
    assert re.fullmatch(r"in the box itself, .*: hits 1\.000 \[.*\] \(chance 0\.025\)", strict)
    assert re.fullmatch(r"trained - brightest: hits 0\.000.*, strict 0\.000.*, box AUC 0\.000.*", gained)
    lesions = r"finding 6 lesions: sensitivity 1\.000 \[.*\] at 1 false mark an image, AP \(IoU 0\.25\) 1\.000 \[.*\]"
    assert re.fullmatch(lesions, detection)
    assert apart.startswith("6 sentences against 18 lesion-free images: AUC 1.000 [")
    assert beside.startswith("beside it: normal sentence ")
    assert texts.startswith("whole text by the global embeddings: ")
    assert len(lines) == 2 + sum(len(shown_rows(d)) for d in found.values() if "classes" in d) + 1
    assert "n/a" in lines[2]
    assert re.search(r"1\.000 \[0\.\d{3}, 1\.000\]", lines[2]), "no image is wrong, which does not make it certain"
    assert not re.search(r"None|\bnan\b", "\n".join(lines))
    (line,) = results_table({"density": found["density"] | {"rows": [], "images": 0, "chance": None}}).splitlines()[2:]
    assert re.fullmatch(r"density +no image to score +n/a +n/a +0 +0", line)


def test_a_task_whose_images_are_not_there_says_so_and_costs_the_others_nothing(
    config: Config, oracle: Oracle, tmp_path: Path
) -> None:
    task = tmp_path / "absent.yaml"
    task.write_text("{title: x, label: cancer, classes: {no: false, yes: true}, images: {implant: true}}")
    told: list[str] = []
    found = evaluate(
        replace(config, eval=replace(config.eval, tasks=[str(task), "cancer"])), config.run_folder, told.append
    )
    reason = "images.implant: no image is true; it is known of none"
    assert found["absent"]["rows"] == []
    assert found["absent"]["not_measured"] == [
        {"protocol": protocol, "model": None, "reason": reason} for protocol in ("zero-shot", "linear probe")
    ]
    assert "absent  no image to score" in told[0]
    assert f"no zero-shot, linear probe: {reason}" in told[0]
    assert found["cancer"]["rows"]
    page = write_report(config, config.run_folder, config.run_folder / "model").read_text()
    assert f"There is nothing to score: {reason}." in page


def test_a_class_that_the_training_texts_never_mention_is_marked(
    config: Config, oracle: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    """In metrics, log, table and report; whether it is mentioned depends on the training split and on the settings."""
    assert all(d["untaught"] == [] for d in evaluate(config, config.run_folder).values() if "classes" in d)
    folder = Path(config.data.shards[0]).parent / "pathology"
    write_shards(folder, {"train": 8, "test": 8}, known=("pathology", "cancer"))
    config = replace(config, data=replace(config.data, shards=[str(folder)]))
    measured = replace(config.eval, tasks=["cancer"], intensity_baseline=False, bootstrap=0)
    config = replace(config, eval=measured)
    assert "never mention" not in caplog.text
    found = evaluate(config, config.run_folder)
    assert found["cancer"]["untaught"] == ["cancer"]
    assert "cancer: the training texts never mention what the class prompts say of cancer" in caplog.text
    table = results_table(found).splitlines()
    assert [line.split("  ")[1] for line in table if line.startswith("cancer")] == ["zero-shot *"] * 4 + [
        "linear probe"
    ] * 4
    assert table[-1].startswith("* cancer: the training texts never mention what the class prompts say of cancer")
    assert (
        "the training texts never mention what the class prompts say of cancer"
        in write_report(config, config.run_folder).read_text()
    )
    with_pathology = replace(config, data=replace(config.data, tell_pathology=True))
    found = evaluate(with_pathology, config.run_folder)
    assert found["cancer"]["untaught"] == []
    assert found["cancer"]["prompts"]["cancer"][-1] == "Pathology: malignant."
    assert "*" not in results_table(found)
    # On another data set, the run's own training texts count; without their shards, the answer is unknown.
    save(config, config.run_folder / "config.yaml")
    other = replace(config, data=replace(config.data, shards=[str(folder.parent / "shards")]))
    assert evaluate(other, config.run_folder)["cancer"]["untaught"] == ["cancer"]
    shutil.rmtree(folder)
    assert evaluate(other, config.run_folder)["cancer"]["untaught"] is None


def test_images_keep_their_order_whatever_the_batch(config: Config, oracle: Oracle) -> None:
    split = Split(config, "test")
    whole = embed_images(oracle, split, config, torch.device("cpu"), "x")  # type: ignore[arg-type]
    one_by_one = [oracle.embed_images(split[i][0][None].float() / 127.5 - 1)[0][0] for i in range(len(split))]
    assert np.allclose(whole.embeddings, torch.stack(one_by_one).numpy())
    assert len(split.items) == 24
    assert split.items[3].key == "test001/1.jpg"


def test_boxes_follow_the_image_into_its_canvas() -> None:
    size = (128, 200)  # twice as high, wider than needed
    assert fit_box(BOX, SIZE, size, "letterbox") == tuple(2 * edge for edge in BOX)
    low = (64, 24)  # half as high and wide: background above and below
    assert fit_box(BOX, SIZE, low, "letterbox") == (8, 12 + 16, 12, 16 + 16)
    assert fit_box(BOX, SIZE, low, "stretch") == (8, 24, 12, 32)  # as high, half as wide
    hit = pointing.region((BOX,), SIZE, (8, 6), beside=1)
    assert np.argwhere(hit).min(0).tolist() == [2, 1]
    assert np.argwhere(hit).max(0).tolist() == [4, 3]
    assert np.argwhere(pointing.region((BOX,), SIZE, (8, 6), beside=0)).tolist() == [[3, 2]]
    corner = pointing.region(((0.0, 0.0, 3.0, 3.0),), SIZE, (8, 6), beside=1)
    assert corner.sum() == 4


@pytest.mark.parametrize(("how", "size"), [("stretch", (64, 96)), ("stretch", (128, 40)), ("letterbox", (128, 64))])
def test_boxes_and_heat_maps_lie_on_the_lesion_however_it_was_fitted(
    config: Config, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, how: Fit, size: tuple[int, int]
) -> None:
    """The lesion is the only white of the image: found in the pixels, and framed in the report's picture."""
    config = replace(config, data=replace(config.data, fit=how, image_size=size))
    monkeypatch.setattr(pictures, "jpeg", lambda pixels: pixels)
    opened = pictures.Pictures(config)
    for target in localisation.find_targets(opened.split, oracle.tokenizer, 200):
        rows, columns = np.nonzero(opened.split.pixels(target.item) > 222)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(target.boxes[0], found, atol=1)
    drawn = opened.heat_map(target.item.key, list(target.boxes), np.zeros((4, 4), np.float32))
    assert drawn
    shown = drawn["plain"]
    larger = -(-pictures.HEAT_MAP_HEIGHT // size[0])
    stored = {"stretch": size, "letterbox": (85, 64)}[how]  # without the background above and below
    assert shown.shape[:2] == (larger * stored[0], larger * stored[1])
    framed = np.argwhere((shown == pictures.BOX_COLOUR).all(2))
    assert framed.min(0).tolist() == pytest.approx([24 / 64 * shown.shape[0], 16 / 48 * shown.shape[1]], abs=2 * larger)
    assert framed.max(0).tolist() == pytest.approx([32 / 64 * shown.shape[0], 24 / 48 * shown.shape[1]], abs=2 * larger)


def test_a_sentence_that_the_token_limit_cuts_off_is_no_target(config: Config, oracle: Oracle) -> None:
    split = Split(config, "test")
    whole = localisation.find_targets(split, oracle.tokenizer, 200)
    assert len(whole) == 6
    assert all(t.text[t.sentence] == "Findings: irregular mass, spiculated margin, high density." for t in whole)
    assert localisation.find_targets(split, oracle.tokenizer, 20) == []


def test_retrieval_lists_the_nearest_by_cosine(config: Config, oracle: Oracle) -> None:
    split = Split(config, "test")
    texts, own = retrieval.distinct_texts(split.items, "report")
    rng = np.random.default_rng(0)
    images, words = (rng.normal(size=(n, 8)).astype(np.float32) for n in (len(split.items), len(texts)))
    found = retrieval.examples(split.items, texts, own, images, words)
    assert len(found["texts"]) == 3  # BI-RADS 1, 2, 5
    for query in found["texts"]:
        column = images @ words[texts.index(query["sentences"])]
        best = sorted(range(len(column)), key=lambda i: -column[i])[:5]
        assert [r["image"] for r in query["results"]] == [split.items[i].key for i in best]
        for result, i in zip(query["results"], best, strict=True):
            assert result["same_text"] == (texts[own[i]] == query["sentences"])
    for query in found["images"]:
        row = images[[i.key for i in split.items].index(query["image"])] @ words.T
        assert query["results"][0]["sentences"] == texts[int(row.argmax())]


def test_all_labels_give_the_probe_of_before_and_fewer_a_row_of_their_own(config: Config, oracle: Oracle) -> None:
    before = evaluate(config, config.run_folder)["density"]["rows"]
    more = replace(config.eval, protocols=["probe"], fractions=[0.3, 1.0], draws=2, intensity_baseline=False)
    found = evaluate(replace(config, eval=more), config.run_folder)["density"]["rows"]
    rows = {(r["model"], r["fraction"], r["draw"]): r for r in found if r["unit"] == "image"}
    assert list(rows) == [(m, f, d) for m in ("trained", "untrained") for f, d in ((0.3, 0), (0.3, 1), (1.0, 0))]
    assert {r["protocol"] for r in found} == {"linear probe"}
    for row in before:
        if (row["protocol"], row["unit"]) == ("linear probe", "image") and row["model"] != "31 intensity percentiles":
            assert rows[row["model"], 1.0, 0] == row
    table = (config.run_folder / "eval" / "density" / "predictions.csv").read_text()
    assert {line.partition(",trained")[0] for line in table.splitlines() if ",trained," in line} == {
        "linear probe",
        '"linear probe, 30 % (0)"',
        '"linear probe, 30 % (1)"',
    }
    assert "linear probe, 30 % (1)" in write_report(config, config.run_folder).read_text()
