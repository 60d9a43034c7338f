"""A run's folder: whose it is, and what a run writes about itself before its first step."""

from __future__ import annotations

import fcntl
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, PretrainError, RecipeError, RunError, storage_error
from pretrain.checkpoints.checkpoint import read_state
from pretrain.checkpoints.start import length_problems
from pretrain.recipe.files import dump, load_recipe, resolved_yaml
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import Resolved, differences, is_longer
from pretrain.recipe.strict_yaml import read_yaml
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import World
from pretrain.runtime.data_record import DataRecord
from pretrain.runtime.failure import forget_failure, note_failure, restore_failure
from pretrain.runtime.run_folder import LOCK, newest_checkpoint

_TRIES = 10  # to take a lock in a folder that whoever had it may remove at the same moment


def refuse_other_run(recipe: Recipe, data: DataRecord, total_steps: int, out: Path) -> list[str]:
    """A folder goes on with its own run only: what changes results must be what it was, the data included, and what it
    is measured on.

    One that has finished may go on for longer.

    Args:
        recipe: that is to be run in the folder.
        data: of its run.
        total_steps: of its run.
        out: the folder.

    Returns:
        Sentences on what could not be compared.

    Raises:
        RecipeError: with everything that differs.
    """
    given, resolved = out / "recipe.yaml", out / "resolved.yaml"
    if not given.is_file():
        return []
    kept_recipe = load_recipe(given)
    kept = read_yaml(resolved.read_text())[0] if resolved.is_file() else {}
    problems = differences(recipe, kept_recipe)
    if is_longer(recipe, kept_recipe):
        newest = newest_checkpoint(out)
        problems = length_problems(total_steps, read_state(newest).progress) if newest is not None else []
    if not problems and kept.get("data_fingerprint", data.train) != data.train:
        problems = [
            f"data.train: expected the data (and weights, of a mixture) with fingerprint {kept['data_fingerprint']}, "
            f"found {data.train}."
        ]
    kept_data = DataRecord.load(out)
    if kept_data is not None:
        problems += data.problems(kept_data, out)
    if problems:
        fix = "Choose another folder with --out, or take this run's own recipe."
        raise RecipeError(f"{out} holds another run", problems, fix)
    if kept_data is None and data.measured_on:
        names = ", ".join(data.measured_on)
        return [f"this run does not say which data {names} had before, so that they could not be compared; now it does"]
    return []


def changed_settings(recipe: Recipe, checkpoint: Path) -> tuple[str, ...]:
    """Notes on what differs from the run that wrote a checkpoint, where that run's recipe lies beside it."""
    kept = checkpoint.resolve().parent.parent / "recipe.yaml"
    if not kept.is_file():
        return ()
    return tuple(f"changed: {change}" for change in differences(recipe, load_recipe(kept)))


@contextmanager
def claimed(out: Path, world: World, check: Callable[[], object]) -> Iterator[None]:
    """Keeps the run's folder for this job alone until the end of the block, and the reason where that fails.

    Every rank enters it. A folder that was made for it is removed where wrong input ends the block before anything was
    written.

    Args:
        out: the run's folder.
        world: this process among the ranks.
        check: called by rank 0 once the folder is its own: whoever had it before may have changed what is in there.

    Raises:
        RunError: another job has the folder; as what `check` raises, the same on every rank.
    """

    kept: bytes | None = None  # why the attempt before failed

    def take() -> BinaryIO:
        nonlocal kept
        file = _locked(out)
        try:
            check()
        except InputError:
            _leave_if_empty(out)
            raise
        kept = forget_failure(out)
        return file

    lock = agree(lambda: take() if world.is_main else None)
    try:
        yield
    except InputError:  # nothing was begun
        if world.is_main:
            restore_failure(out, kept)
            _leave_if_empty(out)
        raise
    except Exception as error:
        known = error if isinstance(error, PretrainError) else storage_error(error)
        words = f"{type(error).__name__}: {error}" if known is None else str(known)
        trace = traceback.format_exc() if known is None else ""
        note_failure(out, words, rank=world.rank, trace=trace)
        raise
    finally:
        if lock is not None:
            lock.close()


def _locked(out: Path) -> BinaryIO:
    """Takes the lock of a folder, which is made where there is none; raises RunError where another process has it."""
    for tries_left in reversed(range(_TRIES)):
        out.mkdir(parents=True, exist_ok=True)
        try:
            file = (out / LOCK).open("ab")
        except FileNotFoundError:  # whoever had it has just removed the folder
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's own: forked workers do not keep it
        except OSError as error:
            file.close()
            raise RunError(
                where=str(out), expected="one job at a time in a run's folder",
                found=f"another at work in it, or no locks there ({error.strerror})",
                fix="Wait for it or stop it, or choose another folder with --out.",
            ) from None  # fmt: skip
        with suppress(FileNotFoundError):
            # Some storage numbers a file anew at each look: there, the lock is all that can be had.
            if os.path.samestat(os.stat(out / LOCK), os.fstat(file.fileno())) or not tries_left:
                return file
        file.close()  # of a folder that was removed while this waited
    raise RunError(str(out), "a folder that stays once it is made", "one that others remove at once", "Choose another.")


def _leave_if_empty(out: Path) -> None:
    """Removes a folder in which there is nothing but the lock, which is held."""
    with suppress(OSError):
        if os.listdir(out) == [LOCK]:
            (out / LOCK).unlink()
            out.rmdir()


def record_run(out: Path, recipe: Recipe, resolved: Resolved, data: DataRecord, environment: str) -> None:
    """Writes `environment.json`, `data.json`, `resolved.yaml` and `recipe.yaml`; rank 0 only.

    Args:
        out: the run's folder.
        recipe: of the run.
        resolved: what follows from it.
        data: of the run.
        environment: JSON that describes the hardware and software.
    """
    _keep_the_shorter(out, recipe)
    data.save(out)
    # The recipe last: it is what makes the folder this run's.
    texts = {
        "environment.json": environment,
        "resolved.yaml": f"{resolved_yaml(recipe, resolved)}data_fingerprint: {data.train}\n",
        "recipe.yaml": dump(recipe),
    }
    for name, text in texts.items():
        with durable_file(out / name) as file:
            file.write(text.encode())


def _keep_the_shorter(out: Path, recipe: Recipe) -> None:
    """Keeps the recipe of a run that now goes on for longer, under another name."""
    given, resolved = out / "recipe.yaml", out / "resolved.yaml"
    if given.is_file() and resolved.is_file() and is_longer(recipe, load_recipe(given)):
        total_steps = read_yaml(resolved.read_text())[0]["resolved"]["total_steps"]
        with durable_file(out / f"recipe-until-step-{total_steps:08d}.yaml") as file:
            file.write(given.read_bytes())
