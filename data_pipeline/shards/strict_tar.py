"""A tar read strictly: every way in which tarfile would stop early without a word is an error here."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import IO, BinaryIO, cast

from data_pipeline.errors import DataError
from data_pipeline.guard import told_as

MAX_HEADER = 1 << 20  # bytes of a long name or extended header; a header may claim any size
MAX_HEADERS = 1 << 22  # bytes of all that stand before one member
CHUNK = 1 << 20
_SOUND = "the next member whole, or the zeros that end a tar"
_COPY = "The tar is damaged or cut off: copy or make it again."
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_RECORD = re.compile(rb"(\d{1,8}) [^=\n]+=")
_DIGITS = re.compile(rb"\d{256}")  # tarfile searches the time squared of such a run


class _Headers:
    """What tarfile reads through: headers only, none of absurd size or form, the last one kept to be looked at."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last, self.num_bytes = file, b"", 0
        self.seek, self.tell = file.seek, file.tell
        self._before_extended = False

    def read(self, size: int) -> bytes:
        self.num_bytes += max(size, 0)
        if size < 0:
            raise tarfile.ReadError("a header of a negative size")
        if size > MAX_HEADER or self.num_bytes > MAX_HEADERS:
            raise tarfile.ReadError(f"a header of {size:,} bytes, with those before it {self.num_bytes:,}")
        self.last = self.file.read(size)
        if self._before_extended:
            _check_records(self.last)
        self._before_extended = not self._before_extended and self.last[156:157] in _EXTENDED
        return self.last


def _check_records(data: bytes) -> None:
    """An extended header is records `LENGTH KEY=VALUE`, ended by zeros; tarfile takes other bytes for records too."""
    position = 0
    while position < len(data) and data[position]:
        record = _RECORD.match(data, position)
        end = position + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a malformed extended header")
        position = end
    if _DIGITS.search(data):
        raise tarfile.ReadError("an extended header with a number of absurd length")


def is_tar(block: bytes) -> bool:
    """Whether the first 512 bytes of a file are those of a tar."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return True
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return True


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
    with _guard(where, end, error):
        try:
            tar = tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:")  # noqa: SIM115  it owns nothing to close
        except tarfile.TarError:
            raise _no_tar(where, headers.last, error) or _damaged(where, 0, "no header of a tar", error) from None
    while True:
        with _guard(where, end, error):
            member = tar.next()
            headers.num_bytes = 0
        if member is None:
            break
        vars(tar)["members"].clear()  # else the headers of a large tar would all stay in memory
        if member.size < 0 or tar.offset <= end:
            raise _damaged(where, member.offset, "a header of a negative size", error)
        end = tar.offset
        _check_size(end, max_bytes, where, error)
        if not member.isdir():
            _check_member(member, where, error)
            yield member
        elif folders:
            yield member
    with _guard(where, end, error):
        _check_end(file, headers.last, tar.offset, max_bytes, where, error)


def _guard(where: str, offset: int, error: type[DataError]) -> AbstractContextManager[None]:
    return told_as(error, f"{where}, offset {offset}", _SOUND, _COPY)


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
        expected=_SOUND,
        found=found,
        fix=_COPY,
    )


def refused(member: tarfile.TarInfo, where: str, expected: str, found: str, error: type[DataError]) -> DataError:
    """The error that a member is not accepted."""
    return error(
        where=f"{where}, offset {member.offset}, member {member.name!r}",
        expected=expected,
        found=found,
        fix="Write the archive again, without it.",
    )
