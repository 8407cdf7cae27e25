from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from shards.errors import ShardError
from shards.schema import EXCLUDED, Finding, Labels, SourceView
from shards.sources.embed.studies import embed
from tests.support.embed_archive import NAS, finding, image, read, write


def both_breasts(root: Path, *clinical: dict[str, str]) -> tuple[SourceView, SourceView]:
    (study,) = read(root, list(clinical), [image("1", "L"), image("1", "R")])
    left, right = study.views
    assert (left.path.name, right.path.name) == ("LCC.dcm", "RCC.dcm")
    return left, right


# --- images


def test_every_image_comes_once_and_those_that_do_not_belong_say_why(tmp_path: Path) -> None:
    files = [
        image("1", "L", "MLO"),
        image("1", "R", "CC", FinalImageType="cview"),
        image("1", "R", "MLO", FinalImageType="C-view"),
        image("1", "R", "ML"),
        image("1", "R", "CC", "spot", spot_mag="1.0"),
        image("1", "R", "CC", "full", spot_mag="0.0"),
        image("1", "R", "CC", "volume", FinalImageType="3D"),
        image("1", "R", "CC", "shot", FinalImageType="ROI_SSC"),
        image("1", "R", "CC", "new", FinalImageType="contrast"),
        image("1", "", "CC", "sideless"),
        image("1", "L", "MLO", SeriesDescription="again"),
        image("1", "R", "", "viewless"),
        image("1", "R", "CC", anon_dicom_path="/data/elsewhere/a.dcm"),
        image("1", "R", "CC", anon_dicom_path=""),
        image("", "R", "CC", "examless"),
        image("4.93227E+15", "R", "CC", "rounded"),
    ]
    study, nameless = read(tmp_path, [finding("1")], files)
    folder = tmp_path / "images" / "cohort_1" / "900"
    assert [str(view.path.relative_to(folder)) for view in study.views if not view.refused] == [
        "1/LMLO.dcm", "1/full.dcm", "1/viewless.dcm",
    ]  # fmt: skip
    assert [view.view for view in study.views if not view.refused] == ["MLO", "CC", None]
    reasons = [view.refused[0] for view in study.views if view.refused]
    assert reasons == [
        "2d-synthetic", "2d-synthetic", "other-view", "spot", "tomosynthesis", "post-processed", "label", "laterality",
        "duplicate", "path", "path",
    ]  # fmt: skip
    assert set(reasons) - EXCLUDED == {"label", "laterality", "duplicate", "path"}
    assert [view.refused and view.refused[0] for view in nameless.views] == ["identifier"] * 2
    assert len(study.views) + len(nameless.views) == len(files)


def test_paths_of_every_release_lead_to_the_folder_of_the_images(tmp_path: Path) -> None:
    starts = (NAS, "/mnt/NAS3/mammo/anon_dicom", "./images", "images")
    files = [image("1", "L", anon_dicom_path=f"{start}/cohort_2/{n}.dcm") for n, start in enumerate(starts)]
    (study,) = read(tmp_path, [], files, images="dicom")
    assert [view.path for view in study.views] == [tmp_path / "dicom" / "cohort_2" / f"{n}.dcm" for n in range(4)]
    (study,) = read(tmp_path, [], files, prefix="./images/cohort_2/")
    assert [view.refused is None for view in study.views] == [False, False, True, False]
    assert study.views[2].path == tmp_path / "images" / "2.dcm"


def test_exams_are_studies_and_rows_of_another_patient_do_not_join(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [image("20", "L"), image("3", "L"), image("20", "R"), image("7", "R", empi_anon="100")]
    clinical = [finding("3", "L", "B"), finding("20", "L", "P"), finding("8"), finding("8"), finding("7", "R", "M")]
    with caplog.at_level(logging.WARNING):
        studies = read(tmp_path, clinical, files)
    assert [(study.patient_id, study.study_id, len(study.views)) for study in studies] == [
        ("100", "7", 1), ("900", "20", 2), ("900", "3", 1),
    ]  # fmt: skip
    assert [study.views[0].labels.birads for study in studies] == [None, 3, 2]
    assert "1 images belong to exams without clinical rows" in caplog.text
    assert "3 clinical rows belong to exams without images" in caplog.text


def test_an_exam_without_clinical_rows_has_no_labels(tmp_path: Path) -> None:
    (study,) = read(tmp_path, [], [image("1", "L")])
    assert (study.views[0].labels, study.views[0].findings, study.views[0].refused) == (Labels(), (), None)
    assert (study.age, study.race, study.ethnicity, study.reason) == (None, None, None, None)


def test_identifiers_of_the_two_tables_join_with_and_without_a_point(tmp_path: Path) -> None:
    files = [image("4932273561626049.0", "L", empi_anon="900.0")]
    (study,) = read(tmp_path, [finding("4932273561626049", "L", "S")], files)
    assert (study.patient_id, study.study_id, study.views[0].labels.birads) == ("900", "4932273561626049", 4)


# --- labels


def test_birads_is_that_of_the_side(tmp_path: Path) -> None:
    left, right = both_breasts(tmp_path, finding("1", "L", "S"), finding("1", "R", "B"), finding("1", "B", "M"))
    assert (left.labels.birads, right.labels.birads) == (4, 2)


def test_a_breast_without_rows_has_the_birads_of_both_sides_and_then_of_the_exam(tmp_path: Path) -> None:
    left, right = both_breasts(tmp_path, finding("1", "L", "S"), finding("1", "B", "P"), finding("1", "", "B"))
    assert (left.labels.birads, right.labels.birads) == (4, 3)
    left, right = both_breasts(tmp_path, finding("1", "L", "A"))
    assert (left.labels.birads, right.labels.birads) == (0, 0)
    left, right = both_breasts(tmp_path, finding("1", "L", "X"), finding("1", "R", "B"))
    assert (left.labels.birads, right.labels.birads) == (2, 2)


def test_the_highest_birads_counts_but_additional_evaluation_beats_a_negative_one(tmp_path: Path) -> None:
    categories = {"NA": 0, "BA": 0, "AP": 3, "NB": 2, "BSN": 4, "K": 6, "MX": 5, "X": None, "": None}
    clinical = [finding(f"of {codes}", "L", code) for codes in categories for code in codes or [""]]
    studies = read(tmp_path, clinical, [image(f"of {codes}", "L") for codes in categories])
    told = {study.study_id: study.views[0].labels.birads for study in studies}
    assert told == {f"of {codes}".strip(): birads for codes, birads in categories.items()}


def test_density_is_a_letter_and_none_for_a_man_or_in_doubt(tmp_path: Path) -> None:
    left, right = both_breasts(tmp_path, finding("1", "L", tissueden="4.0"), finding("1", "R", tissueden="1"))
    assert (left.labels.density, right.labels.density) == ("D", "A")
    left, right = both_breasts(tmp_path, finding("1", "L", tissueden=""), finding("1", "R", tissueden="3"))
    assert (left.labels.density, right.labels.density) == ("C", "C")
    left, right = both_breasts(tmp_path, finding("1", "L", tissueden="5"), finding("1", "L", tissueden=""))
    assert (left.labels.density, right.labels.density) == (None, None)
    left, right = both_breasts(tmp_path, finding("1", "L", tissueden="2"), finding("1", "L", tissueden="3"))
    assert (left.labels.density, right.labels.density) == (None, None)


@pytest.mark.parametrize(("column", "value"), [("asses", "Q"), ("tissueden", "E"), ("path_severity", "7")])
def test_a_label_in_another_code_refuses_the_breast_and_not_the_other(
    column: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        left, right = both_breasts(tmp_path, finding("1", "L", **{column: value}), finding("1", "R"))
    assert left.refused == ("label", f"column {column}: {value!r} is no code of the legend")
    assert right.refused is None
    assert f"column {column}: 1 rows have undocumented codes: {value}" in caplog.text


# --- pathology


def test_the_worst_specimen_of_a_breast_counts(tmp_path: Path) -> None:
    outcomes: dict[str, tuple[bool | None, str | None]] = {
        **dict.fromkeys(("0", "1", "41", "61"), (True, "malignant")),
        **dict.fromkeys(("2", "3", "4", "54"), (False, "benign")),
        **dict.fromkeys(("6", "46"), (None, None)),  # a cancer from elsewhere is none of the breast, nor benign
        "5": (False, "normal"),
    }
    clinical = [finding(codes, "L", "S", path_severity=f"{code}.0") for codes in outcomes for code in codes]
    files = [image(codes, side) for codes in outcomes for side in "LR"]
    studies = read(tmp_path, clinical, files)
    told = {study.study_id: (study.views[0].labels.cancer, study.views[0].labels.pathology) for study in studies}
    assert told == outcomes
    assert {study.views[1].labels.cancer for study in studies} == {None}


def test_pathology_never_reaches_the_wrong_breast(tmp_path: Path) -> None:
    outcomes = {  # side, bside -> cancer of the left and of the right breast
        ("L", ""): (True, None),
        ("L", "L"): (True, None),
        ("L", "B"): (True, None),
        ("L", "R"): (None, None),
        ("L", "?"): (None, None),
        ("B", "R"): (None, True),
        ("", "R"): (None, True),
        ("B", "B"): (True, True),
        ("B", ""): (None, None),
        ("", ""): (None, None),
    }
    clinical = [
        finding(f"side {side}, specimen {bside}.", side, "S", bside=bside, path_severity="0", massshape="X")
        for side, bside in outcomes
    ]
    files = [image(f"side {side}, specimen {bside}.", breast) for side, bside in outcomes for breast in "LR"]
    studies = {study.study_id: study.views for study in read(tmp_path, clinical, files)}
    for (side, bside), cancer in outcomes.items():
        views = studies[f"side {side}, specimen {bside}."]
        assert tuple(view.labels.cancer for view in views) == cancer, (side, bside)
        malignant = tuple(any(f.pathology == "malignant" for f in view.findings) for view in views)
        assert malignant == (cancer[0] is True, cancer[1] is True), (side, bside)


def test_a_breast_is_not_called_benign_while_a_cancer_may_be_in_it(tmp_path: Path) -> None:
    benign, stray = finding("1", "L", "S", path_severity="4"), finding("1", "", "K", path_severity="0")
    left, right = both_breasts(tmp_path, benign, stray)
    assert [(view.labels.cancer, view.labels.pathology) for view in (left, right)] == [(None, None)] * 2
    left, right = both_breasts(tmp_path, benign, {**stray, "bside": "R"})
    assert (left.labels.cancer, right.labels.cancer) == (False, True)


def test_a_negative_reading_is_no_proof(tmp_path: Path) -> None:
    left, _ = both_breasts(tmp_path, finding("1", "", "N"))
    assert left.labels == Labels(birads=1, density="B")


# --- findings


def test_findings_are_of_the_side_in_the_words_of_the_lexicon(tmp_path: Path) -> None:
    left, right = both_breasts(
        tmp_path,
        finding("1", "L", "S", massshape="X", massmargin="S", massdens="+", path_severity="1"),
        finding("1", "L", "A", numfind="2", calcfind="I", calcdistri="C", calcnumber="9", path_severity="4"),
        finding("1", "R", "A", numfind="3", massshape="V"),
        finding("1", "B", "B", numfind="4", massshape="A"),
        finding("1", "R", "A", numfind="5"),
        finding("1", "R", "A", numfind="6", massdens="="),
        finding("1", "R", "A", numfind="7", calcnumber="3"),
    )
    assert left.findings == (
        Finding(1, "mass", shape="irregular", margin="spiculated", density="high", pathology="malignant"),
        Finding(2, "calcification", calcification_type="fine pleomorphic", distribution="grouped", pathology="benign"),
        Finding(4, "distortion"),
    )
    assert right.findings == (
        Finding(3, "asymmetry", shape="developing"),
        Finding(4, "distortion"),
        Finding(6, "mass", density="equal"),
        Finding(7, "calcification"),
    )


def test_an_implant_finding_is_of_its_side_and_none_proves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clinical = [
        finding("1", "R", implanfind="N"),
        finding("1", "L"),
        finding("2", "B", implanfind="K"),
        finding("3", implanfind="R"),
        finding("4", "L", implanfind="1"),
        finding("5", "L"),
        finding("5", "L", implanfind="A"),
    ]
    files = [image(exam, side) for exam in "543216" for side in "LR"]
    studies = {study.study_id: study for study in read(tmp_path, clinical, files)}
    assert {exam: [view.implant for view in study.views] for exam, study in studies.items()} == {
        "1": [None, True], "2": [True, True], "3": [True, True], "4": [None, None], "5": [True, None],
        "6": [None, None],
    }  # fmt: skip
    assert "EMBED: column implanfind: 1 rows have undocumented codes: 1" in caplog.messages


def test_a_second_specimen_is_not_a_second_finding(tmp_path: Path) -> None:
    core = finding("1", "L", "S", massshape="O", path_severity="4")
    left, _ = both_breasts(tmp_path, core, {**core, "path_severity": "0"}, {**core, "numfind": "2"})
    assert left.findings == (
        Finding(1, "mass", shape="oval", pathology="malignant"),
        Finding(2, "mass", shape="oval", pathology="benign"),
    )


def test_codes_without_a_word_in_the_lexicon_are_masses(tmp_path: Path) -> None:
    left, _ = both_breasts(tmp_path, *(finding("1", "L", "B", massshape=code) for code in "GNYDL"))
    assert left.findings == tuple(Finding(number, "mass") for number in range(1, 6))


def test_an_unknown_shape_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        left, _ = both_breasts(tmp_path, finding("1", "L", "B", massshape="Z"))
    assert left.findings == ()
    assert "column massshape: 1 rows have undocumented codes: Z" in caplog.text


# --- regions of interest

MASS = finding("1", "L", "S", massshape="R")
ROI = {"num_roi": "1", "ROI_coords": "((1165, 822, 1294, 1000),)"}


def boxes(root: Path, clinical: list[dict[str, str]], *changes: dict[str, str], **options: Any) -> list[Any]:
    """The box of each image's one finding; each of `changes` is an image of the left breast of one exam."""
    files = [image("1", "L", name=str(n), **{**ROI, **change}) for n, change in enumerate(changes or [{}])]
    (study,) = read(root, clinical, files, **options)
    return [finding.box for view in study.views for finding in view.findings]


def test_a_region_follows_the_png_which_mirrors_by_orientation_and_not_by_side(tmp_path: Path) -> None:
    # The numbers of the authors' own example: 822..1000 in the PNG are 1560..1738 in the DICOM image, 2560 wide.
    mirrored, kept = (1560, 1165, 1738, 1294), (822, 1165, 1000, 1294)
    written_otherwise = {"PatientOrientation": r"P\L", "Columns": "2560.0", "num_roi": "1.0"}
    found = boxes(tmp_path, [MASS], {}, written_otherwise, {"PatientOrientation": "['A', 'R']"})
    assert found == [mirrored, mirrored, kept]
    assert boxes(tmp_path, [MASS], {}, roi_orientation="dicom") == [kept]


def test_a_region_that_may_lie_on_the_wrong_side_is_no_box(tmp_path: Path) -> None:
    unsure = [{"PatientOrientation": ""}, {"PatientOrientation": "['PL', 'F']"}, {"Columns": ""}]
    assert boxes(tmp_path, [MASS], *unsure) == [None] * 3
    assert boxes(tmp_path, [MASS], *unsure, roi_orientation="dicom") == [(822, 1165, 1000, 1294)] * 3


def test_dicom_coordinates_of_a_later_release_go_first(tmp_path: Path) -> None:
    row = {"DCM_ROI_coords": "[[[1165, 1560, 1294, 1738]]]", "PatientOrientation": ""}
    assert boxes(tmp_path, [MASS], row) == [(1560, 1165, 1738, 1294)]


NO_BOX = [
    {"ROI_coords": "((1, 2, 3, 4), (5, 6, 7, 8))", "num_roi": "2"},  # two regions
    {"ROI_coords": "(([1, 2, 3, 4], [5, 6, 7, 8]),)", "num_roi": "2"},  # of one screenshot
    {"num_roi": "2"},
    {"ROI_coords": "()", "num_roi": "0"},
    {"ROI_coords": "", "num_roi": ""},
    {"ROI_coords": "((1165, 822, 1294),)"},
    {"ROI_coords": "((1165, 1000, 1294, 822),)"},  # right of itself
    {"ROI_coords": "((1165, 822, 1294, 2561),)"},  # outside of the image
    {"ROI_coords": "((3300, 822, 3329, 1000),)"},
    {"ROI_coords": "((-5, 822, 1294, 1000),)"},
    {"ROI_coords": "__import__('os').abort()"},
    {"ROI_coords": "(" * 50_000},
    {"ROI_coords": "((1, 2, 3, 99999999999999999999),)"},
    {"ROI_coords": "((nan, 2, 3, 4),)"},
]


@pytest.mark.parametrize("orientation", ["png", "dicom"])
def test_other_regions_are_no_box(orientation: str, tmp_path: Path) -> None:
    assert boxes(tmp_path, [MASS], *NO_BOX, roi_orientation=orientation) == [None] * len(NO_BOX)


def test_a_region_is_a_box_only_where_the_breast_has_one_lesion(tmp_path: Path) -> None:
    second = {**MASS, "numfind": "2", "massshape": "O"}
    undescribed = finding("", "L", "A", numfind="2")
    negative = finding("", "L", "N", numfind="2")
    other_side = finding("", "R", "S", numfind="2", massshape="O")
    exams = {
        "two": [MASS, second],
        "one of both sides": [MASS, {**second, "side": "B"}],
        "one undescribed": [MASS, undescribed],
        "none described": [undescribed],
        "one": [MASS, negative, other_side],
        "one with two specimens": [MASS, {**MASS, "path_severity": "4"}],
    }
    clinical = [{**row, "acc_anon": exam} for exam, rows in exams.items() for row in rows]
    studies = read(tmp_path, clinical, [image(exam, "L", **ROI) for exam in exams])
    placed = (1560, 1165, 1738, 1294)
    assert {study.study_id: [finding.box for finding in study.views[0].findings] for study in studies} == {
        "two": [None, None],
        "one of both sides": [None, None],
        "one undescribed": [None],
        "none described": [],
        "one": [placed],
        "one with two specimens": [placed],
    }


def test_the_log_counts_regions_and_boxes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [image("1", "L", **ROI), image("1", "L", "MLO", **{**ROI, "Columns": ""}), image("1", "R")]
    with caplog.at_level(logging.INFO):
        read(tmp_path, [MASS], files)
    assert "2 images have regions of interest; on 1 of them a finding has a box" in caplog.text


# --- facts of the exam


def test_facts_of_the_exam(tmp_path: Path) -> None:
    told = {"ETHNICITY_DESC": "African American  or Black", "ETHNIC_GROUP_DESC": "Non-Hispanic or Latino"}
    clinical = [
        finding("1", RACE_DESC="Unknown, Unavailable or Unreported", **told),
        finding("2", RACE_DESC="Asian", desc="MG Diagnostic Left w/CAD", age_at_study="abc", ETHNICITY_DESC="other"),
        finding("3", desc="MG Comp to Outside Film", age_at_study="", ETHNIC_GROUP_DESC="Patient Declines"),
    ]
    studies = read(tmp_path, clinical, [image(exam, "L") for exam in "123"])
    assert [(study.age, study.race, study.ethnicity, study.reason) for study in studies] == [
        (52, "African American or Black", "Non-Hispanic or Latino", "screening"),
        (None, "Asian", None, "diagnostic"),
        (None, None, None, None),
    ]


# --- tables


def test_full_tables_go_before_reduced_ones_in_tables_or_root(tmp_path: Path) -> None:
    write(tmp_path, [finding("1", "L", "B")], [image("1", "L")], "_reduced")
    for path in (tmp_path / "tables").iterdir():
        path.rename(tmp_path / path.name)
    (study,) = embed(tmp_path)
    assert study.views[0].labels.birads == 2
    (study,) = read(tmp_path, [finding("1", "L", "S")], [image("1", "L")])
    assert study.views[0].labels.birads == 4


def test_reduced_tables_may_lack_what_only_boxes_and_facts_need(tmp_path: Path) -> None:
    write(tmp_path, [MASS], [image("1", "L", **ROI)], "_reduced")
    drop = {"clinical": ["bside", "calcnumber", "RACE_DESC"], "metadata": ["Rows", "Columns", "PatientOrientation"]}
    for kind, columns in drop.items():
        path = tmp_path / "tables" / f"EMBED_OpenData_{kind}_reduced.csv"
        pd.read_csv(path, dtype=str).drop(columns=columns).to_csv(path, index=False)
    (study,) = embed(tmp_path)
    assert study.views[0].findings == (Finding(1, "mass", shape="round"),)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .* holds neither EMBED_OpenData_clinical\.csv nor") as caught:
        list(embed(tmp_path))
    assert "\n" not in str(caught.value)
    write(tmp_path, [finding("1")], [image("1", "L")])
    with pytest.raises(ShardError, match=r"^pack.options.roi_orientation: 'up' is neither png nor dicom"):
        list(embed(tmp_path, roi_orientation="up"))  # type: ignore[arg-type]
    path = tmp_path / "tables" / "EMBED_OpenData_metadata.csv"
    pd.read_csv(path, dtype=str).drop(columns="spot_mag").to_csv(path, index=False)
    with pytest.raises(ShardError, match="has no column 'spot_mag'"):
        list(embed(tmp_path))


def test_empty_tables_yield_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, [], []) == []
