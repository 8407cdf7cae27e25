from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from shards.errors import Refused
from shards.image import frames as module
from shards.image.decode import LARGEST_FILE, decode, open_image
from shards.image.jpeg_streams import LARGEST
from shards.image.picture import PictureConfig, read_picture
from shards.image.stored_bits import value_bits
from shards.schema import EXCLUDED, SourceView
from tests.support.archives import (
    as_mammogram,
    breast,
    compressed,
    mammograms,
    plain,
    sample_file,
    sample_of,
    write_dicom,
    write_png,
)

STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def refusal(path: Path, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read_picture(path, PictureConfig(**options))
    assert "\n" not in str(caught.value)
    return caught.value


def opened(path: Path) -> Dataset:
    dataset = open_image(path)
    assert isinstance(dataset, Dataset)
    return dataset


# --- every transfer syntax, by two decoders

COMPRESSED = {
    "MR_small_RLE.dcm": ("pydicom", "pylibjpeg"),
    "MR2_J2KR.dcm": ("gdcm", "pylibjpeg", "pillow"),  # JPEG 2000 lossless
    "RG3_J2KR.dcm": ("gdcm", "pylibjpeg", "pillow"),
    "MR_small_jp2klossless.dcm": ("gdcm", "pylibjpeg"),
    "RG3_J2KI.dcm": ("gdcm", "pylibjpeg", "pillow"),  # lossy
    "693_J2KI.dcm": ("gdcm", "pylibjpeg"),  # lossy and signed
    "JPEG2000.dcm": ("gdcm", "pylibjpeg"),
    "J2K_pixelrep_mismatch.dcm": ("gdcm", "pylibjpeg"),  # the header says signed, the stream does not
    "explicit_VR-UN.dcm": ("gdcm", "pylibjpeg"),
    "JPEG-LL.dcm": ("gdcm",),  # JPEG lossless
    "JPGLosslessP14SV1_1s_1f_8b.dcm": ("gdcm",),
    "MR_small_jpeg_ls_lossless.dcm": ("gdcm",),
    "JPEGLSNearLossless_08.dcm": ("gdcm",),
    "JPEGLSNearLossless_16.dcm": ("gdcm",),
}
# The same images, as files that need no decoder.
ORIGINALS = {
    "MR_small_RLE.dcm": "MR_small.dcm",
    "MR_small_jp2klossless.dcm": "MR_small.dcm",
    "MR_small_jpeg_ls_lossless.dcm": "MR_small.dcm",
    "MR2_J2KR.dcm": "MR2_UNCR.dcm",
    "RG3_J2KR.dcm": "RG3_UNCR.dcm",
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_decoders_agree(name: str, tmp_path: Path) -> None:
    path = as_mammogram(name, tmp_path)
    dataset = pydicom.dcmread(path)
    stored = decode(opened(path))
    assert stored.size == stored.values.shape == (dataset.Rows, dataset.Columns)
    assert stored.values.dtype.kind == "ui"[dataset.PixelRepresentation]
    for plugin in COMPRESSED[name]:
        assert plugin in get_decoder(dataset.file_meta.TransferSyntaxUID).available_plugins
        np.testing.assert_array_equal(stored.values, pixel_array(dataset, decoding_plugin=plugin))
    if name in ORIGINALS:
        np.testing.assert_array_equal(stored.values, pixel_array(sample_file(ORIGINALS[name])))


def test_a_real_mammogram_in_rle() -> None:
    path = mammograms()[6]
    dataset = opened(path)
    assert dataset.file_meta.TransferSyntaxUID == RLELossless
    np.testing.assert_array_equal(decode(dataset).values, pixel_array(path, decoding_plugin="pydicom"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_depth_and_sign_survive_compression(signed: bool, bits: int, syntax: str, tmp_path: Path) -> None:
    kind = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    pixels = np.random.default_rng(0).integers(np.iinfo(kind).min, np.iinfo(kind).max, (96, 80), kind)
    tags = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": int(signed)}
    path = compressed(write_dicom(tmp_path / "a.dcm", pixels, **tags), syntax)
    values = decode(opened(path)).values
    assert values.dtype == kind
    np.testing.assert_array_equal(values, pixels)


def test_big_endian(tmp_path: Path) -> None:
    for names, slab in (
        (("MR_small.dcm", "MR_small_bigendian.dcm"), False),  # signed
        (("emri_small.dcm", "emri_small_big_endian.dcm"), True),  # unsigned
    ):
        little, big = (plain(as_mammogram(name, tmp_path), slab=slab).pixels for name in names)
        np.testing.assert_array_equal(little, big)


def transcoded(path: Path, syntax: UID) -> Path:
    """The file at `path` in one of the transfer syntaxes that pydicom does not write, in place."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetFileName(str(path))
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path


OVERLAID = {  # stored as 16 bits -> HighBit of 12 bits; the other bits hold an overlay
    "above": (STORED | np.uint16(0x8000), 11),
    "below": ((STORED << 4) | np.uint16(3), 15),
    "both": ((STORED << 2) | np.uint16(0x8001), 13),
    "nothing, HighBit is wrong": (STORED, 15),
}


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_beside_the_stored_ones_are_no_values(syntax: UID | None, signed: bool, tmp_path: Path) -> None:
    """Old files keep an overlay there."""
    change = compressed if syntax in (RLELossless, JPEG2000Lossless) else transcoded
    values = np.where(STORED < 2048, STORED, STORED - 4096.0) if signed else STORED
    for name, (pixels, high) in OVERLAID.items():
        path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=16, HighBit=15)
        dataset = pydicom.dcmread(change(path, syntax) if syntax else path)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, high, int(signed)
        dataset.save_as(path)
        found = decode(opened(path)).values
        assert found.dtype.kind == "ui"[signed]
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_a_lossy_stream_under_the_name_of_a_lossless_one_does_not_wrap(tmp_path: Path) -> None:
    """It runs over the brightest value: without the upper bits, white would be black."""
    checks = np.kron(np.indices((16, 16)).sum(0) % 2 * 4095, np.ones((8, 8))).astype(np.uint16)
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", checks, BitsStored=16, HighBit=15))
    dataset.compress(JPEG2000, j2k_cr=[30], generate_instance_uid=False)
    expected = pixel_array(dataset)
    assert expected.max() > 4095
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(decode(opened(tmp_path / "a.dcm")).values, expected)


def test_an_overlay_is_seen_neither_in_a_reduced_picture_nor_in_a_slab(tmp_path: Path) -> None:
    image = np.kron(breast("L"), np.ones((2, 2), np.uint16))
    overlaid = image.copy()
    overlaid[::7, ::7] |= 0x8000
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    pictures = []
    for syntax in (None, JPEG2000Lossless):
        for pixels in (overlaid, np.stack([overlaid] * 3)):
            path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=16, HighBit=15, **window)
            dataset = pydicom.dcmread(compressed(path, syntax) if syntax else path)
            dataset.BitsStored, dataset.HighBit = 12, 11
            dataset.save_as(path)
            pictures.append(read_picture(path, PictureConfig(long_side=100, slab=True)).pixels)
    clean = read_picture(write_dicom(tmp_path / "b.dcm", image, **window), PictureConfig(long_side=100)).pixels
    for picture in pictures:
        np.testing.assert_array_equal(picture, clean)


def test_a_lossy_stream_may_run_over_its_brightest(tmp_path: Path) -> None:
    """Its 4,100 of 12 bits is nearly 4,095, and not 4."""
    values = np.array([[4090, 4095, 4100]], np.uint16)
    dataset = opened(write_dicom(tmp_path / "a.dcm", values))
    np.testing.assert_array_equal(value_bits(values, dataset), [[4090, 4095, 4]])
    dataset.file_meta.TransferSyntaxUID = JPEG2000
    np.testing.assert_array_equal(value_bits(values, dataset), values)


# --- JPEG 2000 at reduced resolution


def ramp(height: int, width: int) -> NDArray[np.uint16]:
    return np.add.outer(3 * np.arange(height), 2 * np.arange(width)).astype(np.uint16)


@pytest.mark.parametrize("size", [(469, 387), (604, 467), (512, 512), (333, 700), (621, 285), (97, 130)])
def test_a_reduced_image_is_the_original_at_every_2nd_4th_8th_pixel(size: tuple[int, int], tmp_path: Path) -> None:
    """Sizes of which half are no multiples of 2, 4, 8: Pillow by itself calls their reduced streams broken."""
    dataset = opened(compressed(write_dicom(tmp_path / "a.dcm", ramp(*size)), JPEG2000Lossless))
    for level in (1, 2, 3, 4):
        stored = decode(dataset, max(size) >> level)
        step = 2**level
        assert (stored.level, stored.size) == (level, size)
        expected = ramp(*size)[::step, ::step]
        assert stored.values.shape == expected.shape
        inner = np.s_[1:-1, 1:-1]  # the edge is mirrored
        assert np.abs(stored.values[inner].astype(int) - expected[inner]).max() <= 2


@pytest.mark.parametrize("bits", [6, 8, 9, 12, 16])
def test_reduced_values_have_the_scale_of_the_file(bits: int, tmp_path: Path) -> None:
    pixels = np.full((256, 256), 2**bits - 2, dtype=np.uint16 if bits > 8 else np.uint8)
    pixels[:, :128] = 1
    tags = {"BitsAllocated": 8 * pixels.itemsize, "BitsStored": bits, "HighBit": bits - 1}
    stored = decode(opened(compressed(write_dicom(tmp_path / "a.dcm", pixels, **tags), JPEG2000Lossless)), 64)
    assert stored.level == 2
    assert (stored.values[5, 5], stored.values[5, -5]) == (1, 2**bits - 2)


@pytest.mark.parametrize(("long_side", "level"), [(512, 0), (257, 0), (256, 1), (129, 1), (128, 2), (1, 5), (None, 0)])
def test_the_level_leaves_enough_pixels(long_side: int | None, level: int, tmp_path: Path) -> None:
    dataset = opened(compressed(write_dicom(tmp_path / "a.dcm", ramp(512, 300)), JPEG2000Lossless))
    stored = decode(dataset, long_side)
    assert stored.level == level
    assert long_side is None or max(stored.values.shape) >= long_side


def test_the_lossy_wavelet_too(tmp_path: Path) -> None:
    path = as_mammogram("RG3_J2KI.dcm", tmp_path)
    whole, part = decode(opened(path)), decode(opened(path), 500)
    assert part.level == 1
    apart = np.abs(part.values.astype(int) - whole.values[::2, ::2])
    assert apart.mean() < 0.01 * np.ptp(whole.values)


def patched(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """The file with a change of its JPEG 2000 stream; `change` gets the stream and where its SIZ segment begins."""
    dataset = pydicom.dcmread(path)
    stream = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))
    change(stream, stream.index(b"\xff\x4f\xff\x51") + 2)
    dataset.PixelData = encapsulate([bytes(stream)])
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsStored": 11, "HighBit": 10},
        {"BitsStored": 16, "HighBit": 15},
        {"PixelRepresentation": 1},
        {"PixelPaddingValue": 0},  # the stream's filter mixes padding with tissue
    ],
)
def test_a_stream_that_is_not_what_the_header_says_is_decoded_in_full(tags: dict[str, Any], tmp_path: Path) -> None:
    path = compressed(write_dicom(tmp_path / "a.dcm", ramp(256, 200)), JPEG2000Lossless)
    assert decode(opened(path), 50).level == 2
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        dataset.add_new(name, "US", value)
    dataset.save_as(path)
    stored = decode(opened(path), 50)
    assert stored.level == 0
    np.testing.assert_array_equal(stored.values, ramp(256, 200))


def test_a_signed_stream_is_decoded_in_full(tmp_path: Path) -> None:
    tags = {"PixelRepresentation": 1, "BitsStored": 12, "HighBit": 11}
    pixels = (ramp(256, 200).astype(np.int16) - 500).astype(np.int16)
    path = compressed(write_dicom(tmp_path / "a.dcm", pixels, **tags), JPEG2000Lossless)
    np.testing.assert_array_equal(decode(opened(path), 50).values, pixels)
    unsigned = pydicom.dcmread(path)
    unsigned.PixelRepresentation = 0
    unsigned.save_as(path)
    assert decode(opened(path), 50).level == 0


def huge(stream: bytearray, siz: int) -> None:
    for at in (6, 10, 22, 26):  # of the image and of its only tile
        stream[siz + at : siz + at + 4] = (60_000).to_bytes(4, "big")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEG2000, HTJ2K, HTJ2KLossless])
@pytest.mark.parametrize("reduced", [True, False])
def test_a_stream_that_claims_to_be_huge_is_refused_before_it_is_decoded(
    syntax: str, reduced: bool, tmp_path: Path
) -> None:
    path = patched(compressed(write_dicom(tmp_path / "a.dcm", STORED), JPEG2000Lossless), huge)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.save_as(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(path, reduced=reduced).reason == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the image would be 7 million


def test_a_huge_frame_of_a_volume_is_refused_too(tmp_path: Path) -> None:
    path = compressed(write_dicom(tmp_path / "a.dcm", np.stack([STORED] * 3)), JPEG2000Lossless)
    dataset = pydicom.dcmread(path)
    frames = [bytearray(get_frame(dataset.PixelData, index, number_of_frames=3)) for index in range(3)]
    huge(frames[2], frames[2].index(b"\xff\x4f\xff\x51") + 2)
    dataset.PixelData = encapsulate([bytes(frame) for frame in frames])
    dataset.save_as(path)
    assert refusal(path, slab=True).reason == "too-large"


def test_a_jpeg_of_another_size_than_its_header_does_not_reach_the_decoder(tmp_path: Path) -> None:
    """In a process of its own: gdcm ends it when the claim is large enough."""
    paths = []
    for name, marker in (("JPEG-LL.dcm", 0xC3), ("MR_small_jpeg_ls_lossless.dcm", 0xF7)):
        dataset = pydicom.dcmread(as_mammogram(name, tmp_path))
        stream = dataset.PixelData
        for claim in (60_000, 8):
            data = bytearray(stream)
            at = data.index(bytes([0xFF, marker])) + 5
            data[at : at + 4] = 2 * claim.to_bytes(2, "big")
            dataset.PixelData = bytes(data)
            paths.append(str(tmp_path / f"{claim}-{name}"))
            dataset.save_as(paths[-1])
    program = (
        "import sys; from pathlib import Path; from shards.image.decode import decode, open_image\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode(open_image(Path(name)))\n"
        "    except ValueError as error: print(error.reason)"
    )
    answer = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["unreadable"] * 4


# --- tomosynthesis


def volume(tmp_path: Path, frames: int, **tags: Any) -> tuple[Path, NDArray[np.uint16]]:
    stack = np.stack([breast("R", seed=number) // 2 + np.uint16(10 * number) for number in range(frames)])
    anatomy, group = Dataset(), Dataset()
    anatomy.FrameLaterality = "R"
    group.FrameAnatomySequence = [anatomy]
    tags = {"ImageLaterality": None, "SharedFunctionalGroupsSequence": [group], **tags}
    return write_dicom(tmp_path / "volume.dcm", stack, **tags), stack


@pytest.mark.parametrize(
    ("frames", "first", "last", "syntax"),
    [
        (2, 0, 2, None),
        (9, 0, 9, None),
        (10, 0, 9, None),
        (30, 10, 19, None),
        (11, 1, 10, RLELossless),
        (11, 1, 10, JPEG2000Lossless),
    ],
)
def test_a_slab_is_the_mean_of_the_middle_frames(
    frames: int, first: int, last: int, syntax: str | None, tmp_path: Path
) -> None:
    path, stack = volume(tmp_path, frames)
    if syntax is not None:
        compressed(path, syntax)
    stored = decode(opened(path), slab=True)
    expected = stack[first:last].mean(axis=0)
    assert stored.values.dtype == np.uint16
    assert np.abs(stored.values - expected).max() <= 0.5


def test_a_volume_is_refused_or_becomes_a_slab_with_its_side(tmp_path: Path) -> None:
    path, _ = volume(tmp_path, 12)
    assert refusal(path).reason == "tomosynthesis"
    sample = sample_of(tmp_path, SourceView(path))
    assert [line.reason for line in sample.refusals] == ["tomosynthesis"]
    sample = sample_of(tmp_path, SourceView(path), picture=PictureConfig(slab=True))
    (view,) = sample.study.views
    assert (view.laterality, view.flipped, view.original_size) == ("R", True, (200, 160))
    assert "tomosynthesis" in EXCLUDED


def test_a_tomosynthesis_object_of_one_frame_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED, SOPClassUID="1.2.840.10008.5.1.4.1.1.13.1.3")
    assert refusal(path).reason == "tomosynthesis"


def test_a_real_volume_of_ten_frames(tmp_path: Path) -> None:
    frames = pixel_array(sample_file("emri_small.dcm"))
    for name in (
        "emri_small.dcm",
        "emri_small_RLE.dcm",
        "emri_small_jpeg_2k_lossless.dcm",
        "emri_small_big_endian.dcm",
    ):
        path = as_mammogram(name, tmp_path)
        assert refusal(path).reason == "tomosynthesis"
        values = decode(opened(path), slab=True).values
        assert np.abs(values - frames[:9].mean(axis=0)).max() <= 0.5


# --- untrusted input


def test_refusals_name_their_reason(tmp_path: Path) -> None:
    good = write_dicom(tmp_path / "good.dcm", STORED)
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "cut.dcm").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder.dcm").mkdir()
    os.mkfifo(tmp_path / "fifo.dcm")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.dcm").symlink_to(tmp_path / "loop.dcm")
    (tmp_path / "zero.dcm").symlink_to("/dev/zero")
    for name, reason in {
        "nowhere.dcm": "missing",
        "nowhere.png": "missing",
        "nul\0.dcm": "missing",
        f"{'long' * 100}.dcm": "missing",
        "loop.dcm": "missing",
        "text.dcm": "unreadable",
        "empty.dcm": "unreadable",
        "cut.dcm": "unreadable",
        "bad.png": "unreadable",
        "folder.dcm": "unreadable",
        "fifo.dcm": "unreadable",
        "fifo.png": "unreadable",
        "zero.dcm": "unreadable",
    }.items():
        assert refusal(tmp_path / name).reason == reason, name
    without = pydicom.dcmread(good)
    del without.PixelData
    without.save_as(tmp_path / "without.dcm")
    assert refusal(tmp_path / "without.dcm").reason == "unreadable"


def test_a_file_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # sparse
    assert refusal(path).reason == "too-large"


@pytest.mark.parametrize(("rows", "columns"), [(65535, 65535), (65535, 2000), (0, 64), (64, 0)])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_huge_or_empty_sizes_are_refused(rows: int, columns: int, syntax: str | None, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", STORED)
    dataset = pydicom.dcmread(compressed(path, syntax) if syntax else path)
    dataset.Rows, dataset.Columns = rows, columns
    dataset.save_as(path)
    assert refusal(path).reason == "too-large"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 99}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("side", [12_000, 50_000])
@pytest.mark.parametrize(("suffix", "make"), [(".png", png), (".tif", tiff)])
def test_bombs_of_plain_images(side: int, suffix: str, make: Callable[[int, int], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(make(side, side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert side * side > LARGEST
    assert refusal(path).reason == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_plain_images_of_other_kinds(tmp_path: Path) -> None:
    image = (STORED >> 4).astype(np.uint8)
    for suffix in (".tif", ".TIFF", ".jpg", ".jpeg"):
        cv2.imwrite(str(tmp_path / f"a{suffix.lower()}"), image)
        (tmp_path / f"a{suffix.lower()}").rename(tmp_path / f"b{suffix}")
        assert plain(tmp_path / f"b{suffix}", bits=8).pixels.shape == (64, 64)
    np.testing.assert_array_equal(plain(tmp_path / "b.tif", bits=8).pixels, image)
    colour = write_png(tmp_path / "colour.png", np.dstack([image] * 3))
    np.testing.assert_array_equal(plain(colour, bits=8).pixels, image)
    cv2.imwrite(str(tmp_path / "real.tif"), image.astype(np.float32))
    assert refusal(tmp_path / "real.tif").reason == "unreadable"


def tiff_of(values: NDArray[Any], white_is_zero: bool, order: str, big: bool = False) -> bytes:
    """One strip of `values` [h, w] behind the tags, as TIFF 6.0 or BigTIFF."""
    height, width = values.shape
    bits = 8 * values.itemsize
    first, size, count, entry = (16, "Q", "Q", "HHQQ") if big else (8, "I", "H", "HHII")
    strip = first + struct.calcsize(order + count) + 9 * struct.calcsize(order + entry) + struct.calcsize(order + size)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: strip, 277: 1, 278: height}
    entries = b""
    for tag, value in {**tags, 279: values.nbytes}.items():
        short = tag in (258, 259, 262, 277)
        field = struct.pack(order + ("H" if short else size), value).ljust(struct.calcsize(order + size), b"\0")
        entries += struct.pack(f"{order}HH{size}", tag, 3 if short else (16 if big else 4), 1) + field
    mark = struct.pack(order + "HHHQ", 43, 8, 0, first) if big else struct.pack(order + "HI", 42, first)
    directory = struct.pack(order + count, 9) + entries + struct.pack(order + size, 0)
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    return (b"II" if order == "<" else b"MM") + mark + directory + data


# Pillow opens no BigTIFF with the larger byte first.
@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_tiff_whose_white_is_zero(order: str, big: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for values in ((STORED >> 4).astype(np.uint8), (STORED << 4) + np.uint16(7)):
        path.write_bytes(tiff_of(values, False, order, big))
        np.testing.assert_array_equal(open_image(path), values)
        path.write_bytes(tiff_of(~values, True, order, big))
        np.testing.assert_array_equal(open_image(path), values)
    cut = tiff_of(values, True, order, big)
    for length in (4, 9, 20, 60):
        path.write_bytes(cut[:length])
        assert refusal(path).reason == "unreadable"


def test_palettes_transparency_and_gamma_leave_the_grey_values(tmp_path: Path) -> None:
    image = (STORED >> 4).astype(np.uint8)
    palette = Image.fromarray(255 - image, "P")
    palette.putpalette([255 - index for index in range(256) for _ in range(3)])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.tif")
    Image.fromarray(np.dstack([image, image // 2]), "LA").save(tmp_path / "transparent.png")
    Image.fromarray(np.dstack([image, image // 2]), "LA").save(tmp_path / "transparent.tif")
    data = write_png(tmp_path / "gamma.png", image).read_bytes()
    chunk = b"gAMA" + struct.pack(">I", 100_000)
    gamma = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "gamma.png").write_bytes(data[:33] + gamma + data[33:])  # behind IHDR
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(open_image(path), image, err_msg=path.name)


def test_a_panic_in_a_decoder_is_a_refusal_and_an_interrupt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The RLE decoder is written in Rust: its panics are no subclass of Exception."""
    path = compressed(write_dicom(tmp_path / "a.dcm", breast("L")), RLELossless)

    class PanicException(BaseException):
        pass

    def failing(error: type[BaseException]) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise error("index out of bounds")

        return fail

    monkeypatch.setattr(module, "decode_pixel_data", failing(PanicException))
    assert refusal(path).reason == "unreadable"
    monkeypatch.setattr(module, "decode_pixel_data", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_picture(path, PictureConfig())


def small_files(folder: Path) -> dict[str, bytes]:
    """Raw, compressed and plain images of a few kilobytes."""
    pixels = breast("L")[::3, ::3].copy()
    paths = {"raw": write_dicom(folder / "raw.dcm", pixels)}
    for name, syntax in (("rle", RLELossless), ("j2k", JPEG2000Lossless)):
        paths[name] = compressed(write_dicom(folder / f"{name}.dcm", pixels), syntax)
    for suffix in ("png", "tif", "jpg"):
        paths[suffix] = folder / f"a.{suffix}"
        cv2.imwrite(str(paths[suffix]), pixels if suffix != "jpg" else (pixels >> 4).astype(np.uint8))
    return {path.name: path.read_bytes() for path in paths.values()}


FUZZED = ("raw.dcm", "rle.dcm", "j2k.dcm", "a.png", "a.tif", "a.jpg")


def read_or_refuse(root: Path, name: str, data: bytes) -> str | None:
    """The reason of the refusal, or None for a picture. Anything else is an exception or a failed assertion."""
    path = root / name
    path.write_bytes(data)
    told = SourceView(path, laterality="L", view="CC")
    sample = sample_of(root, told, picture=PictureConfig(long_side=40))
    assert len(sample.images) + len(sample.refusals) == 1
    if not sample.refusals:
        image = cv2.imdecode(np.frombuffer(sample.images[0], np.uint8), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert image.shape == sample.study.views[0].size
        assert sample.study.to_json()
        return None
    (line,) = sample.refusals
    assert line.file == name
    assert "\n" not in line.message
    return line.reason


@pytest.mark.parametrize("name", FUZZED)
@pytest.mark.filterwarnings("ignore")
def test_truncated_files(name: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[name]
    assert read_or_refuse(tmp_path, name, data) is None
    reasons = [read_or_refuse(tmp_path, name, data[: len(data) * part // 20]) for part in range(20)]
    assert reasons[0] == "unreadable"
    if name == "raw.dcm":
        assert None not in reasons


@pytest.mark.parametrize("name", FUZZED)
@pytest.mark.filterwarnings("ignore")  # pydicom and Pillow warn of what they find
def test_flipped_bytes(name: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[name]
    outcomes = set()
    for seed in range(200 if name == "raw.dcm" else 60):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        reach = len(data) if seed % 2 else min(1200, len(data))  # every other one in the header only
        for _ in range(1 + seed % 8):
            damaged[rng.integers(reach)] = rng.integers(256)
        outcomes.add(read_or_refuse(tmp_path, name, bytes(damaged)))
    assert "unreadable" in outcomes


def test_a_path_must_not_lead_out_of_the_archive(tmp_path: Path) -> None:
    root = tmp_path / "archive"
    inside = write_dicom(root / "in.dcm", breast("L"))
    outside = write_dicom(tmp_path / "secret.dcm", breast("L"))
    beside = write_dicom(tmp_path / "archive2" / "a.dcm", breast("L"))
    for path in (
        outside,
        root / ".." / "secret.dcm",
        root / "x" / ".." / ".." / "secret.dcm",
        beside,
        Path("/dev/zero"),
    ):
        sample = sample_of(root, SourceView(path))
        assert [line.reason for line in sample.refusals] == ["outside"], path
        assert not sample.images
    (root / "x").mkdir()
    assert sample_of(root, SourceView(root / "x" / ".." / inside.name)).images


@pytest.mark.parametrize(
    ("facts", "report", "word"),
    [
        ({"race": "White\0"}, None, "race"),
        ({"race": "\x1b[31m"}, None, "race"),
        ({"race": "\ud800"}, None, "race"),  # no UTF-8 of it exists
        ({"race": "W" * 65}, None, "race"),
        ({"ethnicity": "a\x1eb"}, None, "ethnicity"),
        ({"reason": "\x7f"}, None, "reason"),
        ({"age": 131}, None, "age"),
        ({"age": -1}, None, "age"),
        ({}, "A mass.\x00", "report"),
        ({}, "A mass.\b", "report"),
        ({}, "\udfff", "report"),
        ({}, "x" * 20_001, "report"),
    ],
)
def test_texts_of_the_table_are_checked(facts: dict[str, Any], report: str | None, word: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("L"))
    sample = sample_of(tmp_path, SourceView(path, report=report), **facts)
    assert [line.reason for line in sample.refusals] == ["hostile"]
    assert sample.refusals[0].message.startswith(word)
    assert not sample.images
    good = sample_of(tmp_path, SourceView(path, report="Eine Masse.\n\tSonst nichts — ✓."), race="Ätiopien", age=130)
    assert good.images
    assert good.study.to_json()


@pytest.mark.parametrize("end", ["\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_a_line_ends_alike_whatever_program_wrote_the_table(end: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", breast("L")[::4, ::4])
    texts = ["A mass of 3 mm.\n\tBI-RADS 4.\n\nAdvised: biopsy.", "White Irish", "a b", "screening"]
    sample, expected = (
        sample_of(tmp_path, SourceView(path, report=report), race=race, ethnicity=ethnicity, reason=reason)
        for report, race, ethnicity, reason in (
            ["\ufeffA mass of 3\xa0mm.\n\tBI-RADS 4.\n\nAdvised: biopsy.".replace("\n", end),
            f"White{end}Irish", f"a\t{end}b", "screening"],
            texts,
        )
    )  # fmt: skip
    assert [sample.study.views[0].report, sample.study.race, sample.study.ethnicity, sample.study.reason] == texts
    assert list(sample.members()) == list(expected.members())
