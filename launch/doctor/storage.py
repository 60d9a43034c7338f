"""Checks whether a run's folder can be written, locked and shared, and has room for its checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.durable import durable_file
from launch.slurm.finding import Finding, error, gigabytes, ok, warning
from pretrain.runtime.run_folder import LOCK, is_claimed

_OF_ONE_MACHINE = ("tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs")


def existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def writable(out: Path) -> Iterator[Finding]:
    """Checks that files can be written, flushed, renamed, read back and locked; none of them stays."""
    place = existing(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            problem = _written(Path(scratch)) or _locked(Path(scratch))
    except OSError as failed:
        full = failed.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "Free space or raise the quota." if full else "Choose another folder with --out, or mend its permissions."
        yield error("run folder", f"{place} cannot be written: {failed.strerror or failed}", fix)
        return
    if problem:
        yield error("run folder", f"{place}: {problem}", "Choose a folder on other storage with --out.")
    else:
        yield ok("run folder", f"{out}: writing, flushing, renaming and locking work")


def _written(scratch: Path) -> str:
    written = os.urandom(1 << 16)
    for _ in range(2):  # the second takes the place of a file that is there
        with durable_file(scratch / "file") as file:
            file.write(written)
    return "" if (scratch / "file").read_bytes() == written else "a file does not give back what was written"


def _locked(scratch: Path) -> str:
    """Returns what is wrong with locks, by which a second job in the folder is refused; empty: nothing."""
    with (scratch / LOCK).open("ab") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failed:
            return f"files cannot be locked ({failed.strerror})"
        child = os.fork()
        if child == 0:
            os._exit(0 if is_claimed(scratch) else 1)
        _, status = os.waitpid(child, 0)
    return "a lock is not seen by another process" if status else ""


def shared(out: Path, num_nodes: int) -> Iterator[Finding]:
    """Warns of storage that several nodes hardly share; the job itself finds out for certain, in its first minute."""
    kind = file_system(existing(out))
    if num_nodes > 1 and kind in _OF_ONE_MACHINE:
        fix = f"See that all {num_nodes} nodes see it, or choose a folder on shared storage with --out."
        yield warning("run folder", f"on {kind}, which is mostly one machine's own", fix)


def file_system(path: Path) -> str:
    """Returns the kind of file system that a path is on: that of the longest mount point above it."""
    resolved, best, kind = path.resolve(), -1, ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, found = line.split()[1:3]
        point = point.encode().decode("unicode_escape")  # a space is written \040
        if resolved.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def disk_space(out: Path, checkpoint: int, keep_last: int) -> Iterator[Finding]:
    """Compares free space with the checkpoints that are kept and the one that is written before the oldest goes. Quotas
    are not seen.

    Args:
        checkpoint: bytes of a checkpoint.
    """
    taken = sum(file.stat().st_size for file in (out / "checkpoints").glob("*/*") if file.is_file())
    needed = max(0, (keep_last + 1) * checkpoint - taken)
    free = shutil.disk_usage(existing(out)).free
    what = f"{gigabytes(needed)} for {keep_last} + 1 checkpoints of {gigabytes(checkpoint)}, {gigabytes(free)} free"
    fix = "Free space, lower checkpoint.keep_last, or choose another folder with --out."
    if needed > free:
        yield error("disk", what, fix)
    elif needed > 0.8 * free:
        yield warning("disk", what, fix)
    else:
        yield ok("disk", what)
