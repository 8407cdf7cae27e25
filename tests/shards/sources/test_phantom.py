"""The synthetic cohort: deterministic, valid DICOM, and pictures that agree with the facts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from shards.errors import ShardError
from shards.schema import Finding, SourceStudy
from shards.sources.phantom import studies as module
from shards.sources.phantom.anatomy import HEIGHT, SPACING, WIDTH
from shards.sources.phantom.dicom import TRANSFER_SYNTAXES, Exam, write_mammogram
from shards.sources.phantom.image import Breast, Picture, draw_breast
from shards.sources.phantom.lesion import Lesion
from shards.sources.phantom.studies import GLANDULAR_SHARE, phantom, write_archive

SEED, PATIENTS = 3, 6

MALIGNANT_MASS = Finding(1, "mass", shape="irregular", margin="spiculated", density="high", pathology="malignant")
BENIGN_MASS = Finding(1, "mass", shape="oval", margin="circumscribed", density="equal", pathology="benign")
SPECKS = Finding(
    1, "calcification", calcification_type="fine pleomorphic", distribution="grouped", pathology="malignant"
)
COARSE = Finding(1, "calcification", calcification_type="coarse", distribution="grouped", pathology="benign")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_archive(folder, PATIENTS, SEED, workers=1)
    return folder


@pytest.fixture(scope="module")
def studies(root: Path) -> list[SourceStudy]:
    return list(phantom(root, PATIENTS, SEED))


def _bytes(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_seed_gives_same_bytes_in_any_number_of_processes(root: Path, tmp_path: Path) -> None:
    write_archive(tmp_path, PATIENTS, SEED, workers=2)
    assert _bytes(tmp_path) == _bytes(root)


def test_a_patient_does_not_depend_on_how_many_there_are_but_on_the_seed(root: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "fewer", 1, SEED, workers=1)
    fewer = _bytes(tmp_path / "fewer")
    assert len([name for name in fewer if name.endswith(".dcm")]) == 4
    assert all(_bytes(root)[name] == content for name, content in fewer.items() if name.endswith(".dcm"))
    write_archive(tmp_path / "other", 1, SEED + 1, workers=1)
    pixels = [pydicom.dcmread(next(folder.rglob("L_CC.dcm"))).pixel_array for folder in (root, tmp_path / "other")]
    assert not np.array_equal(pixels[0], pixels[1])


def test_studies_state_the_facts_and_leave_side_and_view_to_the_header(root: Path, studies: list[SourceStudy]) -> None:
    assert [study.patient_id for study in studies] == [f"PHANTOM-{SEED}-{i:05d}" for i in range(PATIENTS)]
    for study in studies:
        assert study.age is not None
        assert study.race
        assert study.ethnicity
        assert study.reason in ("screening", "diagnostic")
        assert len(study.views) == 4
        for view in study.views:
            assert view.path.parent == root / study.patient_id
            assert (view.laterality, view.view) == (None, None)
            assert view.labels.cancer == (view.labels.pathology == "malignant")
            allowed = {"malignant": (0, 4, 5), "benign": (2, 3), "normal": (1, 2)}[str(view.labels.pathology)]
            assert view.labels.birads in allowed
            assert {f.pathology for f in view.findings} == ({view.labels.pathology} - {"normal"})


def test_cohort_has_every_class_in_the_intended_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = Picture(np.zeros((8, 8), np.uint16), (replace(BENIGN_MASS, box=(0, 0, 1, 1)),))
    monkeypatch.setattr(module, "draw_breast", lambda breast, key: {"CC": empty, "MLO": empty})
    monkeypatch.setattr(module, "write_mammogram", lambda *arguments: None)
    write_archive(tmp_path, 1000, 0, workers=1)
    found = list(phantom(tmp_path, 1000, 0))
    share = {d: np.mean([s.views[0].labels.density == d for s in found]) for d in "ABCD"}
    assert share == pytest.approx({"A": 0.2, "B": 0.3, "C": 0.3, "D": 0.2}, abs=0.05)
    cancers = [sum(bool(v.labels.cancer) for v in s.views) for s in found]
    assert set(cancers) == {0, 2}, "at most one breast has a cancer, and both of its views say so"
    assert np.mean(np.array(cancers) > 0) == pytest.approx(0.8, abs=0.05)
    assert np.mean([any(v.labels.pathology == "benign" for v in s.views) for s in found]) == pytest.approx(
        0.2, abs=0.05
    )


def test_both_views_of_a_breast_show_the_same_lesions(studies: list[SourceStudy]) -> None:
    seen = 0
    for study in studies:
        for cc, mlo in (study.views[:2], study.views[2:]):
            assert cc.labels == mlo.labels
            for one, other in zip(cc.findings, mlo.findings, strict=True):
                assert replace(one, box=None) == replace(other, box=None)
                assert None not in (one.box, other.box)
                assert one.box != other.box
                seen += 1
    assert seen > 0


@pytest.mark.parametrize("laterality", ["L", "R"])
def test_a_lesion_lies_equally_deep_in_both_views(laterality: str) -> None:
    for patient in range(5):
        breast = Breast(laterality, 0.3, 100.0, (Lesion(BENIGN_MASS, 14.0),))
        depth = []
        for picture in draw_breast(breast, (0, patient, 0)).values():
            box = picture.findings[0].box
            assert box is not None
            tissue = picture.pixels[HEIGHT // 4 :] > 400  # below the burnt-in label
            columns = np.flatnonzero(tissue.sum(axis=0) > 8)
            nipple = columns.max() if laterality == "L" else columns.min()
            depth.append(abs(nipple - (box[0] + box[2]) / 2) * SPACING)
        assert depth[0] == pytest.approx(depth[1], abs=8.0)  # mm; 10 is the rule of the reading room


@pytest.mark.parametrize("finding", [MALIGNANT_MASS, BENIGN_MASS, SPECKS, COARSE])
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_the_box_holds_what_the_lesion_changes(finding: Finding, laterality: str) -> None:
    healthy = Breast(laterality, 0.5, 100.0)
    ill = replace(healthy, lesions=(Lesion(finding, 16.0),))
    for patient in range(3):
        # the anatomy, not the absence of a lesion, decides everything else
        pairs = zip(
            draw_breast(ill, (1, patient, 0)).values(), draw_breast(healthy, (1, patient, 0)).values(), strict=True
        )
        for with_lesion, without in pairs:
            box = with_lesion.findings[0].box
            assert box is not None
            assert not without.findings
            x0, y0, x1, y1 = map(int, box)
            change = with_lesion.pixels.astype(int) - without.pixels
            inside = change[y0:y1, x0:x1].copy()
            change[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 0
            assert np.abs(change).max() < 0.25 * inside.max(), "only the faint ends of spicules leave the box"
            assert inside.max() > 250
            assert all(np.abs(side).max() > 0 for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1])), "tight"


def test_a_malignant_mass_stands_out_of_the_densest_breast() -> None:
    for patient in range(4):
        breast = Breast("L", 0.8, 100.0, (Lesion(MALIGNANT_MASS, 16.0),))
        for picture in draw_breast(breast, (2, patient, 0)).values():
            box = picture.findings[0].box
            assert box is not None
            x, y = int(box[0] + box[2]) // 2, int(box[1] + box[3]) // 2
            core = picture.pixels[y - 6 : y + 7, x - 6 : x + 7].mean()
            assert core > np.quantile(picture.pixels[picture.pixels > 400], 0.97)


def test_dense_tissue_covers_more_of_the_breast_from_a_to_d() -> None:
    bright = []
    for low, high in GLANDULAR_SHARE.values():
        pictures = [draw_breast(Breast("L", (low + high) / 2, 100.0), (0, i, 0))["CC"].pixels for i in range(4)]
        bright.append(np.mean([np.mean(p[p > 400] > 0.42 * 4095) for p in pictures]))
    assert np.all(np.diff(bright) > 0.1), bright


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("syntax", sorted(set(TRANSFER_SYNTAXES)))
def test_pixels_survive_each_transfer_syntax_and_polarity(
    tmp_path: Path, syntax: pydicom.uid.UID, inverted: bool
) -> None:
    pixels = draw_breast(Breast("R", 0.3, 90.0), (0, 0, 0))["MLO"].pixels
    exam = Exam("P", "S", 50, inverted, syntax)
    write_mammogram(tmp_path / "a.dcm", pixels, SPACING, "R", "MLO", exam)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert dataset.file_meta.TransferSyntaxUID == syntax
    assert dataset.PhotometricInterpretation == ("MONOCHROME1" if inverted else "MONOCHROME2")
    assert dataset.PresentationLUTShape == ("INVERSE" if inverted else "IDENTITY")
    stored = dataset.pixel_array
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(4095 - stored if inverted else stored, pixels)


def test_breast_is_bright_on_a_dark_background_at_the_chest_wall_of_its_side(studies: list[SourceStudy]) -> None:
    for view in (view for study in studies for view in study.views):
        dataset = pydicom.dcmread(view.path)
        image = dataset.pixel_array.astype(int)
        assert image.shape == (HEIGHT, WIDTH)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            image = 4095 - image
        wall, outer = (
            (image[:, :40], image[:, -40:]) if dataset.ImageLaterality == "L" else (image[:, -40:], image[:, :40])
        )
        assert np.median(wall) > 800
        assert np.median(outer) < 100


def test_headers_say_what_the_standard_asks_for(studies: list[SourceStudy]) -> None:
    uids: list[str] = []
    for study in studies:
        headers = [pydicom.dcmread(view.path, stop_before_pixels=True) for view in study.views]
        assert {(h.ImageLaterality, h.ViewPosition) for h in headers} == {(s, v) for s in "LR" for v in ("CC", "MLO")}
        assert len({h.StudyInstanceUID for h in headers}) == len({h.SeriesInstanceUID for h in headers}) == 1
        uids += [h.SOPInstanceUID for h in headers]
        for h in headers:
            assert h.SOPClassUID == h.file_meta.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.1.2"
            assert h.file_meta.MediaStorageSOPInstanceUID == h.SOPInstanceUID
            assert all(pydicom.uid.UID(uid).is_valid for uid in (h.SOPInstanceUID, h.StudyInstanceUID))
            assert (h.Modality, h.PatientSex, h.PresentationIntentType) == ("MG", "F", "FOR PRESENTATION")
            assert h.PatientID == study.patient_id
            assert h.PatientAge == f"{study.age:03d}Y"
            assert re.fullmatch(r"[AP]", h.PatientOrientation[0])
            assert (h.PatientOrientation[0] == "A") == (h.ImageLaterality == "L")
            assert h.ViewCodeSequence[0].CodeValue == {"CC": "399162004", "MLO": "399368009"}[h.ViewPosition]
            assert (h.BitsAllocated, h.BitsStored, h.HighBit, h.PixelRepresentation) == (16, 12, 11, 0)
            assert [float(s) for s in h.ImagerPixelSpacing] == [SPACING, SPACING]
            assert (float(h.WindowCenter), float(h.WindowWidth)) == (2048, 4096)
    assert len(set(uids)) == 4 * PATIENTS


def test_the_cohort_mixes_transfer_syntaxes_and_polarities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exams: list[Exam] = []
    empty = Picture(np.zeros((8, 8), np.uint16), ())
    monkeypatch.setattr(module, "draw_breast", lambda breast, key: {"CC": empty})
    monkeypatch.setattr(module, "write_mammogram", lambda *arguments: exams.append(arguments[-1]))
    write_archive(tmp_path, 300, 0, workers=1)
    assert {e.transfer_syntax for e in exams} == {ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless}
    assert np.mean([e.inverted for e in exams]) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize(
    ("patients", "seed", "named"), [(PATIENTS + 1, SEED, "patients"), (PATIENTS, SEED + 1, "seed")]
)
def test_an_archive_of_other_parameters_is_refused(root: Path, patients: int, seed: int, named: str) -> None:
    with pytest.raises(ShardError, match=rf"cohort.json: {named} is .* requested .*; set another pack.root") as caught:
        list(phantom(root, patients, seed))
    assert "\n" not in str(caught.value)


def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="patients must be positive"):
        write_archive(tmp_path / "new", 0, 0)
    assert not (tmp_path / "new").exists()


def test_an_archive_without_its_facts_file_is_written_again(root: Path, tmp_path: Path) -> None:
    whole = _bytes(root)
    torn = tmp_path / f"PHANTOM-{SEED}-00000" / "L_CC.dcm"
    torn.parent.mkdir()
    torn.write_bytes(whole[f"PHANTOM-{SEED}-00000/L_CC.dcm"][:1000])
    assert len(list(phantom(tmp_path, PATIENTS, SEED))) == PATIENTS
    assert _bytes(tmp_path) == whole
    assert json.loads(whole["cohort.json"])["patients"] == PATIENTS
