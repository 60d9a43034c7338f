"""SIGKILL of one rank, or of all, in every phase of a run and at moments of no choice; then on, to the bit.

Ranks write the phase that they are in on a board in shared memory, which outlives them: what it says after the
kill is where the rank died. Short phases are held open for some milliseconds, so that they can be hit.
"""

from __future__ import annotations

import json
import mmap
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoints.checkpoint import complete_checkpoints, module_state
from pretrain.runtime.collectives import World
from tests.ranks import Ranks, started
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow

PHASES = ("start", "step", "evaluation", "gathering", "writing", "hashing", "marking complete")
KILLS_IN_EACH = 6
KILLS_AT_RANDOM = 8
STEPS, PER_EPOCH, BATCH = 720, 96, 8  # an epoch is 12 steps
THREADS = 2  # of a rank: the training's, and the one that writes checkpoints


class Board:
    """A byte for each thread of each rank: the number of its phase."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)

    @classmethod
    def of(cls, path: Path, num_ranks: int) -> Board:
        path.write_bytes(bytes(THREADS * num_ranks))
        return cls(path)

    def enter(self, rank: int, thread: int, phase: str) -> None:
        self._bytes[THREADS * rank + thread] = PHASES.index(phase)

    def phases(self, rank: int) -> set[str]:
        return {PHASES[self._bytes[THREADS * rank + thread]] for thread in range(THREADS)}


def watched_run(world: World, recipe: Path, out: Path, board_path: Path, seed: int) -> None:
    """A run whose phases stand on the board, and whose samples are written down for each step."""
    from pretrain import run
    from pretrain.callbacks.evaluations import Validation
    from pretrain.checkpoints import shares
    from pretrain.checkpoints.writer import CheckpointWriter
    from pretrain.engine.engine import Engine
    from pretrain.recipe.files import load_recipe

    board, rng = Board(board_path), random.Random(seed + world.rank)

    def watch(owner: Any, name: str, thread: int, phase: str, after: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            board.enter(world.rank, thread, phase)
            time.sleep(rng.uniform(0, 0.01))  # before the work and after it, so that a kill falls on either side
            value = real(*args, **kwargs)
            time.sleep(rng.uniform(0, 0.01))
            board.enter(world.rank, thread, after)
            return value

        setattr(owner, name, watching)

    real_step = Engine.step

    def step(engine: Engine, micro_batches: Sequence[Any], progress: Any, *rates: float) -> Any:
        with (out / f"keys-{world.rank}.jsonl").open("a") as file:
            file.write(json.dumps([progress.step, [key for batch in micro_batches for key in batch.keys]]) + "\n")
        return real_step(engine, micro_batches, progress, *rates)

    Engine.step = step  # type: ignore[method-assign, assignment]
    watch(Engine, "step", 0, "step", "start")
    watch(Validation, "evaluate", 0, "evaluation", "start")
    watch(shares.Snapshot, "gather", 0, "gathering", "start")
    watch(shares.Share, "write", 1, "writing", "start")
    watch(shares, "_compare", 1, "hashing", "writing")
    watch(CheckpointWriter, "_mark_complete", 1, "marking complete", "start")
    run.run(load_recipe(recipe), out)


def kill_in(phase: str | None, ranks: Ranks, board: Board, out: Path, rng: random.Random) -> tuple[str, set[str]]:
    """Kills one rank, or all; in a phase, or at any moment. Returns which, and where the first of them died."""
    victim = rng.randrange(2) if phase != "marking complete" else 0  # rank 0's work
    start = len(losses(out))
    if phase is None:
        moment = time.monotonic() + rng.uniform(0.2, 5)
        while time.monotonic() < moment and len(losses(out)) < start + 8:  # so that a fast machine has steps left
            time.sleep(0.01)
    else:
        ahead = rng.randrange(1, 5)
        while len(losses(out)) < start + ahead:
            if not all(process.is_alive() for process in ranks.processes):
                ranks.results()  # raises what they raised
                raise AssertionError("ended before it could be killed")
            time.sleep(0.01)
        while phase not in board.phases(victim):
            assert all(process.is_alive() for process in ranks.processes), "ended before it could be killed"
        time.sleep(rng.uniform(0, 0.005))
    first, second = ranks.processes[victim], ranks.processes[1 - victim]
    first.kill()
    everyone = rng.random() < 0.5
    if not everyone:
        time.sleep(rng.uniform(0, 0.3))  # what the launcher leaves to the others, which may go on writing
    second.kill()
    first.join()
    second.join()
    assert first.exitcode == -signal.SIGKILL
    return "all" if everyone else "one", board.phases(victim)


def last_keys(out: Path) -> dict[int, list[str]]:
    """By step, the samples of all ranks; where a step was taken again, those of the last time."""
    by_step: dict[int, dict[int, list[str]]] = defaultdict(dict)
    for rank in range(2):
        for line in (out / f"keys-{rank}.jsonl").read_text().splitlines():
            step, keys = json.loads(line)
            by_step[step][rank] = keys
    return {step: ranks[0] + ranks[1] for step, ranks in sorted(by_step.items())}


def test_killed_anywhere_it_goes_on_to_the_bit(tmp_path: Path, figure: Callable[[str], None]) -> None:
    shards = write_shards(tmp_path / "train", PER_EPOCH)
    val = write_shards(tmp_path / "val", 17)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards,
        data={"train": str(shards), "val": str(val), "read_streams": 3, "shuffle_window": 16},
        schedule={"steps": STEPS, "warmup": 0.1},
        batch={"global_size": BATCH},
        checkpoint={"every_steps": 3, "every_minutes": None, "keep_last": 2},
        validation={"every_epochs": 4 / 12},
    )  # fmt: skip
    train(recipe, tmp_path / "whole", 2)
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))

    out, rng = tmp_path / "killed", random.Random(3)
    out.mkdir()
    aims: list[str | None] = [*PHASES[1:] * KILLS_IN_EACH, *[None] * KILLS_AT_RANDOM]
    rng.shuffle(aims)
    aims += PHASES[1:] * 8  # for those that had left their phase when the kill came; passed over where none had
    died: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    for number, aim in enumerate(aims):
        if aim is not None and died[aim] >= KILLS_IN_EACH:
            continue
        board = Board.of(tmp_path / "board", 2)
        with started(watched_run, 2, recipe, out, tmp_path / "board", number, joined=False) as ranks:
            who, where = kill_in(aim, ranks, board, out, rng)
        victims[who] += 1
        died.update(where)
    with started(watched_run, 2, recipe, out, tmp_path / "board", 0, joined=False) as ranks:
        ranks.results()

    figure(f"{victims.total()} kills: {dict(victims)}; died in {dict(died)}")
    assert victims.total() >= 30
    assert all(died[phase] >= 5 for phase in PHASES), died
    assert min(victims.values()) >= 5
    assert losses(out) == expected
    keys = last_keys(out)
    assert sorted(keys) == list(range(STEPS))
    every_key = sorted(f"{i:06d}" for i in range(PER_EPOCH))
    for first in range(0, STEPS, PER_EPOCH // BATCH):
        assert sorted(key for step in range(first, first + PER_EPOCH // BATCH) for key in keys[step]) == every_key
    newest = complete_checkpoints(out / "checkpoints")[-1]
    exported = load_file(out / "encoder" / "model.safetensors")
    for name, value in module_state(newest, "encoder.").items():
        assert torch.equal(exported[name], value)
