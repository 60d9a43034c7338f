"""Files that appear whole, whoever else writes them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from data_pipeline.durable import durable_file


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave a name without its bytes, or none of a file that was said to be there."""
    done: list[tuple[str, int, int | None]] = []
    path, fsync, replace = tmp_path / "file", os.fsync, os.replace

    def note(what: str, status: os.stat_result) -> None:
        done.append((what, status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else None))

    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), note("synced", os.fstat(fd)))[0])
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), note("named", os.stat(new)))[0])
    with durable_file(path) as file:
        file.write(b"content")
    of_file = path.stat().st_ino, len(b"content")
    assert done == [("synced", *of_file), ("named", *of_file), ("synced", tmp_path.stat().st_ino, None)]


def test_of_two_writers_with_one_process_id_the_last_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with durable_file(tmp_path / "file") as first:
        first.write(b"first")
        with durable_file(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
