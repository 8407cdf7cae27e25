"""Stored values -> display values: the grayscale transformations of PS3.4 N.2, as one table for an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

SIGN = np.uint16(0x8000)
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # of VOILUTFunction
GREY = ("MONOCHROME1", "MONOCHROME2")
MOST_TRIED = 16  # VOI LUTs and windows of an image: each may be rendered, and a header can hold thousands
FEWEST_BITS = 8  # of the entries of a LUT, PS3.3 C.11.2.1.1

Values = NDArray[np.float64]
# A transformation: values -> other values, and words of `schema.FALLBACKS`. One that cannot be raises what it likes.
Step = Callable[[Values], tuple[Values, tuple[str, ...]]]


@dataclass(frozen=True)
class Tone:
    """What each stored value looks like.

    `unit` has one entry for every value of an unsigned image of this depth: 0 black to 1 white where the
    file has a VOI transformation, and otherwise any range, brighter being larger (`stretch`).
    """

    unit: NDArray[np.float32]
    stretch: bool
    fallbacks: tuple[str, ...] = ()  # words of `schema.FALLBACKS`: what of the header could not be used

    def show(self, codes: NDArray[Any], white: int, among: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """Codes [h, w] as grey values 0..`white` (255: uint8, 65535: uint16).

        Without a VOI transformation the darkest and the brightest of what lies between the smallest and the largest
        code `among` those become black and white.
        """
        unit = self.unit
        if self.stretch:
            counted = codes
            if among is not None and among.any():  # the others count as one more of the first
                counted = np.where(among, codes, codes.flat[among.argmax()])
            used = unit[counted.min() : int(counted.max()) + 1]
            low, high = float(used.min()), float(used.max())
            unit = (unit - low) / (high - low if high > low else 1.0)
        table = np.rint(unit.clip(0, 1) * white).astype(np.uint8 if white == 255 else np.uint16)
        return table.take(codes)


def codes(values: NDArray[Any]) -> NDArray[Any]:
    """Stored values, signed or not, as unsigned ones in the same order: averages of codes are averages of values."""
    if values.dtype.kind == "u":
        return values
    sign = SIGN if values.dtype.itemsize == 2 else np.uint8(0x80)
    return values.view(f"u{values.dtype.itemsize}") ^ sign


def tones_of(header: Dataset | None, dtype: np.dtype[Any]) -> Iterator[Tone]:
    """The tones of a DICOM image, or of a file of another kind, without a header; the one that it asks for first.

    1. Modality LUT, or rescale, or else the stored values. 2. VOI: the items of VOILUTSequence, then the windows by
    VOILUTFunction (LINEAR, LINEAR_EXACT or SIGMOID), in the header's order; the output range becomes black to white,
    so that one scanner's images stay comparable. 3. Inversion, once, for MONOCHROME1 or an INVERSE presentation LUT:
    the two say the same thing (PS3.3 C.11.6.1). A file without a VOI has no range of its own and is stretched;
    8-bit files without a header are taken as ready for display, and so is grey that is stored in colours: windows
    and LUTs have no meaning for it (PS3.3 C.11.2.1.2).

    A step that cannot be (no data, no number, no width, slope 0) is passed over. The later tones are for a picture of
    which the earlier ones show nothing; the last two are stretches of the modality's and of the stored values.
    """
    bits = 8 * dtype.itemsize
    values = np.arange(2**bits, dtype=np.float64) - (2 ** (bits - 1) if dtype.kind == "i" else 0)
    if header is None or header.PhotometricInterpretation not in GREY:
        yield Tone((values / (2**bits - 1)).astype(np.float32), stretch=bits == 16)
        return
    inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    stored = _stored(header, values)
    modality, lost = apply_modality(header, values)
    passed: tuple[str, ...] = ()
    for made in _applied(islice(_voi_steps(header, modality[stored]), MOST_TRIED), modality):
        if made:
            yield Tone((1 - made[0] if inverted else made[0]).astype(np.float32), False, (*lost, *made[1], *passed))
        passed = ("next",)
    passed = ("stretch",) if passed else ()
    yield Tone((-modality if inverted else modality).astype(np.float32), True, (*lost, *passed))
    if modality is not values:
        yield Tone((-values if inverted else values).astype(np.float32), True, ("modality", *passed))


def apply_modality(header: Dataset, values: Values) -> tuple[Values, tuple[str, ...]]:
    """All values of a depth by modality LUT or rescale, or as they are where neither can be; and fallbacks."""
    tried = list(_applied(_modality_steps(header, _stored(header, values)), values))
    return next((made[0] for made in tried if made), values), () if all(tried[:1]) else ("modality",)


def padding_codes(header: Dataset | None, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """The first and the last code that is padding and not tissue (PS3.3 C.7.5.1.1.2)."""
    value = None if header is None else header.get("PixelPaddingValue")
    if header is None or value is None:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    bits = 8 * dtype.itemsize
    offset = 2 ** (bits - 1) if dtype.kind == "i" else 0
    first, last = sorted(int(end) + offset for end in (value, value if limit is None else limit))
    return (max(first, 0), min(last, 2**bits - 1)) if first < 2**bits and last >= 0 else None


def _stored(header: Dataset, values: Values) -> slice:
    """Which of all `values` of this depth BitsStored bits can hold."""
    bits = min(int(header.get("BitsStored") or 16), len(values).bit_length() - 1)
    first = len(values) // 2 - 2 ** (bits - 1) if values[0] < 0 else 0
    return slice(first, first + 2**bits)


def _applied(steps: Iterable[Step], values: Values) -> Iterator[tuple[Values, tuple[str, ...]] | None]:
    """What each step makes of the values; None where it fails, or its numbers are not finite or all the same."""
    for step in steps:
        try:
            with np.errstate(all="ignore"):
                made, words = step(values)
                single = made.astype(np.float32)
            yield (made, words) if np.isfinite(single).all() and single.min() < single.max() else None
        except Exception:  # untrusted input: empty texts, missing attributes, data of any kind
            yield None


def _modality_steps(header: Dataset, stored: slice) -> Iterator[Step]:
    for item in _all(header, "ModalityLUTSequence")[:1]:
        yield partial(_modality_lut, item, header, stored)
    if "RescaleSlope" in header and "RescaleIntercept" in header:
        yield partial(_rescale, header)


def _voi_steps(header: Dataset, inputs: Values) -> Iterator[Step]:
    for item in _all(header, "VOILUTSequence"):
        yield partial(_voi_lut, item, header, inputs)
    names = _all(header, "VOILUTFunction") or [""]
    function = str(names[0]).upper() if "VOILUTFunction" in header else FUNCTIONS[0]
    # A center without a width is a window that cannot be.
    for center, width in zip_longest(_all(header, "WindowCenter"), _all(header, "WindowWidth")):
        yield partial(_window, center, width, function)


def _all(header: Dataset, name: str) -> list[Any]:
    """The values of an attribute: none, one or several; None for what cannot be read."""
    try:
        value = header.get(name)
    except Exception:  # pydicom converts texts when they are asked for, and its errors have no common type
        return [None]
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MutableSequence) else [value]


def _modality_lut(item: Dataset, header: Dataset, stored: slice, values: Values) -> tuple[Values, tuple[str, ...]]:
    entries, first, _ = _lut(item, header)
    return _look_up(values, values[stored], entries, first), ()


def _rescale(header: Dataset, values: Values) -> tuple[Values, tuple[str, ...]]:
    return values * float(header.RescaleSlope) + float(header.RescaleIntercept), ()


def _window(center: Any, width: Any, function: str, values: Values) -> tuple[Values, tuple[str, ...]]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, for an output of 0..1; by a function that is none of them, LINEAR."""
    middle, extent = float(center), float(width)
    words = () if function in FUNCTIONS else ("function",)
    if not extent > 0:
        raise ValueError("a window without width")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - middle) / extent)), words
    if function != "LINEAR_EXACT":
        middle, extent = middle - 0.5, extent - 1
        if extent < 0:
            raise ValueError("a linear window of less than one value")
    if extent == 0:
        return (values > middle).astype(np.float64), words
    return np.clip((values - middle) / extent + 0.5, 0, 1), words


def _voi_lut(item: Dataset, header: Dataset, inputs: Values, values: Values) -> tuple[Values, tuple[str, ...]]:
    """PS3.3 C.11.2.1.1, for an output of 0..1. `inputs` are those that occur.

    The bits are those that the entries fill where the descriptor says others: some scanners (Agfa) write there how
    wide an entry is stored. A picture of 12 bits would be 16 times too dark, one of more than it says all white.
    """
    entries, first, declared = _lut(item, header)
    filled = int(entries.max()).bit_length()
    bits = declared if filled == declared else max(filled, FEWEST_BITS)
    words = () if bits == declared else ("lut-bits",)
    return _look_up(values, inputs, entries, first) / (2**bits - 1), words


def _lut(item: Dataset, header: Dataset) -> tuple[Values, int, int]:
    """Entries, first value mapped and bits of a LUT; entries of 8 bits may lie two in a word (PS3.3 C.11.1.1.1).

    Not by pydicom, which wraps the index of 8-bit LUTs at 256 entries and does not read packed ones.
    """
    number, first, bits = (int(value) for value in item.LUTDescriptor)
    number = number % 2**16 or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        order = ">" if header.original_encoding[1] is False else "<"
        words = np.frombuffer(data + b"\0" * (len(data) % 2), f"{order}u2")
    else:
        words = np.atleast_1d(np.asarray(data)).astype(np.uint16)
    packed = len(words) == (number + 1) // 2 and (bits <= FEWEST_BITS or isinstance(data, bytes))
    entries = words.astype("<u2").view(np.uint8) if packed else words
    return entries[:number].astype(np.float64), first, bits


def _look_up(values: Values, inputs: Values, entries: Values, first: int) -> Values:
    """`first` may be written as of the other sign: the table is then where no input is."""
    low, high = inputs.min(), inputs.max()
    meets = (at for at in (first, first - 2**16, first + 2**16) if at <= high and at + len(entries) > low)
    return entries[np.clip(values - next(meets, first), 0, len(entries) - 1).astype(np.int64)]
