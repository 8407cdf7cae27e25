"""Which files are read, to which values, and what is said of those that are not."""

from __future__ import annotations

import errno
import gzip
import io
import logging
import os
import re
import resource
import shutil
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)
from scipy.fft import dctn

from shards.errors import Refused
from shards.image import dicom_file
from shards.image.decode import decode, open_image
from shards.image.dicom_file import find_file
from shards.image.jpeg_streams import LARGEST
from shards.image.picture import PictureConfig, read_picture
from shards.processes import quiet
from shards.schema import SourceView
from shards.sources.cbis_ddsm.studies import cbis_ddsm
from shards.sources.headers import dicom_files
from tests.support.archives import (
    as_mammogram,
    breast,
    compressed,
    plain,
    sample_file,
    sample_of,
    write_dicom,
    write_png,
)

TWELVE = breast("L")
EIGHT = (TWELVE >> 4).astype(np.uint8)
HEIGHT, WIDTH = EIGHT.shape
COLOURS = np.dstack([EIGHT, EIGHT // 2, EIGHT // 4])
# What libraries say of themselves, and what no user of ours has to do.
FOREIGN = re.compile(r"force|Error|Exception|Traceback|pylibjpeg|pydicom|plugin|object has|[\n{]|/tmp")


def read(path: Path) -> NDArray[Any]:
    """The stored values."""
    opened = open_image(path)
    return opened if isinstance(opened, np.ndarray) else decode(opened).values


def refusal(path: Path) -> Refused:
    with pytest.raises(Refused) as caught, quiet():
        read_picture(path, PictureConfig(long_side=64))
    assert not FOREIGN.search(str(caught.value)), caught.value
    return caught.value


def saved(path: Path, image: Image.Image | NDArray[Any], kind: str, **options: Any) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, kind, **options)
    return path


def by_gdcm(path: Path, syntax: int, lossless: bool = True) -> Path:
    """The file at `path`, transcoded in place by gdcm, which writes the JPEG that pydicom does not."""
    reader, writer, change, codec = (
        gdcm.ImageReader(),
        gdcm.ImageWriter(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.JPEGCodec(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    codec.SetLossless(lossless)
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetUserCodec(codec)
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    return path


def with_stream(path: Path, stream: bytes, syntax: UID, pixels: NDArray[Any], **tags: Any) -> Path:
    dataset = pydicom.dcmread(write_dicom(path, pixels, **tags))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream])
    dataset.save_as(path)
    return path


EIGHT_BITS = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}


def one_of_each(folder: Path) -> dict[str, Path]:
    """A DICOM file of every family of codecs; they are self-made, so that their pixels are known."""
    paths = {name: write_dicom(folder / f"{name}.dcm", TWELVE) for name in ("native", "rle", "j2k", "lossless", "ls")}
    paths["baseline"] = write_dicom(folder / "baseline.dcm", EIGHT, **EIGHT_BITS)
    compressed(paths["rle"], RLELossless)
    compressed(paths["j2k"], JPEG2000Lossless)
    by_gdcm(paths["lossless"], gdcm.TransferSyntax.JPEGLosslessProcess14_1)
    by_gdcm(paths["ls"], gdcm.TransferSyntax.JPEGLSLossless)
    by_gdcm(paths["baseline"], gdcm.TransferSyntax.JPEGBaselineProcess1, lossless=False)
    paths["extended"] = with_stream(folder / "extended.dcm", TWELVE_JPEG, JPEGExtended12Bit, TWELVE)
    paths["deflated"] = deflated(write_dicom(folder / "deflated.dcm", TWELVE))
    return paths


def deflated(path: Path) -> Path:
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    return path


# --- a JPEG encoder of 12 bits, as ITU-T T.81 has it; all Huffman codes of a table are of one length

ZIGZAG = sorted(np.ndindex(8, 8), key=lambda p: (sum(p), p[sum(p) % 2 == 0]))
AC_SYMBOLS = [run << 4 | size for run in range(16) for size in range(1, 15)] + [0x00, 0xF0]


def jpeg_of_12_bits(pixels: NDArray[np.uint16]) -> bytes:
    """Sides are multiples of 8; quantised by 1, so that only rounding of the cosines changes values."""
    bits, before = [], 0
    for y in range(0, pixels.shape[0], 8):
        for x in range(0, pixels.shape[1], 8):
            block = np.rint(dctn(pixels[y : y + 8, x : x + 8] - 2048.0, norm="ortho")).astype(int)
            first, *others = (int(block[place]) for place in ZIGZAG)
            bits.append(format((first - before).bit_length(), "05b") + _amplitude(first - before))
            before = first
            bits.append(_ac_bits(others))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    height, width = (side.to_bytes(2, "big") for side in pixels.shape)
    return b"".join(
        (
            b"\xff\xd8",
            _segment(0xDB, bytes([0] + [1] * 64)),
            _segment(0xC1, b"\x0c" + height + width + bytes([1, 1, 0x11, 0])),
            _segment(0xC4, bytes([0x00] + [0] * 4 + [16] + [0] * 11) + bytes(range(16))),
            _segment(0xC4, bytes([0x10] + [0] * 7 + [len(AC_SYMBOLS)] + [0] * 8) + bytes(AC_SYMBOLS)),
            _segment(0xDA, bytes([1, 1, 0x00, 0, 63, 0])),
            scan,
            b"\xff\xd9",
        )
    )


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def _amplitude(value: int) -> str:
    size = value.bit_length()
    return format(value if value >= 0 else value + 2**size - 1, f"0{size}b") if size else ""


def _ac_bits(values: list[int]) -> str:
    text, run = "", 0
    for value in values:
        if value == 0:
            run += 1
            continue
        text += format(AC_SYMBOLS.index(0xF0), "08b") * (run // 16)
        text += format(AC_SYMBOLS.index(run % 16 << 4 | value.bit_length()), "08b") + _amplitude(value)
        run = 0
    return text + (format(AC_SYMBOLS.index(0), "08b") if run else "")


TWELVE_JPEG = jpeg_of_12_bits(TWELVE)


# --- DICOM: every family of codecs, whole and cut


def test_every_family_of_codecs_is_read_and_refused_when_cut(tmp_path: Path) -> None:
    """A download that stopped; and one that a server has wrapped up as if it were whole."""
    for name, path in one_of_each(tmp_path).items():
        off = {"baseline": 8, "extended": 1}.get(name, 0)  # the lossy ones
        expected = EIGHT if name == "baseline" else TWELVE
        assert np.abs(read(path).astype(int) - expected).max() <= off, name
        data = path.read_bytes()
        for share in (0.5, 0.9, 0.99):
            (tmp_path / "cut.dcm").write_bytes(data[: int(len(data) * share)])
            found = refusal(tmp_path / "cut.dcm")
            assert found.reason == "unreadable"
            assert "the file ends before its pixels do" in str(found), name
        if name not in ("native", "deflated"):
            dataset = pydicom.dcmread(path)
            stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
            dataset.PixelData = encapsulate([stream[: len(stream) // 2]])
            dataset.save_as(tmp_path / "wrapped.dcm")
            assert refusal(tmp_path / "wrapped.dcm").reason == "unreadable", name


def test_an_element_behind_the_pixels_changes_nothing(tmp_path: Path) -> None:
    for path in one_of_each(tmp_path).values():
        expected, start = read(path), path.stat().st_size
        dataset = pydicom.dcmread(path)
        dataset.add_new(0xFFFCFFFC, "OB", np.random.default_rng(0).bytes(90_000))
        dataset.save_as(path)
        np.testing.assert_array_equal(read(path), expected)
        data = path.read_bytes()
        path.write_bytes(data[: start // 2])
        assert refusal(path).reason == "unreadable"


def test_a_jpeg_2000_stream_is_whole_with_its_end_marker(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(compressed(write_dicom(tmp_path / "a.dcm", TWELVE), JPEG2000Lossless))
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1).rstrip(b"\0")
    assert stream.endswith(b"\xff\xd9")
    length = stream.index(b"\xff\x90") + 6
    to_the_end = stream[:length] + bytes(4) + stream[length + 4 :]
    for whole in (stream, stream + bytes(3), to_the_end, to_the_end + bytes(1)):
        dataset.PixelData = encapsulate([whole])
        np.testing.assert_array_equal(decode(dataset).values, TWELVE)
    for cut in (
        stream[:-2],
        stream[:-3],
        stream[:-2000],
        to_the_end[:-2],
        stream[: length - 6],
        stream[: length + 2],
        stream[:30],
    ):
        dataset.PixelData = encapsulate([cut])
        with pytest.raises(Refused, match=r"ends before its pixels|no header"):
            decode(dataset)


def test_a_lossless_jpeg_stream_may_come_without_its_end_marker(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(one_of_each(tmp_path)["lossless"])
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    end = stream.rindex(b"\xff\xd9")
    dataset.PixelData = encapsulate([stream[:end]])
    np.testing.assert_array_equal(decode(dataset).values, TWELVE)
    for missing in (8, 800, end - 800):
        dataset.PixelData = encapsulate([stream[: end - missing]])
        with pytest.raises(Refused):
            decode(dataset)


def test_jpeg_of_12_bits(tmp_path: Path) -> None:
    """pydicom gives two values of its own file, as other decoders see them."""
    for name in ("JPGExtended.dcm", "JPEG-lossy.dcm"):
        values = read(as_mammogram(name, tmp_path))
        assert (values.shape, values.dtype) == ((1024, 256), np.uint16)
        assert (values[420, 140], values[230, 120]) == (244, 95)
    jpeg = io.BytesIO()
    Image.fromarray(EIGHT).save(jpeg, "JPEG", quality=95)
    eight = with_stream(tmp_path / "8.dcm", jpeg.getvalue(), JPEGExtended12Bit, EIGHT, **EIGHT_BITS)
    assert np.abs(read(eight).astype(int) - EIGHT).max() < 12
    larger = with_stream(tmp_path / "a.dcm", TWELVE_JPEG, JPEGExtended12Bit, TWELVE[:-8])
    assert "160 x 200" in str(refusal(larger))
    stream = bytearray(TWELVE_JPEG)
    stream[stream.index(b"\xff\xc1") + 4] = 16  # as gdcm itself writes it; 0 would come back as 4095
    assert "16 bits" in str(refusal(with_stream(tmp_path / "b.dcm", bytes(stream), JPEGExtended12Bit, TWELVE)))


def test_a_slab_of_12_bits(tmp_path: Path) -> None:
    stack = np.stack([TWELVE[80:144, :64] // 2 + np.uint16(50 * number) for number in range(3)])
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", stack))
    dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    dataset.PixelData = encapsulate([jpeg_of_12_bits(frame) for frame in stack])
    assert np.abs(decode(dataset, slab=True).values - stack.mean(axis=0)).max() <= 1


# --- by content, in gzip, deflated


def test_what_a_file_is_tells_its_content(tmp_path: Path) -> None:
    dicom, png = write_dicom(tmp_path / "a.dcm", TWELVE), write_png(tmp_path / "a.png", TWELVE)
    for name in ("scan.png", "bare", "1.2.840.1", "a.tif", "a.IMA"):
        (tmp_path / name).write_bytes(dicom.read_bytes())
        np.testing.assert_array_equal(read(tmp_path / name), TWELVE)
        assert isinstance(open_image(tmp_path / name), pydicom.Dataset)
        (tmp_path / name).write_bytes(png.read_bytes())
        np.testing.assert_array_equal(read(tmp_path / name), TWELVE)
    for path in (dicom, png, compressed(write_dicom(tmp_path / "r.dcm", TWELVE), RLELossless)):
        for name in ("a.dcm.gz", "other"):
            (tmp_path / name).write_bytes(
                gzip.compress(path.read_bytes()[:999]) + gzip.compress(path.read_bytes()[999:])
            )
            np.testing.assert_array_equal(read(tmp_path / name), TWELVE)
    packed = (tmp_path / "a.dcm.gz").read_bytes()
    for damaged in (packed[: len(packed) // 2], packed[:-4], packed[:90] + b"\0" * 40 + packed[130:]):
        (tmp_path / "a.dcm.gz").write_bytes(damaged)
        assert "gzip" in str(refusal(tmp_path / "a.dcm.gz"))


def test_a_deflated_file_of_somebody_else(tmp_path: Path) -> None:
    path = as_mammogram("image_dfl.dcm", tmp_path)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read(path), pixel_array(pydicom.dcmread(sample_file("image_dfl.dcm"))))


def test_bombs_do_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_file, "LARGEST_UNFOLDED", 2**22)
    zeros = bytes(2**20)
    with gzip.open(tmp_path / "a.dcm.gz", "wb", 1) as file:
        file.write(write_dicom(tmp_path / "a.dcm", TWELVE).read_bytes())
        for _ in range(64):
            file.write(zeros)
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    data = deflated(tmp_path / "a.dcm").read_bytes()
    head = data[: 144 + int.from_bytes(data[140:144], "little")]  # up to the end of the file meta information
    (tmp_path / "b.dcm").write_bytes(head + b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("a.dcm.gz", "b.dcm"):
        assert refusal(tmp_path / name).reason == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB


# --- other kinds


def plain_files(folder: Path) -> Iterator[tuple[Path, NDArray[Any], int]]:
    """Files, their values, and by how much those may differ."""
    three = np.dstack([EIGHT] * 3)
    for kind in ("PNG", "TIFF", "PPM", "BMP", "JPEG2000"):
        yield saved(folder / f"{kind}-grey", EIGHT, kind), EIGHT, 0
        yield saved(folder / f"{kind}-rgb", three, kind), EIGHT, 0
    for kind in ("PNG", "TIFF", "JPEG2000"):
        yield saved(folder / f"{kind}-16", TWELVE, kind), TWELVE, 0
    for kind in ("PNG", "TIFF", "BMP"):
        yield saved(folder / f"{kind}-palette", Image.fromarray(EIGHT).convert("P"), kind), EIGHT, 0
    for suffix in ("png", "tif"):
        cv2.imwrite(str(folder / f"16.{suffix}"), np.dstack([TWELVE] * 3))
        yield folder / f"16.{suffix}", TWELVE, 0
    yield saved(folder / "codestream", TWELVE, "JPEG2000", no_jp2=True), TWELVE, 0
    yield saved(folder / "webp", three, "WEBP", lossless=True), EIGHT, 0
    yield saved(folder / "alpha", np.dstack([EIGHT, 255 - EIGHT]), "PNG"), EIGHT, 0
    yield saved(folder / "rgb-alpha", np.dstack([three, 255 - EIGHT]), "PNG"), EIGHT, 0
    yield saved(folder / "progressive", EIGHT, "JPEG", progressive=True, quality=95), EIGHT, 12
    smooth = cv2.GaussianBlur(EIGHT, (0, 0), 4)
    for quality in (30, 60, 95):  # chroma is rounded, too
        yield saved(folder / f"jpeg-{quality}", np.dstack([smooth] * 3), "JPEG", quality=quality), smooth, 25
    (folder / "pgm-16").write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + TWELVE.astype(">u2").tobytes())
    yield folder / "pgm-16", TWELVE, 0
    (folder / "pgm-12").write_bytes(b"P5\n# 12 bits\n%d %d 4095\n" % (WIDTH, HEIGHT) + TWELVE.astype(">u2").tobytes())
    yield folder / "pgm-12", TWELVE, 0
    (folder / "pgm-7").write_bytes(b"P5 %d\n# 7 bits\n%d 127\n" % (WIDTH, HEIGHT) + (EIGHT >> 1).tobytes())
    yield folder / "pgm-7", np.rint((EIGHT >> 1) * (255 / 127)).astype(np.uint8), 0
    (folder / "pgm-text").write_bytes(b"P2 %d %d 255\n" % (WIDTH, HEIGHT) + " ".join(map(str, EIGHT.flat)).encode())
    yield folder / "pgm-text", EIGHT, 0


def test_other_kinds_are_read_and_refused_when_cut(tmp_path: Path) -> None:
    for path, expected, off in plain_files(tmp_path):
        values = read(path)
        assert values.dtype == expected.dtype, path.name
        assert np.abs(values.astype(int) - expected).max() <= off, path.name
        data = path.read_bytes()
        for share in (0.3, 0.7, 0.98):
            (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
            assert refusal(tmp_path / "cut").reason == "unreadable", path.name


def test_a_decoder_that_fills_up_what_is_cut_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenCV 4 does with JPEG and PNG."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: EIGHT)
    for kind in ("JPEG", "PNG", "TIFF", "JPEG2000"):
        path = saved(tmp_path / kind, EIGHT, kind)
        read(path)
        path.write_bytes(path.read_bytes()[:-700])
        assert "copy or download it again" in str(refusal(path)), kind


def test_a_jp2_file_whose_stream_is_larger_than_its_box_says(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jp2", EIGHT, "JPEG2000")
    data = bytearray(path.read_bytes())
    siz = data.index(b"\xff\x4f\xff\x51") + 2
    for at in (6, 10, 22, 26):
        data[siz + at : siz + at + 4] = (60_000).to_bytes(4, "big")
    path.write_bytes(data)
    assert refusal(path).reason == "too-large"
    assert LARGEST < 60_000**2


# --- grey in three channels


def dicom_of_colour(path: Path, image: NDArray[Any], **tags: Any) -> Path:
    """Uncompressed RGB, each channel of a pixel behind the other."""
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, **EIGHT_BITS, **tags}
    dataset = pydicom.dcmread(write_dicom(path, image[:, :, 0], **tags))
    dataset.PixelData = image.tobytes()
    dataset.save_as(path)
    return path


def palette(path: Path, channels: tuple[int, int, int]) -> Path:
    """Stored values 0..255 and a palette whose colours are shares of them."""
    path = write_dicom(path, EIGHT, **EIGHT_BITS, PhotometricInterpretation="PALETTE COLOR")
    dataset = pydicom.dcmread(path)
    for name, share in zip(("Red", "Green", "Blue"), channels, strict=True):
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        table = (np.arange(256) * 257 * share // 100).astype("<u2")
        setattr(dataset, f"{name}PaletteColorLookupTableData", table.tobytes())
    dataset.save_as(path)
    return path


def test_grey_in_three_channels_of_dicom(tmp_path: Path) -> None:
    three = np.dstack([EIGHT] * 3)
    path = dicom_of_colour(tmp_path / "a.dcm", three)
    np.testing.assert_array_equal(read(path), EIGHT)
    for syntax in (RLELossless, JPEG2000Lossless):
        np.testing.assert_array_equal(read(compressed(dicom_of_colour(tmp_path / "b.dcm", three), syntax)), EIGHT)
    planes = dicom_of_colour(
        tmp_path / "c.dcm", three.transpose(2, 0, 1).reshape(HEIGHT, WIDTH, 3), PlanarConfiguration=1
    )
    np.testing.assert_array_equal(read(planes), EIGHT)
    jpeg, smooth = io.BytesIO(), cv2.GaussianBlur(EIGHT, (0, 0), 4)
    Image.fromarray(np.dstack([smooth] * 3)).save(jpeg, "JPEG", quality=60)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 0, **EIGHT_BITS}
    values = read(with_stream(tmp_path / "d.dcm", jpeg.getvalue(), JPEGBaseline8Bit, EIGHT, **tags))
    assert np.abs(values.astype(int) - smooth).max() <= 25
    np.testing.assert_array_equal(read(palette(tmp_path / "e.dcm", (100, 100, 100))), EIGHT * np.uint16(257))
    assert plain(path).pixels.shape == EIGHT.shape


def test_windows_are_of_no_meaning_for_grey_in_colours(tmp_path: Path) -> None:
    """PS3.3 C.11.2.1.2: a window that a conversion left behind is one of the 12 bits that were there before."""
    three, left = np.dstack([EIGHT] * 3), {"WindowCenter": 2048, "WindowWidth": 4096, "RescaleIntercept": -9}
    path = dicom_of_colour(tmp_path / "a.dcm", three, **left, RescaleSlope=1, PresentationLUTShape="INVERSE")
    picture = plain(path, bits=8)
    np.testing.assert_array_equal(picture.pixels, EIGHT)
    assert picture.fallbacks == ()
    dataset = pydicom.dcmread(palette(tmp_path / "b.dcm", (100, 100, 100)))
    dataset.WindowCenter, dataset.WindowWidth = 128, 256
    dataset.save_as(tmp_path / "b.dcm")
    picture = plain(tmp_path / "b.dcm", bits=8)
    np.testing.assert_array_equal(picture.pixels, EIGHT)
    assert picture.fallbacks == ()


def test_colours_are_refused(tmp_path: Path) -> None:
    circle = np.dstack([EIGHT] * 3)
    cv2.circle(circle, (60, 90), 20, (250, 10, 10), 1)
    scanned = np.random.default_rng(0).normal(np.dstack([EIGHT] * 3), 3).clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "16.png"), COLOURS.astype(np.uint16) * 16)
    assert refusal(tmp_path / "16.png").reason == "colour"
    smooth = cv2.GaussianBlur(EIGHT, (0, 0), 4)
    tinted = (np.dstack([smooth] * 3) * (1.0, 1.18, 0.9)).clip(0, 255).astype(np.uint8)  # the base of a film is blue
    for image, refused in ((COLOURS, True), (circle, True), (scanned, False), (tinted, False)):
        paths = [dicom_of_colour(tmp_path / "a.dcm", image)]
        paths += [saved(tmp_path / kind, image, kind) for kind in ("PNG", "TIFF", "JPEG", "BMP", "WEBP", "JPEG2000")]
        for path in paths:
            if refused:
                assert refusal(path).reason == "colour", path.name
            else:
                assert np.abs(read(path).astype(int) - EIGHT).mean() < 15, path.name
    assert refusal(palette(tmp_path / "b.dcm", (100, 60, 20))).reason == "colour"
    assert refusal(saved(tmp_path / "c.png", Image.fromarray(COLOURS).quantize(16), "PNG")).reason == "colour"


# --- what is said, and what is not


def test_what_is_not_read_is_told_in_our_words(tmp_path: Path) -> None:
    texts: dict[str, str] = {}
    for name, data, words in (
        ("text.dcm", b"patient,side\n1,L\n" * 40, "DICOM (with"),
        ("empty", b"", "an empty file"),
        ("old.dcm", b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100" * 9, "not an image"),
        ("a.gif", b"GIF89a" + bytes(300), "not an image"),
        ("head.dcm", bytes(128) + b"DICM", "DICOM"),
        ("odd.dcm", bytes(128) + b"DICM" + b"\x08\x00\x05\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe" * 90, "DICOM"),
        ("rest.dcm", bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\xff\xff" + b"\xff" * 90, "DICOM"),
    ):
        (tmp_path / name).write_bytes(data)
        texts[name] = str(refusal(tmp_path / name))
        assert words in texts[name] or "ends before" in texts[name], texts[name]
    path = write_dicom(tmp_path / "a.dcm", TWELVE)
    for change, words in (
        ({"Rows": None}, "no Rows"),
        ({"BitsAllocated": None}, "no BitsAllocated"),
        ({"PhotometricInterpretation": None}, "no PhotometricInterpretation"),
        ({"PixelData": None}, "no PixelData"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "bytes of pixels"),
    ):
        dataset = pydicom.dcmread(path)
        for attribute, value in change.items():
            dataset.pop(attribute) if value is None else setattr(dataset, attribute, value)
        dataset.save_as(tmp_path / "b.dcm")
        assert words in str(refusal(tmp_path / "b.dcm"))
    for syntax, words in (("1.2.840.10008.1.2.4.102", "MPEG-4"), ("1.2.3.4", "transfer syntax '1.2.3.4'")):
        told = str(refusal(with_stream(tmp_path / "c.dcm", b"\0" * 100, UID(syntax), TWELVE)))
        assert words in told
        assert "convert" in told
    assert "JPEG 2000" in str(refusal(with_stream(tmp_path / "d.dcm", b"\0" * 100, JPEG2000Lossless, TWELVE)))
    assert "RLE" in str(refusal(with_stream(tmp_path / "e.dcm", b"\1" * 100, RLELossless, TWELVE)))


def test_readers_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """gdcm writes of every JPEG with 12 bits, OpenCV and pydicom of every damaged file."""
    with_stream(tmp_path / "a.dcm", TWELVE_JPEG, JPEGExtended12Bit, TWELVE)
    dataset = pydicom.dcmread(write_dicom(tmp_path / "b.dcm", TWELVE))
    dataset.add_new("PatientAge", "AS", "old")
    dataset.save_as(tmp_path / "b.dcm")
    data = saved(tmp_path / "c.png", EIGHT, "PNG").read_bytes()
    (tmp_path / "c.png").write_bytes(data[:999] + bytes(999) + data[1998:])
    (tmp_path / "d.dcm").write_bytes(
        compressed(write_dicom(tmp_path / "d.dcm", TWELVE), RLELossless).read_bytes()[:-99]
    )
    views = [SourceView(tmp_path / name, "L", "CC") for name in ("a.dcm", "b.dcm", "c.png", "d.dcm")]
    capfd.readouterr()
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        sample = sample_of(tmp_path, *views)
    assert len(sample.images) == 2
    assert [line.file for line in sample.refusals] == ["c.png", "d.dcm"]
    assert not warned
    assert not caplog.records
    assert capfd.readouterr().err == ""
    os.write(2, b"later words\n")
    logging.getLogger("pydicom").warning("later words")
    assert capfd.readouterr().err.startswith("later words")
    assert caplog.records


def test_quiet_ends_with_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), quiet():
        os.write(2, b"unheard") // 0
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
    assert len(os.listdir("/proc/self/fd")) == files


def test_quiet_needs_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has none where it was started with descriptor 2 closed; a log's reader may be gone."""
    gone = io.StringIO()
    gone.close()
    for stream in (None, gone, BrokenStream()):
        monkeypatch.setattr("sys.stderr", stream)
        with quiet():
            os.write(2, b"unheard")


class BrokenStream(io.StringIO):
    def flush(self) -> None:
        raise BrokenPipeError


# --- files that lie under another name


def test_a_file_that_was_compressed_or_renamed_is_found(tmp_path: Path) -> None:
    data = write_dicom(tmp_path / "there.dcm", TWELVE).read_bytes()
    for wanted, there in (
        ("a.dcm", "a.dcm.gz"),
        ("b.dcm", "b"),
        ("c.dicom", "c.dcm"),
        ("d", "d.dcm"),
        ("1.2.840.5", "1.2.840.5.DCM"),
        ("e.dcm.gz", "e.dcm"),
        ("f.DCM", "f.dicom.gz"),
        ("g.dcm", "g.IMA"),
    ):
        (tmp_path / there).write_bytes(gzip.compress(data) if there.endswith(".gz") else data)
        np.testing.assert_array_equal(read(tmp_path / wanted), TWELVE)
    assert find_file(tmp_path / "there.dcm") == tmp_path / "there.dcm"
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder.dcm").reason == "missing"
    assert refusal(tmp_path / "h.dcm").reason == "missing"


def test_in_a_missing_folder_no_other_spelling_is_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    true_stat = os.stat

    def counted(path: Path, **more: Any) -> os.stat_result:
        asked.append(str(path))
        return true_stat(path, **more)

    monkeypatch.setattr(os, "stat", counted)
    assert find_file(tmp_path / "away" / "a.dcm") == tmp_path / "away" / "a.dcm"
    assert len(asked) <= 3  # twice for the file, which may be a link


def test_a_network_disk_that_is_gone_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(OSError, match="Stale"):
        open_image(tmp_path / "a.dcm")


def test_sources_find_files_of_any_suffix(tmp_path: Path) -> None:
    data = write_dicom(tmp_path / "x", TWELVE, PatientID=None).read_bytes()
    (tmp_path / "x").unlink()
    names = ("1-1.dcm", "1-1.DCM", "1-1.dicom", "1-1.dcm.gz", "1-1.ima", "1-1", "1.2.840.7", "packed.gz")
    for number, name in enumerate(names):
        folder = tmp_path / f"Mass-Training_P_{number:05d}_LEFT_CC" / "series"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        (folder / "notes.txt").write_text("notes")
        (folder / "DICOMDIR").write_bytes(data)
        (folder / "other.gz").write_bytes(gzip.compress(b"notes"))
        (folder / "broken.gz").write_bytes(b"\x1f\x8bnotes")
    assert [path.name for path in dicom_files(tmp_path)] == list(names)
    studies = list(cbis_ddsm(tmp_path))
    assert [study.patient_id for study in studies] == [f"P_{number:05d}" for number in range(len(names))]
    for study in studies:
        np.testing.assert_array_equal(read(study.views[0].path), TWELVE)


def test_names_in_another_form_of_unicode_or_in_latin_1_are_found(tmp_path: Path) -> None:
    """macOS takes letters and their dots apart; old disks hold one byte a letter. The table has neither."""
    path = write_dicom(tmp_path / "a.dcm", EIGHT, **EIGHT_BITS)
    for folder, name in (
        (unicodedata.normalize("NFD", "Schröder"), unicodedata.normalize("NFD", "Böhm.dcm")),
        (os.fsdecode("Müller".encode("latin-1")), os.fsdecode("Köß.dcm".encode("latin-1"))),
    ):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / name)
    np.testing.assert_array_equal(read(tmp_path / "Schröder" / "Böhm.dcm"), EIGHT)
    np.testing.assert_array_equal(read(tmp_path / "Müller" / "Köß.dcm"), EIGHT)
    assert refusal(tmp_path / "Müller" / "Möß.dcm").reason == "missing"
