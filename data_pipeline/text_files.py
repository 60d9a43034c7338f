"""Text files that a user gives: UTF-8, with or without the mark that editors put before it."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.messages import reason

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path, expected: str) -> str:
    """All of it, without a byte order mark.

    Args:
        expected: what the file should be, for messages.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    data = b""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data.startswith(UTF16_MARKS) else "bytes that are not UTF-8"
        raise DataError(where=str(path), expected=expected, found=found, fix="Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(where=str(path), expected=expected, found=reason(error), fix="Correct the path.") from error
