"""DICOM files and headers, for sources whose tables do not list files."""

from __future__ import annotations

from pathlib import Path

from shards.errors import is_machine_error
from shards.image.dicom_file import holds_dicom, is_named_dicom, open_unfolded, read_dicom
from shards.processes import quiet

INDEX = "DICOMDIR"  # index of a DICOM disc (PS3.10 8.6): in DICOM format, but no image


def dicom_files(root: Path) -> list[Path]:
    """The DICOM files at any depth below `root`, sorted: by suffix, else by content."""
    paths = root.rglob("*")
    return sorted(p for p in paths if is_named_dicom(p) or (p.name != INDEX and p.is_file() and holds_dicom(p)))


def read_header(path: Path, *attributes: str) -> dict[str, str]:
    """The text of each of the `attributes`, stripped; "" if it is missing, or if the file cannot be read.

    Packing finds out whether an unreadable file is damaged or no DICOM file. Raises `OSError` if the machine is to
    blame, not the file.
    """
    try:
        with quiet(), open_unfolded(path) as file:
            header = read_dicom(file, stop_before_pixels=True, specific_tags=list(attributes))
        return {name: str(header.get(name) or "").strip() for name in attributes}
    except Exception as error:  # untrusted input: pydicom's errors about damaged files have no common type
        if isinstance(error, OSError) and is_machine_error(error):
            raise  # otherwise an intact file would be planned as one without identifiers
        return dict.fromkeys(attributes, "")
