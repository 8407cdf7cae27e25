from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.schema import EXCLUDED, Finding, Labels, SourceView
from shards.sources.inbreast import IMAGES, OUTLINES, TABLE, inbreast
from tests.support.inbreast_archive import ANN, EVE, HEADER, SQUARE, document, image, outlines, read, row

BOX = (10.5, 20.25, 30.0, 60.75)


def views_of(root: Path, *rows: str) -> dict[str, SourceView]:
    return {view.path.name.split("_")[0]: view for study in read(root, *rows) for view in study.views}


def reason(view: SourceView) -> str | None:
    return view.refused[0] if view.refused else None


def found(root: Path, *marks: tuple[str | None, list[str]]) -> tuple[Finding, ...]:
    image(root, "20586934")
    outlines(root, "20586934", *marks)
    view = views_of(root, row("20586934"))["20586934"]
    assert view.refused is None
    return view.findings


def test_an_exam_is_a_patient_and_a_month_and_the_files_name_the_patient(tmp_path: Path) -> None:
    first = image(tmp_path, "20586908", "R_CC", EVE)
    second = image(tmp_path, "20586986", "L_ML", EVE)
    third = image(tmp_path, "24065734", "L_CC", ANN)
    later = image(tmp_path, "53586986", "L_CC", EVE)
    studies = read(
        tmp_path,
        row("53586986", "LCC", "201001", "1", "1"),
        row("20586986", "LMLO", "200902", "2", "5", age="61"),
        row("24065734", "LCC", "200902", "4", "4a"),
        row("20586908", "RCC", "200902", "2", "2"),
    )
    assert [(study.patient_id, study.study_id, study.age) for study in studies] == [
        (ANN, f"{ANN} 200902", None),
        (EVE, f"{EVE} 200902", 61),
        (EVE, f"{EVE} 201001", None),
    ]
    assert [[view.path for view in study.views] for study in studies] == [[third], [first, second], [later]]
    assert [(view.laterality, view.view, view.labels) for study in studies for view in study.views] == [
        ("L", "CC", Labels(4, "D")),
        ("R", "CC", Labels(2, "B")),
        ("L", "MLO", Labels(5, "B")),
        ("L", "CC", Labels(1, "A")),
    ]


def test_categories_and_densities(tmp_path: Path) -> None:
    cells = {
        "1": ("1", "1"), "2": (" " * 20, "4b"), "3": ("", "4c"), "4": ("4", "6"), "5": ("3", ""),
        "6": ("5", "1"), "7": ("1", "7"), "8": ("1", "4d"),
    }  # fmt: skip
    for file in cells:
        image(tmp_path, file)
    views = views_of(
        tmp_path, *(row(file, density=density, birads=birads) for file, (density, birads) in cells.items())
    )
    assert [views[file].labels for file in "12345"] == [
        Labels(1, "A"), Labels(4), Labels(4), Labels(6, "D"), Labels(None, "C"),
    ]  # fmt: skip
    assert [reason(views[file]) for file in "12345678"] == [None] * 5 + ["label"] * 3
    assert views["8"].refused == ("label", "INbreast.csv: birads '4d' in row 9 is not documented")


def test_boxes_and_kinds_of_outlines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        findings = found(
            tmp_path,
            ("Mass", SQUARE),
            ("Espiculated Region", ["(1, 9)", "(5, 2)"]),
            ("Spiculated region ", SQUARE),
            ("Unnamed", SQUARE),
            ("Point 3", ["(1.0, 1.0)"]),
            ("", SQUARE),
            (None, SQUARE),
            ("Cluster", SQUARE),
            ("Assymetry", SQUARE),
            ("Asymmetry", ["(7.0, 8.0)"]),  # a single point
            ("Distortion", ["(7.0, 8.0)", "(9.0, 8.0)"]),  # a line
        )
    assert findings == (
        Finding(1, "mass", BOX),
        Finding(2, "mass", (1, 2, 5, 9), margin="spiculated"),
        Finding(3, "mass", BOX, margin="spiculated"),
        Finding(4, "calcification", BOX, distribution="grouped"),
        Finding(5, "asymmetry", BOX),
        Finding(6, "asymmetry"),
        Finding(7, "distortion"),
    )
    assert "4 outlines have no name" in caplog.text


def test_the_single_calcifications_of_an_image_are_one_finding(tmp_path: Path) -> None:
    several = found(tmp_path, ("Calcifications", SQUARE), ("Mass", SQUARE), ("Calcification", ["(1, 2)"]))
    assert several == (Finding(1, "mass", BOX), Finding(2, "calcification"))
    assert found(tmp_path, ("Calcification", SQUARE)) == (Finding(1, "calcification", BOX),)
    assert found(tmp_path, ("Calcification", ["(1, 2)"])) == (Finding(1, "calcification"),)


def test_outlines_hang_on_their_own_image_with_numbers_of_the_exam(tmp_path: Path) -> None:
    for file, place in (("1", "L_CC"), ("2", "L_ML"), ("3", "R_CC")):
        image(tmp_path, file, place)
    outlines(tmp_path, "1", ("Mass", SQUARE))
    outlines(tmp_path, "2", ("Mass", SQUARE))
    views = views_of(tmp_path, row("1"), row("2", "LMLO"), row("3", "RCC"))
    assert {file: [finding.number for finding in view.findings] for file, view in views.items()} == {
        "1": [1],
        "2": [2],
        "3": [],
    }


def roi(name: str, point: str) -> str:
    fields = f"<key>Name</key><string>{name}</string><key>Point_px</key><array>{point}</array>"
    return document(
        f"<dict><key>Images</key><array><dict><key>ROIs</key><array><dict>{fields}</dict></array></dict></array></dict>"
    )


LAUGHS = '<!DOCTYPE plist [<!ENTITY a "Mass"><!ENTITY b "&a;&a;">]>'
FILE = '<!DOCTYPE plist [<!ENTITY a SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not XML",
        roi("Mass", "<string>(1, 2)</string>")[:-30],
        document("<string>&b;</string>", LAUGHS),
        document("<string>&a;</string>", FILE),
        document("<array/>"),
        document("<dict/>"),
        document("<array>" * 20_000 + "</array>" * 20_000),
        roi("Mole", "<string>(1, 2)</string>"),
        roi("Mass", "<string>(1, two)</string>"),
        roi("Mass", "<string>(1, nan)</string>"),
        roi("Mass", "<string>(1e999, 2)</string>"),
        roi("Mass", "<string>__import__('os').abort()</string>"),
        roi("Mass", "<integer>5</integer>"),
    ],
)
def test_outlines_that_cannot_be_read_refuse_their_image_alone(text: str, tmp_path: Path) -> None:
    image(tmp_path, "1")
    image(tmp_path, "2")
    outlines(tmp_path, "2", ("Mass", SQUARE))
    (tmp_path / OUTLINES / "1.xml").write_text(text)
    views = views_of(tmp_path, row("1"), row("2"))
    refused = views["1"].refused
    assert refused is not None
    assert refused[0] == "label"
    assert refused[1].startswith("1.xml: ")
    assert len(refused[1]) < 200
    assert (views["2"].refused, len(views["2"].findings)) == (None, 1)


def test_other_views_and_names_that_contradict_the_table(tmp_path: Path) -> None:
    for file, place in (("1", "R_FB"), ("2", "R_CC"), ("3", "R_XY"), ("4", "R_CC"), ("5", "R_CC"), ("6", "R_CC")):
        image(tmp_path, file, place)
    views = views_of(
        tmp_path, row("1", "RFB"), row("2", "RFB"), row("3", "RCC"), row("4", "LCC"), row("5", "RMLO"), row("6", "XCC")
    )
    assert [reason(view) for _, view in sorted(views.items())] == ["other-view"] * 3 + ["label"] * 3
    assert "other-view" in EXCLUDED


def test_every_row_and_file_comes_once(tmp_path: Path) -> None:
    image(tmp_path, "1")
    image(tmp_path, "2")  # without a row
    image(tmp_path, "4")
    (tmp_path / IMAGES / "copy").mkdir()
    image(tmp_path, "4").rename(tmp_path / IMAGES / "copy" / f"4_{ANN}_MG_L_CC_ANON.dcm")
    image(tmp_path, "4")
    for name in ("unnamed.dcm", "other.dcm"):
        (tmp_path / IMAGES / name).write_bytes(b"")
    studies = read(tmp_path, row("1"), row("1", birads="5"), row("3"), row(""), row(""), row("4"))
    assert [study.study_id for study in studies] == [f"{ANN} 201001", ANN, ""]
    exam, dateless, nameless = studies
    assert [(view.path.name[0], view.labels.birads) for view in exam.views] == [("1", 2), ("4", 2)]
    assert {view.refused for view in exam.views} == {None}
    assert [(view.path.name[0], view.labels, reason(view)) for view in dateless.views] == [
        ("2", Labels(), None),
        ("4", Labels(), "duplicate"),
    ]
    assert sorted((view.path.name, reason(view)) for view in nameless.views) == [
        ("1.dcm", "duplicate"),
        *((name, "identifier") for name in ("3.dcm", "other.dcm", "row 5", "row 6", "unnamed.dcm")),
    ]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .* must hold INbreast\.csv, AllDICOMs and AllXML") as caught:
        list(inbreast(tmp_path))
    assert "\n" not in str(caught.value)
    assert read(tmp_path) == []
    (tmp_path / OUTLINES).rmdir()
    with pytest.raises(ShardError, match=r"^pack.root: .* AllXML"):
        list(inbreast(tmp_path))
    (tmp_path / OUTLINES).mkdir()
    (tmp_path / TABLE).write_text(HEADER.replace(";ACR", "") + "\n")
    with pytest.raises(ShardError, match="has no column 'ACR'"):
        list(inbreast(tmp_path))
