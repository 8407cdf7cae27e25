"""Units against pandas: groups, classes, scores, conflicts and missing views of a cohort drawn at random."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mama.data.held_out import Item
from mama.data.wording import Wording
from mama.evaluate import results
from mama.evaluate.subgroups import area, subgroups
from mama.evaluate.task_data import Predictions, TaskData, task_data
from mama.evaluate.tasks import Task, Unit, load_task
from mama.evaluate.units import facts
from mama.settings.schema import Config, EvalConfig
from shards.schema import DENSITIES, Finding, Labels, Study, View
from tests.support.cohort import study

COLUMNS = {"image": ["exam", "member"], "breast": ["exam", "side"], "exam": ["exam"], "patient": ["patient"]}
VENDORS = ("hologic", "ge", None)


def exam(patient: int, number: int, rng: np.random.Generator) -> Study:
    """Each of the four views is there in three of four exams; labels and findings are by image."""
    views: list[View] = []
    for side, name in product("LR", ("CC", "MLO")):
        if rng.random() < 0.25 and (views or name == "CC"):
            continue
        density = DENSITIES[min(3, max(0, patient % 4 + int(rng.integers(-1, 2))))]
        cancer = bool(rng.random() < 0.3)
        count = int(rng.integers(1, 3)) if cancer and rng.random() < 0.8 else 0
        kinds = rng.choice(["mass", "calcification"], count)
        findings = tuple(Finding(n, str(kind), (0, 0, 4 * (n + 1), 8)) for n, kind in enumerate(kinds))
        views.append(
            replace(
                study(0, "test").views[0],
                member=f"{len(views)}.jpg",
                laterality=side,
                view=name,
                labels=Labels(birads=int(rng.integers(0, 7)), density=density, cancer=cancer),
                findings=findings,
                pixel_spacing=(2.0, 1.5),
                vendor=VENDORS[(patient + len(views) // 3) % 3],
                implant=(True, False, None, False)[(patient + len(views) // 2) % 4],
            )
        )
    key = f"p{patient}-{number}"
    return Study(key, f"p{patient}", "invented", "test", tuple(views), age=38 + 5 * (patient % 8), race=None)


def cohort(patients: int = 40) -> list[Item]:
    rng = np.random.default_rng(3)
    exams = [exam(patient, n, rng) for patient in range(patients) for n in range(1 + patient % 2)]
    return [Item(n, p, one) for n, one in enumerate(exams) for p in range(len(one.views))]


def frame(data: TaskData, scores: np.ndarray) -> pd.DataFrame:
    """A row for each labelled image."""
    rows = [
        {"exam": i.study.key, "patient": i.study.patient, "side": i.view.laterality, "view": i.view.view,
         "member": i.view.member, "density": i.view.labels.density, "vendor": i.view.vendor, "age": i.study.age,
         "implant": {True: "implant", False: "no implant", None: None}[i.view.implant],
         "kinds": {f.kind for f in i.view.findings}} for i in data.items
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(label=data.labels, **{f"s{k}": scores[:, k] for k in range(scores.shape[1])})


def scored(task: Task, items: list[Item]) -> tuple[TaskData, np.ndarray]:
    data = task_data(task, items, [], [], Wording())
    scores = np.random.default_rng(5).dirichlet(np.ones(len(data.classes)), len(data.rows))
    return data, scores


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", ["cancer", "density"])
def test_units_are_those_of_a_group_by(kind: Unit, name: str) -> None:
    task = load_task(name)
    data, scores = scored(task, cohort())
    units, table = data.units(kind), frame(data, scores)
    groups = table.groupby(COLUMNS[kind], sort=False)
    assert units.labels.tolist() == groups["label"].max().tolist()
    assert units.patients == groups["patient"].first().tolist()
    assert units.images.tolist() == groups.size().tolist()
    assert units.conflicts == (groups["label"].nunique() > 1).sum()
    assert (units.conflicts > 0) == (kind != "image")
    columns = [f"s{k}" for k in range(len(data.classes))]
    np.testing.assert_allclose(units.pooled(scores, "mean", task.binary), groups[columns].mean().to_numpy())
    best = groups[columns].max()
    if kind == "image":
        best = groups[columns].first()
    elif task.binary:
        best["s0"] = 1 - best["s1"]
    np.testing.assert_allclose(units.pooled(scores, "max", task.binary), best.div(best.sum(axis=1), axis=0).to_numpy())
    table["place"] = table["side"] + table["view"]
    by_exam = table.groupby([*dict.fromkeys(("exam", *COLUMNS[kind]))])["place"].nunique()
    short = by_exam < {"image": 1, "breast": 2}.get(kind, 4)
    lacking = short.groupby(level=COLUMNS[kind]).any() if kind != "image" else short
    assert units.incomplete == lacking.sum()
    assert (units.incomplete > 0) == (kind != "image")
    assert facts(units, data.classes)["counts"] == {
        name: int((groups["label"].max() == k).sum()) for k, name in enumerate(data.classes)
    }


def test_an_order_and_agreement_decide_the_class_of_a_unit() -> None:
    """BI-RADS 0 is above 2 and below 3."""
    task = load_task("birads")
    data, scores = scored(task, cohort())
    severity = {"BI-RADS 1": 0, "BI-RADS 2": 1, "BI-RADS 0": 2, **{f"BI-RADS {n}": n for n in range(3, 7)}}
    table = frame(data, scores).assign(rank=[severity[data.classes[k]] for k in data.labels])
    groups = table.groupby("exam", sort=False)
    expected = [table["label"][row] for row in groups["rank"].idxmax()]
    assert data.units("exam").labels.tolist() == expected
    data, scores = scored(replace(task, unit_label="agree"), cohort())
    units = data.units("exam")
    agreeing = groups.filter(lambda rows: rows["label"].nunique() == 1).groupby("exam", sort=False)
    assert 0 < len(agreeing) < len(groups)
    assert set(units.keys) == set(agreeing.groups)
    assert units.conflicts == len(groups) - len(agreeing)
    found = dict(zip(units.keys, units.pooled(scores, "mean", False)[:, 2], strict=True))
    assert found == pytest.approx(agreeing["s2"].mean().to_dict())


def test_a_task_whose_rows_are_cut_has_the_units_of_the_rest() -> None:
    data, _ = scored(load_task("cancer"), cohort())
    data.rows, data.labels = data.rows[::3], data.labels[::3]
    assert data.units("breast").keys == list(dict.fromkeys(
        f"{item.study.key}/{item.view.laterality}" for item in cohort()[::3]
    ))  # fmt: skip


def test_views_that_a_task_leaves_out_are_not_missing() -> None:
    task = replace(load_task("cancer"), images={"view": ["MLO"]})
    data, scores = scored(task, cohort())
    exams = frame(data, scores).groupby("exam")["side"].nunique()
    assert data.units("breast").incomplete == 0
    assert data.units("exam").incomplete == (exams < 2).sum() > 0


def test_labels_of_the_split_val_have_its_own_units() -> None:
    items = cohort()
    data = task_data(load_task("cancer"), items[:60], [], items[60:], Wording())
    assert len(data.val_labels) == len(items) - 60
    assert data.val_units("breast").keys == task_data(
        load_task("cancer"), items[60:], [], [], Wording()
    ).units("breast").keys  # fmt: skip


def test_val_and_fractions_of_the_labels_are_measured_by_unit() -> None:
    """Val is pooled as the held-out images are; a share of the labels is left out of units that the task has not."""
    items = cohort()
    data = task_data(load_task("cancer"), items[:60], [], items[60:], Wording())
    rng = np.random.default_rng(5)
    scores, of_val = (rng.dirichlet([1, 1], len(rows)) for rows in (data.rows, data.val_rows))
    data.predictions += [
        Predictions("linear probe", "trained", scores, of_val, fraction, draw)
        for fraction, draw in ((1.0, 0), (0.1, 0), (0.1, 1))
    ]
    seen: list[tuple[int, int]] = []

    def measured(labels: Any, pooled: Any, patients: Any, binary: bool, val: Any, config: Config) -> dict[str, Any]:
        assert len(labels) == len(pooled) == len(patients)
        assert len(val[0]) == len(val[1])
        seen.append((len(labels), len(val[0])))
        return {"metrics": {}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "measured_row", measured)
        rows = results.document(data, items[:60], "test", Config(eval=EvalConfig(bootstrap=5)))["rows"]
    found = [(row["unit"], row["fraction"], row["draw"]) for row in rows]
    several = [(1.0, 0), (0.1, 0), (0.1, 1)]
    assert found == [
        *(("image", *one) for one in several), *(("breast", *one) for one in several), ("exam", 1.0, 0),
        ("patient", 1.0, 0),
    ]  # fmt: skip
    breasts, of_val_too = (len({(i.study.key, i.view.laterality) for i in part}) for part in (items[:60], items[60:]))
    assert seen[:4] == [(60, len(items) - 60)] * 3 + [(breasts, of_val_too)]
    table = results.results_table({"cancer": {**DOCUMENT, "rows": [row | FIGURES for row in rows]}})
    assert [line.split("  ")[1] for line in table.splitlines()[2:8]] == [
        *["linear probe"] * 2, *["linear probe, 10 % (0)"] * 2, *["linear probe, 10 % (1)"] * 2,
    ]  # fmt: skip


NOTHING = {"value": None, "low": None, "high": None}
FIGURES = {"metrics": {"auc": NOTHING, "balanced_accuracy": NOTHING}}
DOCUMENT = {"unit": "breast", "chance": 0.5, "untaught": []}


def test_subgroups_are_those_of_a_selection() -> None:
    """By density, vendor, implant the images of each; by finding the positives that have it, against all negatives."""
    task = load_task("cancer")  # its unit is the breast
    data, scores = scored(task, cohort())
    data.predictions += [Predictions("zero-shot", model, scores) for model in ("trained", "untrained")]
    document = subgroups(data, Config(eval=EvalConfig(bootstrap=20)))
    table = frame(data, scores)
    rows = {(row["by"], row["group"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]), "of the trained model alone"
    for by in ("density", "vendor", "implant"):
        for group, images in table.fillna({by: "unknown"}).groupby(by):
            breasts = images.groupby(["exam", "side"])
            row = rows[by, group]
            assert row["n"] == breasts.ngroups
            assert row["patients"] == images["patient"].nunique()
            assert row["counts"]["cancer"] == breasts["label"].max().sum()
            assert row["metrics"]["auc"]["value"] == pytest.approx(
                area_under(breasts["label"].max(), breasts["s1"].mean())
            )
    ages = table.assign(band=pd.cut(table["age"], [0, 39, 49, 59, 69, 130], labels=False))
    names = ("under 40", "40-49", "50-59", "60-69", "70 and over")
    for number, name in enumerate(names):
        assert rows["age", name]["n"] == ages[ages["band"] == number].groupby(["exam", "side"]).ngroups
    breasts = table.groupby(["exam", "side"])
    kinds = breasts["kinds"].agg(lambda sets: set().union(*sets))
    positive = breasts["label"].max() == 1
    for kind in ("mass", "calcification", "none recorded"):
        has = kinds.map(lambda found, kind=kind: not found if kind == "none recorded" else kind in found)
        row = rows["finding", kind]
        assert row["counts"] == {"no cancer": (~positive).sum(), "cancer": (positive & has).sum()}
        assert row["n"] == sum(row["counts"].values())
    sizes = [key for key in rows if key[0] == "size"]
    assert [group for _, group in sizes] == ["box under 100 mm2", "box of 100 to 400 mm2", "none recorded"]
    assert document["not_recorded"] == ["race", "ethnicity"]
    smallest = min(document["rows"], key=lambda row: row["n"])
    assert document["smallest"] == {key: smallest[key] for key in ("by", "group", "n")}


def area_under(labels: pd.Series, scores: pd.Series) -> float:
    positive, negative = scores[labels == 1].to_numpy(), scores[labels == 0].to_numpy()
    return float((positive[:, None] > negative).mean())


def test_a_box_is_measured_in_the_original_image() -> None:
    """4 x 8 stored pixels, stored at half the size, of 0.5 x 0.25 mm: 2 x 4 x 4 x 0.125 = 16 mm2."""
    view = replace(study(1, "test").views[0], size=(64, 48), pixel_spacing=(0.5, 0.25), to_original=(2, 0, 7, 0, 2, 9))
    finding = Finding(1, "mass", (10.0, 20.0, 14.0, 28.0))
    assert area(view, finding) == "box under 100 mm2"
    assert area(replace(view, pixel_spacing=(1.0, 1.0)), finding) == "box of 100 to 400 mm2"  # 128 mm2
    assert area(replace(view, pixel_spacing=(2.0, 2.0)), finding) == "box over 400 mm2"
    mirrored = replace(view, pixel_spacing=(1.0, 1.0), to_original=(-2, 0, 90, 0, 2, 9))
    assert area(mirrored, finding) == "box of 100 to 400 mm2"
    unknown = replace(view, pixel_spacing=None)
    assert area(unknown, finding) == "box of 1 to 5 % of the image"  # 32 of 3072 pixels
    assert area(replace(unknown, size=(80, 80)), finding) == "box under 1 % of the image"
    assert area(view, Finding(1, "mass")) is None
