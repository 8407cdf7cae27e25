from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from shards.errors import Refused
from shards.image.header import (
    find_implant,
    find_intent,
    find_laterality,
    find_spacing,
    find_vendor,
    find_view,
    refuse_other_objects,
)
from shards.image.picture import PictureConfig, read_picture
from shards.schema import EXCLUDED, SourceStudy, SourceView
from shards.sources.table.studies import table
from tests.support.archives import breast, coded, mg_header, sample_of, write_dicom


def table_of(root: Path, text: str) -> list[SourceStudy]:
    (root / "t.csv").write_text(text)
    return list(table(root, "t.csv", {"patient": "p", "image": "f", "view": "v"}))


def frame_side(side: str) -> list[Dataset]:
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = side
    group.FrameAnatomySequence = [anatomy]
    return [group]


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


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
        ({"ImageLaterality": None, "Laterality": "Left"}, "L"),
        ({"ImageLaterality": None, "ViewPosition": "LCC"}, "L"),
        ({"ImageLaterality": "R", "ViewPosition": "R MLO"}, "R"),
        ({"ImageLaterality": "R", "ViewPosition": "LAT"}, "R"),
    ],
)
def test_laterality_is_found_everywhere(tags: dict[str, Any], side: str | None) -> None:
    assert find_laterality(mg_header(**tags)) == side


@pytest.mark.parametrize(
    "other", [{"Laterality": "R"}, {"SharedFunctionalGroupsSequence": frame_side("R")}, {"ViewPosition": "RCC"}]
)
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
        ({"ViewPosition": "CRANIO-CAUDAL"}, "CC"),
        ({"ViewPosition": "LCC"}, "CC"),
        ({"ViewPosition": "L MLO"}, "MLO"),
        ({"ViewPosition": "mlo-id"}, "MLO"),
        ({"ViewPosition": "L CC Screening", "ViewCodeSequence": [coded("R-10242")]}, "CC"),
        ({"ViewPosition": "UNKNOWN", "ViewCodeSequence": [coded("R-10226")]}, "MLO"),
        ({"ViewPosition": "NONE", "ViewCodeSequence": [coded("R-10226")]}, "MLO"),
        ({"ViewPosition": "--"}, None),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("X1", CodeMeaning="cranio-caudal")]}, "CC"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("R-10226", CodeMeaning="cranio-caudal")]}, "MLO"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("R-10224", CodeMeaning="medio-lateral")]}, "ml"),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("R-10224")]}, "code r-10224"),
        ({"ViewPosition": "Oblique"}, "oblique"),
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
        {"ViewPosition": "AXILLARY"},
        {"ViewPosition": "CC RL"},
    ],
)
def test_another_view_is_neither_cc_nor_mlo(tags: dict[str, Any], tmp_path: Path) -> None:
    assert find_view(mg_header(**tags)) not in ("CC", "MLO", None)
    sample = sample_of(tmp_path, SourceView(write_dicom(tmp_path / "a.dcm", breast("L"), **tags)))
    assert [refusal.reason for refusal in sample.refusals] == ["other-view"]
    assert "other-view" in EXCLUDED


@pytest.mark.parametrize("position", ["MLO", "L MLO"])
def test_position_against_code_is_a_conflict(position: str) -> None:
    with pytest.raises(Refused) as caught:
        find_view(mg_header(ViewPosition=position, ViewCodeSequence=[coded("R-10242")]))
    assert caught.value.reason == "view-conflict"


def test_table_and_header_name_views_alike(tmp_path: Path) -> None:
    """A spelling is the same view from a table and from a header, and what is no CC or MLO is left out by its word."""
    reasons: dict[str, list[str]] = {}
    for text in ("mlo-id", "ml", "axillary", "CC MAG", "spot"):
        write_dicom(tmp_path / "a.dcm", breast("L"), ViewPosition=text)
        write_dicom(tmp_path / "b.dcm", breast("L"), ViewPosition=None)
        (study,) = table_of(tmp_path, f"p,f,v\n1,a.dcm,\n1,b.dcm,{text}\n")
        sample = sample_of(tmp_path, *study.views)
        reasons[text] = [view.view for view in sample.study.views] + [
            f"{refusal.reason} {refusal.message.split(chr(39))[1]}" for refusal in sample.refusals
        ]
    assert reasons == {
        **{"mlo-id": ["MLO"] * 2, "ml": ["other-view ml"] * 2, "axillary": ["other-view axillary"] * 2},
        **{"CC MAG": ["spot spot"] * 2, "spot": ["spot spot"] * 2},
    }


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
        ({"ViewModifierCodeSequence": [coded("X9", CodeMeaning="Spot Compression")]}, "spot"),
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


def test_functional_groups_are_looked_into_the_frames_own_first(tmp_path: Path) -> None:
    """A tomosynthesis volume has window, rescale, spacing and side there, and not beside its pixels (PS3.3 A.55.3)."""
    ramp = np.arange(200 * 160, dtype=np.uint16).reshape(200, 160) % 4096
    lut = item(LUTDescriptor=[4096, 0, 12], LUTData=np.arange(4095, -1, -1, dtype="<u2").tobytes())
    shared = item(
        FrameVOILUTSequence=[item(WindowCenter=[1000, 1], WindowWidth=[501, 1], VOILUTFunction="LINEAR")],
        PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-100)],
        PixelMeasuresSequence=[item(PixelSpacing=[0.1, 0.12])],
        FrameAnatomySequence=[item(FrameLaterality="R")],
        PlanePositionSequence=[],
    )
    tags: dict[str, Any] = {"ImageLaterality": None, "ViewPosition": None, "ViewCodeSequence": [coded("R-10226")]}
    tags |= {"WindowCenter": 9, "VOILUTSequence": [lut], "SharedFunctionalGroupsSequence": [shared]}
    config = PictureConfig(slab=True, long_side=200, crop=False, flip=False)
    windowed = np.clip((2 * ramp.astype(float) - 100 - 999.5) / 500 + 0.5, 0, 1)
    for frames in (1, 11):  # an enhanced object of a single frame too
        own = [item(FrameVOILUTSequence=[item(WindowCenter=3, WindowWidth=2)]) for _ in range(frames)]
        path = write_dicom(tmp_path / "a.dcm", np.stack([ramp] * frames), **tags)
        picture = read_picture(path, config)
        np.testing.assert_array_equal(picture.pixels, np.rint(255 * windowed))
        assert picture.fallbacks == ()
        (view,) = sample_of(tmp_path, SourceView(path), picture=config).study.views
        assert (view.laterality, view.view, view.pixel_spacing) == ("R", "MLO", (0.1, 0.12))
        middle = own[(frames - 1) // 2]
        middle.FrameVOILUTSequence = [item(VOILUTSequence=[lut])]
        middle.FrameAnatomySequence = [item(FrameLaterality="R")]
        middle.PixelMeasuresSequence = [item(PixelSpacing=[0.2, 0.2])]
        middle.PixelValueTransformationSequence = [item(RescaleSlope=1, RescaleIntercept=0)]
        path = write_dicom(tmp_path / "a.dcm", np.stack([ramp] * frames), **tags, PerFrameFunctionalGroupsSequence=own)
        np.testing.assert_array_equal(read_picture(path, config).pixels, np.rint(255 * (1 - ramp / 4095)))
        (view,) = sample_of(tmp_path, SourceView(path), picture=config).study.views
        assert (view.laterality, view.view, view.pixel_spacing) == ("R", "MLO", (0.2, 0.2))
        middle.FrameAnatomySequence[0].FrameLaterality = "L"
        path = write_dicom(tmp_path / "a.dcm", np.stack([ramp] * frames), **tags, PerFrameFunctionalGroupsSequence=own)
        (told,) = sample_of(tmp_path, SourceView(path), picture=config).refusals
        assert told.reason == "laterality-conflict"


def test_a_view_in_the_functional_groups(tmp_path: Path) -> None:
    groups = [item(FrameAnatomySequence=[item(ViewCodeSequence=[coded("R-10242")])])]
    path = write_dicom(tmp_path / "a.dcm", breast("L"), ViewPosition=None, PerFrameFunctionalGroupsSequence=groups)
    (view,) = sample_of(tmp_path, SourceView(path)).study.views
    assert view.view == "CC"


@pytest.mark.parametrize(
    ("told", "intent"),
    [("FOR PRESENTATION", "FOR PRESENTATION"), ("FOR PROCESSING", "FOR PROCESSING"), ("JANE DOE", None), (None, None)],
)
def test_intent_is_one_of_two(told: str | None, intent: str | None) -> None:
    assert find_intent(mg_header(PresentationIntentType=told)) == intent


@pytest.mark.parametrize(
    ("tags", "implant"),
    [
        ({"BreastImplantPresent": "YES"}, True),
        ({"BreastImplantPresent": " no "}, False),
        *(({"BreastImplantPresent": value}, None) for value in (None, "", "UNKNOWN", "N", "YES\\NO")),
        ({"ViewPosition": "MLOID"}, True),
        ({"ViewPosition": None, "ViewCodeSequence": [coded("399162004", CodeMeaning="cranio-caudal")]}, None),
        *(
            ({"ViewCodeSequence": [coded("399162004", ViewModifierCodeSequence=[modifier])]}, implant)
            for modifier, implant in (
                (coded("R-102D5"), True),
                (coded("399209000"), True),
                (coded("NEW", CodeMeaning="Implant Displaced"), True),
                (coded("399161006", CodeMeaning="Cleavage"), None),
            )
        ),
        ({"ViewModifierCodeSequence": [coded("R-102D5")]}, True),
        # Many machines always write NO; a view is set on purpose.
        ({"ViewModifierCodeSequence": [coded("399209000")], "BreastImplantPresent": "NO"}, True),
    ],
)
def test_an_implant_is_known_by_its_attribute_or_the_view(tags: dict[str, Any], implant: bool | None) -> None:
    assert find_implant(mg_header(**tags)) is implant


@pytest.mark.parametrize("told", ["YES", "NO", None])
@pytest.mark.parametrize("stated", [True, False, None])
def test_the_table_wins_over_the_header_about_an_implant(tmp_path: Path, told: str | None, stated: bool | None) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("L"), BreastImplantPresent=told)
    (view,) = sample_of(tmp_path, SourceView(path, implant=stated)).study.views
    of_header = {"YES": True, "NO": False, None: None}[told]
    assert view.implant is (of_header if stated is None else stated)
    assert view.conflicts == (("implant",) if (stated, told) in ((True, "NO"), (False, "YES")) else ())


def test_an_implant_that_one_image_shows_is_in_the_whole_breast_and_not_in_the_other(tmp_path: Path) -> None:
    def source(name: str, side: str, stated: bool | None = None, **tags: Any) -> SourceView:
        path = write_dicom(tmp_path / f"{name}.dcm", breast(side), ImageLaterality=side, **tags)
        return SourceView(path, implant=stated)

    views = [
        source("standard", "R", BreastImplantPresent="NO"),
        source("silent", "R"),
        source("displaced", "R", ViewModifierCodeSequence=[coded("399209000")]),
        source("stated", "R", False),
        source("other", "L", BreastImplantPresent="NO"),
        source("unknown", "L"),
    ]
    stored = sample_of(tmp_path, *views).study.views
    assert [view.implant for view in stored] == [True, True, True, False, False, None]


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
