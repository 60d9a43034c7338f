"""Who holds a run's folder, and which words are left there when a run fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, RunError
from pretrain.record import claimed
from pretrain.runtime.collectives import World
from pretrain.runtime.failure import LOG, note_failure, read_failure
from pretrain.runtime.run_folder import LOCK


def fail(out: Path, error: Exception) -> str | None:
    """What a run's folder says after a run that ends with this error before its first step."""
    with pytest.raises(type(error)), claimed(out, World(), lambda: None):
        raise error
    return read_failure(out)


def failed_before(out: Path) -> None:
    out.mkdir()
    note_failure(out, "the disk was full")


def test_what_storage_refused_is_told_as_elsewhere(tmp_path: Path) -> None:
    said = fail(tmp_path / "run", OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")))
    assert said == (
        f"{tmp_path / 'x'}: expected to be read and written, found No space left on device. "
        "Free space there, or name a folder that has room."
    )
    assert "Traceback" not in (tmp_path / "run" / LOG).read_text()


def test_an_error_of_ours_has_its_trace_in_the_log_whatever_its_words(tmp_path: Path) -> None:
    assert fail(tmp_path / "run", ZeroDivisionError("by \udcff")) is not None
    log = (tmp_path / "run" / LOG).read_text()
    assert log.startswith("Traceback")
    assert log.endswith("error: ZeroDivisionError: by \\udcff\n")


def test_the_words_are_those_of_the_last_attempt_and_of_its_first_rank_to_fail(tmp_path: Path) -> None:
    failed_before(tmp_path / "run")
    assert fail(tmp_path / "run", RunError("a", "b", "c")) == "a: expected b, found c."

    def second() -> None:
        with claimed(tmp_path / "other", World(), lambda: None):
            note_failure(tmp_path / "other", "another rank was first", rank=1)
            raise RunError("a", "b", "c")

    with pytest.raises(RunError):
        second()
    assert read_failure(tmp_path / "other") == "another rank was first"


def test_storage_that_numbers_a_file_anew_at_each_look_is_locked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.samestat", lambda one, other: False)
    with claimed(tmp_path / "run", World(), lambda: None):
        assert (tmp_path / "run" / LOCK).is_file()


def test_wrong_input_changes_no_word(tmp_path: Path) -> None:
    failed_before(tmp_path / "run")
    assert fail(tmp_path / "run", InputError("a", "b", "c")) == "the disk was full"
