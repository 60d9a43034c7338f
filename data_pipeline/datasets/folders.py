"""The images of a folder, or of a zip, tar or tar.gz of one, which stays packed: listed once, read at will.

Names in an archive are never used as paths. A tar.gz can only be read from its beginning, so on the one
pass over it its images go end to end into one temporary file without a name, which is then read in any
order; the system frees it when this process ends, however it ends.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol, cast

from data_pipeline.datasets.file_names import IMAGE_SUFFIXES, count_by_suffix, is_hidden, is_image
from data_pipeline.errors import SampleError, SourceError
from data_pipeline.guard import told_as
from data_pipeline.messages import reason
from data_pipeline.samples.unread import unread_suffix
from data_pipeline.shards import strict_tar
from data_pipeline.shards.row_store import nameless_file, row_path

MAX_IMAGE_BYTES = 1 << 28  # of one file; a larger one is no photograph but an attack or a mistake
MAX_RATIO = 200  # unpacked over packed: pictures hardly shrink, archives made to fill a disk shrink a thousandfold
FREE_BYTES = 1 << 26  # the ratio counts only beyond this
KINDS = "an image folder, or a zip, tar or tar.gz of one; a table (.csv, .tsv, .parquet); or WebDataset shards"


class Entry(NamedTuple):
    """A file in a source."""

    name: str  # relative, with `/`
    at: int  # where it begins (tar, temporary file) or its number among the members (zip)
    size: int  # bytes


class Reader(Protocol):
    """Reads entries in any order; travels to worker processes."""

    def read(self, entry: Entry) -> bytes:
        """The bytes of a file; raises SampleError where they cannot be had."""
        ...


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        images: sorted by name; those in formats that are not read here too, as each image is accounted for.
        others: names of the files that are no images, and of folders, which end in `/`; sorted.
        identity: SHA-256 in hex over the images' names, sizes and checksums or times of change.
        reader: of the images; good as long as this object lives.
        image_bytes: the temporary file behind it, if there is one.
    """

    images: list[Entry]
    others: list[str]
    identity: str
    reader: Reader
    image_bytes: BinaryIO | None


def open_source(path: Path, temporary_folder: Path) -> Source:
    """List the images in `path`.

    Args:
        path: a folder, zip, tar or tar.gz.
        temporary_folder: where a temporary file, as large as the images, may lie if the source is a tar.gz.

    Raises:
        SourceError: nothing there, or no image; damaged or unreadable; two files of one name; an archive with
            links, devices, names that leave its folder, or sizes that only an attack has.
    """
    image_bytes: BinaryIO | None = None
    reader: Reader
    if path.is_dir():
        files, reader = list_folder(path), FolderReader(path)
    elif not path.is_file():
        raise _error(path, KINDS, "nothing there")
    elif _is_zip(path):
        files, reader = _list_zip(path), ZipReader(path)
    elif _is_gzip(path):
        image_bytes = nameless_file(temporary_folder)
        files, reader = _list_tar_gz(path, image_bytes), FileReader(row_path(image_bytes))
    else:
        files, reader = _list_tar(path), FileReader(path)
    try:
        images, others, identity = _sort_out(path, files)
    except (OSError, EOFError, zlib.error) as error:
        raise _error(path, "files that are whole, and room to read them", reason(error)) from error
    return Source(images, others, identity, reader, image_bytes)


class FolderReader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, entry: Entry) -> bytes:
        try:
            return (self.path / entry.name).read_bytes()
        except OSError as error:
            raise _unreadable(entry, error) from error


class FileReader:
    """Out of one file that holds the images' bytes as they are: a tar, or a temporary file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __reduce__(self) -> tuple[type[FileReader], tuple[Path]]:
        return FileReader, (self.path,)  # another process opens it for itself

    def read(self, entry: Entry) -> bytes:
        self._file = self._file or self.path.open("rb")
        self._file.seek(entry.at)
        return self._file.read(entry.size)


class ZipReader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: list[zipfile.ZipInfo] = []

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self.path,)

    def read(self, entry: Entry) -> bytes:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
            self._members = self._archive.infolist()
        with told_as(SampleError, entry.name, "a readable file"):
            # Not all that it unpacks to, which may be any size, whatever the archive says of it.
            with self._archive.open(self._members[entry.at]) as file:
                data = file.read(entry.size + 1)
            if len(data) != entry.size:
                raise EOFError(f"{len(data):,} of {entry.size:,} bytes")
            return data


File = tuple[Entry, int]  # and something that changes with its content: checksum or time of change


def list_folder(root: Path) -> Iterator[File]:
    """Every file below a folder, and every folder, whose name ends in `/`; in no order.

    Raises:
        SourceError: links in a circle, or to nothing; devices.
        OSError: a folder that cannot be listed.
    """
    pending, visited = [""], set()
    while pending:
        folder = pending.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in visited:
            raise _error(root / folder, "every folder once", "a link that leads to a folder met before")
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as found:
            for file in found:
                name = f"{folder}/{file.name}" if folder else file.name
                if file.is_dir():
                    pending.append(name)
                    yield Entry(f"{name}/", 0, 0), 0
                elif file.is_file():
                    yield Entry(name, 0, file.stat().st_size), file.stat().st_mtime_ns
                elif not is_hidden(name):  # editors leave links to nothing
                    raise _error(root / name, "files and folders", "a link that leads nowhere, or a device")


def _list_zip(path: Path) -> Iterator[File]:
    with told_as(SourceError, str(path), "a whole zip"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    _check_ratio(path, sum(member.file_size for member in members))
    for i, member in enumerate(members):
        where = Path(f"{path}, member {member.filename!r}")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _error(where, "files and folders only", "a link or device")
        if member.flag_bits & 1:
            raise _error(where, "members without a password", "an encrypted one")
        name = member.filename
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name.split("/")[0]:
            raise _error(where, "a name inside the archive's folder, with `/`", "another")
        yield Entry(_plain(name), i, member.file_size), member.CRC


def _list_tar(path: Path) -> Iterator[File]:
    with path.open("rb") as file:
        if not strict_tar.is_tar(file.read(tarfile.BLOCKSIZE)):
            raise SourceError(
                where=str(path),
                expected=KINDS,
                found="another kind of file",
                fix="A list of URLs is img2dataset's to download; what it writes can be converted.",
            )
        file.seek(0)
        for member in strict_tar.members(file, str(path), error=SourceError, folders=True):
            yield Entry(_member_name(member), member.offset_data, member.size), _stamp(member)


def _list_tar_gz(path: Path, image_bytes: BinaryIO) -> Iterator[File]:
    """One pass over the archive, the images' bytes put into `image_bytes` end to end."""
    max_bytes = FREE_BYTES + MAX_RATIO * path.stat().st_size
    with gzip.open(path) as unpacked:
        file = cast(BinaryIO, unpacked)
        for member in strict_tar.members(file, str(path), error=SourceError, max_bytes=max_bytes, folders=True):
            entry = Entry(_member_name(member), image_bytes.tell(), member.size)
            if is_image(entry.name):
                _check_bytes(path, entry)
                image_bytes.write(file.read(member.size))  # short only at a premature end, which is found next
            yield entry, _stamp(member)
    image_bytes.flush()


def _stamp(member: tarfile.TarInfo) -> int:
    """Time of change in whole seconds; an extended header can say infinity."""
    return int(member.mtime) if math.isfinite(member.mtime) else 0


def _sort_out(path: Path, files: Iterator[File]) -> tuple[list[Entry], list[str], str]:
    images: list[Entry] = []
    others: list[str] = []
    digest = hashlib.sha256()
    for entry, stamp in sorted(files):
        if not is_image(entry.name):
            others.append(entry.name)
            continue
        if not strict_tar.is_utf8(entry.name):
            raise _error(path, "names in UTF-8", repr(entry.name))
        _check_bytes(path, entry)
        if images and images[-1].name == entry.name:
            raise _error(path, "one file of a name", f"two of {entry.name!r}")
        images.append(entry)
        digest.update(f"{entry.name}\0{entry.size}\0{stamp}\n".encode())
    if all(unread_suffix(entry.name) for entry in images):
        names = [name for name in (*others, *(entry.name for entry in images)) if not name.endswith("/")]
        found = f"none among {count_by_suffix(names)}" if names else "no file"
        raise _error(path, f"images ({' '.join(sorted(IMAGE_SUFFIXES))})", found)
    return images, others, digest.hexdigest()


def _plain(name: str) -> str:
    """Without `./` and `//`, so that one file has one name; a folder's ends in `/`."""
    return PurePosixPath(name).as_posix() + ("/" if name.endswith("/") else "")


def _member_name(member: tarfile.TarInfo) -> str:
    return _plain(f"{member.name}/" if member.isdir() else member.name)


def _is_zip(path: Path) -> bool:
    with told_as(SourceError, str(path), "a whole zip"):
        return zipfile.is_zipfile(path)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _check_bytes(path: Path, entry: Entry) -> None:
    if entry.size > MAX_IMAGE_BYTES:
        where = Path(f"{path}, member {entry.name!r}")
        raise _error(where, f"an image of at most {MAX_IMAGE_BYTES:,} bytes", f"{entry.size:,}")


def _check_ratio(path: Path, unpacked: int) -> None:
    limit = FREE_BYTES + MAX_RATIO * path.stat().st_size
    if unpacked > limit:
        raise _error(path, f"at most {limit:,} bytes when unpacked, for its size", f"{unpacked:,}")


def _error(where: Path, expected: str, found: str) -> SourceError:
    return SourceError(where=str(where), expected=expected, found=found)


def _unreadable(entry: Entry, error: Exception) -> SampleError:
    return SampleError(where=entry.name, expected="a readable file", found=reason(error))
