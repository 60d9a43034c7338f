"""A rank's share of a checkpoint: copied out of the training in one piece, written, and read back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from data_pipeline.durable import durable_file
from pretrain.engine.training_state import Fragment
from pretrain.runtime.collectives import World
from pretrain.runtime.run_folder import sha256_of

_CHUNK = 1 << 24  # bytes that are written and hashed at a time
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as safetensors calls them


class Snapshot:
    """This rank's share of a state in one piece of memory, as safetensors lays it out; kept for the next save.

    Attributes:
        shapes: of the whole logical tensors that it has stretches of, by name.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._header = b""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0

    def gather(self, fragments: Sequence[Fragment], world: World) -> None:
        """Copies the stretches that this rank alone keeps, and its part of those that every rank has."""
        shared = [f for f in fragments if f.replicated]  # alike on every rank, and in one order; the others are not
        own = [f for f in fragments if not f.replicated] + shared[world.rank :: world.size]
        own.sort(key=lambda fragment: -fragment.data.itemsize)  # each type is then aligned to its own size
        self.shapes = {fragment.name: fragment.shape for fragment in own}
        offsets = list(accumulate((fragment.data.nbytes for fragment in own), initial=0))
        places = {
            f"{fragment.name}@{fragment.start}": {
                "dtype": _DTYPES[fragment.data.dtype],
                "shape": [fragment.data.numel()],
                "data_offsets": [start, stop],
            }
            for fragment, (start, stop) in zip(own, pairwise(offsets), strict=True)
        }
        header = json.dumps(places).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._num_bytes = offsets[-1]
        on_gpu = any(fragment.data.is_cuda for fragment in own)
        if self._buffer.numel() < self._num_bytes:
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        for fragment, (start, stop) in zip(own, pairwise(offsets), strict=True):
            view = self._buffer[start:stop].view(fragment.data.dtype)
            view.copy_(fragment.data.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()

    def pieces(self) -> list[memoryview]:
        """The bytes of the file, in order."""
        body = memoryview(self._buffer.numpy().data)[: self._num_bytes]
        return [memoryview(self._header), *(body[at : at + _CHUNK] for at in range(0, len(body), _CHUNK))]


@dataclass
class Share:
    """The file that one rank wrote, and what it holds.

    Attributes:
        name: of the file.
        shapes: of the whole logical tensors that it has stretches of, by name.
        sha256: of the file; empty until it is written.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    sha256: str = ""

    def write(self, path: Path, snapshot: Snapshot) -> None:
        """Writes the snapshot to the disk and reads it back.

        Raises:
            OSError: the disk does not take it, or does not give back what it took.
        """
        digest = hashlib.sha256()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for piece in snapshot.pieces():
                digest.update(piece)
                _write_all(descriptor, piece)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        finally:
            os.close(descriptor)
        self.sha256 = digest.hexdigest()
        _compare(path, self.sha256)


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _compare(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise OSError(f"{path.name} does not give back what was written")


def put_verified(path: Path, data: bytes) -> None:
    """Writes a small file durably.

    It is read back before it appears under its name, and once it has: a rename can be lost as well as a byte.
    """
    with durable_file(path) as file:
        file.write(data)
        file.flush()
        file.seek(0)
        _refuse_other(path, file.read(), data)
    _refuse_other(path, path.read_bytes() if path.exists() else b"", data)


def _refuse_other(path: Path, found: bytes, written: bytes) -> None:
    if found != written:
        raise OSError(f"{path.name} does not give back what was written")
