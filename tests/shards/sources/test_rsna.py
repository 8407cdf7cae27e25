from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.schema import EXCLUDED, Labels, SourceView
from shards.sources.rsna import rsna
from tests.support.rsna_archive import TEST, TRAIN, row, write


def views_of(root: Path, *rows: dict[str, str]) -> dict[str, SourceView]:
    studies = rsna(write(root, "train.csv", TRAIN, *rows))
    return {view.path.stem: view for study in studies for view in study.views}


def test_a_patient_is_a_study_and_each_row_an_image_of_its_folder(tmp_path: Path) -> None:
    rows = [row("20", "1"), row("3", "2", "RMLO"), row("20", "3", "RCC"), row("3", "4", "LMLO")]
    first, second = rsna(write(tmp_path, "train.csv", TRAIN, *rows))
    assert (first.patient_id, first.study_id, second.patient_id) == ("20", "20", "3")
    assert (first.age, first.reason) == (61, "screening")
    assert [view.path for view in first.views] == [tmp_path / "train_images" / "20" / f"{n}.dcm" for n in (1, 3)]
    assert [(view.laterality, view.view) for view in first.views + second.views] == [
        ("L", "CC"), ("R", "CC"), ("R", "MLO"), ("L", "MLO"),
    ]  # fmt: skip


def test_labels_are_of_the_image_and_empty_where_the_table_is(tmp_path: Path) -> None:
    views = views_of(
        tmp_path,
        row("1", "negative"),
        row("1", "cancer", "RCC", cancer="1", biopsy="1", BIRADS="0", density="D"),
        row("1", "benign", biopsy="1", BIRADS="2.0", density="A"),
        row("1", "site2", BIRADS="", density=""),
        row("1", "unlabelled", cancer="", biopsy="1"),
    )
    assert {name: view.labels for name, view in views.items()} == {
        "negative": Labels(1, "C", cancer=False),
        "cancer": Labels(0, "D", cancer=True, pathology="malignant"),
        "benign": Labels(2, "A", cancer=False, pathology="benign"),
        "site2": Labels(cancer=False),
        "unlabelled": Labels(1, "C"),
    }


def test_implants_are_those_of_the_images_own_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In whatever order the rows are, in either table; a column that an archive lacks, or an odd cell, says nothing."""
    told = {"0": False, "1": True, "0.0": False, "1.0": True, "": None, "none": None, "2": None, "yes": None}
    rows = [row(str(n % 3), f"{n:02}", implant=list(told)[n * 5 % 8]) for n in range(24)]
    write(tmp_path, "test.csv", TEST, row("0", "07", implant="1"), row("9", "90", implant="0"))
    studies = list(rsna(write(tmp_path, "train.csv", TRAIN, *reversed(rows))))
    found = {str(view.path.relative_to(tmp_path)): view.implant for study in studies for view in study.views}
    expected = {f"train_images/{one['patient_id']}/{one['image_id']}.dcm": told[one["implant"]] for one in rows}
    assert found == {**expected, "test_images/0/07.dcm": True, "test_images/9/90.dcm": False}
    assert not any(view.refused for study in studies for view in study.views)
    assert "RSNA: column implant: 6 rows have undocumented values: their implants are unknown" in caplog.messages
    for name, header in (("train.csv", TRAIN), ("test.csv", TEST)):
        write(tmp_path, name, header.replace("implant", "notes"), *rows)
    assert {view.implant for study in rsna(tmp_path) for view in study.views} == {None}


def test_other_views_and_undocumented_cells_say_why_they_are_left_out(tmp_path: Path) -> None:
    views = views_of(
        tmp_path,
        *(row("1", view, f"L{view}") for view in ("AT", "LM", "ML", "LMO", "CC")),
        row("1", "viewless", "L"),
        row("1", "sideless", laterality=""),
        row("1", "both", laterality="B"),
        row("1", "density", density="E"),
        row("1", "birads", BIRADS="3.0"),
        row("1", "sure", cancer="2"),
        row("1", "cut", biopsy="yes"),
    )
    assert {name: view.refused and view.refused[0] for name, view in views.items()} == {
        **dict.fromkeys(("AT", "LM", "ML", "LMO"), "other-view"),
        **dict.fromkeys(("CC", "viewless", "sideless"), None),
        **dict.fromkeys(("both", "density", "birads", "sure", "cut"), "label"),
    }
    assert (views["viewless"].view, views["sideless"].laterality) == (None, None)
    assert views["density"].refused == ("label", "column density: 'E' in row 10 is not documented")
    assert "other-view" in EXCLUDED


def test_a_row_that_comes_twice_or_has_no_name_is_refused(tmp_path: Path) -> None:
    rows = [row("1", "5"), row("2", "5"), row("1", "5", cancer="1"), row("", "6"), row("3", "")]
    one, two, nameless = rsna(write(tmp_path, "train.csv", TRAIN, *rows))
    assert [view.refused for view in one.views] == [
        None,
        ("duplicate", "train.csv: row 4 names a file that a row before it names"),
    ]
    assert two.views[0].refused is None
    assert [view.refused for view in nameless.views] == [
        ("identifier", "train.csv: patient_id or image_id of row 5 is empty"),
        ("identifier", "train.csv: patient_id or image_id of row 6 is empty"),
    ]


def test_the_test_table_has_images_of_its_own_and_no_labels(tmp_path: Path) -> None:
    write(tmp_path, "test.csv", TEST, row("9", "1"), row("1", "7"))
    both, tested = rsna(write(tmp_path, "train.csv", TRAIN, row("1", "7", cancer="1")))
    assert [str(view.path.relative_to(tmp_path)) for view in both.views] == [
        "train_images/1/7.dcm",
        "test_images/1/7.dcm",
    ]
    assert [(view.refused, view.labels.cancer) for view in both.views] == [(None, True), (None, None)]
    assert (tested.patient_id, tested.age, tested.views[0].labels) == ("9", 61, Labels())


def test_age_is_that_of_all_images(tmp_path: Path) -> None:
    ages = {
        "1": ("61.0", ""),
        "2": ("61", "62"),
        "3": ("abc", "-4"),
        "4": ("", ""),
        "5": ("0", "131"),
        "6": ("89", "89"),
    }
    rows = [row(patient, f"{patient}{n}", age=age) for patient, pair in ages.items() for n, age in enumerate(pair)]
    studies = rsna(write(tmp_path, "train.csv", TRAIN, *rows))
    assert {study.patient_id: study.age for study in studies} == {
        "1": 61, "2": None, "3": None, "4": None, "5": None, "6": 89,
    }  # fmt: skip


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .* must hold train\.csv") as caught:
        list(rsna(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ShardError, match="has no column 'cancer'"):
        list(rsna(write(tmp_path, "train.csv", TEST, row("1", "1"))))
    assert list(rsna(write(tmp_path, "train.csv", TRAIN))) == []
