"""Small image folders, the same folder packed in every way, and what a folder holds, for tests."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import simplejpeg

Files = Mapping[str, bytes]


def jpeg(seed: int, height: int = 10, width: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=90)
    return data


def class_folders(num_images: int = 12, top: str = "") -> dict[str, bytes]:
    """Images in the folders cat, dog and eel."""
    return {f"{top}{('cat', 'dog', 'eel')[i % 3]}/{i:04d}.jpg": jpeg(i) for i in range(num_images)}


def as_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def as_tar(path: Path, files: Files, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def as_tar_gz(path: Path, files: Files) -> Path:
    return as_tar(path, files, "w:gz")


PACKINGS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": as_folder,
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": as_tar_gz,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
