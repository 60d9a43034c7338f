"""Storage that fails while a checkpoint is written: whatever the fault, nothing claims to be complete and is not.

A save is made of file operations: create, write, flush, rename, remove. Each fault strikes one of them in a process
of its own, forked for it: the process is killed before, in or after the operation; the disk is full; it takes half
of the bytes and says that it took them all; it changes one; it forgets a rename. Afterwards the folder is read as a
new run would read it.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import CheckpointError, PretrainError
from pretrain.checkpoints import checkpoint, shares
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.training_state import Fragment
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState

LEAST = 500


class Held:
    """A training state of three steps' making, small enough to be saved a thousand times."""

    stage = 1

    def __init__(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self._tensors = {
            "param/a": torch.randn(31, 7, generator=generator),
            "optim/exp_avg/a": torch.randn(31, 7, generator=generator),
            "param/b": torch.randn(5, generator=generator),
            "buffer/n": torch.tensor(step),
        }
        self._step = step

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, tuple(tensor.shape), 0, tensor.view(-1), replicated=False)
            for name, tensor in self._tensors.items()
        ]

    def group_values(self) -> list[dict[str, Any]]:
        return [{"name": "decay", "step": float(self._step), "lr": 0.1}]


def save(folder: Path, step: int) -> None:
    writer = CheckpointWriter(folder, Held(step), world=World(), keep_last=1, say=lambda _: None)
    writer.save(RunState(Progress(step, 9, 8 * step)))
    writer.finish()


OPERATIONS = ("write", "fsync", "replace", "unlink", "rmdir", "mkdir", "open")
FAULTS = ("killed before", "killed after", "killed half-way", "full", "short", "flipped", "lost")
APPLIES = {
    "killed half-way": {"write"},
    "short": {"write"},
    "flipped": {"write"},
    "full": {"write", "fsync", "replace", "mkdir", "open"},
    "lost": {"replace"},
}


@dataclass
class Saboteur:
    """Stands between the writer and the disk; at the `at`-th operation of its kind it strikes.

    Files opened with Python's own `open` write through the descriptor that it returns, so that their bytes pass
    through `os.write` here as well.
    """

    operation: str
    at: int
    fault: str
    rng: random.Random
    seen: Counter[str]

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            number = self.seen[name]
            self.seen[name] += 1
            if name != self.operation or number != self.at:
                return real(*args, **kwargs)
            return self._strike(real, args, kwargs)

        return operation

    def _strike(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.fault == "lost":
            return None
        if self.fault in ("short", "flipped", "killed half-way"):
            descriptor, data = args[0], bytearray(args[1])
            cut = self.rng.randrange(len(data))
            if self.fault == "flipped":
                data[cut] ^= 1 << self.rng.randrange(8)
                cut = len(data)
            real(descriptor, data[:cut])
            if self.fault == "killed half-way":
                die()
            return len(data)
        if self.fault == "killed after":
            real(*args, **kwargs)
        return die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Unbuffered:
    """A file whose bytes go through `os.write`, as the real one's do one layer below Python's sight."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> Unbuffered:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def flush(self) -> None: ...

    def seek(self, at: int) -> None:
        os.lseek(self._descriptor, at, os.SEEK_SET)

    def read(self) -> bytes:
        return os.read(self._descriptor, 1 << 20)

    def fileno(self) -> int:
        return self._descriptor


def in_a_process(work: Callable[[], None]) -> int:
    """Exit status of a fork that does it; negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except PretrainError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sabotage(saboteur: Saboteur) -> None:
    for name in OPERATIONS:
        setattr(os, name, saboteur.around(name, getattr(os, name)))
    real = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return Unbuffered(path) if mode == "w+b" else real(path, mode, *rest, **more)

    Path.open = opened  # type: ignore[assignment, method-assign]


write_to_pipe = os.write  # the real one


def counted(folder: Path) -> Counter[str]:
    """How often each operation happens in one save over an older checkpoint."""
    save(folder, 1)
    read, write = os.pipe()

    def work() -> None:
        saboteur = Saboteur("none", 0, "none", random.Random(0), Counter())
        sabotage(saboteur)
        save(folder, 2)
        text = " ".join(f"{name}={n}" for name, n in saboteur.seen.items())
        write_to_pipe(write, text.encode())

    assert in_a_process(work) == 0
    return Counter({name: int(n) for name, n in (part.split("=") for part in os.read(read, 4096).decode().split())})


def cases(counts: Counter[str]) -> Iterator[tuple[str, int, str]]:
    for name, fault in itertools.product(OPERATIONS, FAULTS):
        if name in APPLIES.get(fault, OPERATIONS):
            yield from ((name, at, fault) for at in range(counts[name]))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_CHUNK", 256)  # many writes, though the state is small


def test_no_fault_makes_a_checkpoint_that_claims_what_it_does_not_hold(
    tmp_path: Path, small_pieces: None, figure: Callable[[str], None]
) -> None:
    torch.set_num_threads(1)
    expected = {}
    for step in (1, 2, 3):
        save(tmp_path / "sound" / str(step), step)
        expected[step] = checkpoint.digests(tmp_path / "sound" / str(step) / checkpoint.folder_name(step))
    counts = counted(tmp_path / "counted")
    assert all(counts[name] for name in ("write", "fsync", "replace", "unlink", "rmdir", "mkdir", "open"))
    found = list(cases(counts))
    rounds = -(-LEAST // len(found))
    outcomes: Counter[str] = Counter()
    struck = 0
    for number, (name, at, fault) in enumerate(found * rounds):
        folder = tmp_path / f"case-{number}"
        save(folder, 1)
        saboteur = Saboteur(name, at, fault, random.Random(number), Counter())

        def work(saboteur: Saboteur = saboteur, folder: Path = folder) -> None:
            sabotage(saboteur)
            save(folder, 2)

        status = in_a_process(work)
        assert status in (0, 3, -signal.SIGKILL), f"{name} {at} {fault}: not an error of ours ({status})"
        struck += status != 0
        claimed = checkpoint.complete_checkpoints(folder)
        assert claimed, f"{name} {at} {fault}: nothing is left"
        for path in claimed:
            step = int(path.name.removeprefix("step_"))
            opened = checkpoint.open_checkpoint(path, World())
            assert checkpoint.digests(opened.path) == expected[step], f"{name} {at} {fault}: {path.name} is another"
        newest, passed_over = checkpoint.newest_sound(folder, World())
        assert newest is not None
        assert not passed_over
        if status == 0:
            assert newest.path.name == checkpoint.folder_name(2), f"{name} {at} {fault}: said to be saved"
        save(folder, 3)  # and the next save stands, whatever the last one left
        assert [p.name for p in checkpoint.all_folders(folder)] == [checkpoint.folder_name(3)]
        outcomes[f"{fault}: {'saved' if newest.path.name.endswith('2') else 'the one before'}"] += 1
    figure(f"{len(found) * rounds} faults at {dict(counts)}: {dict(outcomes)}")
    assert len(found) * rounds >= LEAST
    assert struck > LEAST // 2


def test_damage_after_the_fact_is_found(tmp_path: Path, small_pieces: None) -> None:
    """Every byte of every file of a complete checkpoint, flipped: never loaded, always named."""
    save(tmp_path, 1)
    target = tmp_path / checkpoint.folder_name(1)
    tried = 0
    for path in sorted(target.iterdir()):
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            try:
                opened = checkpoint.open_checkpoint(target, World())
            except CheckpointError:
                tried += 1
            else:
                assert path.name == "COMPLETE", f"{path.name}, byte {at}"  # white space between two of its words
                assert opened.state.run_state() == RunState(Progress(1, 9, 8))
        path.write_bytes(data)
    assert tried > LEAST
    checkpoint.open_checkpoint(target, World())
