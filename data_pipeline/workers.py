"""Processes that work ahead, in order: torch's DataLoader, with our errors and a clean end."""

from __future__ import annotations

import atexit
import multiprocessing.queues
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import PretrainError, RunError
from data_pipeline.parallel import how_one_died

Entry = TypeVar("Entry")
EntryOut = TypeVar("EntryOut", covariant=True)

PREFETCH = 2  # entries that each worker holds ready
_HELD = 2  # that were taken: the one that is computed with, and the next
SHARED_MEMORY = Path("/dev/shm")  # where torch's processes hand tensors over
STALLED_SECONDS = 1800.0  # without an entry, of workers that live: more than the slowest of them takes
_MOST_WORDS = 2000  # bytes, which a pipe takes at once
_OUTLIVED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Table(Protocol[EntryOut]):
    """A pure function of an integer, so that it does not matter which process is asked."""

    def __getitem__(self, index: int, /) -> EntryOut: ...


def entries(table: Table[Entry], indices: Iterable[int], num_workers: int) -> Iterator[Entry]:
    """table[i] for each i, in order; pinned where CUDA is present.

    Args:
        table: of entries that torch can send between processes, with `pin_memory()` where they hold tensors.
        indices: may be endless.
        num_workers: processes of one thread each; 0: in this process. They end when the iterator is closed or
            dropped, when this process exits, and within seconds of its death.

    Raises:
        PretrainError: as the table raised it.
        RunError: a worker died, could not hand an entry over, or none of them made one for `STALLED_SECONDS`.
    """
    words, worker_words = os.pipe() if num_workers else (-1, -1)
    loader: DataLoader[Entry | PretrainError] = DataLoader(
        _ErrorsAsValues(table),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        worker_init_fn=_Worker(worker_words),
        prefetch_factor=PREFETCH if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if num_workers else None,  # at once, sharing the manifest's pages
        generator=torch.Generator(),  # or it would draw from the generator that dropout uses
    )
    iterator = _start(loader)
    patience = _Patience(iterator)
    # torch ends workers when their iterator is freed, which an error's traceback can put off, and else by SIGTERM at
    # exit, which they outlive. So they are told, here or at exit.
    end = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        while (entry := _next(iterator, num_workers, patience, words)) is not None:
            if isinstance(entry, PretrainError):
                raise entry
            yield entry
    finally:
        end()
        atexit.unregister(end)
        for descriptor in (words, worker_words) if num_workers else ():
            os.close(descriptor)


def entries_at_once(num_workers: int) -> int:
    """Entries that lie in shared memory at once: those that workers make or hold ready, and those that were taken."""
    return num_workers * PREFETCH + _HELD if num_workers else 0


def check_shared_memory(num_workers: int, num_entries: int | None, bytes_of_entry: int) -> None:
    """Raises RunError where what the workers of this process hold ready does not fit into shared memory.

    Args:
        num_workers: as `entries` takes them.
        num_entries: that there are; None: without end.
        bytes_of_entry: of its tensors.
    """
    most = entries_at_once(num_workers)
    ready = most if num_entries is None else min(most, num_entries)
    if not ready or not SHARED_MEMORY.is_dir():
        return
    needed, free = ready * bytes_of_entry, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise RunError(
            where=str(SHARED_MEMORY),
            expected=f"{needed / 2**20:,.0f} MiB for {ready} batches of {num_workers} loader workers",
            found=f"{free / 2**20:,.0f} MiB free",
            fix=f"Make it larger (docker run --shm-size, mount -o remount,size=... {SHARED_MEMORY}), or take fewer "
            "workers (runtime.num_workers, --num-workers) or smaller batches.",
        )


class _ErrorsAsValues(Dataset["Entry | PretrainError"], Generic[Entry]):
    """torch raises a worker's exception anew from its text alone, which ours cannot be made of."""

    def __init__(self, table: Table[Entry]) -> None:
        self.table = table

    def __getitem__(self, index: int) -> Entry | PretrainError:
        try:
            return self.table[index]
        except PretrainError as error:
            return error


def _start(loader: DataLoader[Entry | PretrainError]) -> Iterator[Entry | PretrainError]:
    """Start the workers, without the SIGCHLD handler of torch: it raises wherever the training happens to be.

    A dead worker is then found by the next entry that is waited for.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Patience:
    """Stands between torch's iterator and its look for the next entry, which it repeats every few seconds."""

    def __init__(self, iterator: Any) -> None:
        self._deadline = float("inf")
        self._look: Callable[..., Any] | None = getattr(iterator, "_try_get_data", None)
        if self._look is not None:
            iterator._try_get_data = self

    def begin(self) -> None:
        """A wait begins."""
        self._deadline = monotonic() + STALLED_SECONDS

    def __call__(self, *arguments: Any) -> Any:
        assert self._look is not None
        if monotonic() > self._deadline:
            raise RunError(
                where="loader workers",
                expected="a batch",
                found=f"none for {STALLED_SECONDS:,.0f} s, of processes that are alive",
                fix="Look at the storage that the data lie on, or set runtime.num_workers (--num-workers) to 0 to see "
                "where reading stands.",
            )
        return self._look(*arguments)


def _next(
    iterator: Iterator[Entry | PretrainError], num_workers: int, patience: _Patience, words: int
) -> Entry | PretrainError | None:
    patience.begin()
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:  # torch's word, or that of a broken connection
        raised_by_table = num_workers == 0 or "in DataLoader worker process" in str(error)
        if raised_by_table:
            raise
        raise RunError(
            where="loader worker",
            expected="a process that runs to the end",
            found="one that "
            + (
                _said(words)
                or how_one_died(getattr(iterator, "_workers", ()))
                or f"was killed ({error or type(error).__name__})"
            ),
            fix="Look for out-of-memory messages and a full /dev/shm, or lower runtime.num_workers.",
        ) from error


def _said(words: int) -> str:
    """What a worker said before it ended; empty: it could not."""
    os.set_blocking(words, False)
    try:
        said = os.read(words, _MOST_WORDS).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
    return f"could not hand a batch over ({said})" if said else ""


class _Worker:
    """What a worker does first.

    - A signal to the whole job (Ctrl-C, preemption) is the rank's to answer; its workers go when it says.
    - What cannot be handed over (a full /dev/shm) ends it with its words: Python's queues would print them, drop the
      entry, and leave the other side waiting for it.
    """

    def __init__(self, words: int) -> None:
        self._words = words

    def __call__(self, _worker: int) -> None:
        for number in _OUTLIVED:
            signal.signal(number, signal.SIG_IGN)
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(self._end)  # type: ignore[attr-defined]

    def _end(self, error: BaseException, _entry: object) -> None:
        os.write(self._words, f"{type(error).__name__}: {error}".encode()[:_MOST_WORDS])
        os._exit(1)
