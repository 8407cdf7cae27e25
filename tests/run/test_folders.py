"""A folder that is replaced is the old one or a new one, whole, whenever one looks."""

from __future__ import annotations

import platform
from pathlib import Path
from unittest.mock import patch

import pytest

from mama.run.files import replace_folder, replaced, surviving


def made(place: Path, content: str) -> Path:
    place.mkdir()
    (place / "file").write_text(content)
    return place


@pytest.mark.parametrize("at", ["folder", "file", "link", "empty", "nothing"])
def test_a_folder_takes_the_place_of_whatever_is_there(tmp_path: Path, at: str) -> None:
    place = tmp_path / "x"
    if at == "folder":
        made(place, "before")
    elif at == "file":
        place.write_text("before")
    elif at == "link":
        place.symlink_to(made(tmp_path / "elsewhere", "kept"))
    elif at == "empty":
        place.mkdir()
    replace_folder(made(tmp_path / "x.partial", "after"), place)
    assert (place / "file").read_text() == "after"
    assert {path.name for path in tmp_path.iterdir()} == {"x"} | ({"elsewhere"} if at == "link" else set())
    assert at != "link" or (tmp_path / "elsewhere" / "file").read_text() == "kept"


def test_a_kill_between_the_two_renames_leaves_the_old_folder(tmp_path: Path) -> None:
    place, rename = made(tmp_path / "x", "before"), Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == place:
            raise KeyboardInterrupt
        return rename(path, target)

    new = made(tmp_path / "x.partial", "after")
    with patch.object(Path, "rename", killed), pytest.raises(KeyboardInterrupt):
        replace_folder(new, place)
    assert not place.exists()
    assert (surviving(place) / "file").read_text() == "before"
    replace_folder(new, place)
    assert (surviving(place) / "file").read_text() == "after"
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_two_processes_do_not_mix_their_files(tmp_path: Path) -> None:
    """The second begins while the first still writes; what a dead one left is removed."""
    place = tmp_path / "x"
    (tmp_path / f".x.{platform.node()}-999999999.partial").mkdir()
    with replaced(place) as one:
        (one / "file").write_text("first")
        with patch("os.getpid", return_value=1), replaced(place) as other:
            assert other != one
            (other / "other").write_text("second")
        assert [path.name for path in one.iterdir()] == ["file"]
    assert [path.name for path in place.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
