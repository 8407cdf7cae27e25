"""Label tables as they come: byte order marks, blanks in headers, texts that look like nothing, unsorted rows."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from shards.errors import ShardError
from shards.sources.tables import blank_unknown, groups, read_table, rows


def written(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def cells(table: pd.DataFrame) -> list[tuple[object, ...]]:
    return [tuple(row) for row in rows(table)]


def complaint(path: Path, columns: dict[str, str], **options: object) -> str:
    with pytest.raises(ShardError) as caught:
        read_table(path, columns, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_byte_order_mark_and_blanks_are_no_part_of_names_and_values(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbfpatient , side,unused\r\n 012 ,L ,x\r\n13, ,y\r\n")
    table = read_table(path, {"side": "laterality", "patient": "patient"})
    assert list(table.columns) == ["laterality", "patient"]
    assert cells(table) == [("L", "012"), (None, "13")]


def test_texts_that_look_like_nothing_stay_texts(tmp_path: Path) -> None:
    words = ["NA", "N/A", "nan", "None", "null", "-", "X"]
    path = written(tmp_path, "\n".join(["code,n", *(f"{word},1" for word in words), ",2"]) + "\n")
    assert [row.code for row in rows(read_table(path, {"code": "code"}))] == [*words, None]  # type: ignore[attr-defined]


def test_excel_cells_are_the_texts_that_csv_would_hold(tmp_path: Path) -> None:
    path = tmp_path / "table.xlsx"
    content = {
        " code": ["NA", None, "None "],
        "n": [12.0, None, 7],
        "id": ["0012", "1e5", ""],
        "ok": [True, False, None],
    }
    pd.DataFrame(content).to_excel(path, index=False)
    table = read_table(path, {name.strip(): name.strip() for name in content})
    assert cells(table) == [("NA", "12", "0012", "True"), (None, None, "1e5", "False"), ("None", "7", None, None)]


def test_parquet_cells_are_the_texts_that_csv_would_hold(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="no Parquet reader; run `pip install pyarrow`")
    path = tmp_path / "table.parquet"
    content = {
        "patient": [12.0, None, 7.0],  # a column of whole numbers with an empty cell
        "share": [0.5, 2.0, None],
        "code": pd.Categorical([1, None, 3]),
        "text": [" NA", "", "None"],
        "ok": [True, None, False],
        "large": [1e17, 1.0, None],  # a float does not know the last digit: not to be shown as if it did
    }
    pd.DataFrame(content).to_parquet(path)
    assert cells(read_table(path, {name: name for name in content})) == [
        ("12", "0.5", "1", "NA", "True", "1e+17"),
        (None, "2.0", None, None, None, "1.0"),
        ("7", None, "3", "None", "False", None),
    ]


def test_the_index_of_a_parquet_file_is_a_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="no Parquet reader; run `pip install pyarrow`")
    path = tmp_path / "table.parquet"
    pd.DataFrame({"image": ["b", "a"], "n": [1, 2]}).set_index("image").to_parquet(path)
    assert cells(read_table(path, {"n": "n", "image": "image"})) == [("1", "b"), ("2", "a")]


def test_parquet_without_a_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_engine(*_: object) -> None:
        raise ImportError("Unable to find a usable engine; tried using: 'pyarrow', 'fastparquet'.")

    monkeypatch.setattr(pd, "read_parquet", no_engine)
    path = written(tmp_path, "", "table.parquet")
    assert complaint(path, {"a": "a"}) == "to read .parquet files run `pip install pyarrow`"


def test_an_optional_column_may_be_missing_and_no_other(tmp_path: Path) -> None:
    path = written(tmp_path, "a,b\n1,2\n")
    table = read_table(path, {"a": "a", "c": "cancer"}, optional=["cancer"])
    assert cells(table) == [("1", None)]
    assert complaint(path, {"a": "a", "c": "cancer"}) == "has no column 'c'; it has a, b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a table (No columns"),
        (b"c;b\n1;2\n", "has no column 'a'; it has c, b"),
        (b"a,b\n1,2\n1,2,3\n", "cannot be read as a table (line 3 has 3 cells for 2 columns; quote cells that hold"),
        # pandas would take the surplus cell for a row name, and every value for that of its neighbour
        (b"a,b\n1,2,3\n1,2,3\n", "cannot be read as a table (line 2 has 3 cells for 2 columns; quote cells"),
        (b"a,b\n1,2,\n1,2,\n", "cannot be read as a table (line 2 has 3 cells for 2 columns; quote cells"),
        (b'a,b\n1,2\n1,"2\n3,4\n', "cannot be read as a table (the quote that opens in row 3 is not closed)"),
        (gzip.compress(b"a,b\n" * 99, mtime=0)[:-9], "cannot be read as a table (Compressed file ended before"),
        ("a,b\n".encode("utf-16-le"), "holds NUL bytes: UTF-16 without its byte order mark, or no text; save it as"),
        ("a,b\nРак,1\nРоза,\n".encode("cp1251"), "byte 0xd0 in line 3 is neither UTF-8 nor Windows-1252; save it"),
        ("a,b\nzmiana łagodna,1\n".encode("cp1250"), "byte 0xb3 in line 2 is neither UTF-8 nor Windows-1252"),
        (
            b"\xef\xbb\xbfa,b\n\xe4,1\n",
            "'utf-8' codec can't decode byte 0xe4 in position 4: invalid continuation byte; save",
        ),
        (b"a,b\n\xc3\xa4,\n\xe4,\n", "byte 0xe4 in line 3 is not UTF-8, line 2 is; save all as UTF-8"),
    ],
)
def test_what_is_no_such_table_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    assert complaint(written(tmp_path, content), {"a": "a"}).startswith(message)


def test_no_file_no_excel_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.csv", {"a": "a"}) == "no such table"
    assert complaint(written(tmp_path, "a\n1\n", "table.xlsx"), {"a": "a"}).startswith("cannot be read as a table")
    assert complaint(tmp_path, {"a": "a"}).startswith("cannot be read as a table")


def test_words_for_nothing_are_blanked_where_they_are_no_codes(tmp_path: Path) -> None:
    words = ["NA", "n/a", "#N/A", "<NA>", "NaN", "None", "Unknown", "-"]
    path = written(tmp_path, "code,sign,n\n" + "".join(f"{word},{word},1\n" for word in [*words, "N", "nano"]))
    table = blank_unknown(read_table(path, {"code": "code", "sign": "sign"}), {"sign": {"-": "low", "+": "high"}})
    assert cells(table) == [(None, None)] * 7 + [(None, "-"), ("N", "N"), ("nano", "nano")]


def test_a_table_without_rows_has_no_groups(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a,b\n"), {"a": "a", "b": "b"})
    assert list(table.columns) == ["a", "b"]
    assert list(rows(table)) == []
    assert list(groups(table, ["a"])) == []


@pytest.mark.parametrize("names", ["a,b,a", '"\ufeff a",b,a', "\ufeffa;b; a ", "a,b,a,a.1"])
def test_a_name_that_two_columns_have_is_an_error_where_it_is_asked_for(tmp_path: Path, names: str) -> None:
    path = written(tmp_path, f"{names}\n{','.join('1234'[: names.count(',') + 1])}\n")
    assert complaint(path, {"a": "a"}) == "has 2 columns 'a'; remove or rename all but one"
    book = tmp_path / "table.xlsx"
    pd.DataFrame([["a", "b", "a "], [1, 2, 3]]).to_excel(book, index=False, header=False)
    assert complaint(book, {"a": "a"}) == "has 2 columns 'a'; remove or rename all but one"
    assert cells(read_table(book, {"b": "b"})) == [("2",)]


TEXT = 'number{0}share{0}words\r\n007{0}0{1}07{0}"Läsion, „3 mm“; {0}\r\nunverändert"\r\n\r\n12{1}0{0}{0}\r\n'


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_encoding_separator_and_compression_are_found(
    tmp_path: Path, separator: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = TEXT.format(separator, "." if separator == "," else ",")
    ways: dict[str, Callable[[bytes], bytes]] = {
        **{"utf-8": bytes, "utf-8-sig": gzip.compress, "utf-16": bz2.compress, "cp1252": lzma.compress}
    }
    for encoding, packed in ways.items():
        caplog.clear()
        path = written(tmp_path, packed(text.encode(encoding)))
        table = read_table(path, {name: name for name in ("number", "share", "words")})
        assert cells(table) == [
            ("007", "0.07", f"Läsion, „3 mm“; {separator}\r\nunverändert"),
            ("12.0", None, None),
        ]
        assert list(table.index + 2) == [2, 4]  # the rows of a spreadsheet, in which a blank line is one
        assert ("read as Windows-1252, as in 'Läsion' in line 2" in caplog.text) == (encoding == "cp1252")


def test_a_zip_file_holds_one_table(tmp_path: Path) -> None:
    path = tmp_path / "train.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.csv", "a,b\n1,2\n")
    assert cells(read_table(path, {"b": "b"})) == [("2",)]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test.csv", "a,b\n1,2\n")
    assert complaint(path, {"b": "b"}).endswith("(a zip file of several files; unpack it and name the table)")


def test_rows_of_a_large_table_are_read_in_pieces_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.sources.tables.ROWS", 3)
    lines = [f"{n},0{n}," for n in range(8)]
    table = read_table(written(tmp_path, "\n".join(["x,n,y", *lines[:4], "", ",,", *lines[4:]])), {"n": "n"})
    assert cells(table) == [(f"0{n}",) for n in range(8)]
    assert list(table.index + 2) == [2, 3, 4, 5, 8, 9, 10, 11]
    # A row that has a cell too many is told also where only some columns are asked for.
    assert complaint(written(tmp_path, "\n".join(["x,n,y", *lines, "1,2,3,4"])), {"n": "n"}).startswith(
        "cannot be read as a table (line 10 has 4 cells for 3 columns"
    )


def test_commas_are_decimal_only_where_that_is_certain(tmp_path: Path) -> None:
    numbers = ["1,234", "0,123", "-12,5", "1.234,5", "1,5 mm", "1,2,3", "1,"]
    points = ["1.234", "0.123", "-12.5", *numbers[3:]]
    rest = "\n".join(f"{number};" for number in numbers)
    table = read_table(written(tmp_path, f"a;b\n{rest}"), {"a": "a", "b": "b"})
    assert list(table["a"]) == points
    table = read_table(written(tmp_path, f"a;b\n{rest}".replace(";", "\t")), {"a": "a", "b": "b"})
    assert list(table["a"]) == ["1,234", *points[1:]]  # a thousand and 234, perhaps
    quoted = "\n".join(f'"{number}",' for number in numbers)
    assert list(read_table(written(tmp_path, f"a,b\n{quoted}"), {"a": "a", "b": "b"})["a"]) == numbers


def test_the_header_may_come_late_and_its_separator_may_be_given(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "\n;;\na;b\n1;2\n"), {"a": "a", "b": "b"})
    assert (cells(table), list(table.index + 2)) == ([("1", "2")], [4])
    table = read_table(written(tmp_path, "sep=;\r\n\r\na;b\r\n1;2\r\n"), {"a": "a", "b": "b"})
    assert (cells(table), list(table.index + 2)) == ([("1", "2")], [4])
    path = written(tmp_path, "a;b,c\n1;2,3\n")
    assert cells(read_table(path, {"a": "a"})) == [("1",)]
    assert cells(read_table(path, {"a;b": "a"}, separator=",")) == [("1;2",)]


def test_excel_cells_with_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "table.xlsx"
    pd.DataFrame([["a"], ["Mass._x000D_\nBI-RADS 4."]]).to_excel(path, index=False, header=False)
    assert cells(read_table(path, {"a": "a"})) == [("Mass.\r\nBI-RADS 4.",)]


def test_unsorted_rows_come_together_and_keep_their_order(tmp_path: Path) -> None:
    text = "patient,study,n\nb,1,0\na,2,1\nb,1,2\na,1,3\n,1,4\na,2,5\n,1,6\nb,,7\n"
    table = read_table(written(tmp_path, text), {"patient": "patient", "study": "study", "n": "n"})
    found = [(group[0][:2], [row[2] for row in group]) for group in groups(table, ["patient", "study"])]
    assert found == [
        (("a", "1"), ["3"]),
        (("a", "2"), ["1", "5"]),
        (("b", "1"), ["0", "2"]),
        (("b", None), ["7"]),
        ((None, "1"), ["4", "6"]),
    ]


def test_neighbours_that_differ_in_one_column_are_two_groups(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a,b\n1,11\n11,1\n1,11\n11,11\n"), {"a": "a", "b": "b"})
    assert [len(group) for group in groups(table, ["a", "b"])] == [2, 1, 1]
    assert [len(group) for group in groups(table, ["a"])] == [2, 2]


def test_equal_rows_keep_the_order_of_the_table(tmp_path: Path) -> None:
    text = "a,n\n" + "".join(f"{n % 3},{n}\n" for n in range(300))
    table = read_table(written(tmp_path, text), {"a": "a", "n": "n"})
    found = [[int(row[1]) for row in group] for group in groups(table, ["a"])]
    assert found == [list(range(start, 300, 3)) for start in range(3)]
