from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.schema import Finding, Labels
from shards.sources.vindr import BREASTS, METADATA, vindr
from tests.support.vindr_archive import IMAGE, finding, image, read, write

NO_FINDING = "['No Finding']"


def found(root: Path, *findings: tuple[str, str]) -> tuple[Finding, ...]:
    only = image("a", "1")
    (study,) = read(root, [only], [finding(only, *row) for row in findings])
    assert study.views[0].refused is None
    return study.views[0].findings


def test_a_study_is_a_patient_and_its_rows_are_images(tmp_path: Path) -> None:
    images = [
        image("b", "1"),
        image("a", "2", "RMLO", breast_birads="BI-RADS 5", breast_density="DENSITY A"),
        image("b", "3", "LCC", breast_birads="", breast_density=""),  # one exam has two L-CC and no L-MLO
    ]
    first, second = read(tmp_path, images, [finding(row, NO_FINDING) for row in images])
    assert (first.patient_id, first.study_id, second.patient_id, second.study_id) == ("a", "a", "b", "b")
    assert [view.path for view in second.views] == [tmp_path / "images" / "b" / f"{n}.dicom" for n in (1, 3)]
    assert [(view.laterality, view.view) for view in first.views + second.views] == [
        ("R", "MLO"), ("L", "CC"), ("L", "CC"),
    ]  # fmt: skip
    assert [view.labels for view in first.views + second.views] == [Labels(5, "A"), Labels(2, "C"), Labels()]
    assert {view.findings for view in first.views + second.views} == {()}
    assert (first.age, first.reason) == (None, None)


def test_boxes_go_to_their_own_image_with_numbers_that_no_other_view_has(tmp_path: Path) -> None:
    left, right = image("a", "1"), image("a", "2", "RCC")
    (study,) = read(
        tmp_path,
        [left, right],
        [
            finding(right, "['Mass']", "2355.139893 1731.640015 2482.979980 1852.750000"),
            finding(left, "['Suspicious Calcification', 'Focal Asymmetry']", "1 2 3.5 4"),
            finding(right, "['Architectural Distortion']", "10 20 30 40", birads=""),
        ],
    )
    assert study.views[0].findings == (
        Finding(1, "calcification", (1, 2, 3.5, 4)),
        Finding(1, "asymmetry", (1, 2, 3.5, 4), shape="focal"),
    )
    assert study.views[1].findings == (
        Finding(2, "mass", (2355.139893, 1731.640015, 2482.97998, 1852.75)),
        Finding(3, "distortion", (10, 20, 30, 40)),
    )


def test_signs_beside_a_lesion_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        findings = found(
            tmp_path,
            ("['Skin Thickening', 'Nipple Retraction']", "1 2 3 4"),
            ("['Mass', 'Skin Retraction']", "1 2 3 4"),
            ("['Suspicious Lymph Node']", "1 2 3 4"),
            ('["Global Asymmetry"]', "5 6 7 8"),
            ("['Asymmetry']", ""),
        )
    assert findings == (
        Finding(1, "mass", (1, 2, 3, 4)),
        Finding(2, "asymmetry", (5, 6, 7, 8), shape="global"),
        Finding(3, "asymmetry"),
    )
    assert "4 skin, nipple and lymph node findings are left out" in caplog.text


@pytest.mark.parametrize(
    ("categories", "corners", "message"),
    [
        ("['Mole']", "1 2 3 4", "category 'Mole' in row 2 is not documented"),
        ("__import__('os').abort()", "1 2 3 4", "is not documented"),
        ("[" * 50_000, "1 2 3 4", "is not documented"),
        ("[]", "", "category '' in row 2"),
        ("['Mass']", "3 2 1 4", "xmin, ymin, xmax, ymax of row 2 are no box"),
        ("['Mass']", "1 2 3", "are no box"),
        ("['Mass']", "1 2 3 nan", "are no box"),
        ("['Mass']", "1 2 inf 4", "are no box"),
        ("['Mass']", "1 2 3 wide", "are no box"),
    ],
)
def test_a_finding_that_is_not_understood_refuses_its_image_alone(
    categories: str, corners: str, message: str, tmp_path: Path
) -> None:
    bad, good = image("a", "1"), image("a", "2")
    (study,) = read(tmp_path, [bad, good], [finding(bad, categories, corners), finding(good, "['Mass']", "1 2 3 4")])
    refused = study.views[0].refused
    assert refused is not None
    assert refused[0] == "label"
    assert message in refused[1]
    assert study.views[1].refused is None


def test_every_image_comes_once_and_those_that_do_not_belong_say_why(tmp_path: Path) -> None:
    images = [
        image("a", "1"),
        image("a", "1", breast_birads="BI-RADS 5"),
        image("a", "2", breast_birads="BI-RADS 0"),
        image("a", "3", breast_density="DENSITY E"),
        image("a", "4", "XCC"),
        image("a", "5", "LML"),
        image("", "6"),
        image("b", ""),
    ]
    orphan = image("a", "7")
    study, nameless = read(tmp_path, images, [finding(orphan, "['Mass']", "1 2 3 4"), finding(orphan, NO_FINDING)])
    assert [view.refused and view.refused[0] for view in study.views] == [None, "duplicate", *["label"] * 5]
    assert [view.path.stem for view in study.views] == ["1", "1", "2", "3", "4", "5", "7"]
    assert [view.refused for view in nameless.views] == [
        ("identifier", "breast-level_annotations.csv: study_id or image_id is empty")
    ] * 2


def test_ages_come_from_the_optional_table_with_blanks_in_its_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ages = {"1": "", "2": "053Y", "3": "61", "4": "abc", "5": "000Y", "6": "62.0"}
    images = [image(f"study {name}", name) for name in ages] + [image("study 1", "1b")]
    rows = [{" SOP Instance UID": name, "Patient's Age ": age} for name, age in {**ages, "1b": "047Y"}.items()]
    write(tmp_path / METADATA, [" SOP Instance UID", "Patient's Age "], rows)
    studies = read(tmp_path, images, [])
    assert [study.age for study in studies] == [47, 53, 61, None, None, 62]
    write(tmp_path / METADATA, ["SOP Instance UID", "Manufacturer"], [{"SOP Instance UID": "1"}])
    with caplog.at_level(logging.WARNING):
        assert {study.age for study in vindr(tmp_path)} == {None}
    assert "metadata.csv has no ages" in caplog.text


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .* must hold breast-level_annotations\.csv") as caught:
        list(vindr(tmp_path))
    assert "\n" not in str(caught.value)
    assert read(tmp_path, [], []) == []
    write(tmp_path / BREASTS, IMAGE[1:], [])
    with pytest.raises(ShardError, match="has no column 'study_id'"):
        list(vindr(tmp_path))
