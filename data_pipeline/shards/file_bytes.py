"""The bytes of an open file, piece by piece, and a word where the file gets smaller while it is read.

A file that is mapped into memory ends its reader by SIGBUS, without a word, when somebody cuts it off meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from typing import BinaryIO

from data_pipeline.errors import ShardError

PIECE = 1 << 18  # bytes that are read at once, into the same memory, which stays in the caches of a core


class FileBytes:
    """What an open file holds, in any order; where the file stands is left alone.

    Args:
        file: of this machine.
        where: its name, for messages.

    Attributes:
        size: of the file when this began, in bytes.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._descriptor, self._where = file.fileno(), where
        self.size = os.fstat(self._descriptor).st_size
        self._begin, self._ahead = 0, memoryview(b"")  # bytes that were read on the way, and where they stand
        self._digest = hashlib.sha256()  # of all bytes before the end of those
        self._room = memoryview(bytearray(PIECE))

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on, fewer where the file ends before; raises ShardError where it got smaller."""
        found, end = b"", min(offset + size, self.size)
        while offset + len(found) < end:
            piece = os.pread(self._descriptor, end - offset - len(found), offset + len(found))
            if not piece:
                raise self._changed(f"ended at {offset + len(found):,}")
            found = found + piece if found else piece
        return found

    def crc32(self, offset: int, size: int) -> int:
        """The checksum of what `read` returns. In the order of the file, which is read once, for its hash too."""
        found, end = 0, min(offset + size, self.size)
        while offset < end:
            if offset < self._begin:
                return zlib.crc32(self.read(offset, end - offset), found)
            while self._begin + len(self._ahead) <= offset:
                self._read_ahead()
            piece = self._ahead[offset - self._begin : end - self._begin]
            found = zlib.crc32(piece, found)
            offset += len(piece)
        return found

    def sha256(self) -> str:
        """The hash of the whole file, in hex; raises as `read`."""
        while self._begin + len(self._ahead) < self.size:
            self._read_ahead()
        return self._digest.hexdigest()

    def _read_ahead(self) -> None:
        self._begin += len(self._ahead)
        count = os.preadv(self._descriptor, [self._room[: self.size - self._begin]], self._begin)
        if not count:
            raise self._changed(f"ended at {self._begin:,}")
        self._ahead = self._room[:count]
        self._digest.update(self._ahead)

    def refuse_change(self) -> None:
        """Raises ShardError where the file has another size than when this began."""
        size = os.fstat(self._descriptor).st_size
        if size != self.size:
            raise self._changed(f"{size:,} a moment later")

    def _changed(self, found: str) -> ShardError:
        return ShardError(
            where=self._where,
            expected="a file that stays as it is while it is read",
            found=f"one that had {self.size:,} bytes, and {found}",
            fix="Something writes it: wait until that has ended, then give the command again.",
        )
