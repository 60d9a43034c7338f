"""What the system or a library says reaches a user without numbers, addresses and other programs' words."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from data_pipeline.durable import durable_file, naming
from data_pipeline.errors import InputError, PretrainError, plain, storage_error


def test_error_numbers_and_addresses_are_left_out() -> None:
    told = str(InputError("x", "an image", "FileNotFoundError: [Errno 2] No such file or directory: 'y'"))
    assert told == "x: expected an image, found FileNotFoundError: No such file or directory: 'y'."
    assert plain("cannot identify image file <_io.BytesIO object at 0x7f3a1c0>") == "cannot identify image file"


def test_a_sentence_of_a_library_ends_once() -> None:
    assert str(PretrainError("x", "y", "No key. Log in.", "Do it.")) == "x: expected y, found No key. Log in. Do it."
    assert str(PretrainError("x", "y", "z")) == "x: expected y, found z."


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "Free space there"), (errno.EROFS, "Make it writable"), (errno.EIO, "Check the storage")],
)
def test_a_failed_write_names_its_file_and_what_to_do(tmp_path: Path, number: int, mend: str) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught, durable_file(tmp_path / "metrics.jsonl"):
        raise OSError(number, os.strerror(number))  # as a write does, which knows no name
    found = storage_error(caught.value)
    assert found is not None
    assert str(found).startswith(f"{tmp_path / 'metrics.jsonl'}: expected to be read and written, found ")
    assert mend in str(found)


def test_the_file_of_a_reader_stays_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "out"):
        (tmp_path / "source").open()
    assert Path(caught.value.filename) == tmp_path / "source"


def test_without_a_place_for_temporary_files_it_is_said_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.mkdtemp()
    assert str(storage_error(caught.value)).startswith("TMPDIR: expected")


def test_a_library_in_rust_is_understood(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(Exception, match="os error") as caught:
        save_file({}, tmp_path / "folder")
    assert "directory" in str(storage_error(caught.value))
    assert storage_error(ValueError("no number")) is None
