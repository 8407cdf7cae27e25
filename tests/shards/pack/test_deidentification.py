"""No attribute of a DICOM header reaches a shard, unless it is on the short list of facts that a sample keeps.

Planted is every attribute of pydicom's dictionary that decoding does not need. PS3.15 Table E.1-1 lists a part of
them: whatever it names, of this edition or the next, is among the planted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.read.manifest import Manifest
from shards.read.reader import ShardReader
from shards.schema import SourceStudy, SourceView
from shards.sources.all_sources import SOURCES
from tests.support.archives import breast, write_dicom

# What decides how the pixels are decoded and shown. Without a legal value there is no picture.
DECODING = {
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelDataProviderURL",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "ModalityLUTSequence",
    "PresentationLUTShape",
    "SpecificCharacterSet",
}
# What tells whether the file is a mammogram, and of what: a foreign value refuses the file.
# The words of these attributes are compared with fixed vocabularies, and what is stored is a word of the vocabulary.
VOCABULARY = {
    "Modality": "MG",
    "BodyPartExamined": "BREAST",
    "ImageLaterality": "L",
    "Laterality": "L",
    "FrameLaterality": "L",
    "ViewPosition": "CC",
    "SpecimenDescriptionSequence": None,
    "ViewCodeSequence": None,
    "SharedFunctionalGroupsSequence": None,
}
# Numbers that a sample keeps as they are, on purpose.
KEPT = {"PixelSpacing": [0.07, 0.08], "ImagerPixelSpacing": [0.07, 0.08]}

# Some of the attributes of PS3.15 Table E.1-1, typed by hand.
TABLE_E_1_1 = (
    "AccessionNumber",
    "AcquisitionDate",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "AdmissionID",
    "AdmittingDiagnosesDescription",
    "ClinicalTrialSubjectID",
    "ContentDate",
    "DetectorID",
    "DeviceSerialNumber",
    "DeviceUID",
    "EthnicGroup",
    "FrameOfReferenceUID",
    "GantryID",
    "ImageComments",
    "InstitutionAddress",
    "InstitutionName",
    "InstitutionalDepartmentName",
    "IssuerOfPatientID",
    "MedicalRecordLocator",
    "NameOfPhysiciansReadingStudy",
    "Occupation",
    "OperatorsName",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientAddress",
    "PatientAge",
    "PatientBirthDate",
    "PatientBirthName",
    "PatientComments",
    "PatientID",
    "PatientMotherBirthName",
    "PatientName",
    "PatientReligiousPreference",
    "PatientSex",
    "PatientSize",
    "PatientTelephoneNumbers",
    "PatientWeight",
    "PerformedProcedureStepID",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "PlateID",
    "PregnancyStatus",
    "ProtocolName",
    "ReferringPhysicianName",
    "RequestAttributesSequence",
    "ResponsiblePerson",
    "SOPInstanceUID",
    "SeriesDate",
    "SeriesDescription",
    "SeriesInstanceUID",
    "StationName",
    "StudyDate",
    "StudyDescription",
    "StudyID",
    "StudyInstanceUID",
    "StudyTime",
)

NUMBERS = {"US": 2, "SS": 2, "UL": 4, "SL": 4, "UV": 8, "SV": 8}  # bytes


@dataclass
class Planted:
    """Values as they would look in a shard: text in whatever case, numbers written out, bytes as they are."""

    texts: set[str] = field(default_factory=set)
    raw: set[bytes] = field(default_factory=set)
    keywords: set[str] = field(default_factory=set)
    count: int = 0

    def value(self, vr: str) -> Any:
        """A new value of this representation that occurs nowhere by chance; None where it has none of its own."""
        self.count += 1
        number = self.count
        if vr in ("AE", "CS", "SH", "LO", "ST", "LT", "UC", "UT", "UR"):
            return self._text(f"PLANT{number:05d}QX")
        if vr == "PN":
            return self._text(f"PLANT{number:05d}QX") + "^" + self._text(f"JANE{number:05d}QX")
        if vr == "UI":
            return self._text(f"1.2.826.{7_000_000_000 + number}.4711")
        if vr == "DA":
            return self._text(f"{1800 + number // 372 % 100:04d}{number // 31 % 12 + 1:02d}{number % 31 + 1:02d}")
        if vr == "TM":
            return self._text(f"{number % 24:02d}{number // 24 % 60:02d}{number % 60:02d}.{900_000 + number:06d}")
        if vr == "DT":
            return self._text(f"18991231235959.{800_000 + number:06d}")
        if vr == "AS":
            return self._text(f"{400 + number % 599:03d}W")
        if vr == "IS":
            return self._text(str(1_700_000_000 + number))
        if vr == "DS":
            return self._text(f"{31_415_926_000 + number}.5")
        if vr in ("FL", "FD"):
            return float(self._text(str(float(2**22 + number) + 0.5)))
        if vr in NUMBERS:
            return int(self._text(str((2**15 - 1 if NUMBERS[vr] == 2 else 2_040_000_000) - number % 32_000)))
        if vr == "AT":
            return Tag(0x7777, number)
        if vr in ("OB", "OD", "OF", "OL", "OV", "OW", "UN"):
            data = f"RAWPLANT{number:05d}QX-".encode()  # 16 bytes: whole words of all lengths
            self.raw.add(data)
            return data
        return None

    def _text(self, text: str) -> str:
        self.texts.add(text)
        return text

    def found(self, data: bytes) -> list[str]:
        """The planted values in `data`: in any case, as UTF-8 or UTF-16."""
        hits = [raw.decode() for raw in self.raw if raw in data]
        lower = data.lower()
        # A short number occurs by chance in offsets and sizes: it counts where it stands alone, as a JSON number does.
        words = set(re.findall(rb"[a-z0-9_.]+", lower))
        for text in self.texts:
            small = text.lower().encode()
            long = len(small) >= 9
            if (small in lower if long else small in words) or small.decode().encode("utf-16-le") in lower:
                hits.append(text)
        return hits


def attributes() -> Iterator[tuple[str, int, str]]:
    """Keyword, tag and VR of every attribute that can stand in a data set and is not needed to decode it."""
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if keyword and tag >> 16 > 0x0002 and keyword not in DECODING:
            yield keyword, tag, vr


def plant(dataset: Dataset, planted: Planted, nested: bool) -> None:
    for keyword, tag, vr in attributes():
        if keyword in VOCABULARY and not nested:
            if VOCABULARY[keyword]:
                setattr(dataset, keyword, VOCABULARY[keyword])
            continue
        if keyword in KEPT:
            continue
        vr = vr.split(" or ")[-1] if " or " in vr else vr
        vr = {"OW": "OB"}.get(vr, vr)
        if vr == "SQ":
            if nested:
                continue
            item = Dataset()
            item.add_new(0x00080104, "LO", planted.value("LO"))
            item.add_new(0x00080100, "SH", planted.value("SH"))
            item.add_new(0x0040A123, "PN", planted.value("PN"))
            item.add_new(0x00080018, "UI", planted.value("UI"))
            dataset.add_new(tag, "SQ", Sequence([item]))
        else:
            value = planted.value(vr)
            if value is None:
                continue
            dataset.add_new(tag, vr, value)
        planted.keywords.add(keyword)


def planted_file(path: Path) -> Planted:
    planted = Planted()
    dataset = dcmread(write_dicom(path, breast("L"), **KEPT))
    plant(dataset, planted, nested=False)
    item = Dataset()
    plant(item, planted, nested=True)
    dataset.ReferencedStudySequence.append(item)
    block = dataset.private_block(0x0099, planted.value("LO"), create=True)
    for element, vr in enumerate(("LO", "PN", "UI", "DA", "LT", "UN", "OB", "DS", "FD", "SH")):
        block.add_new(element, vr, planted.value(vr))
    dataset.file_meta.ImplementationVersionName = planted.value("SH")
    dataset.file_meta.SourceApplicationEntityTitle = planted.value("AE")
    dataset.file_meta.PrivateInformationCreatorUID = planted.value("UI")
    dataset.file_meta.PrivateInformation = planted.value("OB")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.preamble = b"PREAMBLEPLANT-QX".ljust(128, b"\0")
    planted.raw.add(b"PREAMBLEPLANT-QX")
    dataset.save_as(path)
    return planted


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Manifest, Planted]]:
    folder = tmp_path_factory.mktemp("planted")
    planted = planted_file(folder / "archive" / "PLANTEDFOLDER-QX" / "PLANTEDFILE-QX.dcm")
    planted.texts |= {"PLANTEDFOLDER-QX", "PLANTEDFILE-QX", "PLANTEDPATIENT-QX", "PLANTEDSTUDY-QX", str(folder)}

    def source(root: Path) -> Iterator[SourceStudy]:
        (path,) = root.rglob("*.dcm")
        yield SourceStudy("PLANTEDPATIENT-QX", "PLANTEDSTUDY-QX", (SourceView(path),), age=50)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "planted", source)
        config = PackConfig(
            source="planted",
            root=str(folder / "archive"),
            out=str(folder / "out"),
            long_side=100,
            workers=1,
            key_file=str(folder / "hash.key"),
        )
        yield folder / "out", pack(config), planted


def test_nothing_that_is_planted_is_found(built: tuple[Path, Manifest, Planted]) -> None:
    out, manifest, planted = built
    assert (manifest.images, manifest.images_refused, manifest.images_excluded) == (1, {}, {})
    files = [*out.glob("*.tar"), out / "manifest.json"]
    assert len(files) == 2
    for path in files:
        assert planted.found(path.read_bytes()) == [], path.name


def test_names_of_shards_and_members_tell_nothing(built: tuple[Path, Manifest, Planted]) -> None:
    out, _, planted = built
    assert planted.found(" ".join(str(path.relative_to(out)) for path in out.rglob("*")).encode()) == []


def test_what_is_kept_is_the_list_and_no_more(built: tuple[Path, Manifest, Planted]) -> None:
    (study,) = (ShardReader(built[0]).study(0),)
    (view,) = study.views
    assert (view.laterality, view.view) == ("L", "CC")
    assert view.pixel_spacing == (0.07, 0.08)
    assert (view.vendor, view.presentation_intent) == ("other", None)
    assert re.fullmatch(r"[0-9a-f]{16}", view.instance or "")
    assert (study.age, study.race, study.ethnicity, study.reason) == (50, None, None, None)
    assert (view.report, view.findings, view.conflicts) == (None, (), ())


def test_the_planted_are_nearly_all_that_there_is(built: tuple[Path, Manifest, Planted]) -> None:
    planted = built[2]
    known = {keyword for keyword, _, _ in attributes()}
    left_out = known - planted.keywords
    assert len(planted.keywords) > 4500
    assert {keyword for keyword in left_out if keyword in TABLE_E_1_1} == set()
    assert len(left_out) < 40, sorted(left_out)
    assert len(planted.texts) > 5000


@pytest.mark.parametrize("keyword", TABLE_E_1_1)
def test_the_table_of_the_standard_is_planted(keyword: str, built: tuple[Path, Manifest, Planted]) -> None:
    assert keyword in built[2].keywords


def test_the_search_finds_what_is_there(built: tuple[Path, Manifest, Planted]) -> None:
    """A test of the test: a value of every kind is seen when it does leak, whatever the case."""
    planted = built[2]
    texts = set(sorted(planted.texts)[::20])
    raw = {value.decode() for value in planted.raw}
    assert set(planted.found(str(sorted(texts)).lower().encode() + b" ".join(planted.raw))) >= texts | raw
    assert set(planted.found(" ".join(texts).lower().encode("utf-16-le"))) >= texts
    assert planted.found(b'{"age": 50, "size": [100, 64]}') == []


def test_every_planted_value_is_in_the_file_that_was_packed(built: tuple[Path, Manifest, Planted]) -> None:
    out, _, planted = built
    (path,) = (out.parent / "archive").rglob("*.dcm")
    data = path.read_bytes()
    assert all(raw in data for raw in planted.raw)
    texts = [text for text in planted.texts if text.startswith(("PLANT", "JANE", "1.2.826")) and "-QX" not in text]
    assert len(texts) > 2000
    assert all(text.encode() in data for text in texts)


def test_the_manifest_records_how(built: tuple[Path, Manifest, Planted]) -> None:
    assert built[1].deidentification == {
        "113100": "Basic Application Confidentiality Profile",
        "113108": "Retain Patient Characteristics Option",
    }
    assert b'"113100"' in (built[0] / "manifest.json").read_bytes()
