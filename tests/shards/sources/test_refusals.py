"""The exact words of every refusal of a source.

The words are held because `shards.pack.plan.digest_of` hashes them: plans of existing builds have the digests of their
studies. If a message is reworded, a build that is continued or extended reports every study with such an image as
changed. A new refusal gets a line here; an existing line stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from shards.schema import SourceStudy
from shards.sources.cbis_ddsm.studies import cbis_ddsm
from shards.sources.cmmd import cmmd
from shards.sources.inbreast import IMAGES, OUTLINES
from shards.sources.rsna import rsna
from shards.sources.table.studies import table
from tests.support import cbis_ddsm_archive as of_cbis_ddsm
from tests.support import cmmd_archive as of_cmmd
from tests.support import embed_archive as of_embed
from tests.support import inbreast_archive as of_inbreast
from tests.support import rsna_archive as of_rsna
from tests.support import table_archive as of_table
from tests.support import vindr_archive as of_vindr

LONG = "long " * 20  # only its beginning is quoted
CUT = (8 * "long ")[:40]


def archive_of_cbis_ddsm(root: Path) -> Iterable[SourceStudy]:
    def row(folder: str, first: str = "OVAL", **more: Any) -> Any:
        return of_cbis_ddsm.abnormality(folder, 1, first, **more)

    for folder in ("Mass-Test_P_00001_LEFT_CC", "Calc-Test_P_00001_LEFT_CC"):
        of_cbis_ddsm.image(root, folder)
    of_cbis_ddsm.image(root, "Mass-Test_P_00001_LEFT_CC_1", "1-1", "cropped images")
    of_cbis_ddsm.image(root, "Mass-Test_P_00001_LEFT_CC_1", "1-2", "ROI mask images")
    other_side: dict[str, Any] = {"left or right breast": "RIGHT"}
    nowhere: dict[str, Any] = {"image file path": "Mass-Test_somewhere/1-1.dcm"}
    rows = [
        row("Mass-Test_P_00002_LEFT_CC", pathology="UNPROVEN"),
        row("Mass-Test_P_00003_LEFT_CC", "SQUARE"),
        row("Mass-Test_P_00004_LEFT_CC", **other_side),
        row("Mass-Test_P_00005_LEFT_CC", **nowhere),
        row("Mass-Test_P_00006_LEFT_CC", assessment=LONG),
        row("Calc-Training_P_00007_LEFT_CC", LONG),
    ]
    return cbis_ddsm(of_cbis_ddsm.write_tables(root, *rows))


def archive_of_cmmd(root: Path) -> Iterable[SourceStudy]:
    for patient in ("D1-0001", "D1-0002", "D1-0003", "D1-0004"):
        of_cmmd.image(root, patient, "L")
    rows = [
        ("D1-0001", "B", 44, "mass", "Benign"),
        ("D1-0002", "L", 44, "cyst", "Benign"),
        ("D1-0003", "L", 44, "mass", "Uncertain"),
        ("D1-0004", "L", 44, "mass", "Benign"),
        ("D1-0004", "L", 44, "mass", "Malignant"),
    ]
    return cmmd(of_cmmd.write_table(root, *rows))


def archive_of_embed(root: Path) -> Iterable[SourceStudy]:
    image, finding = of_embed.image, of_embed.finding
    files = [
        image("1", "R", FinalImageType="cview"),
        image("1", "R", name="volume", FinalImageType="3D"),
        image("1", "R", name="screenshot", FinalImageType="ROI_SSC"),
        image("1", "R", name="new", FinalImageType="contrast"),
        image("1", "R", name="spot", spot_mag="1.0"),
        image("1", "R", "ML"),
        image("1", "", name="sideless"),
        image("1", "R", anon_dicom_path="/data/elsewhere/a.dcm"),
        image("1", "R", anon_dicom_path=""),
        image("1", "L"),
        image("1", "L"),
        image("", "L", name="examless"),
        *(image(exam, "L") for exam in ("2", "3", "4")),
    ]
    clinical = [finding("1"), finding("2", "L", "Q"), finding("3", "L", tissueden="E")]
    clinical.append(finding("4", "L", path_severity=LONG))
    return of_embed.read(root, clinical, files)


def archive_of_inbreast(root: Path) -> Iterable[SourceStudy]:
    for file, place in (("1", "R_FB"), ("2", "R_CC"), ("3", "L_CC"), ("4", "L_CC"), ("5", "L_CC"), ("6", "L_CC")):
        of_inbreast.image(root, file, place)
    (root / IMAGES / "copy").mkdir()
    of_inbreast.image(root, "6").rename(root / IMAGES / "copy" / f"6_{of_inbreast.ANN}_MG_L_CC_ANON.dcm")
    of_inbreast.image(root, "6")
    (root / IMAGES / "other.dcm").write_bytes(b"")
    of_inbreast.outlines(root, "4", ("Mole", of_inbreast.SQUARE))
    (root / OUTLINES / "5.xml").write_text(of_inbreast.document("<dict/>"))
    row = of_inbreast.row
    rows = [row("1", "RFB"), row("2", "LCC"), row("3", birads="4d"), row("4"), row("5"), row("7"), row(""), row("7")]
    return of_inbreast.read(root, *rows)


def archive_of_rsna(root: Path) -> Iterable[SourceStudy]:
    row = of_rsna.row
    rows = [row("1", "1", "LAT"), row("1", "2", density="E"), row("1", "3"), row("1", "3"), row("", "4"), row("1", "")]
    rows += [row("1", "5", laterality=LONG), row("1", "6", view=LONG)]
    of_rsna.write(root, "test.csv", of_rsna.TEST, row("2", "1", laterality="B"))
    return rsna(of_rsna.write(root, "train.csv", of_rsna.TRAIN, *rows))


def archive_of_table(root: Path) -> Iterable[SourceStudy]:
    fields = ["patient", "study", "image", "laterality", "view", "birads", "cancer", "pathology", "age", *of_table.BOX]
    fields.append("implant")
    header = [field.title() for field in fields]
    lines = [
        "1,1,a,,,IV",
        "1,1,b,L,RCC",
        "1,1,c,,,,0,malignant",
        "1,1,d,,,,,,,1,2,3,,mass",
        "1,1,e,,,,,,,3,2,1,4,mass",
        "1,1,f,,,,,,,0.1,0.2,0.3,1,mass",
        "1,1,g,,,,,,,1,2,3,4,",
        "1,1,h,,,4",
        "1,1,h,,,5",
        "1,1,../i",
        "1,2,j,,,,,,50",
        "1,2,k,,,,,,51",
        "1,3,a",
        ",1,l",
        "1,,m",
        "1,1,",
        "1.5E+15,1,n",
        f"1,1,o,,,{LONG.strip()}",
        "1,1,p,,MLO-ID,,,,,,,,,,no",
    ]
    cells = [line + "," * (len(fields) - 1 - line.count(",")) for line in lines]
    (root / "exams.csv").write_text("\n".join([",".join(header), *cells]) + "\n")
    yield from table(root, "exams.csv", dict(zip(fields, header, strict=True)))
    without_study = root / "patients.csv"
    without_study.write_text("Patient,Image,Age\n1,a,50\n1,b,51\n")
    yield from table(root, without_study.name, {"patient": "Patient", "image": "Image", "age": "Age"})


def archive_of_vindr(root: Path) -> Iterable[SourceStudy]:
    image, finding = of_vindr.image, of_vindr.finding
    images = [image("a", "1"), image("a", "1"), image("a", "2", breast_birads="BI-RADS 0"), image("a", "3", "XCC")]
    images += [image("", "4"), image("a", "5"), image("a", "6"), image("a", "7", breast_density=LONG), image("a", "9")]
    findings = [finding(image("a", "5"), "['Mole']"), finding(image("a", "6"), "['Mass']", "3 2 1 4")]
    findings += [finding(image("a", "8"), "['Mass']", "1 2 3 4"), finding(image("a", "9"), f"['{LONG}']")]
    return of_vindr.read(root, images, findings)


WORDS: dict[Callable[[Path], Iterable[SourceStudy]], list[tuple[str, str]]] = {
    archive_of_cbis_ddsm: [
        (
            "duplicate",
            "the same film as CBIS-DDSM/Calc-Test_P_00001_LEFT_CC/07-20-2016-DDSM-NA-74994/1.000000-NA-24515/1-1.dcm",
        ),
        (
            "identifier",
            "mass_case_description_test_set.csv: the image file path of row 5 names no patient, breast and view",
        ),
        ("label", f"calc_case_description_train_set.csv: {CUT!r} in row 2 is no documented calcification_type"),
        ("label", "mass_case_description_test_set.csv: 'SQUARE' in row 3 is no documented shape"),
        ("label", f"mass_case_description_test_set.csv: birads {CUT!r} in row 6 is not documented"),
        ("label", "mass_case_description_test_set.csv: pathology 'UNPROVEN' in row 2 is not documented"),
        ("label", "mass_case_description_test_set.csv: patient, breast or view of row 4 contradicts its file path"),
        ("lesion-crop", "a crop around one abnormality"),
        ("roi-mask", "the outline of one abnormality"),
    ],
    archive_of_cmmd: [
        ("label", "CMMD_clinicaldata_revision.xlsx: abnormality 'cyst' in row 3 is not known"),
        ("label", "CMMD_clinicaldata_revision.xlsx: classification 'uncertain' in row 4 is not known"),
        ("label", "CMMD_clinicaldata_revision.xlsx: side 'B' in row 2 is not known"),
        ("label-conflict", "CMMD_clinicaldata_revision.xlsx: calls this breast benign and malignant"),
    ],
    archive_of_embed: [
        ("2d-synthetic", "a C-view, computed from tomosynthesis"),
        ("duplicate", "anon_dicom_path: a row before this one has the same file"),
        ("identifier", "empi_anon or acc_anon: is empty or has lost digits, as 4.9E+15 has; export them as text"),
        ("label", "FinalImageType: 'contrast' is not known"),
        ("label", "column asses: 'Q' is no code of the legend"),
        ("label", f"column path_severity: {CUT!r} is no code of the legend"),
        ("label", "column tissueden: 'E' is no code of the legend"),
        ("laterality", "ImageLateralityFinal: None is neither L nor R"),
        ("other-view", "ViewPosition: 'ML' is not one of CC, MLO"),
        ("path", "anon_dicom_path: '' starts with no known prefix; give options.prefix"),
        ("path", "anon_dicom_path: '/data/elsewhere/a.dcm' starts with no known prefix; give options.prefix"),
        ("post-processed", "a screenshot with a radiologist's marks"),
        ("spot", "spot_mag: '1', a spot compression or magnification view"),
        ("tomosynthesis", "a tomosynthesis volume"),
    ],
    archive_of_inbreast: [
        ("duplicate", "a row of INbreast.csv or a file before it has the number 6"),
        ("duplicate", "a row of INbreast.csv or a file before it has the number 7"),
        (
            "identifier",
            "INbreast.csv: row 7 has no file number, or no file in AllDICOMs has it: the patient is not known",
        ),
        (
            "identifier",
            "INbreast.csv: row 8 has no file number, or no file in AllDICOMs has it: the patient is not known",
        ),
        ("identifier", "the file's name is not <number>_<patient>_MG_..._ANON"),
        ("label", "4.xml: the name of an outline, 'mole', is not documented"),
        ("label", "5.xml: cannot be read as outlines (KeyError: 'Images')"),
        ("label", "INbreast.csv: Laterality or View of row 3 contradicts the file's name"),
        ("label", "INbreast.csv: birads '4d' in row 4 is not documented"),
        ("other-view", "the view is 'FB'"),
    ],
    archive_of_rsna: [
        ("duplicate", "train.csv: row 5 names a file that a row before it names"),
        ("identifier", "train.csv: patient_id or image_id of row 6 is empty"),
        ("identifier", "train.csv: patient_id or image_id of row 7 is empty"),
        ("label", "column density: 'E' in row 3 is not documented"),
        ("label", "column laterality: 'B' in row 2 is not documented"),
        ("label", f"column laterality: {CUT!r} in row 8 is not documented"),
        ("other-view", "column view: 'AT' is not one of CC, MLO"),
        ("other-view", f"column view: {CUT!r} is not one of CC, MLO"),
    ],
    archive_of_table: [
        ("duplicate", "row 2 has this file in another study; row 14 does not count"),
        ("identifier", "column Image: is empty in row 17"),
        ("identifier", "column Patient: '1.5E+15' has lost its last digits; export the column as text"),
        ("identifier", "column Patient: is empty in row 15"),
        ("identifier", "column Study: is empty in row 16"),
        ("label", "column Birads: 'IV' is not understood; map it in pack.options.values.birads"),
        ("label", f"column Birads: {CUT!r} is not understood; map it in pack.options.values.birads"),
        ("label", "column Kind: does not say what finding row 8 describes"),
        ("label", "columns X0, Y0, X1, Y1: row 5 has only some of the four numbers of a box"),
        ("label", "columns X0, Y0, X1, Y1: row 6 holds no box from its upper left to its lower right"),
        ("label", "columns X0, Y0, X1, Y1: row 7 holds shares of the image; a box is in pixels"),
        ("label-conflict", "column Age: rows 12 and 13 of one study differ"),
        (
            "label-conflict",
            "column Age: rows 2 and 3 of one study differ; name the column that tells exams apart in "
            "options.columns.study",
        ),
        ("label-conflict", "column Birads: rows 9 and 10 of this image differ"),
        ("label-conflict", "column Cancer says false, column Pathology malignant"),
        ("label-conflict", "column Implant says no, column View a view with the implant displaced"),
        ("label-conflict", "columns Laterality and View: name different sides"),
        ("outside", "the path leads out of the archive's root or holds control characters"),
    ],
    archive_of_vindr: [
        ("duplicate", "breast-level_annotations.csv: a row before this one names the same image"),
        ("identifier", "breast-level_annotations.csv: study_id or image_id is empty"),
        ("label", "breast-level_annotations.csv: birads 'BI-RADS 0' is not documented"),
        ("label", f"breast-level_annotations.csv: density {CUT!r} is not documented"),
        ("label", "breast-level_annotations.csv: has no row for this image, but finding_annotations.csv has"),
        ("label", "breast-level_annotations.csv: laterality 'X' is not documented"),
        ("label", "finding_annotations.csv: category 'Mole' in row 2 is not documented"),
        ("label", f"finding_annotations.csv: category {CUT!r} in row 5 is not documented"),
        ("label", "finding_annotations.csv: xmin, ymin, xmax, ymax of row 3 are no box"),
    ],
}


@pytest.mark.parametrize("archive", WORDS, ids=lambda archive: archive.__name__.removeprefix("archive_of_"))
def test_the_words_of_a_refusal_stay(archive: Callable[[Path], Iterable[SourceStudy]], tmp_path: Path) -> None:
    refused = {view.refused for study in archive(tmp_path) for view in study.views if view.refused}
    assert sorted(refused) == sorted(WORDS[archive])
