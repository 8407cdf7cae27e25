from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
import pytest
from archives import breast, coded, mg_header, sample_of, write_dicom
from pydicom.dataset import Dataset

from shards.header import (
    find_intent,
    find_laterality,
    find_spacing,
    find_vendor,
    find_view,
    refuse_other_objects,
)
from shards.schema import EXCLUDED, Refused, SourceView


def frame_side(side: str) -> list[Dataset]:
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = side
    group.FrameAnatomySequence = [anatomy]
    return [group]


# --- laterality


@pytest.mark.parametrize(
    ("tags", "side"),
    [
        ({"ImageLaterality": "R"}, "R"),
        ({"ImageLaterality": "", "Laterality": "R"}, "R"),
        ({"ImageLaterality": None, "Laterality": " r "}, "R"),
        ({"ImageLaterality": None, "SharedFunctionalGroupsSequence": frame_side("R")}, "R"),
        ({"ImageLaterality": "L", "Laterality": "L", "SharedFunctionalGroupsSequence": frame_side("L")}, "L"),
        ({"ImageLaterality": "B"}, None),
        ({"ImageLaterality": "B", "Laterality": "L"}, "L"),
        ({"ImageLaterality": None}, None),
        ({"ImageLaterality": None, "PatientOrientation": ["A", "R"]}, "L"),
        ({"ImageLaterality": None, "PatientOrientation": ["P", "L"]}, "R"),
        ({"ImageLaterality": None, "PatientOrientation": ["A", "FR"]}, "L"),
        ({"ImageLaterality": None, "PatientOrientation": ["P", "FL"]}, "R"),
        ({"ImageLaterality": None, "PatientOrientation": ["A", "F"]}, None),
        ({"ImageLaterality": None, "PatientOrientation": ["L", "F"]}, None),
        ({"ImageLaterality": None, "PatientOrientation": ["A", "LR"]}, None),
        ({"ImageLaterality": None, "PatientOrientation": "MLO"}, None),
        ({"ImageLaterality": None, "PatientOrientation": ["A", ""]}, None),
        ({"ImageLaterality": "R", "PatientOrientation": ["A", "R"]}, "R"),  # a name counts before a direction
        ({"ImageLaterality": None, "SharedFunctionalGroupsSequence": []}, None),
    ],
)
def test_laterality_is_found_everywhere(tags: dict[str, Any], side: str | None) -> None:
    assert find_laterality(mg_header(**tags)) == side


@pytest.mark.parametrize("other", [{"Laterality": "R"}, {"SharedFunctionalGroupsSequence": frame_side("R")}])
def test_two_lateralities_are_a_conflict(other: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        find_laterality(mg_header(ImageLaterality="L", **other))
    assert caught.value.reason == "laterality-conflict"


# --- view


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "MLO"}, "MLO"),
        ({"ViewPosition": " cc "}, "CC"),
        ({"ViewPosition": "", "ViewCodeSequence": [coded("R-10242")]}, "CC"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("399162004")]}, "CC"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("R-10226")]}, "MLO"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("399368009")]}, "MLO"),
        ({"ViewPosition": "CC", "ViewCodeSequence": [coded("R-10242")]}, "CC"),
        ({"ViewPosition": None, "PatientOrientation": "MLO"}, "MLO"),
        ({"ViewPosition": None, "PatientOrientation": ["A", "L"]}, None),
        ({"ViewPosition": None, "AcquisitionDeviceProcessingDescription": "L MLO"}, "MLO"),
        ({"ViewPosition": None, "AcquisitionDeviceProcessingDescription": "MAMMO,CC,RT"}, "CC"),
        ({"ViewPosition": None, "AcquisitionDeviceProcessingDescription": "CC MLO"}, None),
        ({"ViewPosition": None, "AcquisitionDeviceProcessingDescription": "ACCURATE"}, None),
        ({"ViewPosition": None}, None),
        ({"ViewPosition": None, "ViewCodeSequence": []}, None),
    ],
)
def test_view_is_found_everywhere(tags: dict[str, Any], view: str | None) -> None:
    assert find_view(mg_header(**tags)) == view


@pytest.mark.parametrize(
    "tags",
    [
        {"ViewPosition": "XCCL", "ViewCodeSequence": [coded("R-10242")]},
        {"ViewPosition": "ML"},
        {"ViewPosition": "LM"},
        {"ViewPosition": None, "ViewCodeSequence": [coded("R-10224")]},  # medio-lateral
        {"ViewPosition": "XCCL", "AcquisitionDeviceProcessingDescription": "CC"},
    ],
)
def test_another_view_is_neither_cc_nor_mlo(tags: dict[str, Any], tmp_path: Path) -> None:
    assert find_view(mg_header(**tags)) not in ("CC", "MLO", None)
    sample = sample_of(tmp_path, SourceView(write_dicom(tmp_path / "a.dcm", breast("L"), **tags)))
    assert [refusal.reason for refusal in sample.refusals] == ["other-view"]
    assert "other-view" in EXCLUDED


def test_position_against_code_is_a_conflict() -> None:
    with pytest.raises(Refused) as caught:
        find_view(mg_header(ViewPosition="MLO", ViewCodeSequence=[coded("R-10242")]))
    assert caught.value.reason == "view-conflict"


# --- table against header


@pytest.mark.parametrize(
    ("tags", "told", "expected", "conflicts"),
    [
        ({}, {}, ("L", "CC"), ()),
        ({}, {"laterality": "L", "view": "CC"}, ("L", "CC"), ()),
        ({}, {"laterality": "R"}, ("R", "CC"), ("laterality",)),
        ({}, {"view": "MLO"}, ("L", "MLO"), ("view",)),
        ({}, {"laterality": "R", "view": "MLO"}, ("R", "MLO"), ("laterality", "view")),
        ({"ImageLaterality": None, "ViewPosition": None}, {"laterality": "R", "view": "MLO"}, ("R", "MLO"), ()),
        ({"Laterality": "R"}, {"laterality": "L"}, ("L", "CC"), ("laterality",)),
        ({"ViewCodeSequence": [coded("R-10226")]}, {"view": "MLO"}, ("L", "MLO"), ("view",)),
        ({"ViewPosition": "XCCL"}, {"view": "CC"}, ("L", "CC"), ("view",)),
    ],
)
def test_the_table_wins_and_the_conflict_is_kept(
    tags: dict[str, Any], told: dict[str, Any], expected: tuple[str, str], conflicts: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("L"), **tags)
    sample = sample_of(tmp_path, SourceView(path, **told))
    assert not sample.refusals
    (view,) = sample.study.views
    assert (view.laterality, view.view) == expected
    assert view.conflicts == conflicts


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Laterality": "R"}, "laterality-conflict"),
        ({"ViewCodeSequence": [coded("R-10226")]}, "view-conflict"),
        ({"ImageLaterality": None}, "laterality"),
        ({"ViewPosition": None}, "view"),
    ],
)
def test_without_a_table_the_header_must_tell_and_agree(tags: dict[str, Any], reason: str, tmp_path: Path) -> None:
    sample = sample_of(tmp_path, SourceView(write_dicom(tmp_path / "a.dcm", breast("L"), **tags)))
    assert [refusal.reason for refusal in sample.refusals] == [reason]
    assert not sample.images


def test_mirroring_depends_on_the_pixels_and_not_on_the_label(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("R"), ImageLaterality="L")
    assert sample_of(tmp_path, SourceView(path)).study.views[0].flipped


# --- other objects


def modified(code: str) -> list[Dataset]:
    return [coded("R-10242", ViewModifierCodeSequence=[coded("R-40AAA"), coded(code)])]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "MR"}, "modality"),
        ({"Modality": "SR"}, "modality"),
        ({"BodyPartExamined": "CHEST"}, "not-a-breast"),
        ({"SpecimenDescriptionSequence": [Dataset()]}, "specimen"),
        ({"SeriesDescription": "L Specimen"}, "specimen"),
        ({"ProtocolName": "specimen MAG"}, "specimen"),
        ({"SeriesDescription": "ACR Phantom"}, "not-a-breast"),
        ({"ProtocolName": "Flat Field"}, "not-a-breast"),
        ({"ProtocolName": "flatfield"}, "not-a-breast"),
        ({"SeriesDescription": "Calibration 28 kV"}, "not-a-breast"),
        ({"SeriesDescription": "Quality Control"}, "not-a-breast"),
        ({"SeriesDescription": "L CC C-View"}, "2d-synthetic"),
        ({"SeriesDescription": "R MLO Intelligent 2D"}, "2d-synthetic"),
        ({"SeriesDescription": "V-Preview"}, "2d-synthetic"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]}, "2d-synthetic"),
        ({"ViewCodeSequence": modified("R-102D6")}, "spot"),
        ({"ViewCodeSequence": modified("R-102D7")}, "spot"),
        ({"ViewCodeSequence": modified("399163009")}, "spot"),
        ({"ViewModifierCodeSequence": [coded("399055006")]}, "spot"),
        ({"PhotometricInterpretation": "HSV"}, "colour"),
        ({"PhotometricInterpretation": "CMYK"}, "colour"),
    ],
)
def test_other_objects_are_refused(tags: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        refuse_other_objects(mg_header(**tags))
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"Modality": None},  # RSNA files
        {"Modality": "RG"},
        {"Modality": "CR"},
        {"Modality": "DX"},
        {"BodyPartExamined": "breast"},
        {"BodyPartExamined": ""},
        {"ImageType": ["DERIVED", "PRIMARY", ""]},
        {"ViewCodeSequence": [coded("R-10242")]},
        {"ViewCodeSequence": modified("R-102D5")},  # cleavage: the breast is whole
        {"SpecimenDescriptionSequence": []},
        {"SeriesDescription": "Routine screening preview"},
        {"SeriesDescription": "L CC-View"},  # holds "C-View", and is none
        {"PhotometricInterpretation": "MONOCHROME1"},
    ],
)
def test_mammograms_pass(tags: dict[str, Any]) -> None:
    refuse_other_objects(mg_header(**tags))


# --- facts


@pytest.mark.parametrize(
    ("maker", "vendor"),
    [
        ("HOLOGIC, Inc.", "hologic"),
        ("Lorad, A Hologic Company", "hologic"),
        ("GE MEDICAL SYSTEMS", "ge"),
        ("GE Healthcare", "ge"),
        ("SIEMENS", "siemens"),
        ("Siemens Healthineers", "siemens"),
        ("FUJIFILM Corporation", "fujifilm"),
        ("FUJI PHOTO FILM Co., ltd.", "fujifilm"),
        ("Philips Digital Mammography Sweden AB", "philips"),
        ("Sectra Imtec AB", "philips"),
        ("Planmed", "planmed"),
        ("IMS s.r.l.", "ims"),
        ("Carestream Health", "carestream"),
        ("KODAK", "carestream"),
        ("Agfa", "agfa"),
        ("KONICA MINOLTA", "konica minolta"),
        ("St. Mary's Hospital workstation", "other"),
        ("GENERAL HOSPITAL of Dr. Siemens", "other"),
        ("", "other"),
        (None, "other"),
    ],
)
def test_vendors_are_a_closed_vocabulary(maker: str | None, vendor: str) -> None:
    assert find_vendor(mg_header(Manufacturer=maker)) == vendor


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"PixelSpacing": [0.05, 0.06]}, (0.05, 0.06)),
        ({"ImagerPixelSpacing": [0.07, 0.08]}, (0.07, 0.08)),
        ({"PixelSpacing": [0.05, 0.06], "ImagerPixelSpacing": [0.07, 0.08]}, (0.05, 0.06)),
        ({"PixelSpacing": [0, 0]}, None),
        ({"PixelSpacing": [-0.1, 0.1]}, None),
        ({"PixelSpacing": [100, 100]}, None),
        ({"PixelSpacing": "0.1"}, None),
        ({"PixelSpacing": [0.1, 0.1, 0.1]}, None),
        ({}, None),
    ],
)
def test_spacing(tags: dict[str, Any], spacing: tuple[float, float] | None) -> None:
    assert find_spacing(mg_header(**tags)) == spacing


@pytest.mark.parametrize(
    ("told", "intent"),
    [("FOR PRESENTATION", "FOR PRESENTATION"), ("FOR PROCESSING", "FOR PROCESSING"), ("JANE DOE", None), (None, None)],
)
def test_intent_is_one_of_two(told: str | None, intent: str | None) -> None:
    assert find_intent(mg_header(PresentationIntentType=told)) == intent


def test_facts_of_the_header_reach_the_sample(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm",
        breast("L"),
        ImagerPixelSpacing=[0.07, 0.08],
        PresentationIntentType="FOR PRESENTATION",
        Manufacturer="HOLOGIC, Inc.",
    )
    (view,) = sample_of(tmp_path, SourceView(path)).study.views
    assert (view.laterality, view.view, view.vendor) == ("L", "CC", "hologic")
    assert (view.pixel_spacing, view.presentation_intent) == ((0.07, 0.08), "FOR PRESENTATION")
    assert (view.size, view.original_size) == ((64, view.size[1]), (200, 160))


def test_the_same_instance_twice_is_one_image(tmp_path: Path) -> None:
    one = write_dicom(tmp_path / "1.dcm", breast("L"), SOPInstanceUID="1.2.3")
    two = write_dicom(tmp_path / "2.dcm", breast("L"), SOPInstanceUID="1.2.3")
    nameless = write_dicom(tmp_path / "3.dcm", breast("L"))
    dataset = pydicom.dcmread(nameless)
    del dataset.SOPInstanceUID
    dataset.save_as(nameless)
    sample = sample_of(tmp_path, *(SourceView(path) for path in (one, two, nameless, nameless)))
    assert [refusal.reason for refusal in sample.refusals] == ["duplicate"]
    assert len(sample.images) == 3
    assert "1.2.3" not in str(sample.study)
