"""Tables as spreadsheets write them are read; lines, rows and columns of any length are refused in bounded memory."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.errors import SourceError
from data_pipeline.ingest import table_rows
from data_pipeline.ingest.table_rows import Table

TEXT = "\ufeffid{0}image{0}caption\n1{0}a.jpg{0}one, two; three\n2{0}b.jpg{0}x\n"
ROWS = [("line 2", ("a.jpg", "one, two; three")), ("line 3", ("b.jpg", "x"))]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tabs_and_semicolons_are_read_under_any_name(tmp_path: Path, name: str, delimiter: str) -> None:
    text = TEXT.format(delimiter).replace("one, two; three", '"one, two; three"')
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    for column in (None, "image"):
        table = Table.open(path, column)
        assert table.column_names() == ["id", "image", "caption"]
        assert list(table.rows(["image", "caption"])) == ROWS


def test_the_delimiter_of_the_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,a;image;b\nx,y\n")
    assert Table.open(tmp_path / "t.csv", None).column_names() == ["image", "a;image;b"]
    assert Table.open(tmp_path / "t.csv", "none").delimiter == ","


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_told(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes(TEXT.format(",").encode(encoding))
    with pytest.raises(SourceError, match=r"t\.csv: expected UTF-8, found UTF-16\. Save the table"):
        Table.open(tmp_path / "t.csv", None)


@pytest.mark.parametrize(
    "rows",
    [
        b"a" * 1_000_000,  # one line
        b'a.jpg,"' + b"b\n" * 500_000,  # one value over many lines
        b'"' + b'a\n","' * 250_000,  # one row of many values
    ],
)
def test_a_row_of_any_length_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: bytes
) -> None:
    monkeypatch.setattr(table_rows, "MAX_ROW", 50_000)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"image,caption\nx.jpg,y\n" + rows * 100, 1))
    table = Table.open(path, None)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"line [0-9,]+: expected a row of at most 50,000 characters"):
            list(table.rows(["image"]))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_long_values_and_columns_of_parquet_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": ["a", "b" * 5000], "other": ["c" * 9000, "d"]}), path)
    monkeypatch.setattr(table_rows, "MAX_VALUE", 1000)
    first, second = Table.open(path, None).rows(["image"])
    assert first == ("row 1", ("a",))
    assert second == ("row 2", "a value of 5,000 characters, where 1,000 are the most")
    monkeypatch.setattr(table_rows, "MAX_COLUMN_BYTES", 1000)
    with pytest.raises(SourceError, match="row group 0, column image: expected at most 1,000 bytes"):
        list(Table.open(path, None).rows(["image"]))
