"""Processes that work ahead, in order: torch's DataLoader, with our errors and a clean end."""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import PretrainError, RunError
from data_pipeline.parallel import how_one_died

Entry = TypeVar("Entry")
EntryOut = TypeVar("EntryOut", covariant=True)

_PREFETCH = 2  # entries that each worker holds ready
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
        RunError: a worker died.
    """
    loader: DataLoader[Entry | PretrainError] = DataLoader(
        _ErrorsAsValues(table),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        worker_init_fn=_outlive_signals,
        prefetch_factor=_PREFETCH if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if num_workers else None,  # at once, sharing the manifest's pages
        generator=torch.Generator(),  # or it would draw from the generator that dropout uses
    )
    iterator = _start(loader)
    # torch ends workers when their iterator is freed, which an error's traceback can put off, and else by SIGTERM at
    # exit, which they outlive. So they are told, here or at exit.
    end = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        while (entry := _next(iterator, num_workers)) is not None:
            if isinstance(entry, PretrainError):
                raise entry
            yield entry
    finally:
        end()
        atexit.unregister(end)


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


def _next(iterator: Iterator[Entry | PretrainError], num_workers: int) -> Entry | PretrainError | None:
    try:
        return next(iterator, None)
    except (RuntimeError, OSError, EOFError) as error:  # torch's word, or that of a broken connection
        raised_by_table = num_workers == 0 or "in DataLoader worker process" in str(error)
        if raised_by_table:
            raise
        raise RunError(
            where="loader worker",
            expected="a process that runs to the end",
            found=f"one that {how_one_died(getattr(iterator, '_workers', ())) or f'was killed ({error!r})'}",
            fix="Look for out-of-memory messages and a full /dev/shm, or lower runtime.num_workers.",
        ) from error


def _outlive_signals(_worker: int) -> None:
    """A signal to the whole job (Ctrl-C, preemption) is the rank's to answer; its workers go when it says."""
    for number in _OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
