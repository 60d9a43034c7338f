"""A tar read strictly: every way in which tarfile would stop early without a word is an error here."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from data_pipeline.errors import DataError
from data_pipeline.messages import reason

MAX_HEADER = 1 << 20  # bytes of a long name or extended header; a header may claim any size
CHUNK = 1 << 20


class _Headers:
    """What tarfile reads through: headers only, none of absurd size, the last one kept to be looked at."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self.file.read(size)
        return self.last


def members(
    file: BinaryIO, where: str, *, error: type[DataError], max_bytes: int | None = None, folders: bool = False
) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar that proves sound up to and behind its end mark.

    While a member is yielded, `file` stands at its first byte, and may be read on from there.

    Args:
        file: uncompressed; only moved forward, so a decompressing file will do.
        where: its name, for messages.
        error: what is raised.
        max_bytes: more than this is refused (a small archive can unpack to any size).
        folders: give the members that are folders too.

    Raises:
        error: damaged, truncated or too large; a link, device or sparse file; a name that is absolute, leaves
            the folder, or is not UTF-8. Told with the offset.
    """
    headers, end = _Headers(file), 0
    try:
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # else the headers of a large tar would all stay in memory
                end = tar.offset
                _check_size(end, max_bytes, where, error)
                if not member.isdir():
                    _check_member(member, where, error)
                    yield member
                elif folders:
                    yield member
            end = tar.offset
        _check_end(file, headers.last, end, max_bytes, where, error)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, zlib.error, OSError) as problem:
        if end == 0 and (other := _no_tar(where, headers.last, error)) is not None:
            raise other from None
        raise _damaged(where, end, reason(problem), error) from problem


def _check_end(
    file: BinaryIO, mark: bytes, end: int, max_bytes: int | None, where: str, error: type[DataError]
) -> None:
    """Behind the last member, at `end`, a tar has nothing but zeros, at least one block of them."""
    if len(mark) < tarfile.BLOCKSIZE:
        raise _damaged(where, end, "the end of the file", error)
    if any(mark):
        raise _damaged(where, end, "a damaged header", error)
    position = end + len(mark)
    while chunk := file.read(CHUNK):
        if any(chunk):
            raise _damaged(where, end, f"the end mark, and data again within {CHUNK} bytes of {position}", error)
        position += len(chunk)
        _check_size(position, max_bytes, where, error)


def _check_member(member: tarfile.TarInfo, where: str, error: type[DataError]) -> None:
    if not member.isreg() or member.issparse():
        expected, found = "regular files only", "a link, device or sparse file"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        expected, found = "a name inside the archive's folder", "one that leaves it"
    elif "\0" in member.name or not is_utf8(member.name):
        expected, found = "a name in UTF-8", "other bytes"
    else:
        return
    raise refused(member, where, expected, found, error)


def is_utf8(name: str) -> bool:
    """Whether a file's name was UTF-8; where it was not, Python holds its bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_size(size: int, max_bytes: int | None, where: str, error: type[DataError]) -> None:
    if max_bytes is not None and size > max_bytes:
        raise error(
            where=where,
            expected=f"at most {max_bytes:,} bytes when unpacked, for an archive of its size",
            found="more",
            fix="If it is to be trusted, unpack it and give the folder.",
        )


_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", ""),
}  # by their first bytes: what they are, and what unpacks them


def _no_tar(where: str, first: bytes, error: type[DataError]) -> DataError | None:
    """The error that a file is compressed, or another archive; None: its first bytes do not say so."""
    for magic, (kind, command) in _COMPRESSED.items():
        if first.startswith(magic):
            return error(
                where=where,
                expected="an uncompressed tar, which can be read at any place",
                found=f"a {kind} file, whatever its name",
                fix=f"Unpack it: {command} < FILE > SHARD.tar" if command else "Write its files as a tar.",
            )
    return None


def _damaged(where: str, offset: int, found: str, error: type[DataError]) -> DataError:
    return error(
        where=f"{where}, offset {offset}",
        expected="the next member whole, or the zeros that end a tar",
        found=found,
        fix="The tar is damaged or cut off: copy or make it again.",
    )


def refused(member: tarfile.TarInfo, where: str, expected: str, found: str, error: type[DataError]) -> DataError:
    """The error that a member is not accepted."""
    return error(
        where=f"{where}, offset {member.offset}, member {member.name!r}",
        expected=expected,
        found=found,
        fix="Write the archive again, without it.",
    )
