"""Sources: the same images from every packing, and archives made to do harm refused, each with its reason."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.datasets import folders as sources
from data_pipeline.datasets.folders import open_source
from data_pipeline.errors import SampleError, SourceError
from tests.data_pipeline.archives import PACKINGS, as_folder, as_tar, as_tar_gz, as_zip, class_folders, jpeg

EXTRAS = {"cat/notes.txt": b"text", "__MACOSX/cat/._0000.jpg": b"", ".hidden/a.jpg": b"", "cat/._x.jpg": b""}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_images(tmp_path: Path, packing: str) -> None:
    files = class_folders()
    names = list(files)
    random.Random(0).shuffle(names)
    shuffled = {name: files[name] for name in names} | EXTRAS
    source = open_source(PACKINGS[packing](tmp_path / "source", shuffled), tmp_path)
    assert [entry.name for entry in source.images] == sorted(files)
    assert [name for name in source.others if not name.endswith("/")] == sorted(EXTRAS)
    reader = pickle.loads(pickle.dumps(source.reader))  # as it travels to a worker
    for entry in reversed(source.images):
        assert reader.read(entry) == files[entry.name]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_identity_follows_the_images(tmp_path: Path, packing: str) -> None:
    def identity(name: str, files: dict[str, bytes]) -> str:
        return open_source(PACKINGS[packing](tmp_path / name, files), tmp_path).identity

    files = class_folders()
    source = PACKINGS[packing](tmp_path / "one", files)
    assert open_source(source, tmp_path).identity == open_source(source, tmp_path).identity
    changed = files | {"cat/0000.jpg": files["cat/0000.jpg"] + b"x"}
    renamed = {name.replace("eel", "elk"): data for name, data in files.items()}
    found = [identity(str(i), other) for i, other in enumerate((files, changed, renamed))]
    assert len(set(found)) == 3


def test_names_with_dots_and_slashes_are_one_name(tmp_path: Path) -> None:
    files = {"./a/b.jpg": jpeg(0), "a//c.JPEG": jpeg(1)}
    source = open_source(as_tar(tmp_path / "source.tar", files), tmp_path)
    assert [entry.name for entry in source.images] == ["a/b.jpg", "a/c.JPEG"]
    with pytest.raises(SourceError, match=r"two of 'a/b\.jpg'"):
        open_source(as_tar(tmp_path / "twice.tar", files | {"a/b.jpg": b""}), tmp_path)


def member(name: str = "a.jpg", **attributes: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(header, attribute, value)
    return header


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (member(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, device"),
        (member(type=tarfile.LNKTYPE, linkname="b.jpg"), "a link, device"),
        (member(type=tarfile.BLKTYPE), "a link, device"),
        (member("../../a.jpg"), "leaves"),
        (member("/tmp/a.jpg"), "leaves"),
        (member("a/../../b.txt"), "leaves"),
        (member(b"\xff.jpg".decode(errors="surrogateescape")), "UTF-8"),
    ],
)
def test_tar_members_that_are_refused(tmp_path: Path, mode: str, header: tarfile.TarInfo, reason: str) -> None:
    path = tmp_path / "source"
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        tar.addfile(header, io.BytesIO())
    with pytest.raises(SourceError, match=reason) as caught:
        open_source(path, tmp_path)
    assert repr(header.name) in str(caught.value)
    assert [left.name for left in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "a/../../b.jpg", "..\\a.jpg", "C:/a.jpg"])
def test_zip_names_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="a name inside the archive's folder"):
        open_source(as_zip(tmp_path / "source.zip", {name: jpeg(0)}), tmp_path)


def test_zip_link_and_password_are_refused(tmp_path: Path) -> None:
    for kind in ("link", "password"):
        info = zipfile.ZipInfo("a.jpg")
        if kind == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        path = tmp_path / f"{kind}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, b"/etc/passwd")
        if kind == "password":
            content = path.read_bytes()
            at = content.index(b"PK\x01\x02") + 8
            path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
        with pytest.raises(SourceError, match=r"a link or device|an encrypted one"):
            open_source(path, tmp_path)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FREE_BYTES", 100_000)
    zeros = {f"{i}.jpg": bytes(10_000_000) for i in range(2)} | {"z.bin": bytes(10_000_000)}
    with pytest.raises(SourceError, match="when unpacked"):
        open_source(as_zip(tmp_path / "bomb.zip", zeros), tmp_path)
    with pytest.raises(SourceError, match="when unpacked"):
        open_source(as_tar_gz(tmp_path / "bomb.tar.gz", zeros), tmp_path)
    padding = tmp_path / "padding.tar.gz"
    tar = as_tar(tmp_path / "small.tar", {"a.jpg": jpeg(0)}).read_bytes()
    padding.write_bytes(gzip.compress(tar + bytes(30_000_000)))
    with pytest.raises(SourceError, match="when unpacked"):
        open_source(padding, tmp_path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_image_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 1000)
    path = PACKINGS[packing](tmp_path / "source", {"a.jpg": bytes(1001)})
    with pytest.raises(SourceError, match="at most 1,000 bytes"):
        open_source(path, tmp_path)


@pytest.mark.parametrize("packing", ["zip", "tar", "tar.gz"])
def test_truncated_archives_are_refused(tmp_path: Path, packing: str) -> None:
    content = PACKINGS[packing](tmp_path / "whole", class_folders(30)).read_bytes()
    last = len(content) - (10240 if packing == "tar" else 1)  # a tar ends with a record of zeros
    for size in {*range(3, last, len(content) // 40), last, 512, 1024}:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(SourceError, match="cut"):
            open_source(tmp_path / "cut", tmp_path)


def test_damage_inside_is_found(tmp_path: Path) -> None:
    content = bytearray(as_tar_gz(tmp_path / "a.tar.gz", class_folders(30)).read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.tar\.gz"):
        open_source(tmp_path / "a.tar.gz", tmp_path)
    content = bytearray(as_zip(tmp_path / "a.zip", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)}).read_bytes())
    content[60] ^= 0x10
    (tmp_path / "a.zip").write_bytes(content)
    source = open_source(tmp_path / "a.zip", tmp_path)
    with pytest.raises(SampleError, match=r"a\.jpg"):
        source.reader.read(source.images[0])


def test_what_is_no_source_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path, found in ((tmp_path / "text", "another kind of file"), (tmp_path / "none", "nothing there")):
        with pytest.raises(SourceError, match=found):
            open_source(path, tmp_path)
    with pytest.raises(SourceError, match=r"none among 3 files \(1 hidden, 1 \.txt, 1 \.heic\)"):
        open_source(as_folder(tmp_path / "folder", {"a.txt": b"", ".b.txt": b"", "c.heic": b""}), tmp_path)


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    inside = as_folder(tmp_path / "elsewhere", {"a.jpg": jpeg(0)})
    root = as_folder(tmp_path / "root", {"b/b.jpg": jpeg(1)})
    (root / "a").symlink_to(inside)
    assert [entry.name for entry in open_source(root, tmp_path).images] == ["a/a.jpg", "b/b.jpg"]
    (root / "b" / "up").symlink_to(root)
    with pytest.raises(SourceError, match="a link that leads to a folder met before"):
        open_source(root, tmp_path)
    (root / "b" / "up").unlink()
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match="a link that leads nowhere"):
        open_source(root, tmp_path)
