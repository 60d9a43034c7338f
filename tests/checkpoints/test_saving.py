"""Whether a save fits between the warning of a time limit and the limit, tried before the first step."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from pretrain.__main__ import main
from pretrain.checkpoints.schedule import check_time_to_save
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.runtime.collectives import World
from pretrain.runtime.run_folder import complete_checkpoints
from pretrain.runtime.signals import LEAD_SECONDS
from pretrain.runtime.state import Progress, RunState
from tests.launch.run_folders import Held, make_run
from tests.ranks import started
from tests.runs import write_recipe
from tests.shards import write_shards


def test_time_for_a_large_checkpoint_is_told_from_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEAD_SECONDS, "60")
    check_time_to_save(10**6, tmp_path, World(0, 1, 0))
    with pytest.raises(InputError, match=r"signal_lead_seconds: expected time for a save of 100000\.00 GB") as raised:
        check_time_to_save(10**14, tmp_path, World(0, 1, 0))
    assert "time_minutes" in raised.value.fix
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(LEAD_SECONDS)
    check_time_to_save(10**14, tmp_path, World(0, 1, 0))  # no scheduler, no limit


def refused(_: World, recipe: Path, out: Path) -> tuple[int, str]:
    """The exit status of a rank that has no time to save, and what it says."""
    os.environ[LEAD_SECONDS] = "-1"
    with redirect_stderr(StringIO()) as said:
        status = main([str(recipe), "--out", str(out)])
    return status, said.getvalue()


def test_a_run_that_could_not_save_in_time_is_not_started(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", write_shards(tmp_path / "shards", 30), schedule={"steps": 2})
    with started(refused, 1, recipe, tmp_path / "run", joined=False) as ranks:
        ((status, said),) = ranks.results()
    assert status == 2, said
    assert "signal_lead_seconds" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_training_goes_on_while_a_disk_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the next save that waits for the one before, which claims nothing until the disk has it."""
    fsync, goes_on = os.fsync, threading.Event()

    def slow(descriptor: int) -> None:
        assert goes_on.wait(60), "training waited for the disk"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    writer = CheckpointWriter(tmp_path, Held(), world=World(), keep_last=2, say=lambda _: None)
    writer.save(RunState(Progress(1, 30, 8)))
    assert not complete_checkpoints(tmp_path)
    goes_on.set()
    writer.save(RunState(Progress(2, 30, 16)))
    assert [path.name for path in complete_checkpoints(tmp_path)][:1] == ["step_00000001"]
    writer.finish()


def test_an_old_checkpoint_that_is_open_elsewhere_goes_after_a_later_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the name of a file that is open, and with it the folder."""
    run, rmdir = make_run(tmp_path / "run"), os.rmdir
    writer = CheckpointWriter(run / "checkpoints", Held(), world=World(), keep_last=1, say=lambda _: None)

    def saved(step: int) -> list[str]:
        writer.save(RunState(Progress(step, 30, 8 * step)))
        writer.finish()
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    def refuse(path: object, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    assert saved(1) == ["step_00000001"]
    monkeypatch.setattr(os, "rmdir", refuse)
    assert saved(2) == ["step_00000001", "step_00000002"]
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step_00000002"]
    monkeypatch.setattr(os, "rmdir", rmdir)
    assert saved(3) == ["step_00000003"]
