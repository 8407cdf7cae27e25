from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards.errors import ShardError
from shards.schema import Finding, Labels, SourceStudy, SourceView
from shards.sources.cmmd import TABLE, cmmd
from tests.support.archives import coded, sample_of, write_dicom
from tests.support.cmmd_archive import CC, COLUMNS, MLO, image, write_table


def read(root: Path, *rows: tuple[object, ...]) -> dict[str, SourceStudy]:
    return {study.patient_id: study for study in cmmd(write_table(root, *rows))}


def one(root: Path, *rows: tuple[object, ...]) -> dict[str | None, SourceView]:
    """The images of both breasts of the patient that the rows are about, by their side."""
    for side in "LR":
        image(root, "D1-0001", side, side)
    return {view.laterality: view for view in read(root, *rows)["D1-0001"].views}


def test_a_patient_is_a_study_and_labels_are_of_each_breast(tmp_path: Path) -> None:
    for name, side, view in (("1-1", "R", CC), ("1-2", "R", MLO), ("1-3", "L", CC), ("1-4", "L", MLO)):
        image(tmp_path, "D1-0002", side, name, view)
    image(tmp_path, "D2-0001", "L")
    image(tmp_path, "D2-0001", "R", "1-2")
    studies = read(
        tmp_path,
        ("D2-0001", "L", 64, "Calcification", "Malignant"),  # no row of its other breast
        ("D1-0002", "R", 44, "mass", "Benign"),
        ("D1-0002", "L", 44, "both", "Malignant"),
    )
    assert [(study.patient_id, study.study_id, study.age) for study in studies.values()] == [
        ("D1-0002", "D1-0002", 44),
        ("D2-0001", "D2-0001", 64),
    ]
    benign, malignant = Labels(None, None, False, "benign"), Labels(None, None, True, "malignant")
    mixed = studies["D1-0002"].views
    assert [(view.laterality, view.labels) for view in mixed] == [("R", benign)] * 2 + [("L", malignant)] * 2
    assert [view.findings for view in mixed] == [(Finding(1, "mass", pathology="benign"),)] * 2 + [
        (Finding(1, "mass"), Finding(2, "calcification"))
    ] * 2
    known, other = studies["D2-0001"].views
    assert (known.labels, known.findings) == (malignant, (Finding(1, "calcification", pathology="malignant"),))
    assert (other.laterality, other.labels, other.findings, other.refused) == ("R", Labels(), (), None)


def test_the_builder_finds_the_view_in_its_code(tmp_path: Path) -> None:
    for name, view in (("1-1", MLO), ("1-2", CC)):
        path = image(tmp_path, "D1-0001", "L", name, view)
        pixels = np.zeros((200, 160), np.uint16)
        pixels[40:160, :90] = np.arange(90, dtype=np.uint16) + 1200
        tags = {"PatientID": "D1-0001", "ViewPosition": None, "ViewCodeSequence": [coded(view)]}
        write_dicom(path, pixels, **tags)
    (study,) = cmmd(write_table(tmp_path, ("D1-0001", "L", 44, "mass", "Malignant")))
    sample = sample_of(tmp_path, *study.views)
    assert [(view.laterality, view.view, view.labels.cancer) for view in sample.study.views] == [
        ("L", "MLO", True),
        ("L", "CC", True),
    ]


def test_rows_that_contradict_each_other_refuse_their_breast(tmp_path: Path) -> None:
    views = one(
        tmp_path,
        ("D1-0001", "L", 44, "mass", "Benign"),
        ("D1-0001", "R", 44, "mass", "Benign"),
        ("D1-0001", "L", 45, "calcification", "Malignant"),
    )
    assert views["L"].refused == ("label-conflict", f"{TABLE}: calls this breast benign and malignant")
    assert (views["R"].refused, views["R"].labels.cancer) == (None, False)
    (study,) = cmmd(tmp_path)
    assert study.age is None, "two ages"


def test_rows_that_agree_are_added_up(tmp_path: Path) -> None:
    views = one(
        tmp_path,
        ("D1-0001", "L", 44, "calcification", "Benign"),
        ("D1-0001", "L", "abc", "mass", "Benign"),
        ("D1-0001", "R", None, None, None),
    )
    assert views["L"].findings == (
        Finding(1, "mass", pathology="benign"),
        Finding(2, "calcification", pathology="benign"),
    )
    assert (views["R"].labels, views["R"].findings, views["R"].refused) == (Labels(), (), None)
    assert next(cmmd(tmp_path)).age == 44


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        (("D1-0001", "L", 44, "mass", "Uncertain"), "L"),
        (("D1-0001", "L", 44, "cyst", "Benign"), "L"),
        (("D1-0001", "B", 44, "mass", "Benign"), "LR"),
        (("D1-0001", None, 44, "mass", "Benign"), "LR"),
    ],
)
def test_what_the_table_does_not_document_refuses_the_breasts_that_it_may_be_of(
    row: tuple[object, ...], refused: str, tmp_path: Path
) -> None:
    views = one(tmp_path, ("D1-0001", "R", 44, "mass", "Benign"), row)
    assert {side: view.refused and view.refused[0] for side, view in views.items()} == {
        side: "label" if side in refused else None for side in "LR"
    }


def test_every_image_comes_once_and_patients_without_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image(tmp_path, "D1-0001", "L", PatientID=None)  # the folder names the patient
    image(tmp_path, "D1-0001", None, "1-2")
    image(tmp_path, "somebody", "L")
    (tmp_path / "CMMD" / "broken.dcm").write_bytes(b"not DICOM")
    with caplog.at_level(logging.WARNING):
        studies = read(
            tmp_path,
            ("D1-0001", "L", 44, "mass", "Benign"),
            ("D1-0003", "L", 44, "mass", "Benign"),
            (None, "L", 44, "mass", "Benign"),
        )
    assert "1 patients of CMMD_clinicaldata_revision.xlsx have no image" in caplog.text
    assert "ID1 is empty in 1 rows" in caplog.text
    inside = "07-18-2010-NA-NA-79377/1.000000-NA-70244/1-1.dcm"
    assert list(studies) == ["CMMD/broken.dcm", f"CMMD/somebody/{inside}", "D1-0001"]
    named, sideless = studies["D1-0001"].views
    assert (named.laterality, named.labels.cancer) == ("L", False)
    assert (sideless.laterality, sideless.labels) == (None, Labels())
    assert studies["CMMD/broken.dcm"].views == (SourceView(tmp_path / "CMMD" / "broken.dcm"),)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .* must hold CMMD_clinicaldata_revision\.xlsx") as caught:
        list(cmmd(tmp_path))
    assert "\n" not in str(caught.value)
    write_table(tmp_path)
    with pytest.raises(ShardError, match=r"^pack.root: .* has no DICOM files"):
        list(cmmd(tmp_path))
    image(tmp_path, "D1-0001", "L")
    pd.DataFrame(columns=COLUMNS[:5]).to_excel(tmp_path / TABLE, index=False)
    with pytest.raises(ShardError, match="has no column 'classification'"):
        list(cmmd(tmp_path))
