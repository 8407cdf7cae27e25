from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mama.errors import ConfigError
from mama.evaluate import metrics
from mama.evaluate.bootstrap import NO_IMAGE
from mama.evaluate.calibration import NO_VAL
from mama.evaluate.evaluation import evaluate
from mama.evaluate.measured_row import measured_row
from mama.evaluate.results import format_estimate, shown_rows
from mama.objective.losses import weights_at
from mama.report import figures
from mama.report.figures import forest_plot, precision_recall_curves, reliability_diagram
from mama.report.page import POINT_TITLES, TERMS, TITLES, write_report
from mama.settings.schema import Config, LossConfig
from tests.support.browser import CHROMIUM, probe
from tests.support.cohort import Oracle, write_shards
from tests.support.oracle_run import install_oracle, oracle_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return oracle_config(tmp_path)


@pytest.fixture
def oracle(config: Config, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    return install_oracle(config, monkeypatch)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has been evaluated; tests read it."""
    config = oracle_config(tmp_path_factory.mktemp("evaluated"))
    with pytest.MonkeyPatch.context() as patch:
        install_oracle(config, patch)
        evaluate(config, config.run_folder)
    return config


@pytest.fixture(scope="module")
def page(evaluated: Config) -> Path:
    config = evaluated
    log = [{"step": s, "loss/total": 9 / (s + 1), "loss/local": 2.0, "accuracy/image_to_text": s / 9, "lr/heads": 1e-3,
            "scale/global": 14.0, "scale/largest": 100.0, "pairs_per_second": 20.0 + s} for s in range(5)]  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (config.run_folder / "log.jsonl").write_text(lines + '{"step": 5, "lo')  # is being written
    versions = {"mama-clip": "0.1.0", "torch": "2.13.0"}
    environment = {"python": "3.11", "platform": "<Linux>", "commit": "0123456789abcdef", "versions": versions}
    (config.run_folder / "environment.json").write_text(json.dumps(environment))
    return write_report(config, config.run_folder)


def _words(page: Path) -> str:
    """The page with each estimate in one piece, "0.912 [0.880, 0.940]"; in the page its interval is an element."""
    return re.sub('<span class="interval">(.*?)</span>', r"\1", page.read_text())


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?://|//[a-z]+\.", re.sub(r'"data:[^"]*"', '""', text))
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "<script" not in text
    assert "<link" not in text
    assert "&lt;Linux&gt;" in text  # facts are escaped


def test_the_page_shows_what_was_measured(page: Path, evaluated: Config, tmp_path: Path) -> None:
    text = _words(page)
    for name in ("cancer", "birads", "density", "malignancy"):
        document = json.loads((evaluated.run_folder / "eval" / name / "metrics.json").read_text())
        assert document["title"] in text
        for row in shown_rows(document):
            auc = row["metrics"]["auc"]
            assert f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in text
    recall = json.loads((evaluated.run_folder / "eval" / "retrieval" / "metrics.json").read_text())
    for chance in recall["chance"].values():
        cells = "".join(f'<td class="number">{chance[f"recall@{k}"]:.3f}</td>' for k in (1, 5, 10))
        assert f"<td>chance</td>{cells}</tr>" in text
    assert "24 images of 12 patients" in text
    assert text.count("A hash of the patient decides the split: about 70 % train") == 1
    assert "0123456789ab" in text
    assert "5 of 40000 steps" in text
    assert text.count('alt="mammogram"') == 6
    assert len(re.findall('alt="ROC curves, ', text)) == len(re.findall('alt="precision-recall curves, ', text)) == 4
    assert len(re.findall('alt="subgroups, ', text)) == 4
    assert "The smallest subgroup has " in text
    assert "zero-shot by template" in text
    assert "no image of BI-RADS 0, BI-RADS 3, BI-RADS 4, BI-RADS 6" in text
    assert not re.search(r"\bNone\b|\bnan\b", re.sub(r'"data:[^"]*"', "", text))
    # Whatever the page names by a code has its sentence.
    notes = " ".join(re.findall(r'<p class="not(?:e|ice)">.*?</p>|<h2 id="method">.*?</p>', text, re.DOTALL)).lower()
    rows = [*document["rows"], *json.loads((evaluated.run_folder / "eval/alignment/metrics.json").read_text())["rows"]]
    for code in {row.get("protocol", row["model"]) for row in rows} | {row["model"] for row in rows}:
        assert code in notes, code
    assert text.count('alt="FROC curves"') == text.count("By kind, size and pathology of lesion") == 1
    assert "6 lesions in 24 images, 18 of them without a lesion, of 12 patients." in text
    assert TERMS.keys() == weights_at(LossConfig(), 0).keys()
    assert all(sentence in text for sentence in TERMS.values())
    # A metric that is undefined has its reason in place of the figure.
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    path = config.run_folder / "eval" / "cancer" / "metrics.json"
    document = json.loads(path.read_text())
    measured = document["rows"][0]["metrics"]
    assert measured.keys() == {*metrics.REASONS, "ece"} == {"auc", "balanced_accuracy", *TITLES}
    for name, estimate in measured.items():
        estimate |= {"value": None, "low": None, "high": None, "reason": metrics.REASONS.get(name, NO_IMAGE)}
    del document["rows"][1]["metrics"]["ece"]  # as an earlier release wrote it
    document["subgroups"]["smallest"]["n"] = 1
    path.write_text(json.dumps(document))
    # An earlier release measured the pointing game alone, and no recall.
    (config.run_folder / "eval" / "retrieval" / "metrics.json").unlink()
    path = config.run_folder / "eval" / "alignment" / "metrics.json"
    document = json.loads(path.read_text())
    earlier = {key: value for key, value in document.items() if key not in ("detection", "strata")}
    rows = [{key: row[key] for key in ("model", "hit_rate")} for row in document["rows"]]
    path.write_text(json.dumps(earlier | {"rows": rows}))
    text = write_report(config, config.run_folder).read_text()
    assert "FROC" not in text
    assert "The smallest subgroup has 1 breast (" in text
    assert text.count("There is no retrieval recall") == 1
    assert ">brightest patch</td>" in text
    assert all(f">{words}</" in text for words in (*metrics.REASONS.values(), *TITLES.values()))


def test_subgroups_stand_beside_all_units_of_their_kind(evaluated: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cancer these are breasts; a subgroup has a point for each protocol of the trained model."""
    drawn: dict[str, list[list[dict[str, Any]]]] = {}

    def draw(rows: list[dict[str, Any]], overall: list[dict[str, Any]], unit: str) -> str:
        drawn[unit] = [rows, overall]
        return forest_plot(rows, overall, unit)

    monkeypatch.setattr(figures, "forest_plot", draw)
    write_report(evaluated, evaluated.run_folder)
    assert drawn.keys() == {"breast", "exam"}
    rows, overall = drawn["breast"]
    assert [(row["protocol"], row["model"], row["unit"]) for row in overall] == [
        ("zero-shot", "trained", "breast"), ("linear probe", "trained", "breast"),
    ]  # fmt: skip
    assert {row["protocol"] for row in rows} == {"zero-shot", "linear probe"}


def test_curves_have_the_measured_areas(evaluated: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[dict[str, Any]], str, float]] = []

    def draw(curves: list[dict[str, Any]], title: str, positives: float) -> str:
        drawn.append((curves, title, positives))
        return precision_recall_curves(curves, title, positives)

    monkeypatch.setattr(figures, "precision_recall_curves", draw)
    write_report(evaluated, evaluated.run_folder)
    document = json.loads((evaluated.run_folder / "eval" / "cancer" / "metrics.json").read_text())
    curves, protocol, positives = drawn[0]
    assert positives == document["classes"][1]["images"] / document["images"]
    rows = [row for row in document["rows"] if row["unit"] == "image" and row["protocol"] == protocol]
    for curve, row in zip(curves, rows, strict=True):
        measured = row["metrics"]["average_precision"]
        assert curve["label"] == f"{row['model']}: {format_estimate(measured)}"
        assert np.sum(np.diff(curve["x"]) * curve["y"][1:]) == pytest.approx(measured["value"], abs=1e-5)


def test_calibration_operating_points_and_recall_are_those_measured(
    evaluated: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a split `val` the reason stands in their place; with one the figures of the trained model's images."""
    drawn: list[tuple[dict[str, Any], str]] = []

    def draw(calibration: dict[str, Any], title: str) -> str:
        drawn.append((calibration, title))
        return reliability_diagram(calibration, title)

    monkeypatch.setattr(figures, "reliability_diagram", draw)
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    text = write_report(config, config.run_folder).read_text()
    assert text.count(f'n/a: <span class="soft">{NO_VAL}') == 8  # both ways, two tasks, two protocols
    assert text.count(f'<span class="soft" style="white-space: normal">{NO_VAL}') == 12  # of three points each
    path = config.run_folder / "eval" / "cancer" / "metrics.json"
    document = json.loads(path.read_text())
    rows = [one for one in document["rows"] if one["model"] == "trained" and one["unit"] == "image"]
    assert drawn[:2] == [(row["calibration"], row["protocol"]) for row in rows]
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    shares = np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, 60), 0.01, 0.99)
    scores = np.stack([1 - shares, shares], axis=1)
    fitted = replace(config, eval=replace(config.eval, prevalence=[0.006]))
    rows[0] |= measured_row(labels, scores, [f"p{n // 2}" for n in range(60)], True, (labels, scores), fitted)
    del rows[1]["calibration"], rows[1]["operating_points"]  # as an earlier release wrote it
    path.write_text(json.dumps(document))
    path = config.run_folder / "eval" / "retrieval" / "metrics.json"
    recall = json.loads(path.read_text())
    for number, row in enumerate(recall["rows"]):
        for k in (1, 5, 10):
            row["metrics"][f"recall@{k}"] |= {"value": (10 * number + k) / 100, "low": 0.0, "high": 1.0}
    path.write_text(json.dumps(recall))
    text = _words(write_report(config, config.run_folder))
    for row in recall["rows"]:
        shown = (format_estimate(row["metrics"][f"recall@{k}"]) for k in (1, 5, 10))
        cells = ".*".join(f">{re.escape(words)}</span></td>" for words in shown)
        assert re.search(f"<td>{row['model']}</td>[^\n]*{cells}", text)
    assert text.count("calibration and operating points were not measured") == 1
    points, kinds = rows[0]["operating_points"], rows[0]["calibration"]
    for name in ("uncalibrated", "temperature", "isotonic"):
        cells = ".*".join(f">{re.escape(format_estimate(kinds[name][key]))}</span>" for key in ("ece", "brier"))
        assert re.search(f"<td>{name}[ <][^\n]*{cells}", text), name
    for name, title in POINT_TITLES.items():
        cells = ".*".join(f">{re.escape(format_estimate(point['metrics'][name]))}</span>" for point in points)
        assert re.search(f"<td>{title}</td>[^\n]*{cells}", text), name
    cells = ".*".join(f">{re.escape(format_estimate(point['ppv_at_prevalence'][0]))}</span>" for point in points)
    assert re.search(f"<td>PPV at a prevalence of 0.6 %</td>[^\n]*{cells}", text)
    assert all(f">{point['threshold']:.4g}</td>" in text for point in points)
    assert "60 images, 30 of them positive" in text


def test_the_worst_errors_are_one_of_each_patient(evaluated: Config, tmp_path: Path) -> None:
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    file = config.run_folder / "eval" / "cancer" / "predictions.csv"
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines))
    classes = rows[0][5:]
    own = [row for row in rows[1:] if row[:2] == ["zero-shot", "trained"]]
    wrong = [row for row in own if row[3] in dict.fromkeys(one[3] for one in own[:14])][:14]  # two of a patient
    for number, row in enumerate(wrong):
        share = 0.6 + number / 100
        row[5:] = [str(share if name != row[4] else 1 - share) for name in classes]
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(rows)
    document = json.loads(file.with_name("metrics.json").read_text())
    document["rows"][0]["confusion"] = [[5, 7], [7, 5]]
    file.with_name("metrics.json").write_text(json.dumps(document))
    text = write_report(config, config.run_folder).read_text()
    assert "<strong>Zero-shot</strong>: 14 of 24 images have the wrong class" in text
    caption = r"<strong>([\d.]*)</strong> for ([\w ]*); it is ([\w ]*) ·"
    shown = re.findall(rf'alt="error \d+, [^"]*, zero-shot" >{caption}', text)
    worst: dict[str, list[str]] = {}
    for row in reversed(wrong):
        worst.setdefault(row[3], row)
    expected = [(f"{max(map(float, row[5:])):.2f}", classes[row[4] == classes[0]], row[4]) for row in worst.values()]
    assert shown == expected[:5]
    file.write_text("protocol\n")
    text = write_report(config, config.run_folder).read_text()
    assert text.count("missing or damaged, so there is no curve") == text.count("so there are no errors to show") == 1


def test_missing_parts_are_named(tmp_path: Path, config: Config) -> None:
    config.run_folder.mkdir(parents=True)
    text = write_report(config, config.run_folder).read_text()
    for part in ("no environment.json", "Nothing has been evaluated", "no log.jsonl", "no ROC curve",
                 "no calibration", "no predictions", "no errors to show", "no retrieval recall",
                 "no retrieval examples", "no local alignment maps"):  # fmt: skip
        assert part in text, part
    assert "<img" not in text


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("environment.json", {"versions": 5}),
        ("eval/complete.json", {"shards": 5}),
        ("eval/complete.json", {"settings": []}),
    ],
)
def test_a_damaged_json_file_is_an_error_of_one_line(config: Config, file: str, change: dict[str, object]) -> None:
    path = config.run_folder / file
    path.parent.mkdir(parents=True)
    whole: dict[str, object] = {
        "shards": {"folders": [], "split": "test"},
        "model": None,
        "settings": {},
        "tasks": [],
        "places": [],
    }
    path.write_text(json.dumps(whole | change))
    with pytest.raises(
        ConfigError, match=r"^[^\n]*: a JSON file in it was edited or damaged \([^\n]*run `mama eval` again$"
    ):
        write_report(config, config.run_folder)


def test_pictures_without_boxes_are_announced(tmp_path: Path, config: Config, oracle: Oracle) -> None:
    shutil.rmtree(config.data.shards[0])
    write_shards(Path(config.data.shards[0]), {"train": 8, "test": 4}, words="Heterogenously enhancing mass")
    evaluate(config, config.run_folder)
    text = write_report(config, config.run_folder).read_text()
    assert "Pointing game: n/a, no finding of this split has a box." in text
    assert text.count("no box known") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_picture(page: Path, tmp_path: Path) -> None:
    dom, attributes = probe(page, tmp_path, 1280)
    assert "error" not in attributes
    assert int(attributes["images"]) == page.read_text().count("<img")
    assert int(attributes["images"]) > 20
    assert attributes["broken"] == "0"
    assert (attributes["wide"], attributes["cut"]) == ("false", "0")
    assert attributes["requests"] == "0"
    for heading in (
        "Results",
        "Training",
        "ROC and precision-recall curves",
        "Retrieval",
        "Local alignment: where a sentence points",
        "Data",
    ):
        assert re.search(rf"<h2[^>]*>{heading}</h2>", dom), heading
    # On a telephone wide tables scroll; on paper, about 714 pixels, nothing can.
    for width, cut in ((390, "scrolls"), (714, "")):
        _, attributes = probe(page, tmp_path, width)
        assert int(attributes["images"]) == page.read_text().count("<img")
        assert (attributes["wide"], attributes["broken"]) == ("false", "0")
        assert attributes["cut"] == attributes.get(cut, "0")


def test_controls_and_differences_of_pointing_are_shown(evaluated: Config, tmp_path: Path) -> None:
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    path = config.run_folder / "eval" / "alignment" / "metrics.json"
    document = json.loads(path.read_text())
    names = ("hit_rate", "strict_hit_rate", "box_auc")

    def figures_of(value: float) -> dict[str, dict[str, float | None]]:
        one = {"low": value - 0.01, "high": value + 0.01, "resamples": 9, "reason": None}
        return {name: {"value": value + 0.1 * n, **one} for n, name in enumerate(names)}

    row = {"name": "other finding", "findings": 7, "patients": 3, **figures_of(0.231), "difference": figures_of(0.417)}
    missing = [{"name": "no finding", "reason": "the text is too long with it"}]
    document["controls"] = {"rows": [row], "missing": missing, "sentences": ["Findings: a <word>."]}
    document["differences"] = [{"model": "trained", "against": "brightest patch", **figures_of(-0.119)}]
    path.write_text(json.dumps(document))
    page = write_report(config, config.run_folder).read_text()
    cells = {
        "other finding": ("0.231", "0.331", "0.431"),
        "own sentence − other finding": ("0.417", "0.517", "0.617"),
        "trained − brightest patch": ("-0.119", "-0.019", "0.081"),
    }
    for title, values in cells.items():
        (line,) = re.findall(rf"<tr><td[^>]*>{title}</td>.*?</tr>", page)
        assert tuple(re.findall(r">(-?\d\.\d{3}) <span", line)) == values
    assert "Not asked for no finding: the text is too long with it." in page
    assert "“Findings: a &lt;word&gt;.”" in page


def test_sentences_against_lesion_free_images_are_shown(evaluated: Config, tmp_path: Path) -> None:
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    path = config.run_folder / "eval" / "alignment" / "metrics.json"
    document = json.loads(path.read_text())
    title = "Retrieval by sentences: lesions against lesion-free images"
    text = write_report(config, config.run_folder).read_text()
    (section,) = re.findall(rf"{title}.*?</details>", text, re.DOTALL)
    for row in document["local_retrieval"]["rows"]:
        assert f"<td>{row['model']}</td><td>{row['by']}</td>" in section
        assert f">{row['auc']['value']:.3f} <span" in section
    assert (
        "of each of 6 sentences about a finding, of 6 patients, the share of the 18 lesion-free images, of 12 patients"
        in section
    )
    assert "(“Findings: no mass and no calcification.”)" in section
    assert document["local_retrieval"]["rule"]["lesion_free"] in section
    assert "<strong>mass</strong>" in section
    document["local_retrieval"] |= {"rows": [], "strata": [], "reason": "there is <none>"}
    path.write_text(json.dumps(document))
    text = write_report(config, config.run_folder).read_text()
    assert "Retrieval by sentences: n/a, there is &lt;none&gt;." in text
    assert title not in text
    del document["local_retrieval"]  # as an earlier release wrote it
    path.write_text(json.dumps(document))
    assert "Retrieval by sentences" not in write_report(config, config.run_folder).read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_tables_of_many_models_are_not_cut(evaluated: Config, tmp_path: Path) -> None:
    config = replace(evaluated, runs=str(tmp_path))
    shutil.copytree(evaluated.run_folder, config.run_folder)
    whole = {"value": 0.123, "low": 0.101, "high": 0.145, "resamples": 9, "reason": None}
    path = config.run_folder / "eval" / "cancer" / "metrics.json"
    document = json.loads(path.read_text())
    probes = [row for row in document["rows"] if row["unit"] == "image" and row["protocol"] == "linear probe"]
    document["rows"] += [row | {"protocol": "fine-tuned"} for row in probes]
    for row in document["rows"]:
        row["metrics"] = dict.fromkeys(row["metrics"], whole)
    path.write_text(json.dumps(document))
    path = config.run_folder / "eval" / "alignment" / "metrics.json"
    document = json.loads(path.read_text())
    detected = document["detection"]["rows"]
    detected += [detected[0] | {"model": f"detector {number}"} for number in (1, 2, 3)]
    for row in detected:
        row["froc"] = [one | {"sensitivity": whole} for one in row["froc"]]
        row["ap"] = dict.fromkeys(row["ap"], whole)
    path.write_text(json.dumps(document))
    _, attributes = probe(write_report(config, config.run_folder), tmp_path, 1280)
    assert (attributes["wide"], attributes["cut"]) == ("false", "0")
