"""What takes a run's lines may fail: that costs lines, which are counted, and nothing else."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from data_pipeline.durable import read_lines
from data_pipeline.errors import RunError
from pretrain.checkpoints.checkpoint import complete_checkpoints
from pretrain.evals.result import EvalReport
from pretrain.monitoring import outlets, sinks
from pretrain.monitoring.budgets import Budgets
from pretrain.monitoring.log import MetricLog, evaluation_line, progress_line
from pretrain.monitoring.outlets import AppendedFile, Outlet
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Logging, Wandb
from pretrain.runtime.collectives import World
from tests.ranks import started
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_piece_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, room = AppendedFile(tmp_path / "lines", lambda: b"head\n"), os.write, 12

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise FULL
        written = real(descriptor, data[: min(5, room)])
        room -= written
        return written

    monkeypatch.setattr(os, "write", write)
    file.write_line("1234")
    with pytest.raises(OSError, match="No space"):
        file.write_line("5678")
    room = 100
    file.write_line("9")
    file.close()
    assert (tmp_path / "lines").read_text() == "head\n1234\n9\n"


def test_an_outlet_says_once_that_it_fails_and_how_much_was_lost() -> None:
    said: list[str] = []
    outlet = Outlet("the log", said.append)

    def fail() -> None:
        raise FULL

    assert [outlet.give(work) for work in (fail, fail, lambda: 0, fail, lambda: 0)] == [False, False, True, False, True]
    assert said == [
        "the log: No space left on device; the run goes on without it",
        "the log works again; 2 lost (No space left on device)",
        "the log: No space left on device; the run goes on without it",
        "the log works again; 3 lost (No space left on device)",
    ]


def test_an_error_of_ours_is_none_of_an_outlet() -> None:
    with pytest.raises(ZeroDivisionError):
        Outlet("the log", print).give(lambda: 1 / 0)


class Broken:
    """A sink whose service is gone, so that even its end fails."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("the service is gone")

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        raise RuntimeError("the service is gone")

    def close(self) -> None:
        raise RuntimeError("the service is gone")


def test_a_sink_that_fails_costs_its_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = MetricLog(tmp_path, step=0, total_steps=2, active=True, sinks={"wandb": Broken()})
    log.write(1, {"loss": 1.0})
    log.picture(1, "images", np.zeros((2, 2, 3), np.uint8))
    log.write(2, {"loss": 0.5})
    log.close()
    assert losses(tmp_path) == {1: 1.0, 2: 0.5}
    told = (tmp_path / "log-rank0.txt").read_text()
    assert told.splitlines()[0] == "wandb: ConnectionError: the service is gone; the run goes on without it"
    assert "wandb: 4 lost (RuntimeError: the service is gone) in all" in told
    assert told in capfd.readouterr().out


def test_wandb_that_takes_no_run_ends_one_at_its_start_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(sinks, "Wandb", refuse)
    config = Logging(tensorboard=False, wandb=Wandb(project="trial"))
    with pytest.raises(RunError, match=r"RuntimeError: no login\. Log in with"):
        sinks.open_sinks(config, tmp_path, "r", 0)
    with pytest.raises(RuntimeError, match="no login"):
        sinks.open_sinks(config, tmp_path, "r", 5)["wandb"].write(6, {})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shards = write_shards(folder / "train")
    return write_recipe(
        folder / "r.yaml", shards, schedule={"steps": 8}, logging={"every_steps": 1, "images_every_steps": 4},
        checkpoint={"every_steps": 4},
        evals=[{"kind": "knn", "train": str(shards), "test": str(shards), "k": 2, "every_epochs": 0.3}],
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(recipe, out)
    return out


def _run_beside_a_disk(_: World, recipe: Path, out: Path, number: int, steps: tuple[int, int]) -> bool:
    """A run while whose steps `steps` no line, number or report can be written; it ends as it would by itself."""
    from pretrain.run import run

    step, real, save = [1], outlets.write_whole, EvalReport.save
    record = MetricLog.write

    def failing() -> bool:
        return steps[0] <= step[0] <= steps[1]

    def write(file: int, data: bytes) -> None:
        real(file, data[: len(data) // 2] if failing() else data)
        if failing():
            raise OSError(number, os.strerror(number))

    def save_report(report: EvalReport, path: Path) -> None:
        if failing():
            raise OSError(number, os.strerror(number), str(path))
        save(report, path)

    def write_numbers(log: MetricLog, now: int, values: dict[str, float]) -> None:
        step[0] = now
        record(log, now, values)

    outlets.write_whole, EvalReport.save, MetricLog.write = write, save_report, write_numbers  # type: ignore[method-assign]
    with (out.parent / f"{out.name}-stdout").open("wb") as stdout:
        os.dup2(stdout.fileno(), 1)
    return run(load_recipe(recipe), out)


def events(out: Path) -> dict[int, float]:
    (path,) = (out / "tensorboard").iterdir()
    return {
        event.step: value.tensor.float_val[0]
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "loss"
    }


@pytest.mark.parametrize(("number", "steps"), [(errno.ENOSPC, (3, 6)), (errno.EIO, (0, 99))])
def test_a_disk_that_fails_costs_lines_of_the_log_and_not_the_run(
    recipe: Path, undisturbed: Path, tmp_path: Path, number: int, steps: tuple[int, int]
) -> None:
    """TensorBoard, stdout and an evaluation's report included; for some steps, or from the first one to the end."""
    out = tmp_path / "run"
    with started(_run_beside_a_disk, 1, recipe, out, number, steps, joined=False) as ranks:
        assert ranks.results() == [True]
    kept = {step: loss for step, loss in losses(undisturbed).items() if not steps[0] <= step <= steps[1]}
    assert losses(out) == kept
    assert all(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()), "no half lines"
    assert complete_checkpoints(out / "checkpoints")[-1].name == "step_00000008"
    assert (out / "encoder").is_dir()
    if kept:
        assert events(out) == pytest.approx(kept)
        reason = os.strerror(number)
        told = (out / "log-rank0.txt").read_text()
        shown = (out.parent / "run-stdout").read_text()
        for name, lost in (("metrics.jsonl", 5), ("TensorBoard", 6)):  # an evaluation's line; a picture besides
            assert f"{name} works again; {lost} lost ({reason})" in told + shown
            assert f"{name}: {lost} lost ({reason}) in all" in told
        for name in ("log-rank0.txt", "stdout"):
            assert f"{name} works again; " in told + shown
        assert "files beside the run: 1 not written" in told, "the report of step 4"
        assert [path.name for path in (out / "evals").glob("*.json")] == ["knn_step_00000008.json"]


def test_a_terminal_that_cuts_the_line_keeps_what_is_asked_for_first() -> None:
    values = {"top1": 0.25, "lr": 1e-3, "loss": 6.9078, "images_per_second": 12_345.6, "grad_norm": 1.0, "mfu": 0.5}
    line = progress_line(123_456, 1_250_000, 400_000.0, values)
    assert line[:80].startswith("step 123456/1250000  loss 6.9078  left 111:06:40  12346 images/s  top1 25.0%")


def test_what_is_right_is_shown_in_percent_whoever_measured_it() -> None:
    values = {"val/loss": 1.5, "val/top1": 0.25, "val/image_to_text": 0.125, "knn/top1_k20": 33.3333}
    assert evaluation_line(4, values) == (
        "step 4  val/loss 1.5000  val/top1 25.00%  val/image_to_text 12.50%  knn/top1_k20 33.33%"
    )
    assert evaluation_line(4, {"val/view_to_view": 1.0}) == "step 4  val/view_to_view 100.00%"
    left_out = {"val/left_out": 90.0, "knn/left_out": 7.0}
    assert evaluation_line(4, left_out) == "step 4  val/left_out 90  knn/left_out 7"


def test_few_samples_of_a_skipped_step_are_named_and_the_rest_are_in_a_file(tmp_path: Path) -> None:
    log, said = MetricLog(tmp_path, step=0, total_steps=9, active=True), list[str]()
    budgets = Budgets(0, 1, said.append, log.append, tmp_path / "skipped-samples.jsonl")
    keys = [f"key{i}" for i in range(64)]
    budgets.count_skipped_step(3, 1, False, keys)
    with pytest.raises(RunError) as error:
        budgets.count_skipped_step(4, 2, False, keys)
    for text in (*said, str(error.value)):
        assert "key0, key1, key2, key3, key4 and 59 more, all of them in " in text
        assert "key5" not in text
    assert read_lines(tmp_path / "skipped-samples.jsonl") == [{"step": step, "samples": keys} for step in (3, 4)]
    log.close()
