"""Modality and VOI transformations of a DICOM header: rescale, windows and LUTs (PS3.3 C.11.1 and C.11.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # of VOILUTFunction, PS3.3 C.11.2.1.3
FEWEST_BITS = 8  # of a LUT's entries, PS3.3 C.11.2.1.1

Values = NDArray[np.float64]
Result = tuple[Values, tuple[str, ...]]  # values, words of `schema.FALLBACKS`
Transformation = Callable[[Values], Result]  # raises any exception if the header is unusable


def apply_each(transformations: Iterable[Transformation], values: Values) -> Iterator[Result | None]:
    """The result of each transformation of the same `values`; None if it fails, is not finite, or is constant."""
    for transformation in transformations:
        try:
            with np.errstate(all="ignore"):
                transformed, words = transformation(values)
                single = transformed.astype(np.float32)
            yield (transformed, words) if np.isfinite(single).all() and single.min() < single.max() else None
        except Exception:  # untrusted input: empty texts, missing attributes, data of any kind
            yield None


def modality_transformations(header: Dataset, stored: slice) -> Iterator[Transformation]:
    """The modality LUT, then the rescale. `stored` is the range of the values that BitsStored bits can hold."""
    for item in _all(header, "ModalityLUTSequence")[:1]:
        yield partial(_modality_lut, item, header, stored)
    if "RescaleSlope" in header and "RescaleIntercept" in header:
        yield partial(_rescale, header)


def voi_transformations(header: Dataset, inputs: Values) -> Iterator[Transformation]:
    """The VOI LUTs, then the windows, in the header's order, each to 0..1. `inputs` are the values that can occur."""
    for item in _all(header, "VOILUTSequence"):
        yield partial(_voi_lut, item, header, inputs)
    names = _all(header, "VOILUTFunction") or [""]
    function = str(names[0]).upper() if "VOILUTFunction" in header else FUNCTIONS[0]
    # A center without a width yields a window that fails.
    for center, width in zip_longest(_all(header, "WindowCenter"), _all(header, "WindowWidth")):
        yield partial(_window, center, width, function)


def _all(header: Dataset, name: str) -> list[Any]:
    """The values of an attribute: none, one or several; [None] if they cannot be read."""
    try:
        value = header.get(name)
    except Exception:  # pydicom converts texts on access, and its errors have no common type
        return [None]
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MutableSequence) else [value]


def _modality_lut(item: Dataset, header: Dataset, stored: slice, values: Values) -> Result:
    entries, first, _ = _read_lut(item, header)
    return _look_up(values, values[stored], entries, first), ()


def _rescale(header: Dataset, values: Values) -> Result:
    return values * float(header.RescaleSlope) + float(header.RescaleIntercept), ()


def _window(center: Any, width: Any, function: str, values: Values) -> Result:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with an output of 0..1; LINEAR if the function is unknown."""
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


def _voi_lut(item: Dataset, header: Dataset, inputs: Values, values: Values) -> Result:
    """PS3.3 C.11.2.1.1 with an output of 0..1.

    If the entries fill another number of bits than the descriptor declares, theirs counts: some scanners (Agfa)
    declare the width of the stored word. An image of 12 bits would be 16 times too dark otherwise, one that exceeds
    the declared bits all white.
    """
    entries, first, declared = _read_lut(item, header)
    filled = int(entries.max()).bit_length()
    bits = declared if filled == declared else max(filled, FEWEST_BITS)
    words = () if bits == declared else ("lut-bits",)
    return _look_up(values, inputs, entries, first) / (2**bits - 1), words


def _read_lut(item: Dataset, header: Dataset) -> tuple[Values, int, int]:
    """Entries, first value mapped, and bits of a LUT. Entries of 8 bits may be packed, two a word (PS3.3 C.11.1.1.1).

    pydicom wraps the index of 8-bit LUTs at 256 entries and does not read packed ones.
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
    """The entries for `values`. `first` may have been written with the wrong sign: take one that overlaps `inputs`."""
    low, high = inputs.min(), inputs.max()
    overlapping = (at for at in (first, first - 2**16, first + 2**16) if at <= high and at + len(entries) > low)
    return entries[np.clip(values - next(overlapping, first), 0, len(entries) - 1).astype(np.int64)]
