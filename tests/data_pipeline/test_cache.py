"""The cache of shards keeps its bound and gives whole files, whoever shares it, and whoever of them is killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import PretrainError, RunError
from data_pipeline.remote.cache import Cache


def key(number: int) -> str:
    return f"{hashlib.sha256(str(number).encode()).hexdigest()}.tar"


def filled(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def sound(_: Path) -> None:
    """A check that finds every file whole."""


def names(folder: Path) -> set[str]:
    """What lies there, the notes of what was checked apart."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".ok")}


def test_the_file_used_longest_ago_goes_first_and_stays_readable(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    oldest = cache.open(key(0), 40, filled(b"0" * 40), sound)
    cache.open(key(1), 40, filled(b"1" * 40), sound).close()
    time.sleep(0.02)
    cache.open(key(0), 40, filled(b"?"), sound).close()  # used again
    (tmp_path / "notes.txt").write_bytes(b"mine" * 1000)
    cache.open(key(2), 40, filled(b"2" * 40), sound).close()
    assert names(tmp_path) == {key(0), key(2), "notes.txt", ".lock"}
    cache.open(key(3), 90, filled(b"3" * 90), sound).close()
    assert names(tmp_path) == {key(3), "notes.txt", ".lock"}
    assert oldest.read() == b"0" * 40


def test_one_of_many_threads_fetches(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path, 1000), []

    def fetch(path: Path) -> None:
        fetched.append(path)
        time.sleep(0.05)
        path.write_bytes(b"whole")

    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(cache.open(key(n % 3), 5, fetch, sound).read()))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [b"whole"] * 12
    assert len(fetched) == 3


def _hammer(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(folder, 500)
    for number in rng.integers(0, 12, 60).tolist():
        content = hashlib.sha256(str(number).encode()).digest() * 3

        def fetch(path: Path, content: bytes = content) -> None:
            with path.open("wb") as file:
                for byte in range(0, 96, 32):
                    file.write(content[byte : byte + 32])
                    file.flush()
                    time.sleep(0.0005)

        with cache.open(key(number), 96, fetch, sound) as file:
            assert file.read() == content, "torn"
        assert sum(_sizes(folder)) <= 500


def _sizes(folder: Path) -> Iterator[int]:
    """Of the files that have their own name, also while some go."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if not path.name.startswith("."):
                yield path.stat().st_size


def test_processes_share_the_folder_and_killed_ones_leave_nothing_that_looks_whole(tmp_path: Path) -> None:
    """Three processes over twelve files in the room of five; a fourth is killed again and again on its way."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer_until_done, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    rng = np.random.default_rng(7)
    for seed in range(100, 108):
        victim = context.Process(target=_hammer_until_done, args=(tmp_path, seed))
        victim.start()
        time.sleep(float(rng.uniform(0.01, 0.06)))
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert set(_sizes(tmp_path)) == {96}
    Cache(tmp_path, 500).open(key(99), 96, filled(b"x" * 96), sound).close()
    assert not list(tmp_path.glob(".*.tmp"))


def _hammer_until_done(folder: Path, seed: int) -> None:
    os._exit(0 if _passes(folder, seed) else 1)


def _passes(folder: Path, seed: int) -> bool:
    try:
        _hammer(folder, seed)
    except (AssertionError, PretrainError, OSError) as error:
        print(repr(error), file=sys.stderr)
        return False
    return True


def test_links_and_files_of_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that several users share, anybody could have put them there; nothing is written through them."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    folder = tmp_path / "cache"
    for name in (key(0), f".{key(0)}.4.tmp", ".lock"):
        for link in (Path.symlink_to, Path.hardlink_to):
            if link is Path.hardlink_to and name == key(0):
                continue  # a file of ours under a second name is still one of ours, and is checked
            folder.mkdir()
            link(folder / name, precious)
            with pytest.raises(RunError, match=r"data\.cache\.folder, or remove the file"):
                Cache(folder, 100).open(key(0), 4, filled(b"ours"), sound)
            assert precious.read_bytes() == b"mine"
            shutil.rmtree(folder)
    Cache(folder, 100).open(key(0), 4, filled(b"ours"), sound).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    Cache(folder, 100).open(key(0), 4, filled(b"ours"), sound).close()  # the folder's owner
    inner = os.fstat

    def another(descriptor: int) -> os.stat_result:
        found = inner(descriptor)
        return os.stat_result((*found[:4], 54321, *found[5:]))

    monkeypatch.setattr(os, "fstat", another)
    with pytest.raises(RunError, match="found one of user 54321"):
        Cache(folder, 100).open(key(0), 4, filled(b"ours"), sound)


def test_a_lock_does_not_outlive_its_holder_in_a_forked_child(tmp_path: Path) -> None:
    """A worker forked in the middle of a download has the lock's descriptor too, for as long as it lives."""
    cache, children = Cache(tmp_path, 100), []

    def fetch(path: Path) -> None:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        children.append(child)
        path.write_bytes(b"1")

    cache.open(key(0), 1, fetch, sound).close()
    (tmp_path / key(0)).unlink()
    waiting = threading.Thread(target=lambda: cache.open(key(0), 1, filled(b"2"), sound).close(), daemon=True)
    waiting.start()
    waiting.join(30)
    children[0].kill()
    assert not waiting.is_alive()


def test_a_note_that_cannot_be_removed_is_told_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / f".{key(0)}.ok").mkdir()
    with pytest.raises(RunError, match=r"data\.cache\.folder"):
        Cache(tmp_path, 100).distrust(key(0))
