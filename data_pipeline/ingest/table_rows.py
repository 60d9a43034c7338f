"""The columns and rows of a CSV, TSV or Parquet file, as text, in bounded memory whatever stands in it."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from data_pipeline.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
IMAGE_NAMES = ("image", "path", "filepath", "file_path", "image_path", "file_name", "filename")

MAX_VALUE = 1 << 22  # characters of one value; in a CSV, more is a quotation mark without its other half
MAX_ROW = 1 << 24  # characters of one row of a CSV
MAX_COLUMN_BYTES = 1 << 30  # of one column in one row group of a Parquet file, unpacked
_BATCH_ROWS = 1 << 13  # of a Parquet file at a time
_OTHER_DELIMITERS = (",", "\t", ";")  # a spreadsheet writes tabs or semicolons under any name
_UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # as bytes come that are not UTF-8

Values = tuple[str | None, ...] | str


def is_table(path: Path) -> bool:
    """By its name."""
    return _suffix(path) in DELIMITERS or _suffix(path) == ".parquet"


@dataclass(frozen=True)
class Table:
    """A table that is read from front to back.

    Attributes:
        path: of the file.
        delimiter: what stands between the values of a row; of no meaning for Parquet.
    """

    path: Path
    delimiter: str

    @classmethod
    def open(cls, path: Path, image_column: str | None) -> Table:
        """The table in a file.

        Args:
            path: of the file.
            image_column: name of the column with images; None: one of the usual names. The delimiter is the one that
                finds it: first that of the file's name, then others.
        """
        if _suffix(path) == ".parquet":
            return cls(path, "")
        own = DELIMITERS[_suffix(path)]
        for delimiter in (own, *_OTHER_DELIMITERS):
            table = cls(path, delimiter)
            try:
                names = table.column_names()
            except csv.Error:  # told where it is the file's own
                continue
            if image_column in names or (image_column is None and {name.lower() for name in names} & {*IMAGE_NAMES}):
                return table
        return cls(path, own)

    def column_names(self) -> list[str]:
        """As they stand in the first row, or the schema."""
        if _suffix(self.path) == ".parquet":
            from pyarrow import parquet as pq

            names: list[str] = pq.read_schema(self.path).names
            return names
        with self._opened() as file:
            return next(self._csv_rows(_Lines(self.path, file)), [])

    def rows(self, names: list[str]) -> Iterator[tuple[str, Values]]:
        """(place, values of the named columns) of each row; a text in their stead says what is wrong with the row.

        Bytes that are not UTF-8 come as lone surrogates, so that one wrong letter does not end it all.
        """
        if _suffix(self.path) == ".parquet":
            yield from self._parquet_rows(names)
            return
        with self._opened() as file:
            lines = _Lines(self.path, file)
            reader = self._csv_rows(lines)
            header = next(reader)
            places = [header.index(name) for name in names]
            for row in reader:
                lines.row_length = 0
                where = f"line {lines.number}"
                if len(row) == len(header):
                    yield where, tuple(row[place] for place in places)
                elif row:
                    yield where, f"{len(row)} for {len(header)}"

    def _opened(self) -> TextIO:
        opened = gzip.open if self.path.suffix.lower() == ".gz" else open
        return cast(TextIO, opened(self.path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""))

    def _csv_rows(self, lines: _Lines) -> Iterator[list[str]]:
        """Python's own: arrow's guesses types, and drops a row of the wrong length that is not UTF-8 without a word."""
        csv.field_size_limit(MAX_VALUE)
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _parquet_rows(self, names: list[str]) -> Iterator[tuple[str, Values]]:
        from pyarrow import parquet as pq

        number = itertools.count(1)
        wanted = list(dict.fromkeys(names))
        with pq.ParquetFile(self.path) as parquet:
            self._check_row_groups(parquet.metadata, wanted)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted):
                columns = [_texts(self.path, name, batch.column(name)) for name in names]
                for values in zip(*columns, strict=True):
                    longest = max((len(value) for value in values if value is not None), default=0)
                    too_long = f"a value of {longest:,} characters, where {MAX_VALUE:,} are the most"
                    yield f"row {next(number)}", too_long if longest > MAX_VALUE else values

    def _check_row_groups(self, metadata: pa.parquet.FileMetaData, names: list[str]) -> None:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            if row_group.total_byte_size <= MAX_COLUMN_BYTES:  # columns are not asked: arrow aborts at damaged ones
                continue
            for column in (row_group.column(i) for i in range(row_group.num_columns)):
                name, size = column.path_in_schema, column.total_uncompressed_size
                if name.partition(".")[0] in names and size > MAX_COLUMN_BYTES:
                    raise SourceError(
                        where=f"{self.path}, row group {group}, column {column.path_in_schema}",
                        expected=f"at most {MAX_COLUMN_BYTES:,} bytes when unpacked",
                        found=f"{column.total_uncompressed_size:,}",
                        fix="Write the table with smaller row groups.",
                    )


class _Lines:
    """The lines of a text file, none longer than a row may be.

    Attributes:
        number: lines given so far.
        row_length: characters given since the reader set it to 0.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self.number = self.row_length = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW + 1 - self.row_length)
        if not line:
            raise StopIteration
        if self.number == 0 and line.startswith(_UTF16_MARKS):
            raise SourceError(where=str(self._path), expected="UTF-8", found="UTF-16", fix="Save the table as UTF-8.")
        self.number += 1
        self.row_length += len(line)
        if self.row_length > MAX_ROW:
            raise SourceError(
                where=f"{self._path}, line {self.number:,}",
                expected=f"a row of at most {MAX_ROW:,} characters",
                found="more",
                fix="If no row is that long, a quotation mark lacks its other half.",
            )
        return line


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _texts(path: Path, name: str, column: pa.Array) -> list[str | None]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        column = column.cast(pa.string())
    try:
        values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise SourceError(where=f"{path}, column {name}", expected="text or numbers", found=f"{column.type}") from error
    return [None if value is None else value.decode(errors="surrogateescape") for value in values]
