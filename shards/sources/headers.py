"""What a source needs of DICOM headers, where no table of the data set names the files."""

from __future__ import annotations

from pathlib import Path

from shards.errors import is_of_the_machine
from shards.image.dicom_file import holds_dicom, is_named_dicom, open_unfolded, read_dicom
from shards.processes import quiet

INDEX = "DICOMDIR"  # of a DICOM disc (PS3.10 8.6): it names the images, and is none


def dicom_files(root: Path) -> list[Path]:
    """The DICOM files at any depth below `root`, sorted: by their suffix, else by their content."""
    return sorted(path for path in root.rglob("*") if is_named_dicom(path) or _is_unnamed_dicom(path))


def _is_unnamed_dicom(path: Path) -> bool:
    return path.name != INDEX and path.is_file() and holds_dicom(path)


def read_header(path: Path, *attributes: str) -> dict[str, str]:
    """The text of these attributes; "" for one that is missing, and for all of a file that cannot be read.

    Raises `OSError` where the machine is to blame, and not the file.

    Whether such a file is damaged or no DICOM file at all is told by the builder, to which it is left.
    """
    try:
        with quiet(), open_unfolded(path) as file:
            header = read_dicom(file, stop_before_pixels=True, specific_tags=list(attributes))
        return {name: str(header.get(name) or "").strip() for name in attributes}
    except Exception as error:  # untrusted input: pydicom's errors about damaged files have no common type
        if isinstance(error, OSError) and is_of_the_machine(error):
            raise  # or a file of which nothing is wrong would be planned as one without a name
        return dict.fromkeys(attributes, "")
