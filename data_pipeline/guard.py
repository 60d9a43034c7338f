"""Libraries at bytes that they did not expect: whatever they raise becomes one error of ours, with file and place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.errors import DataError, PretrainError
from data_pipeline.messages import reason, storage_or


@contextmanager
def told_as(error: type[DataError], where: str, expected: str, fix: str = "") -> Iterator[None]:
    """Around calls of a library that reads a file from elsewhere, and as little else as may be.

    A zip or tar that was damaged or made to do harm makes Python's readers raise nearly anything: struct.error,
    KeyError, RecursionError, MemoryError, OverflowError among them. Errors of ours pass through.

    Args:
        error: what is raised.
        where, expected, fix: of that error; where storage fails to give the file, it is not called damaged.
    """
    try:
        yield
    except PretrainError:
        raise
    except Exception as problem:
        raise error(where, expected, reason(problem), storage_or(fix, problem)) from problem
