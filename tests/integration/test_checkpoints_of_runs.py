"""Where whole runs save, start and go on from."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import RecipeError, RunError
from pretrain.checkpoints.checkpoint import complete_checkpoints, digests, module_state
from pretrain.record import claimed
from pretrain.runtime.collectives import World
from pretrain.runtime.failure import read_failure
from pretrain.runtime.run_folder import is_claimed, step_of
from pretrain.runtime.signals import STOPPED
from tests.commands import begun, program
from tests.gate import Gate, until
from tests.ranks import Ranks, started
from tests.runs import MODEL, losses, running, train, wait_for_step, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", shards, schedule={"steps": 12, "warmup": 0.1})


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps, checkpoints at 10 and 12."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, out)
    return out


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SELDOM = "checkpoint={every_steps: null, every_minutes: 60}"


def ask(ranks: Ranks, signum: int) -> None:
    """The second rank: what one is asked for, all do."""
    pid = ranks.processes[1].pid
    assert pid is not None
    os.kill(pid, signum)


def test_a_signal_to_any_rank_saves_at_the_next_step(recipe: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "run", Gate(tmp_path / "gate")
    gate.open(3)
    with running(recipe, out, 2, SELDOM, gate=gate) as ranks:
        wait_for_step(ranks, out, 3)
        assert not (out / "checkpoints").exists() or not complete_checkpoints(out / "checkpoints")
        ask(ranks, signal.SIGUSR1)
        gate.open(7)
        wait_for_step(ranks, out, 7)  # and the run goes on
        until(lambda: complete_checkpoints(out / "checkpoints"), meanwhile=ranks.processes[0].is_alive, seconds=60)
        assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["step_00000004"]
        with pytest.raises(AssertionError, match=r"(?s)RunError.*one job at a time"):
            train(recipe, out, 1, SELDOM)


def test_a_signal_to_one_rank_saves_and_stops_all_and_they_go_on_to_the_bit(recipe: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "run", Gate(tmp_path / "gate")
    train(recipe, tmp_path / "whole", 2, SELDOM)
    gate.open(3)
    with running(recipe, out, 2, SELDOM, gate=gate) as ranks:
        wait_for_step(ranks, out, 3)
        ask(ranks, signal.SIGUSR2)
        gate.open(12)
        assert ranks.results() == [False, False], "neither got as far as it was to"
    assert max(losses(out)) == 4
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["step_00000004"]
    train(recipe, out, 2, SELDOM)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("nproc", "signum"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_save_and_stop(shards: Path, tmp_path: Path, nproc: int, signum: int) -> None:
    """As a person or a service manager sends them to the command, long before the first checkpoint."""
    recipe = write_recipe(tmp_path / "r.yaml", shards, schedule={"steps": 10**6}, checkpoint={"every_steps": 10**6})
    out = tmp_path / "run"
    with begun(program("launch.cli", "train", recipe, "--out", out, "--nproc", nproc)) as command:
        until(lambda: max(losses(out), default=0) >= 2, meanwhile=command.running, said=command.said)
        os.kill(command.pid, signal.SIGUSR1)  # saves, and goes on
        until(lambda: complete_checkpoints(out / "checkpoints"), meanwhile=command.running, said=command.said)
        os.kill(command.pid, signum)
        done = command.wait()
    assert done.status == STOPPED
    assert done.stderr.count("asked to stop: it saves") == 1
    assert step_of(complete_checkpoints(out / "checkpoints")[-1]) == max(losses(out))


def held_before_the_engine(_: World, recipe: Path, out: Path, folder: Path) -> bool:
    """A run that stands between what it starts from and its first step until the test has done its part."""
    from pretrain import run as module
    from pretrain.recipe.files import load_recipe

    build = module._engine

    def engine(*arguments: object) -> object:
        (folder / "there").touch()
        until((folder / "go").exists)
        return build(*arguments)  # type: ignore[arg-type]

    module._engine = engine  # type: ignore[assignment]
    return module.run(load_recipe(recipe), out)


def test_a_folder_is_taken_before_its_start_is_looked_up(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Else the second of two that begin at once would train from scratch over what the first one did."""
    out = tmp_path / "run"
    with started(held_before_the_engine, 1, recipe, out, tmp_path, joined=False) as first:
        until((tmp_path / "there").exists, meanwhile=first.processes[0].is_alive)
        with pytest.raises(AssertionError, match=r"(?s)RunError.*one job at a time"):
            train(recipe, out)
        assert not (out / "metrics.jsonl").exists()
        (tmp_path / "go").touch()
        assert first.results() == [True]
    assert losses(out) == losses(finished)


def refuse(problem: str) -> None:
    raise RecipeError("r", [problem])


def test_what_came_into_a_folder_meanwhile_is_looked_at_under_its_lock(tmp_path: Path) -> None:
    for out in (tmp_path / "new", tmp_path / "old"):
        kept = out.name == "old"
        if kept:
            out.mkdir()
            (out / "recipe.yaml").touch()
        with pytest.raises(RecipeError), claimed(out, World(), partial(refuse, "another run.")):
            raise AssertionError("it was not looked at")
        assert out.exists() == kept, "a folder that is new is left as it was"
        assert not is_claimed(out)


def test_the_reason_that_is_kept_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    """Also of one that failed before its first step, which is when a run used to forget the one before."""
    for words in ("no room", "no driver"):
        with pytest.raises(RunError), claimed(tmp_path, World(), lambda: None):
            raise RunError("the device", "to be there", words)
        assert words in (read_failure(tmp_path) or "")
    with pytest.raises(RecipeError), claimed(tmp_path, World(), partial(refuse, "another run.")):
        raise AssertionError("it was not looked at")
    assert "no driver" in (read_failure(tmp_path) or ""), "a command that was refused is no attempt"


def test_a_damaged_one_is_named_and_the_one_before_goes_on_to_the_bit(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    flip(next(newest.glob("tensors-*")))
    log = train(recipe, out)
    assert f"passed over, damaged: {newest}/tensors-" in log
    assert "step_00000010" in log.splitlines()[-5:][0] or f"from {out / 'checkpoints' / 'step_00000010'}" in log
    assert losses(out) == losses(finished)
    assert digests(complete_checkpoints(out / "checkpoints")[-1]) == digests(
        complete_checkpoints(finished / "checkpoints")[-1]
    )


def test_every_file_of_a_run_has_the_mode_that_the_umask_says(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    files, folders = ((tmp_path / name).stat().st_mode for name in ("plain", "folder"))
    other = {
        str(path.relative_to(finished)): oct(path.stat().st_mode)
        for path in finished.rglob("*")
        if path.stat().st_mode != (folders if path.is_dir() else files)
    }
    assert not other
    assert (finished / "encoder" / "model.safetensors").is_file()


def test_resume_from_takes_the_whole_state_or_nothing(recipe: Path, finished: Path, tmp_path: Path) -> None:
    source = copied(finished, tmp_path)
    at_10, at_12 = complete_checkpoints(source / "checkpoints")
    log = train(recipe, tmp_path / "again", 1, f"resume_from={at_10}")
    assert f"from {at_10}" in log
    expected = {step: loss for step, loss in losses(finished).items() if step > 10}
    assert losses(tmp_path / "again") == expected
    flip(at_12 / "state.json")
    for asked in (at_12, source):  # a particular one, or the newest: never an older one in its place
        with pytest.raises(AssertionError, match=r"(?s)CheckpointError.*step_00000012"):
            train(recipe, tmp_path / "refused", 1, f"resume_from={asked}")
    assert not (tmp_path / "refused").exists()


def test_a_finished_run_goes_on_for_longer(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    log = train(recipe, out, 1, "schedule.steps=16")
    assert "extended from 12 to 16 steps: the learning rate is that of step 12 of 16" in log
    found = losses(out)
    assert sorted(found) == list(range(1, 17))
    assert {step: found[step] for step in range(1, 13)} == losses(finished)
    assert "steps: 12" in (out / "recipe-until-step-00000012.yaml").read_text()
    with pytest.raises(AssertionError, match=r"(?s)RecipeError.*more than the 16 steps"):
        train(recipe, out, 1, "schedule.steps=14")
    with pytest.raises(AssertionError, match=r"(?s)RecipeError.*optim\.base_lr"):
        train(recipe, out, 1, "schedule.steps=20", "optim.base_lr=1")


def test_an_unfinished_run_keeps_its_length(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", max_steps=3)
    with pytest.raises(AssertionError, match=r"(?s)RecipeError.*expected the 12 steps of this run, which is at step 3"):
        train(recipe, tmp_path / "run", 1, "schedule.steps=16")


@pytest.mark.parametrize("source", ["run", "checkpoint", "encoder", "encoder/model.safetensors"])
def test_init_from_takes_the_encoder_and_says_so(shards: Path, finished: Path, tmp_path: Path, source: str) -> None:
    """A supervised run begins with the encoder of a MAE run; the decoder stays behind, the head is new."""
    newest = complete_checkpoints(finished / "checkpoints")[-1]
    path = {"run": finished, "checkpoint": newest}.get(source, finished / source)
    supervised = write_recipe(
        tmp_path / "s.yaml", shards, objective={"kind": "supervised", "num_classes": 3},
        init_from=str(path), optim={"base_lr": 1e-12}, schedule={"steps": 1, "warmup": 0.0},
    )  # fmt: skip
    log = train(supervised, tmp_path / "run", 2, "engine.zero_stage=3")
    expected = module_state(newest, "encoder.")
    assert f"taken from {path}: {len(expected)} of encoder" in log
    assert "new, as initialized: 2 of head" in log
    left = "left behind: nothing" if "encoder" in source else "of decoder"
    assert left in log
    found = module_state(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1], "encoder.")
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-9 for name in expected)


def test_an_export_that_was_lost_is_made_up(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint and its encoder: started again, there is no step left to take."""
    out = copied(finished, tmp_path)
    shutil.rmtree(out / "encoder")
    log = train(recipe, out)
    assert log.splitlines()[-1].endswith(f"the encoder is in {out / 'encoder'}")
    expected = module_state(complete_checkpoints(out / "checkpoints")[-1], "encoder.")
    found = load_file(out / "encoder" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_whose_end_is_damaged_is_not_made_longer(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    flip(next(complete_checkpoints(out / "checkpoints")[-1].glob("tensors-*")))
    with pytest.raises(AssertionError, match=r"(?s)RecipeError.*the 12 steps of this run, which is at step 10"):
        train(recipe, out, 1, "schedule.steps=16")
    assert "steps: 12" in (out / "recipe.yaml").read_text()


def test_init_from_refuses_part_of_an_encoder(shards: Path, finished: Path, tmp_path: Path) -> None:
    deeper = {**MODEL, "options": {**MODEL["options"], "depth": 3}}
    recipe = write_recipe(tmp_path / "r.yaml", shards, model=deeper, init_from=str(finished))
    with pytest.raises(AssertionError, match=r"(?s)CheckpointError.*missing encoder\.blocks\.2"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
