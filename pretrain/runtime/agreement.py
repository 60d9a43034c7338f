"""Failures that ranks must share: where one cannot do its part, none goes on, and none waits for it in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data_pipeline.errors import PretrainError, StorageError, storage_error
from pretrain.runtime.collectives import Group, gather_objects

T = TypeVar("T")


class RanksFailedError(Exception):
    """Some ranks could not do their part; the message has a part for each of them, and is the same on all ranks."""


def agree(work: Callable[[], T], group: Group = None) -> T:
    """Does this rank's part of some work, and finds out whether all ranks could do theirs. Every rank calls it.

    Args:
        work: what this rank does; on a rank that has no part in it, a function that does nothing.
        group: one of `side_group`, for work of another thread or of hours; None: all ranks.

    Returns:
        What `work` returned on this rank.

    Raises:
        PretrainError: it, or an OSError, was raised by the work of a rank, of several by that of the first; the same on
            every rank.
        RanksFailedError: the work of a rank raised anything else; on that rank itself, it is the cause.
    """
    done: list[T] = []
    problem: Exception | None = None
    try:
        done.append(work())
    except Exception as error:  # whatever it is: the others wait below
        problem = error
    # Any other may not travel to another process.
    shared = problem if isinstance(problem, PretrainError) else storage_error(problem) if problem else None
    answers = gather_objects((shared, f"{type(problem).__name__}: {problem}" if problem else ""), group)
    for rank, (first, _) in enumerate(answers):
        if isinstance(first, StorageError) and len(answers) > 1:  # it may be of one machine alone
            first = StorageError(first.where, first.expected, f"rank {rank}: {first.found}", first.fix)
        if first is not None:
            raise first
    if found := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]:
        raise RanksFailedError("; ".join(found)) from problem
    return done[0]
