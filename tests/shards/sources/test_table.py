"""The source `table`: any archive whose table is named, column by column, in the configuration."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mama.settings.load import load
from shards.errors import ShardError
from shards.pack.identity import split_of
from shards.schema import Finding, Labels, SourceStudy, SourceView
from shards.sources.table.cell_words import READERS, read_cell
from shards.sources.table.options import FIELDS
from shards.sources.table.studies import table
from shards.spellings import OTHER_VIEWS
from tests.support.table_archive import BOX

COLUMNS = {"patient": "PatientNumber", "study": "ExamID", "image": "Path"}


def studies_of(root: Path, text: str, columns: dict[str, str], **options: Any) -> list[SourceStudy]:
    """What the source makes of a CSV file; blanks around a cell and empty lines of `text` do not count."""
    (root / "exams.csv").write_text("".join(line.strip() + "\n" for line in text.splitlines() if line.strip()))
    return list(table(root, "exams.csv", columns, **options))


def views_of(studies: list[SourceStudy], root: Path) -> dict[str, SourceView]:
    """The views by their path in the archive; a path that is there twice is a mistake."""
    views = [view for study in studies for view in study.views]
    named = {str(view.path.relative_to(root)): view for view in views}
    assert len(named) == len(views)
    return named


def refused(root: Path, text: str, columns: dict[str, str], **options: Any) -> dict[str, tuple[str, str] | None]:
    return {name: view.refused for name, view in views_of(studies_of(root, text, columns, **options), root).items()}


def complaint(root: Path, **options: Any) -> str:
    with pytest.raises(ShardError) as caught:
        list(table(root, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the join


def test_the_shipped_recipe_reads_a_table_with_its_columns(tmp_path: Path) -> None:
    options = load("table").pack.options
    assert list(options["columns"]) == [*COLUMNS, *(field for field in options["columns"] if field not in COLUMNS)]
    assert set(options["columns"]) == set(FIELDS) - {"box_width", "box_height"}
    cells = {
        **{"PatientNumber": "P1", "ExamID": "E1", "Side": "links", "ACR": "II", "Age": "90+", "Reason": "Screening"},
        **{"BIRADS": "4b", "Cancer": "", "Pathology": "malignant", "Race": "Asian", "Ethnicity": "", "Finding": "mass"},
        **{"XMin": "10", "YMin": "20.5", "XMax": "30", "YMax": "40", "Shape": "Irregular", "Margin": "spiculated"},
        **{"MassDensity": "high", "CalcType": "", "CalcDistribution": "", "FindingPathology": "Malignant"},
        "Implant": "No",
    }
    cc = {**cells, "Path": "1/cc.dcm", "View": "cc", "Lesion": "7", "ReportText": "Mass, left.\nBIOPSY advised"}
    mlo = {**cells, "Path": "1/mlo.dcm", "View": "MLO", "Lesion": "7", "ReportText": ""}
    pd.DataFrame([cc, mlo]).to_csv(tmp_path / "exams.csv", index=False)
    (study,) = table(tmp_path, **options)
    labels = Labels(birads=4, density="B", cancer=True, pathology="malignant")
    box = (10.0, 20.5, 30.0, 40.0)
    findings = (Finding(7, "mass", box, "irregular", "spiculated", "high", None, None, "malignant"),)
    assert study == SourceStudy(
        "P1",
        "E1",
        (
            SourceView(
                tmp_path / "1/cc.dcm", "L", "CC", labels, findings, "Mass, left.\nBIOPSY advised", implant=False
            ),
            SourceView(tmp_path / "1/mlo.dcm", "L", "MLO", labels, findings, implant=False),
        ),
        age=90,
        race="Asian",
        reason="screening",
    )


def test_studies_are_sorted_and_their_views_in_the_order_of_the_table(tmp_path: Path) -> None:
    text = """
        Path,ExamID,BIRADS,PatientNumber
        d.dcm,2,1,b
        a.dcm,1,2,a
        c.dcm,2,3,b
        b.dcm,1,4,b
        e.dcm,1,5,a
    """
    studies = studies_of(tmp_path, text, {**COLUMNS, "birads": "BIRADS"})
    found = [(s.patient_id, s.study_id, [(v.path.name, v.labels.birads) for v in s.views]) for s in studies]
    assert found == [
        ("a", "1", [("a.dcm", 2), ("e.dcm", 5)]),
        ("b", "1", [("b.dcm", 4)]),
        ("b", "2", [("d.dcm", 1), ("c.dcm", 3)]),
    ]


def test_patient_and_image_are_enough(tmp_path: Path) -> None:
    (study,) = studies_of(tmp_path, "who,file\nP1,a.dcm\nP1,b.dcm\n", {"patient": "who", "image": "file"})
    views = SourceView(tmp_path / "a.dcm"), SourceView(tmp_path / "b.dcm")
    assert study == SourceStudy("P1", "P1", views)


def test_implants_are_of_the_image_and_shown_by_an_implant_displaced_view(tmp_path: Path) -> None:
    text = """
        PatientNumber,ExamID,Path,View,Silicone
        b,1,no.dcm,MLO,no
        a,1,yes.dcm,CC,1.0
        b,1,empty.dcm,CC,
        a,1,unknown.dcm,MLO,n/a
        b,2,displaced.dcm,MLO-ID,
        a,2,both.dcm,LCCID,Yes
        c,1,against.dcm,Eklund,N
        c,1,odd.dcm,CC,saline
        c,1,profile.dcm,MLO nipple in profile,
        d,1,rows.dcm,CC,
        d,1,rows.dcm,CC,0
        d,1,differ.dcm,CC,1
        d,1,differ.dcm,CC,0
    """
    columns = {**COLUMNS, "view": "View", "implant": "Silicone"}
    views = views_of(studies_of(tmp_path, text, columns, values={"view": {"eklund": "CC implant displaced"}}), tmp_path)
    assert {name.removesuffix(".dcm"): view.implant for name, view in views.items() if not view.refused} == {
        "yes": True, "both": True, "displaced": True, "no": False, "rows": False,
        "empty": None, "unknown": None, "profile": None,
    }  # fmt: skip
    assert {name.removesuffix(".dcm"): view.refused for name, view in views.items() if view.refused} == {
        "against": ("label-conflict", "column Silicone says no, column View a view with the implant displaced"),
        "odd": ("label", "column Silicone: 'saline' is not understood; map it in pack.options.values.implant"),
        "differ": ("label-conflict", "column Silicone: rows 13 and 14 of this image differ"),
    }
    without = views_of(studies_of(tmp_path, text, {**COLUMNS, "view": "View"}), tmp_path)
    assert {name for name, view in without.items() if view.implant is not None} == {"displaced.dcm", "both.dcm"}


def test_one_column_may_tell_two_facts(tmp_path: Path) -> None:
    columns = {**COLUMNS, "laterality": "View", "view": "View"}
    values = {
        "laterality": {"LCC": "L", "LMLO": "L", "RCC": "R"},
        "view": {"LCC": "CC", "LMLO": "MLO", "RCC": "CC"},
    }
    text = "PatientNumber,ExamID,Path,View\n1,1,a,LCC\n1,1,b,lmlo\n1,1,c,RCC\n"
    (study,) = studies_of(tmp_path, text, columns, values=values)
    assert [(v.laterality, v.view) for v in study.views] == [("L", "CC"), ("L", "MLO"), ("R", "CC")]


def test_a_view_may_tell_the_side(tmp_path: Path) -> None:
    """It fills an empty cell of the side, must not contradict a full one, and the user's own spelling goes first."""
    text = "PatientNumber,ExamID,Path,View,Side\n1,1,a,LCC,\n1,1,b,rmlo,R\n1,1,c,MLO,R\n1,1,d,R MLO-ID,L\n1,1,e,RO,\n"
    columns = {**COLUMNS, "view": "View"}
    (study,) = studies_of(tmp_path, text, columns, values={"view": {"RO": "R MLO"}})
    sides = [("L", "CC"), ("R", "MLO"), (None, "MLO"), ("R", "MLO"), ("R", "MLO")]
    assert [(v.laterality, v.view) for v in study.views] == sides
    (study,) = studies_of(tmp_path, text, {**columns, "laterality": "Side"}, values={"view": {"RO": "R MLO"}})
    assert [(v.laterality, v.view) for v in study.views if not v.refused] == [*sides[:2], ("R", "MLO"), sides[4]]
    assert study.views[3].refused == ("label-conflict", "columns Side and View: name different sides")


def test_decimal_commas_are_of_numbers_alone(tmp_path: Path) -> None:
    text = """PatientNumber;ExamID;Path;Age;Text;Race
    1,5;2,0;3,5;54,0;6,5;7,5"""
    columns = {**COLUMNS, "age": "Age", "report": "Text", "race": "Race"}
    (study,) = studies_of(tmp_path, text, columns)
    assert (study.patient_id, study.study_id, study.age, study.race) == ("1,5", "2,0", 54, "7,5")
    assert study.views == (SourceView(tmp_path / "3,5", report="6,5"),)


def test_a_separator_a_byte_order_mark_and_rows_without_anything(tmp_path: Path) -> None:
    (tmp_path / "exams.csv").write_bytes(
        b"\xef\xbb\xbfPatientNumber ;ExamID;Path\r\n1;1;a.dcm\r\n;;\r\n;;\r\n;1;b.dcm\r\n"
    )
    first, nameless = table(tmp_path, "exams.csv", COLUMNS, separator=";")
    assert first == SourceStudy("1", "1", (SourceView(tmp_path / "a.dcm"),))
    assert [view.refused for view in nameless.views] == [("identifier", "column PatientNumber: is empty in row 5")]


def test_an_excel_file_with_merged_cells(tmp_path: Path) -> None:
    rows = {"PatientNumber": [12, None, 3], "ExamID": [7, None, 8], "Path": ["a", "a", "b"], "BIRADS": [4, None, 1]}
    rows |= {"Kind": ["mass", "calcification", None]}
    pd.DataFrame(rows).to_excel(tmp_path / "exams.xlsx", index=False)
    columns = {**COLUMNS, "birads": "BIRADS", "kind": "Kind"}
    twelve, three = table(tmp_path, "exams.xlsx", columns)
    assert (twelve.patient_id, twelve.study_id, three.patient_id) == ("12", "7", "3")
    (view,) = twelve.views
    assert (view.labels.birads, [finding.kind for finding in view.findings]) == (4, ["mass", "calcification"])
    assert three.views == (SourceView(tmp_path / "b", labels=Labels(birads=1)),)


def test_a_parquet_file_with_numbers_for_identifiers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="no Parquet reader; run `pip install pyarrow`")
    rows = {
        "PatientNumber": [12.0, 12.0, None],
        "ExamID": [1, 1, 1],
        "Path": ["a", "b", "c"],
        "Cancer": [True, None, None],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "exams.parquet")
    twelve, nameless = table(tmp_path, "exams.parquet", {**COLUMNS, "cancer": "Cancer"})
    assert (twelve.patient_id, [view.labels.cancer for view in twelve.views]) == ("12", [True, None])
    assert [view.path.name for view in nameless.views] == ["c"]


# --- findings


def test_rows_of_one_image_are_its_findings(tmp_path: Path) -> None:
    columns = {**COLUMNS, **BOX, "birads": "BIRADS", "margin": "Margin", "finding_pathology": "Truth"}
    text = """
        PatientNumber,ExamID,Path,BIRADS,X0,Y0,X1,Y1,Kind,Margin,Truth
        1,1,cc.dcm,4,1,2,3,4,mass,SPICULATED,malignant
        1,1,mlo.dcm,,,,,,,,
        1,1,./cc.dcm,BI-RADS 4,5,6,7.5,8,Calcifications,,benign
        1,1,cc.dcm,,1,2,3,4,mass,Spiculated,malignant
        1,1,mlo.dcm,2,,,,,asymmetry,,
        1,1,mlo.dcm,2,,,,,asymmetry,,
        1,1,mlo.dcm,2,,,,,no finding,,
    """
    views = views_of(studies_of(tmp_path, text, columns), tmp_path)
    assert views["cc.dcm"].labels == Labels(birads=4)
    assert views["cc.dcm"].findings == (
        Finding(1, "mass", (1.0, 2.0, 3.0, 4.0), margin="spiculated", pathology="malignant"),
        Finding(2, "calcification", (5.0, 6.0, 7.5, 8.0), pathology="benign"),
    )
    assert views["mlo.dcm"].labels == Labels(birads=2)
    assert views["mlo.dcm"].findings == (Finding(3, "asymmetry"), Finding(4, "asymmetry"))


def test_numbers_of_the_table_stay_and_others_avoid_them(tmp_path: Path) -> None:
    text = (
        "PatientNumber,ExamID,Path,Kind,Lesion\n1,1,a,mass,\n1,1,a,mass,5\n1,1,b,mass,5.0\n1,1,b,mass,0\n1,2,c,mass,\n"
    )
    views = views_of(studies_of(tmp_path, text, {**COLUMNS, "kind": "Kind", "number": "Lesion"}), tmp_path)
    numbers = {name: [finding.number for finding in view.findings] for name, view in views.items()}
    assert numbers == {"a": [6, 5], "b": [5, 0], "c": [1]}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("1,2,3,,mass", "columns X0, Y0, X1, Y1: row 3 has only some of the four numbers of a box"),
        ("0.1,0.2,0.3,1,mass", "columns X0, Y0, X1, Y1: row 3 holds shares of the image; a box is in pixels"),
        ("3,2,3,4,mass", "columns X0, Y0, X1, Y1: row 3 holds no box from its upper left to its lower right"),
        ("1,4,3,2,mass", "columns X0, Y0, X1, Y1: row 3 holds no box from its upper left to its lower right"),
        ("1,2,3,4,", "column Kind: does not say what finding row 3 describes"),
        ("1,2,3,inf,mass", "column Y1: 'inf' is not understood; map it in pack.options.values.y1"),
        ("1,2,3,4,tumour", "column Kind: 'tumour' is not understood; map it in pack.options.values.kind"),
    ],
)
def test_a_finding_that_is_none_refuses_its_image_and_no_other(tmp_path: Path, cells: str, message: str) -> None:
    text = f"PatientNumber,ExamID,Path,X0,Y0,X1,Y1,Kind\n1,1,a,1,2,3,4,mass\n1,1,a,{cells}\n1,1,b,1,2,3,4,mass\n"
    assert refused(tmp_path, text, {**COLUMNS, **BOX}) == {"a": ("label", message), "b": None}


def test_a_box_by_its_size_is_that_of_its_corners(tmp_path: Path) -> None:
    """The same three boxes, in a German spreadsheet's spelling of the numbers in the second table."""
    corners = (
        "PatientNumber,ExamID,Path,X0,Y0,X1,Y1,Kind\n1,1,a,10,20.5,110,60,mass\n1,1,a,,,,,mass\n1,1,b,0,0,1,2,mass\n"
    )
    sizes = (
        "PatientNumber;ExamID;Path;X0;Y0;W;H;Kind\n1;1;a;10,0;20,5;100;39,50;mass\n1;1;a;;;;;mass\n1;1;b;0;0;1;2;mass\n"
    )
    by_size = {**COLUMNS, "x0": "X0", "y0": "Y0", "box_width": "W", "box_height": "H", "kind": "Kind"}
    studies = studies_of(tmp_path, corners, {**COLUMNS, **BOX})
    assert studies == studies_of(tmp_path, sizes, by_size)
    boxes = [finding.box for view in studies[0].views for finding in view.findings]
    assert boxes == [(10.0, 20.5, 110.0, 60.0), None, (0.0, 0.0, 1.0, 2.0)]
    none = "columns X0, Y0, W, H: row 2 holds no box from its upper left to its lower right"
    assert refused(tmp_path, sizes.replace("100", "-100"), by_size) == {"a": ("label", none), "b": None}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("x0", "y0", "x1", "y1", "box_width"),
            ": a box is x0, y0, x1, y1 or x0, y0, box_width, box_height; take two out",
        ),
        (("x0", "y0", "x1", "box_height"), ": a box is x0, y0, x1, y1 or x0, y0, box_width, box_height; take two out"),
        (("x0", "y0", "box_width"), ".box_height: is missing; name the column that holds it"),
        (("box_width", "box_height"), ".x0: is missing; name the column that holds it"),
    ],
)
def test_a_box_has_four_fields(tmp_path: Path, extra: tuple[str, ...], message: str) -> None:
    columns = {**COLUMNS, "kind": "Kind", **{field: field for field in extra}}
    assert complaint(tmp_path, columns=columns) == f"pack.options.columns{message}"


# --- what is understood


@pytest.mark.parametrize(
    ("field", "spellings"),
    [
        ("laterality", {"L": ["L", "l", "Left", " LEFT ", "LCC"], "R": ["R", "right"]}),
        (
            "view",
            {
                **{"CC": ["cc", "Cranio-Caudal", "LCC"], "MLO": ["MLO", "mediolateral  oblique", "MLO-ID"]},
                **{"ml": ["ML"], "xccl": ["XCCL"]},
            },
        ),
        (
            "birads",
            {4: ["4", "4.0", "4a", "4C", "BI-RADS 4", "birads-4b", "Bi-Rads: Category 4"], 0: ["0"], 6: ["BIRADS6"]},
        ),
        ("density", {"A": ["A", "1", "1.0"], "B": ["b", "ACR 2", "DENSITY B"], "C": ["3", "acr_c"], "D": ["4"]}),
        ("cancer", {True: ["1", "1.0", "TRUE", "yes", "Y"], False: ["0", "0.0", "False", "no", "n"]}),
        ("pathology", {"normal": ["Normal"], "benign": ["BENIGN"], "malignant": ["malignant "]}),
        ("age", {54: ["54", "54.0", "54.9", "054Y"], 0: ["0"], 130: ["130"]}),
        ("reason", {"screening": ["Screening"], "diagnostic": ["DIAGNOSTIC"]}),
        ("race", {"Black or African American": ["Black or African American"]}),
        ("kind", {"mass": ["Mass"], "distortion": ["architectural distortion"], "asymmetry": ["Focal asymmetry"]}),
        ("number", {3: ["3", "3.0"]}),
        ("x0", {-1.5: ["-1.5", "-1.50"], 1200.0: ["1200", "1.2e3"]}),
        ("margin", {"not circumscribed": ["Not  Circumscribed"]}),
        ("calcification_type", {"x" * 64: ["x" * 64]}),
    ],
)
def test_spellings_that_are_understood(field: str, spellings: dict[Any, list[str]]) -> None:
    for value, texts in spellings.items():
        for text in texts:
            found = read_cell(field, text, {})
            assert (found, type(found)) == (value, type(value)), text


@pytest.mark.parametrize("field", READERS)
def test_not_stated_is_none_and_never_a_guess(field: str) -> None:
    for text in ("", "NA", "n/a", "#N/A", "<NA>", "NaN", "null", "Unknown"):
        assert read_cell(field, text, {}) is None


@pytest.mark.parametrize(
    ("field", "texts"),
    [
        ("laterality", ["B", "both", "links", "l/r", "CC", "RM"]),
        ("view", ["C C", "oblique", "L", "1"]),
        ("birads", ["IV", "7", "-4", "4.5", "3a", "4d", "4 5", "44", "None", "ACR 4"]),
        ("density", ["E", "0", "5", "IV", "25", "BC"]),
        ("cancer", ["2", "-1", "None", "positive", "malignant"]),
        ("pathology", ["cancer", "benign_without_callback", "0"]),
        ("age", ["abc", "131", "-1", "999", "018M", "50-59", "90+"]),
        ("reason", ["screen"]),
        ("number", ["1.5", "a", "-1", "1_0"]),
        ("x0", ["12,5", "1_0", "inf", "1e999", "0x10"]),
        ("shape", ["x" * 65, "oval\nJANE", "\x00"]),
    ],
)
def test_spellings_that_are_not_understood(field: str, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ValueError, match=re.escape(text)):
            read_cell(field, text, {})


def test_a_cell_that_is_not_understood_refuses_its_image_with_column_and_fix(tmp_path: Path) -> None:
    columns = {**COLUMNS, "birads": "BIRADS", "density": "ACR"}
    text = "PatientNumber,ExamID,Path,BIRADS,ACR\n1,1,a,IV,E\n1,1,b,4,E\n1,1,c,NA,\n"
    assert refused(tmp_path, text, columns) == {
        "a": ("label", "column BIRADS: 'IV' is not understood; map it in pack.options.values.birads"),
        "b": ("label", "column ACR: 'E' is not understood; map it in pack.options.values.density"),
        "c": None,
    }


def test_values_go_before_what_is_understood(tmp_path: Path) -> None:
    columns = {**COLUMNS, "birads": "BIRADS", "cancer": "Cancer", "age": "Age", "race": "Race"}
    values = {
        "birads": {"IV": 4, "0": None, "3": "BI-RADS 2"},
        "cancer": {"yes": "no", "suspected": None},
        "age": {"90+": 90},
        "race": {"w": "White"},
    }
    text = """
        PatientNumber,ExamID,Path,BIRADS,Cancer,Age,Race
        1,1,a,iv,yes,90+,W
        1,2,b,0,Suspected,50,Asian
        1,3,c,3.0,1,50,
    """
    studies = studies_of(tmp_path, text, columns, values=values)
    assert [(s.age, s.race, s.views[0].labels.birads, s.views[0].labels.cancer) for s in studies] == [
        (90, "White", 4, False),
        (50, "Asian", None, None),
        (50, None, 2, True),
    ]


def test_cancer_follows_from_pathology_and_must_not_contradict_it(tmp_path: Path) -> None:
    text = """
        PatientNumber,ExamID,Path,Cancer,Pathology
        1,1,a,,malignant
        1,1,b,,benign
        1,1,c,0,normal
        1,1,d,1,
        1,1,e,0,malignant
        1,1,f,1,benign
        1,1,g,,
    """
    views = views_of(studies_of(tmp_path, text, {**COLUMNS, "cancer": "Cancer", "pathology": "Pathology"}), tmp_path)
    assert {name: view.labels.cancer for name, view in views.items() if not view.refused} == {
        **{"a": True, "b": False, "c": False, "d": True, "g": None},
    }
    assert views["e"].refused == ("label-conflict", "column Cancer says false, column Pathology malignant")
    assert views["f"].refused == ("label-conflict", "column Cancer says true, column Pathology benign")


def test_another_view_is_left_to_the_builder(tmp_path: Path) -> None:
    """Also one that nobody knows, which the builder leaves out by its word; a number is no view."""
    names = [*OTHER_VIEWS, "axillary", "schräg 2"]
    lines = [f"1,1,{name}.dcm,{name.upper()}" for name in names]
    text = "\n".join(["PatientNumber,ExamID,Path,View", *lines, "1,1,n.dcm,2"])
    (study,) = studies_of(tmp_path, text, {**COLUMNS, "view": "View"})
    *others, number = study.views
    assert [(view.view, view.refused) for view in others] == [(name, None) for name in names]
    assert number.refused == ("label", "column View: '2' is not understood; map it in pack.options.values.view")


# --- what is refused


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("laterality", "L", "R"),
        ("view", "CC", "MLO"),
        ("birads", "4", "5"),
        ("density", "A", "2"),
        ("cancer", "0", "1"),
        ("pathology", "benign", "malignant"),
        ("report", "Mass.", "mass."),
    ],
)
def test_rows_of_an_image_that_disagree_refuse_it(tmp_path: Path, field: str, one: str, other: str) -> None:
    lines = f"1,1,a,{one}\n1,1,b,{one}\n1,1,a,\n1,1,a,{other}\n1,1,b,{one}\n1,1,c,{other}\n"
    found = refused(tmp_path, f"PatientNumber,ExamID,Path,Fact\n{lines}", {**COLUMNS, field: "Fact"})
    conflict = ("label-conflict", "column Fact: rows 2 and 5 of this image differ")
    assert found == {"a": conflict, "b": None, "c": None}


@pytest.mark.parametrize(("field", "one", "other"), [("age", "54", "55"), ("reason", "screening", "diagnostic")])
def test_rows_of_a_study_that_disagree_refuse_its_images(tmp_path: Path, field: str, one: str, other: str) -> None:
    text = f"PatientNumber,ExamID,Path,Fact\n1,1,a,{one}\n1,1,b,\n1,1,c,{other}\n1,2,d,{other}\n"
    message = "column Fact: rows 2 and 4 of one study differ"
    conflict = ("label-conflict", message)
    columns = {**COLUMNS, field: "Fact"}
    assert refused(tmp_path, text, columns) == {"a": conflict, "b": conflict, "c": conflict, "d": None}
    del columns["study"]
    hint = "; name the column that tells exams apart in options.columns.study"
    assert set(refused(tmp_path, text, columns).values()) == {("label-conflict", message + hint)}


def test_the_same_file_in_two_studies_stays_in_the_first(tmp_path: Path) -> None:
    text = "PatientNumber,ExamID,Path\n2,1,a.dcm\n1,2,./x/../a.dcm\n1,1,b.dcm\n1,1,a.dcm\n"
    first, second, third = studies_of(tmp_path, text, COLUMNS)
    assert [(view.path, view.refused) for view in first.views] == [(tmp_path / n, None) for n in ("b.dcm", "a.dcm")]
    message = "row 5 has this file in another study; row {} does not count"
    assert second.views == (SourceView(tmp_path / "a.dcm", refused=("duplicate", message.format(3))),)
    assert third.views == (SourceView(tmp_path / "a.dcm", refused=("duplicate", message.format(2))),)


def test_a_row_without_patient_study_or_image_is_counted(tmp_path: Path) -> None:
    text = """
        PatientNumber,ExamID,Path,BIRADS
        1,1,a.dcm,1
        ,1,b.dcm,IV
        NA,1,b.dcm,4
        1,,c.dcm,1
        1,1,,1
        1,1,unknown,1
        ,,d.dcm,1
    """
    studies = studies_of(tmp_path, text, {**COLUMNS, "birads": "BIRADS"})
    assert [(study.patient_id, len(study.views)) for study in studies] == [("1", 1), ("", 5)]
    assert split_of("table", "")  # the builder asks this of every study
    assert {name: view.refused for name, view in views_of(studies, tmp_path).items()} == {
        "a.dcm": None,
        "b.dcm": ("identifier", "column PatientNumber: is empty in row 3"),
        "c.dcm": ("identifier", "column ExamID: is empty in row 5"),
        "exams.csv row 6": ("identifier", "column Path: is empty in row 6"),
        "exams.csv row 7": ("identifier", "column Path: is empty in row 7"),
        "d.dcm": ("identifier", "column PatientNumber: is empty in row 8"),
    }


@pytest.mark.parametrize("word", ["NA", "#N/A", "<NA>", "n.a.", "None", "-", "Unknown"])
def test_a_word_for_nothing_is_no_patient(tmp_path: Path, word: str) -> None:
    text = f"PatientNumber,ExamID,Path\n{word},{word},a\n{word},1,b\n1,{word},c\n1,1,{word}\n1,1,d\n"
    kept, nameless = studies_of(tmp_path, text, COLUMNS)
    assert kept == SourceStudy("1", "1", (SourceView(tmp_path / "d"),))
    assert [view.refused and view.refused[0] for view in nameless.views] == ["identifier"] * 4


def test_a_number_is_one_patient_however_it_is_written_but_zeros_in_front_count(tmp_path: Path) -> None:
    lines = "12,1.0,a\n12.0,1,b\n12.00,2,c\n012,1,d\n12.5,1,e\n1.2.840.0,1,f\n12E5,1,g\n"
    studies = studies_of(tmp_path, f"PatientNumber,ExamID,Path\n{lines}", COLUMNS)
    assert Counter((study.patient_id, study.study_id) for study in studies for _ in study.views) == {
        ("12", "1"): 2,
        ("12", "2"): 1,
        ("012", "1"): 1,
        ("12.5", "1"): 1,
        ("1.2.840.0", "1"): 1,
        ("12E5", "1"): 1,
    }


def test_a_number_that_a_spreadsheet_has_rounded_names_nobody(tmp_path: Path) -> None:
    lines = "1.23457E+16,1,a\n1,1e+17,b\n1,1,c\n"
    fix = "has lost its last digits; export the column as text"
    assert refused(tmp_path, f"PatientNumber,ExamID,Path\n{lines}", COLUMNS) == {
        "a": ("identifier", f"column PatientNumber: '1.23457E+16' {fix}"),
        "b": ("identifier", f"column ExamID: '1e+17' {fix}"),
        "c": None,
    }


def test_paths_stay_inside_the_archive(tmp_path: Path) -> None:
    root = tmp_path / "archive"
    root.mkdir()
    inside = ["a/b.dcm", "a/../c.dcm", str(root / "d.dcm"), "e\\f.dcm", "../archive/g.dcm", "..h.dcm"]
    outside = ["../x.dcm", "a/../../y.dcm", "/etc/passwd", "..", f"{root}-2/x.dcm", "..\\z.dcm"]
    controlled = ["x.dcm\0", "\0/../../x.dcm", "x\n.dcm", "x\x7f.dcm", "../\ty.dcm"]
    rows = [{"who": "1", "file": name} for name in (*inside, *outside, *controlled)]
    pd.DataFrame(rows).to_csv(root / "exams.csv", index=False)
    (study,) = table(root, "exams.csv", {"patient": "who", "image": "file"})
    assert len(study.views) == len(rows)
    good = [str(view.path.relative_to(root)) for view in study.views if view.refused is None]
    assert good == ["a/b.dcm", "c.dcm", "d.dcm", "e/f.dcm", "g.dcm", "..h.dcm"]
    assert Counter(view.refused[0] for view in study.views if view.refused) == {"outside": 11}


def test_a_relative_root_is_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("archive").mkdir()
    Path("archive/exams.csv").write_text(f"who,file\n1,a.dcm\n1,{tmp_path}/archive/b.dcm\n1,../c.dcm\n")
    (study,) = table(Path("archive"), "exams.csv", {"patient": "who", "image": "file"})
    assert [view.path for view in study.views] == [
        Path("archive/a.dcm"),
        Path("archive/b.dcm"),
        Path("archive/../c.dcm"),
    ]
    assert [view.refused is None for view in study.views] == [True, True, False]


def test_counts_add_up_to_the_archive(tmp_path: Path) -> None:
    """Of 60 images with three rows each every 6th has no patient and every 10th no BI-RADS; 5 rows have no image."""
    images = [f"{'' if n % 6 == 0 else n % 5 + 1},{n % 2},{n}.dcm,{'x' if n % 10 == 1 else 1}\n" for n in range(60)]
    text = "PatientNumber,ExamID,Path,BIRADS\n" + "".join(images * 3) + "1,1,,\n" * 5
    studies = studies_of(tmp_path, text, {**COLUMNS, "birads": "BIRADS"})
    views = views_of(studies, tmp_path)
    assert len(views) == 60 + 5
    assert Counter(view.refused and view.refused[0] for view in views.values()) == {
        **{"identifier": 10 + 5, "label": 6, None: 44},
    }
    assert len({(study.patient_id, study.study_id) for study in studies}) == len(studies) == 5 * 2 + 1


# --- options


def test_options_that_are_wrong_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "exams.csv").write_text("PatientNumber,ExamID,Path\n1,1,a\n")
    needed: dict[str, Any] = {"file": "exams.csv", "columns": COLUMNS}

    def columns(**more: Any) -> dict[str, Any]:
        return {**needed, "columns": {**COLUMNS, **more}}

    where = "pack.options.columns."
    assert (
        complaint(tmp_path, **columns(denstiy="ACR"))
        == f"{where}denstiy: there is no such field; did you mean density?"
    )
    assert complaint(tmp_path, **columns(zzz=None)).startswith(
        f"{where}zzz: there is no such field; it is one of patient,"
    )
    assert complaint(tmp_path, **columns(patient=None)).startswith(f"{where}patient: is missing")
    assert complaint(tmp_path, file="exams.csv").startswith(f"{where}patient: is missing")
    assert complaint(tmp_path, file="exams.csv", columns={"patient": "a"}).startswith(f"{where}image: is missing")
    assert complaint(tmp_path, **columns(kind="K", x0="X", y0="Y", x1="XX")).startswith(f"{where}y1: is missing")
    assert complaint(tmp_path, **columns(margin="M")).startswith(f"{where}kind: is missing")
    assert complaint(tmp_path, file="exams.csv", columns=["a"]) == (
        "pack.options.columns: ['a'] is no mapping; write {key: value}"
    )
    assert complaint(tmp_path, **columns(race=1.1)) == (f"{where}race: 1.1 is no column name; write it in quotes")
    assert complaint(tmp_path, columns=COLUMNS) == "pack.options.file: is empty; name the table, relative to root"
    assert complaint(tmp_path / "none", **needed) == f"pack.root: {tmp_path / 'none'} is no folder"
    assert complaint(tmp_path, **columns(birads="BIRADS")) == (
        f"{tmp_path / 'exams.csv'}: has no column 'BIRADS'; it has PatientNumber, ExamID, Path"
    )
    assert complaint(tmp_path, file="none.csv", columns=COLUMNS).startswith("pack.options.file: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"denstiy": {"1": "A"}}, "denstiy: pack.options.columns lacks it; did you mean density?"),
        ({"patient": {"1": "2"}}, "patient: pack.options.columns lacks it; it is one of density"),
        ({"density": {"1": "E"}}, "density.1: 'E' is not understood"),
        ({"density": "A"}, "density: 'A' is no mapping; write {key: value}"),
        *(
            (
                {"density": {one: "A", "x": "B", other: "C"}},
                f"density.{other}: 'C', but another line maps the same cell to 'A'; remove one",
            )
            for one, other in (("1", "1.0"), ("Yes", "yes"), ("true", "True"), ("a  b", " a b"))
        ),
    ],
)
def test_values_that_are_wrong_are_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    columns = {**COLUMNS, "density": "ACR"}
    assert complaint(tmp_path, file="exams.csv", columns=columns, values=values) == f"pack.options.values.{message}"


def test_a_column_without_a_name_in_yaml_is_not_there(tmp_path: Path) -> None:
    (study,) = studies_of(tmp_path, "PatientNumber,ExamID,Path\n1,1,a\n", {**COLUMNS, "race": None, "x0": None})  # type: ignore[dict-item]
    assert study == SourceStudy("1", "1", (SourceView(tmp_path / "a"),))


def test_refusals_can_be_written_down(tmp_path: Path) -> None:
    found = refused(tmp_path, 'PatientNumber,ExamID,Path\n1,1,"../ü.dcm"\n', COLUMNS)
    assert json.loads(json.dumps(found, ensure_ascii=False)).keys() == {"../ü.dcm"}
