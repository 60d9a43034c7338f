"""Checkpoints are elastic, exact, and never taken for whole when they are not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import CheckpointError, RunError
from pretrain.checkpoints import checkpoint, files, shares
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.training_state import Fragment
from pretrain.runtime.collectives import World, barrier
from pretrain.runtime.state import Progress, RunState
from tests.engine.test_engine import make_engine, whole_state
from tests.ranks import run_ranks
from tests.toy import split, toy_batch


def steps(engine: Any, world: World, first: int, last: int) -> list[float]:
    return [
        float(engine.step(split(toy_batch(s), world.rank, world.size, 1), Progress(s, 99, 0), 1e-2).metrics["loss"])
        for s in range(first, last)
    ]


def save(folder: Path, engine: Any, state: RunState, world: World, keep_last: int = 5) -> None:
    writer = CheckpointWriter(folder, engine.state, world=world, keep_last=keep_last, say=lambda _: None)
    writer.save(state)
    writer.finish()


def train_and_save(world: World, folder: Path, stage: int, more: int) -> list[float]:
    engine = make_engine(world, stage)
    steps(engine, world, 0, 3)
    state = RunState(Progress(3, 99, 24), cursor=24)
    save(folder, engine, state, world)
    return steps(engine, world, 3, 3 + more)


def load_and_save(world: World, source: Path, folder: Path, stage: int, more: int) -> list[float]:
    engine = make_engine(world, stage, seed=7)  # other weights, to be replaced entirely
    steps(engine, world, 50, 51)
    state = checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
    assert state == RunState(Progress(3, 99, 24), cursor=24)
    save(folder, engine, state, world)
    return steps(engine, world, 3, 3 + more)


def test_any_world_size_and_stage_loads_it_exactly(tmp_path: Path) -> None:
    """Saved at (1, ZeRO 1), then handed on through (2, 2), (2, 3), (1, 0) and back: equal by hash at every stop."""
    expected = torch.tensor(run_ranks(train_and_save, 1, tmp_path / "start", 1, 10)[0])
    source = tmp_path / "start" / "step_00000003"
    original = checkpoint.digests(source)
    assert {"param", "optim", "groups"} <= {name.split("/")[0] for name in original}
    for stop, (world_size, stage) in enumerate([(2, 2), (2, 3), (1, 0), (1, 1)]):
        losses = run_ranks(load_and_save, world_size, source, tmp_path / str(stop), stage, 10)
        source = tmp_path / str(stop) / "step_00000003"
        assert checkpoint.digests(source) == original, f"world {world_size}, ZeRO {stage}"
        torch.testing.assert_close(torch.tensor(losses).mean(0), expected, rtol=1e-5, atol=0)


def save_batch_norm(world: World, folder: Path, stage: int) -> dict[str, Any]:
    engine = make_engine(world, stage, batch_norm=True)
    steps(engine, world, 0, 2)
    save(folder, engine, RunState(Progress(2, 99, 16)), world)
    return {name: t for name, t in whole_state(engine).items() if name.startswith("buffer/")}


def test_what_every_rank_has_is_written_once_however_many_pieces_each_has_besides() -> None:
    """At ZeRO 1 and 2 a rank keeps nothing of some parameters, so that buffers stand elsewhere in each rank's list."""
    shared = [Fragment(f"buffer/{i}", (2,), 0, torch.zeros(2), True) for i in range(5)]
    written: list[str] = []
    for rank in range(3):
        own = [Fragment(f"param/{i}", (9,), 3 * rank, torch.zeros(3), False) for i in range(rank)]
        snapshot = shares.Snapshot()
        snapshot.gather([*own, *shared], World(rank=rank, size=3))
        written += [name for name in snapshot.shapes if name.startswith("buffer/")]
    assert sorted(written) == [fragment.name for fragment in shared]


def share_of_a_rank() -> tuple[shares.Share, shares.Snapshot]:
    snapshot = shares.Snapshot()
    snapshot.gather([Fragment("param/a", (9,), 0, torch.arange(9.0), False)], World())
    return shares.Share("tensors", snapshot.shapes), snapshot


def test_tensors_are_on_disk_before_they_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before COMPLETE says that they are: what is read back may come out of memory."""
    share, snapshot = share_of_a_rank()
    path, done = tmp_path / "tensors", list[str]()
    fsync, compare = os.fsync, shares._compare

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        done.append(f"synced {os.fstat(descriptor).st_size}")

    def compared(*args: Any) -> None:
        compare(*args)
        done.append("compared")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shares, "_compare", compared)
    share.write(path, snapshot)
    assert done == [f"synced {sum(map(len, snapshot.pieces()))}", "compared"]


def test_a_disk_that_gives_back_other_tensors_than_it_took_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the writer, so that nothing claims to be complete."""
    write_all = shares._write_all

    def lying(descriptor: int, piece: memoryview) -> None:
        write_all(descriptor, memoryview(bytes(piece[:-1]) + bytes([piece[-1] ^ 1])))

    monkeypatch.setattr(shares, "_write_all", lying)
    trained = SimpleNamespace(
        stage=0, fragments=lambda: [Fragment("param/a", (9,), 0, torch.arange(9.0), False)], group_values=list
    )
    writer = CheckpointWriter(tmp_path, trained, world=World(), keep_last=2, say=lambda _: None)
    writer.save(RunState(Progress(3, 9, 0)))
    with pytest.raises(RunError, match="does not give back what was written"):
        writer.finish()
    assert checkpoint.all_folders(tmp_path) == []


@pytest.mark.parametrize("stage", [0, 3])
def test_running_statistics_are_one_state_on_all_ranks(tmp_path: Path, stage: int) -> None:
    first, second = run_ranks(save_batch_norm, 2, tmp_path, stage)
    assert (
        first.keys()
        == second.keys()
        == {f"buffer/encoder.4.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    )
    stored = checkpoint.module_state(tmp_path / "step_00000002")
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, stored[name.removeprefix("buffer/")])
    assert first["buffer/encoder.4.running_mean"].abs().sum() > 0


def save_many(world: World, folder: Path) -> None:
    engine = make_engine(world, 1)
    for step in (1, 2, 3):
        save(folder, engine, RunState(Progress(step, 9, 0)), world, keep_last=2)
        if step == 2:
            (folder / "step_00000002" / "COMPLETE").unlink()
            (folder / "step_00000009").mkdir()  # torn


def refuse_to_write(world: World, folder: Path) -> tuple[list[str], str]:
    """Rank 1's disk is full for three saves."""
    engine, told = make_engine(world, 1), list[str]()
    writer = CheckpointWriter(folder, engine.state, world=world, keep_last=2, say=told.append)
    writer.save(RunState(Progress(4, 9, 0)))
    writer.finish()
    full = OSError(28, "No space left on device")
    if world.rank == 1:
        shares._write_all = lambda *_: (_ for _ in ()).throw(full)
    for step in (5, 6, 7):
        writer.save(RunState(Progress(step, 9, 0)))
    with pytest.raises(RunError) as caught:
        writer.save(RunState(Progress(8, 9, 0)))
    return told, str(caught.value)


def test_retention_counts_complete_ones_only(tmp_path: Path) -> None:
    run_ranks(save_many, 1, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_one_rank_that_cannot_write_leaves_nothing_complete(tmp_path: Path) -> None:
    """The run goes on for a while, with the last good one kept, and then stops on every rank alike."""
    (told, _), (silent, _) = found = run_ranks(refuse_to_write, 2, tmp_path)
    assert all("rank 1: No space left" in message for _, message in found)
    assert [p.name for p in checkpoint.all_folders(tmp_path)] == ["step_00000004"]
    assert all("step_00000004" in message for _, message in found)
    assert [line.split()[0] for line in told] == ["saved", "NOT", "NOT", "NOT"]
    assert silent == []


def damage_and_find(world: World, folder: Path, keep_last: int) -> tuple[str, list[str]]:
    """Four saves; the newest two are damaged, and a run that goes on from the third saves again."""
    engine = make_engine(world, 2)
    writer = CheckpointWriter(folder, engine.state, world=world, keep_last=4, say=lambda _: None)
    for step in (1, 2, 3, 4):
        writer.save(RunState(Progress(step, 9, 0)))
    writer.finish()
    if world.is_main:
        (folder / "step_00000004" / "state.json").write_text("{}")
        with (folder / "step_00000003" / "tensors-00001-of-00002.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
    barrier()
    found, passed_over = checkpoint.newest_sound(folder, world)
    assert found is not None
    unsound = [folder / f"step_0000000{step}" for step in (3, 4)]
    again = CheckpointWriter(
        folder, engine.state, world=world, keep_last=keep_last, say=lambda _: None, unsound=unsound
    )  # fmt: skip
    again.save(RunState(Progress(3, 9, 0)))
    again.finish()
    return found.path.name, [error.where for error in passed_over]


def test_damaged_ones_are_passed_over_and_never_counted_as_kept(tmp_path: Path) -> None:
    for name, where in run_ranks(damage_and_find, 2, tmp_path, 2):
        assert name == "step_00000002"
        assert [Path(w).parent.name for w in where] == ["step_00000004", "step_00000003"]
        assert Path(where[1]).name == "tensors-00001-of-00002.safetensors"
    assert [p.name for p in checkpoint.all_folders(tmp_path)] == ["step_00000002", "step_00000003"]


def test_none_sound_is_an_error_not_a_fresh_start(saved: Path, tmp_path: Path) -> None:
    target = copied(saved, tmp_path)
    (target / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"one sound checkpoint.*state\.json"):
        checkpoint.newest_sound(tmp_path, World())
    (target / "COMPLETE").unlink()  # torn: it never was one
    assert checkpoint.newest_sound(tmp_path, World()) == (None, [])


def unreadable_at_rank_1(world: World, source: Path) -> str:
    if world.rank == 1:
        files.sha256_of = lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    with pytest.raises(RunError) as caught:
        checkpoint.newest_sound(source.parent, world)
    return str(caught.value)


def test_what_cannot_be_read_is_not_taken_for_damaged(saved: Path) -> None:
    """A hiccup of the storage must not cost a good checkpoint: the run stops, and nothing is passed over."""
    for message in run_ranks(unreadable_at_rank_1, 2, saved):
        assert "Input/output error" in message


def test_no_rank_goes_on_from_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    other = copied(saved, tmp_path)
    complete = json.loads((other / "COMPLETE").read_text())
    (other / "COMPLETE").write_text(json.dumps(complete))  # the same digests, other bytes
    for message in run_ranks(open_different, 2, [saved, other]):
        assert "the same checkpoint on every rank" in message


def open_different(world: World, folders: list[Path]) -> str:
    with pytest.raises(RunError) as caught:
        checkpoint.open_checkpoint(folders[world.rank], world)
    return str(caught.value)


def buffers_of_two_saves(world: World, folder: Path) -> tuple[int, int, bool]:
    """Training goes on while a copy is written: what is stored is the state of the step that was saved."""
    engine = make_engine(world, 1)
    writer = CheckpointWriter(folder, engine.state, world=world, keep_last=5, say=lambda _: None)
    steps(engine, world, 0, 1)
    before = {name: t.clone() for name, t in whole_state(engine).items()}
    writer.save(RunState(Progress(1, 9, 0)))
    steps(engine, world, 1, 4)
    first = writer._snapshot._buffer.data_ptr()
    writer.save(RunState(Progress(4, 9, 0)))
    writer.finish()
    stored = checkpoint.Tensors(folder / "step_00000001")
    same = all(torch.equal(stored.whole(name), value) for name, value in before.items())
    return first, writer._snapshot._buffer.data_ptr(), same


def test_a_copy_is_written_while_training_goes_on(tmp_path: Path) -> None:
    first, second, same = run_ranks(buffers_of_two_saves, 1, tmp_path)[0]
    assert same
    assert first == second


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train_and_save, 2, folder, 2, 0)
    return folder / "step_00000003"


def copied(saved: Path, to: Path) -> Path:
    target = to / saved.name
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    "name",
    ["COMPLETE", "state.json", "tensors-00000-of-00002.safetensors", "tensors-00001-of-00002.safetensors"],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    target = copied(saved, tmp_path)
    data = bytearray((target / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (target / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "remove":
        (target / name).unlink()
    with pytest.raises(CheckpointError, match=r"tensors-|state\.json|COMPLETE"):
        checkpoint.module_state(target)


def load_other_model(world: World, source: Path) -> str:
    engine = make_engine(world, 1, batch_norm=True)
    before = whole_state(engine)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
    after = whole_state(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(caught.value)


def test_partial_load_is_refused(saved: Path) -> None:
    (message,) = run_ranks(load_other_model, 1, saved)
    assert "buffer/encoder.4.running_mean" in message


def test_complete_lists_every_file(saved: Path) -> None:
    listed = json.loads((saved / "COMPLETE").read_text())
    assert {p.name for p in saved.iterdir()} - {"COMPLETE"} == set(listed)
