"""Files that appear whole, whoever else writes them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.durable import claimed, durable_file, has_other_files
from data_pipeline.errors import RunError


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


class TestManyAtOnce:
    """What `convert`, `make` and `label` claim: all of them may find the same empty folder in one moment."""

    def test_a_plan_that_another_wrote_in_the_same_moment_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = tmp_path / "out" / "plan.json"
        with claimed(plan, {"a": 1}, "this"):
            there = plan.stat().st_ino
            monkeypatch.setattr(Path, "exists", lambda path: False)
            with pytest.raises(RunError, match="another at work"), claimed(plan, {"a": 1}, "this"):
                pass
            assert plan.stat().st_ino == there, "or its lock would be on a file without a name"
        monkeypatch.undo()
        assert [path.name for path in plan.parent.iterdir()] == ["plan.json"]

    def test_another_plan_of_the_same_moment_is_refused(self, tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        with claimed(plan, {"a": 1}, "this"):
            pass
        with pytest.raises(RunError, match="another one, written just now"), claimed(plan, {"a": 2}, "this"):
            pass

    def test_a_plan_that_its_holder_took_back_meanwhile_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan, flock = tmp_path / "plan.json", fcntl.flock

        def late(file: Any, how: int) -> None:
            plan.unlink()
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(RunError, match="taken back just now"), claimed(plan, {"a": 1}, "this"):
            pass

    def test_its_holder_may_clear_away_what_others_are_writing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second one finds no plan; the first writes it, and clears the folder, before the second has its own."""
        plan, link = tmp_path / "plan.json", os.link

        def late(temporary: Path, path: Path) -> None:
            monkeypatch.setattr(os, "link", link)
            with claimed(plan, {"a": 1}, "this"):
                assert not temporary.exists()
            link(temporary, path)

        monkeypatch.setattr(os, "link", late)
        with claimed(plan, {"a": 1}, "this"):
            assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    def test_what_is_being_written_is_no_other_file(self, tmp_path: Path) -> None:
        with durable_file(tmp_path / "file"):
            assert not has_other_files(tmp_path)
        assert has_other_files(tmp_path)

    def test_storage_without_links_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*names: Path) -> None:
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(os, "link", refuse)
        with claimed(tmp_path / "plan.json", {"a": 1}, "this"):
            assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
