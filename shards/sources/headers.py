"""What a source needs of DICOM headers, where no table of the data set names the files."""

from __future__ import annotations

from pathlib import Path

import pydicom


def read_header(path: Path, *attributes: str) -> dict[str, str]:
    """The text of these attributes; "" for one that is missing, and for all of a file that cannot be read.

    Whether such a file is damaged or no DICOM file at all is told by the builder, to which it is left.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(attributes))
        return {name: str(header.get(name) or "").strip() for name in attributes}
    except Exception:  # untrusted input: pydicom's errors about damaged files have no common type
        return dict.fromkeys(attributes, "")
