from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from mama.compare.methods import common_settings, methods
from mama.compare.results_table import Cell, Column, Table, results_table
from mama.data.held_out import Split
from mama.evaluate import intervals, metrics
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.comparison import delong
from mama.evaluate.result_folders import MARKER
from mama.evaluate.results import rows_of
from mama.run.files import read_object, write_digests, write_json
from mama.sweep import status
from mama.sweep.sweep import Sweep
from tests.support.cohort import write_shards
from tests.support.sweep_results import evaluated, sweep_config, sweep_of, write_evaluation

DIFFERING: list[dict[str, Any]] = [
    *({"recipe": "clip", "optim.lr": 1e-4, "seed": seed} for seed in (1, 2, 3)),
    *({"recipe": "mama", "optim.lr": 1e-4, "seed": seed} for seed in (1, 2, 3)),
    {"recipe": "clip", "optim.lr": 1e-3, "seed": 1},
    {"recipe": "slip", "optim.lr": 1e-3, "seed": 1},
]
SKILL = {"clip": 0.5, "mama": 2.4, "slip": 2.3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    base = sweep_config(tmp_path_factory.mktemp("made"), patients=40)
    sweep = sweep_of(base, DIFFERING, {"recipe": "clip"})
    for point in sweep.points:
        evaluated(point, SKILL[point.differs["recipe"]])
    return sweep


@pytest.fixture(scope="module")
def table(made: Sweep) -> Table:
    return results_table(made)


@pytest.fixture
def sweep(made: Sweep) -> Iterator[Sweep]:
    """The same sweep, for tests that change its folder."""
    copy = Path(made.folder).with_name("copy")
    shutil.copytree(made.folder, copy)
    yield replace(made, folder=copy, points=[replace(p, config=replace(p.config, runs=str(copy))) for p in made.points])
    shutil.rmtree(copy)


def column(
    table: Table, task: str = "cancer", protocol: str = "zero-shot", model: str = "trained", unit: str = "image"
) -> Column:
    wanted = (task, protocol, model, unit)
    (found,) = {c for _, c, _ in table.cells if (c.task, c.protocol, c.model, c.unit) == wanted}
    return found


def cell(table: Table, method: str, metric: str = "auc", **of_column: str) -> Cell:
    return table.cells[method, column(table, **of_column), metric]


def folder(sweep: Sweep, number: int) -> Path:
    return sweep.points[number].config.run_folder / "eval"


def edit(file: Path, **changes: Any) -> None:
    write_json(file, read_object(file) | changes)


def test_points_that_differ_in_the_seed_alone_are_one_method(made: Sweep) -> None:
    names = {method.name: len(method.points) for method in methods(made)}
    assert names == {"clip, lr=0.0001": 3, "mama, lr=0.0001": 3, "clip, lr=0.001": 1, "slip, lr=0.001": 1}
    only_seeds = sweep_of(made.points[0].config, [{"seed": 1}, {"seed": 2}])
    assert [(method.name, len(method.points)) for method in methods(only_seeds)] == [("seed-1", 2)]
    towers = sweep_of(made.points[0].config, [{"text.model": "a"}, {"text.model": "b"}])
    assert [method.name for method in methods(towers)] == ["text.model=a", "text.model=b"], "as in the points' names"


def test_methods_have_names_of_their_own(made: Sweep) -> None:
    base = made.points[0].config
    first = sweep_of(base, [{"optim.lr": 1e-4}, {"optim.lr": 1e-4, "vision.model": None}, {"optim.lr": 1e-3}])
    assert [method.name for method in methods(first)] == ["lr-0.0001", "lr-0.0001_model-None", "lr=0.001"]
    large = sweep_of(base, [{"optim.warmup_steps": 1234567}, {"optim.warmup_steps": 1234568}])
    assert [method.name for method in methods(large)] == ["warmup_steps=1234567", "warmup_steps=1234568"]


def test_mean_spread_and_interval_over_seeds(made: Sweep, table: Table) -> None:
    for task, protocol, metric in (("cancer", "zero-shot", "auc"), ("density", "linear probe", "balanced_accuracy")):
        files = [json.loads((folder(made, n) / task / "metrics.json").read_text()) for n in (3, 4, 5)]
        found = [r["metrics"][metric]["value"] for f in files for r in rows_of(f, "image")
                 if (r["protocol"], r["model"]) == (protocol, "trained")]  # fmt: skip
        one = cell(table, "mama, lr=0.0001", metric, task=task, protocol=protocol)
        assert one.values == found
        assert (one.mean, one.sd, one.over) == (pytest.approx(mean(found)), pytest.approx(stdev(found)), "seeds")
        low, high = student.interval(0.95, 2, mean(found), stdev(found) / 3**0.5)
        assert (one.low, one.high) == (pytest.approx(max(0, low)), pytest.approx(min(1, high)))
        assert stdev(found) > 0


def test_one_seed_has_the_interval_of_its_evaluation(made: Sweep, table: Table) -> None:
    one = cell(table, "slip, lr=0.001")
    rows = read_object(folder(made, 7) / "cancer" / "metrics.json")["rows"]
    auc = next(r["metrics"]["auc"] for r in rows if (r["protocol"], r["model"]) == ("zero-shot", "trained"))
    assert (one.mean, one.sd, one.low, one.high, one.over) == (auc["value"], None, auc["low"], auc["high"], "patients")


def test_every_task_protocol_metric_and_model_has_its_figure(table: Table) -> None:
    keys = {(c.task, c.protocol, c.model, metric) for _, c, metric in table.cells}
    for task in ("cancer", "birads", "density"):
        for protocol in ("zero-shot", "linear probe"):
            assert {(task, protocol, model, "auc") for model in ("trained", "untrained")} <= keys
    assert ("cancer", "zero-shot", "trained", "specificity_at_sensitivity") in keys
    assert ("alignment", "pointing game", "trained", "hit_rate") in keys
    (images,) = table.sets
    assert [(c.task, c.title) for c in table.columns(images, "auc")][:4] == [
        ("cancer", "zero-shot"),
        ("cancer", "zero-shot, by breast"),
        ("cancer", "linear probe"),
        ("cancer", "linear probe, by breast"),
    ]
    assert table.metrics()[:2] == ["auc", "balanced_accuracy"]


def test_figures_of_pointing_are_those_on_file_and_an_earlier_box_auc_is_left_out(sweep: Sweep) -> None:
    pointing = {"task": "alignment", "protocol": "pointing game"}
    (row,) = read_object(folder(sweep, 7) / "alignment" / "metrics.json")["rows"]
    table = results_table(sweep)
    for metric in ("hit_rate", "strict_hit_rate", "box_auc"):
        assert cell(table, "slip, lr=0.001", metric, **pointing).values == [row[metric]["value"]]
    del row["strict_hit_rate"]  # as before there was one, when box AUC was of whole patches
    edit(folder(sweep, 7) / "alignment" / "metrics.json", rows=[row])
    earlier = {
        metric for name, c, metric in results_table(sweep).cells if name == "slip, lr=0.001" and c.task == "alignment"
    }
    assert earlier == {"hit_rate"}


def test_the_baseline_is_the_one_with_the_other_settings_alike(made: Sweep, table: Table) -> None:
    assert {m.name: cell(table, m.name).baseline for m in table.methods} == {
        "clip, lr=0.0001": "",
        "mama, lr=0.0001": "clip, lr=0.0001",
        "clip, lr=0.001": "",
        "slip, lr=0.001": "clip, lr=0.001",
    }
    alone = results_table(replace(made, baseline={"recipe": "clip", "optim.lr": 1e-4}))
    assert cell(alone, "slip, lr=0.001").baseline == "clip, lr=0.0001"
    none = results_table(replace(made, baseline={}))
    assert all(c.against is None and c.no_comparison == "the sweep names no baseline" for c in none.cells.values())
    missing = results_table(replace(made, points=made.points[:6] + made.points[7:]))
    assert cell(missing, "slip, lr=0.001").baseline == "clip, lr=0.0001", "the only one that fits"


def test_a_comparison_is_paired_by_patient_and_averages_the_seeds(made: Sweep, table: Table) -> None:
    """By hand from predictions.csv: the same patients for both methods, the mean of each method's three AUCs."""

    def predictions(number: int) -> dict[str, tuple[str, bool, float]]:
        with (folder(made, number) / "cancer" / "predictions.csv").open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if (r["protocol"], r["model"]) == ("zero-shot", "trained")]
        positive = list(rows[0])[-1]
        return {r["image"]: (r["patient"], r["label"] == positive, float(r[positive])) for r in rows}

    trainings = [predictions(number) for number in range(6)]
    images = sorted(trainings[0])
    patients = sorted({trainings[0][i][0] for i in images})

    def difference(drawn: list[str]) -> float:
        rows = [i for p in drawn for i in images if trainings[0][i][0] == p]
        areas = [roc_auc_score([t[i][1] for i in rows], [t[i][2] for i in rows]) for t in trainings]
        return float(np.mean(areas[3:]) - np.mean(areas[:3]))

    found = cell(table, "mama, lr=0.0001").against
    assert found
    assert found.value == pytest.approx(difference(patients), abs=1e-4)
    resampled = Bootstrap([trainings[0][i][0] for i in images], 1000, 0)  # one for all
    labels = np.array([trainings[0][i][1] for i in images], dtype=np.int64)
    scores = [np.array([[1 - t[i][2], t[i][2]] for i in images]) for t in trainings]
    parts = [metrics.drawn_parts(labels, one, resampled, True)["auc"] for one in scores]
    same = intervals.difference(parts[3:], parts[:3])
    assert same
    assert (found.low, found.high, found.p) == pytest.approx((same.low, same.high, same.p))
    rng = np.random.default_rng(0)
    draws = [difference(list(rng.choice(patients, len(patients)))) for _ in range(60)]
    assert found.high - found.low == pytest.approx(4 * np.std(draws), rel=0.4)
    assert found.low > 0
    assert found.p is not None
    assert found.p < 0.05
    by_delong = delong(labels, [s[:, 1] for s in scores[3:]], [s[:, 1] for s in scores[:3]],
                       [trainings[0][i][0] for i in images])  # fmt: skip
    assert cell(table, "mama, lr=0.0001").delong == by_delong
    assert by_delong
    assert by_delong.value == pytest.approx(found.value, abs=1e-4)


def test_delongs_test_is_of_the_auc_of_two_classes(table: Table) -> None:
    with_it = {(c.task, metric) for (_, c, metric), one in table.cells.items() if one.delong}
    assert with_it == {("cancer", "auc")}
    assert any(one.against for (_, c, metric), one in table.cells.items() if (c.task, metric) == ("density", "auc"))


def test_the_best_brier_score_and_ece_are_the_lowest(table: Table) -> None:
    for metric in ("brier", "ece"):
        cells = [cell(table, m.name, metric=metric) for m in table.methods]
        best = min((one for one in cells if one.mean is not None), key=lambda one: one.mean or 0)
        assert best.bold, metric
        assert best.mean != max(one.mean or 0 for one in cells)
    assert cell(table, "mama, lr=0.0001", metric="brier").against
    ece = cell(table, "mama, lr=0.0001", metric="ece")
    assert (ece.against, ece.no_comparison) == (None, "no comparison of this figure from predictions.csv")


def test_breasts_are_compared_by_their_own_predictions(made: Sweep, table: Table) -> None:
    """The AUC of each method by pandas, from predictions.csv: a breast has the mean of its images."""
    one = cell(table, "mama, lr=0.0001", unit="breast")
    for number, value in zip((3, 4, 5), one.values, strict=True):
        images = pd.read_csv(folder(made, number) / "cancer" / "predictions.csv")
        images = images[(images["protocol"] == "zero-shot") & (images["model"] == "trained")]
        studies = {i.key: f"{i.study.key}/{i.view.laterality}" for i in Split(made.points[0].config, "test").items}
        breasts = images.groupby(images["image"].map(studies))
        area = roc_auc_score(breasts["label"].max() == "no cancer", -breasts["cancer"].mean())
        assert roc_auc_score(breasts["label"].min() == "cancer", breasts["cancer"].mean()) == pytest.approx(area)
        assert value == pytest.approx(area, abs=1e-3)
    assert one.against is not None, one.no_comparison


def test_bold_are_the_best_and_those_that_cannot_be_told_from_it(table: Table) -> None:
    bold = {m.name for m in table.methods if cell(table, m.name).bold}
    assert bold == {"mama, lr=0.0001", "slip, lr=0.001"}
    assert not any(c.bold for (_, c_, _), c in table.cells.items() if c_.model == "untrained")


def test_what_is_missing_is_named(sweep: Sweep) -> None:
    run = [point.config.run_folder for point in sweep.points]
    shutil.rmtree(run[0])
    shutil.rmtree(run[1] / "eval")
    for step, word in (("train", "done"), ("eval", "failed")):
        place = run[1] / "stages" / f"{step}.json"
        status.end(place, status.start(place, "settings", None), word, "out of memory")  # type: ignore[arg-type]
    shutil.rmtree(run[3] / "eval")
    shutil.rmtree(run[6] / "eval")
    shutil.rmtree(run[6] / "model")
    edit(run[4] / "eval" / MARKER, tasks=["cancer", "birads"])
    (run[5] / "eval/cancer/metrics.json").write_text("{")
    edit(run[5] / "eval/birads/metrics.json", model={"step": 240, "sha256": "of other weights"})
    shutil.copytree(run[7], sweep.folder / "taken_out")
    table = results_table(sweep)
    missing = dict(table.missing)
    names = [point.name for point in sweep.points]
    assert missing[names[0]] == "not trained"
    assert missing[names[1]] == "eval failed: out of memory"
    assert missing[names[3]] == "not evaluated"
    assert missing[names[6]] == "not trained to its end, or not consolidated"
    assert "no density, zero-shot on shards, test" in missing[names[4]]
    unread = [what for name, what in table.missing if name == names[5] and "is missing, damaged or of another" in what]
    assert [Path(what.split()[0]).parent.name for what in unread] == ["cancer", "birads"]
    assert "no cancer, zero-shot" in missing[names[5]]
    assert "no point of the sweep" in missing["taken_out"]
    assert (len(cell(table, "clip, lr=0.0001").values), cell(table, "clip, lr=0.0001").expected) == (1, 3)
    assert [m.name for m in table.rows(next(iter(table.sets)), "auc")] == [m.name for m in table.methods]
    nothing = results_table(replace(sweep, points=sweep.points[:1]))
    assert (nothing.cells, nothing.sets) == ({}, {})


def test_figures_of_other_images_or_settings_are_never_in_the_same_column(sweep: Sweep, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"train": 9, "test": 10})
    elsewhere = sweep.points[0].config
    elsewhere = replace(elsewhere, data=replace(elsewhere.data, shards=[str(tmp_path / "shards")]))
    assert write_evaluation(elsewhere, 1.0).parent.name == "eval-on"
    for name in ("cancer", "birads", "density", "alignment"):  # measured at another image size, and by an older release
        file = folder(sweep, 1) / name / "metrics.json"
        settings = read_object(file)["settings"]
        edit(file, settings=settings | {"image_size": [32, 24], "resamples": 7})
        edit(folder(sweep, 2) / name / "metrics.json", settings=settings | {"resamples": 7, "seed": 5})
    edit(folder(sweep, 1) / MARKER, settings=settings | {"image_size": [32, 24], "resamples": 7})
    edit(folder(sweep, 2) / MARKER, settings=settings | {"resamples": 7, "seed": 5})
    table = results_table(sweep)
    by_title = {title: images for images, title in table.sets.items()}
    assert len(by_title) == 3
    own, other = (images.digest for title, images in by_title.items() if "(" in title and "evaluated" not in title)
    assert own != other
    (departing,) = (images for title, images in by_title.items() if "evaluated with image_size=[32, 24]" in title)
    counts = {images: len(table.cells["clip, lr=0.0001", next(iter(table.columns(images, "auc"))), "auc"].values)
              for images in table.sets}  # fmt: skip
    assert sorted(counts.values()) == [1, 1, 2]
    assert counts[departing] == 1


def test_two_tasks_of_one_name_are_never_in_the_same_column(sweep: Sweep) -> None:
    """Files of two definitions that their authors called alike."""
    sweep = replace(sweep, points=[sweep.points[0], sweep.points[3]])
    for number, label in ((0, "density"), (1, "birads")):
        own = folder(sweep, number) / "mine"
        shutil.copytree(own.with_name("cancer"), own)
        edit(own / "metrics.json", task="mine", definition={"label": label})
        edit(folder(sweep, number) / MARKER, tasks=["mine"])
    columns = {
        c for _, c, _ in results_table(sweep).cells if (c.task, c.protocol, c.unit) == ("mine", "zero-shot", "image")
    }
    assert len({column for column in columns if column.model == "trained"}) == 2


def test_predictions_that_are_not_of_the_same_images_are_not_compared(sweep: Sweep) -> None:
    sweep = replace(sweep, points=[sweep.points[n] for n in (0, 3, 6, 7)])
    file = folder(sweep, 1) / "cancer/predictions.csv"
    lines = file.read_text().splitlines(keepends=True)

    def refused(text: str) -> str:
        file.write_text(text)
        table = results_table(sweep)
        one = cell(table, "mama, lr=0.0001")
        assert one.mean is not None
        assert one.against is None
        assert cell(table, "mama, lr=0.0001", task="density").against, "other columns are"
        assert cell(table, "slip, lr=0.001").against, "other methods are"
        return one.no_comparison

    head, first, *rest = lines
    cells = first.split(",")
    assert "is not of the images, patients and labels of" in refused("".join([head, *rest]))
    assert "is not of the images" in refused("".join([head, ",".join([*cells[:3], "another", *cells[4:]]), *rest]))
    assert "is damaged" in refused("".join([head, ",".join([*cells[:5], "x", "y"]) + "\n", *rest]))
    assert "is damaged, or lacks zero-shot of the trained model" in refused(head)
    swapped = [",".join([*(c := line.rstrip().split(","))[:5], c[6], c[5]]) + "\n" for line in (first, *rest)]
    assert "and metrics.json has" in refused("".join([head, *swapped]))
    file.unlink()
    assert (
        "No such file"
        in results_table(sweep).cells["mama, lr=0.0001", column(results_table(sweep)), "auc"].no_comparison
    )


def test_common_settings_and_those_that_a_recipe_changes(made: Sweep) -> None:
    points = [replace(p, config=replace(p.config, train=replace(p.config.train, steps=500)))
              if p.differs["recipe"] == "mama" else p for p in made.points]  # fmt: skip
    common, others = common_settings(replace(made, points=points))
    assert common["optim.weight_decay"] == f"{made.points[0].config.optim.weight_decay:g}"
    assert others.keys() == {"train.steps"}
    assert others["train.steps"]["500"] == ["mama, lr=0.0001"]
    assert not {"seed", "name", "runs", "optim.lr"} & common.keys()


def test_figures_of_weights_that_were_replaced_are_not_shown(sweep: Sweep) -> None:
    run = sweep.points[7].config.run_folder
    write_digests(run / "model")
    assert not results_table(sweep).missing
    with (run / "model" / "heads.safetensors").open("ab") as file:
        file.write(b" ")
    write_digests(run / "model")
    table = results_table(sweep)
    (first, second) = table.missing
    assert first == (run.name, f"{run / 'eval'} is of other weights than model/ holds now; evaluate again")
    assert second[0] == run.name
    assert not any(name == "slip, lr=0.001" for name, _, _ in table.cells)
