"""A file that somebody cuts off or goes on writing while it is read: told by its name, never a death without a word."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError, ShardError
from data_pipeline.inspect.verify import verify
from data_pipeline.messages import killed_by
from data_pipeline.parallel import how_one_died, run_parallel
from data_pipeline.shards import file_bytes, strict_tar
from data_pipeline.shards.file_bytes import FileBytes
from data_pipeline.shards.scan import index_shards, scan_shard
from tests.data_pipeline.archives import as_tar

SAMPLES = {f"{i}.jpg": bytes([i]) * 20_000 for i in range(20)}
PAGE = mmap.PAGESIZE


@pytest.fixture(params=[100, 5 * PAGE, 1_000_000], ids=["to 100 bytes", "to some pages", "to more"])
def changed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shard that gets another size as soon as its second member was found."""
    path = as_tar(tmp_path / "shard-000000.tar", SAMPLES)
    index_shards(str(tmp_path))
    whole = strict_tar.members

    def members(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, member in enumerate(whole(*arguments, **options)):
            if number == 1:
                os.truncate(path, request.param)
            yield member

    monkeypatch.setattr(strict_tar, "members", members)
    monkeypatch.setattr(file_bytes, "PIECE", 1000)
    return path


def test_a_shard_that_changes_while_it_is_scanned_is_told(changed: Path) -> None:
    with pytest.raises(ShardError, match="a file that stays as it is while it is read") as error:
        scan_shard(changed)
    assert str(changed) in str(error.value)


def test_a_shard_that_changes_while_it_is_verified_is_a_fault(changed: Path) -> None:
    (fault, *_) = verify(str(changed.parent)).faults
    assert "a file that stays as it is while it is read" in fault.what


def test_bytes_are_those_of_the_file_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, "PIECE", 7)
    content = bytes(range(100))
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        for offsets in ((0, 5, 30, 64), (64, 3, 90), ()):
            found = FileBytes(file, "file")
            for offset in offsets:
                for size in (0, 1, 20, 1000):
                    assert found.crc32(offset, size) == zlib.crc32(content[offset : offset + size])
                    assert found.read(offset, size) == content[offset : offset + size]
            assert (found.sha256(), found.size) == (hashlib.sha256(content).hexdigest(), 100)


def read_beyond_the_end(path: Path) -> int:
    """Reads through a map of a file that was cut off meanwhile: the kernel ends this process."""
    with path.open("r+b") as file:
        content = mmap.mmap(file.fileno(), 0)
        os.ftruncate(file.fileno(), 0)
        return content[0]


def test_a_worker_that_read_a_file_that_got_smaller_is_told(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"1" * PAGE)
    with pytest.raises(RunError, match=r"was killed by SIGBUS \(a file that it had mapped into memory got smaller"):
        list(run_parallel(read_beyond_the_end, [tmp_path / "mapped"], workers=2))


def test_what_signals_mean() -> None:
    assert killed_by(signal.SIGKILL) == "SIGKILL (perhaps for want of memory)"
    assert killed_by(signal.SIGSEGV) == "SIGSEGV"
    assert killed_by(99) == "signal 99"


class Dying:
    """A process that has closed its files, and has no exit status before it is waited for."""

    def __init__(self) -> None:
        self.sentinel, self._other = os.pipe()
        self.exitcode: int | None = None
        os.close(self._other)

    def join(self, timeout: float) -> None:
        assert timeout > 0
        self.exitcode = -signal.SIGKILL


def test_the_end_of_a_process_is_waited_for_once_it_has_begun() -> None:
    process = Dying()
    assert how_one_died([process]).startswith("was killed by SIGKILL")  # type: ignore[list-item]
    os.close(process.sentinel)


def test_of_no_processes_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.parallel.wait_for_sentinel", lambda *_: pytest.fail("waits"))
    assert how_one_died([]) == ""
