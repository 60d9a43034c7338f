"""Runs in which nothing moves any more: each is ended in time, and names the rank that holds the others up."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pretrain.monitoring.watchdog import HUNG, RankStatus, stalled_ranks
from pretrain.runtime.collectives import World
from tests.gate import until
from tests.ranks import started
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

TIMEOUT = 6.0
NEVER = 100_000  # steps; such a run ends by its watchdog


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


def hanging_run(world: World, recipe: Path, out: Path, hang: str | None, overrides: Sequence[str]) -> None:
    """A run whose last rank does as `hang` says at step 8; what goes to stderr lies beside the run."""
    from pretrain import run
    from pretrain.evals.features.extract import Extraction
    from pretrain.recipe.files import load_recipe

    os.dup2(os.open(out.with_name(f"stderr-{world.rank}"), os.O_WRONLY | os.O_CREAT, 0o666), 2)
    steps, prepare, calls = run._steps, run.prepare, count(1)

    def sleepy_steps(*args: Any) -> Iterator[Any]:
        for i, step in enumerate(steps(*args)):
            if i == 8:
                HANGS[hang or ""]()
            yield step

    def sleepy_prepare(*args: Any) -> Any:
        if next(calls) == 8:
            asleep_in_the_step()
        return prepare(*args)

    def sleepy_forward(*args: Any) -> Any:
        time.sleep(0.7 * TIMEOUT)
        return forward(*args)

    forward = Extraction.forward
    if hang == "evaluation":
        Extraction.forward = sleepy_forward  # type: ignore[method-assign]
    elif hang is not None and world.rank == world.size - 1:
        if hang == "step":
            run.prepare = sleepy_prepare
        else:
            run._steps = sleepy_steps
    run.run(load_recipe(recipe, list(overrides)), out)


def asleep_in_the_loader() -> None:
    time.sleep(1000)


def asleep_in_the_step() -> None:
    time.sleep(1000)


def asleep_with_the_interpreter() -> None:
    """No other thread of the process runs any more."""
    ctypes.PyDLL(None).sleep(1000)


HANGS = {"loader": asleep_in_the_loader, "interpreter": asleep_with_the_interpreter}


class Hung:
    """A run that was made to hang: what its ranks said, once those that can have ended."""

    def __init__(self, recipe: Path, out: Path, *, hang: str | None = None, stop: int | None = None, nproc: int = 2):
        (out / "job").mkdir(parents=True)
        self.out = out
        overrides = [f"runtime.step_timeout_seconds={TIMEOUT}", f"schedule.steps={NEVER}", "schedule.warmup=0"]
        with started(hanging_run, nproc, recipe, out, hang, overrides, joined=False) as ranks:
            until(
                lambda: max(losses(out), default=0) >= 7,
                meanwhile=lambda: all(process.is_alive() for process in ranks.processes), said=lambda: self.said(0),
            )  # fmt: skip
            if stop is not None:
                os.kill(ranks.processes[stop].pid or 0, signal.SIGSTOP)
            begun = time.monotonic()
            self.seconds: dict[int, float] = {}

            def ended() -> bool:
                for rank, process in enumerate(ranks.processes):
                    if not process.is_alive():
                        self.seconds.setdefault(rank, time.monotonic() - begun)
                return len(self.seconds) == nproc - (stop is not None)

            with suppress(AssertionError):  # a rank that is stuck is one of what tests look at
                until(ended, seconds=4 * TIMEOUT)
            self.statuses = {rank: ranks.processes[rank].exitcode for rank in self.seconds}

    def said(self, rank: int) -> str:
        return self.out.with_name(f"stderr-{rank}").read_text()

    def lines(self, rank: int) -> list[str]:
        return [line for line in self.said(rank).splitlines() if "has made no progress for" in line]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_the_other(shards: Path, tmp_path: Path, stopped: int) -> None:
    """Rank 0 keeps the store that the others would read of."""
    recipe = write_recipe(tmp_path / "r.yaml", shards, checkpoint={"every_steps": None, "every_minutes": None})
    hung = Hung(recipe, tmp_path / "run", stop=stopped)
    other = 1 - stopped
    assert hung.statuses == {other: HUNG}
    assert 0.9 * TIMEOUT < hung.seconds[other] < 2 * TIMEOUT
    (line,) = hung.lines(other)
    assert line.startswith(f"rank {stopped} on {platform.node()} has made no progress for ")
    assert "not heard of any more" in line
    assert int(line.split("step ")[1].split(",")[0]) >= 7
    assert "distributed_c10d.py" in hung.said(other), "the stacks of all threads"
    told = json.loads((tmp_path / "run" / "job" / f"hang-{other}.json").read_text())
    assert [(one["rank"], one["node"], one["line"]) for one in told["found"]] == [(stopped, platform.node(), line)]


@pytest.mark.slow
@pytest.mark.parametrize(("hang", "where"), [("loader", "data"), ("step", "step")])
def test_a_rank_that_sleeps_is_named_with_its_stack(shards: Path, tmp_path: Path, hang: str, where: str) -> None:
    """By itself and by the one that waits for it in a collective."""
    recipe = write_recipe(tmp_path / "r.yaml", shards, checkpoint={"every_steps": None, "every_minutes": None})
    hung = Hung(recipe, tmp_path / "run", hang=hang)
    assert set(hung.statuses.values()) == {HUNG}
    assert max(hung.seconds.values()) < 2 * TIMEOUT
    for rank in hung.statuses:
        (line,) = hung.lines(rank)
        assert line.startswith(f"rank 1 on {platform.node()} has made no progress for ")
        assert f": step {8 if hang == 'loader' else 7}, in {where} (in no collective, at {__file__}:" in line
        assert f"asleep_in_the_{hang}" in hung.said(rank)
    assert 0 in hung.statuses


@pytest.mark.slow
def test_one_process_alone_is_ended_too(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", shards, checkpoint={"every_steps": None, "every_minutes": None})
    hung = Hung(recipe, tmp_path / "run", hang="loader", nproc=1)
    assert hung.statuses == {0: HUNG}
    assert f"rank 0 on {platform.node()}" in hung.lines(0)[0]
    assert "asleep_in_the_loader" in hung.said(0)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_one_that_keeps_the_interpreter_is_ended_too(shards: Path, tmp_path: Path, nproc: int) -> None:
    """Its watchdog does not run: faulthandler ends it, and says where it was; or the other says that it is silent."""
    recipe = write_recipe(tmp_path / "r.yaml", shards, checkpoint={"every_steps": None, "every_minutes": None})
    hung = Hung(recipe, tmp_path / "run", hang="interpreter", nproc=nproc)
    assert hung.statuses == ({0: HUNG, 1: 1} if nproc == 2 else {0: 1})
    assert "asleep_with_the_interpreter" in hung.said(nproc - 1)
    if nproc == 2:
        assert hung.lines(0)[0].startswith(f"rank 1 on {platform.node()}")
        assert "not heard of any more" in hung.lines(0)[0]


@pytest.mark.slow
def test_a_run_that_moves_is_left_alone(shards: Path, tmp_path: Path) -> None:
    """With evaluations and saves; its losses are those of a run that nobody watches. The next test takes longer."""
    val = write_shards(tmp_path / "val", 27)
    recipe = write_recipe(
        tmp_path / "r.yaml", shards,
        data={"train": str(shards), "val": str(val), "read_streams": 3, "shuffle_window": 16},
        schedule={"steps": 12}, checkpoint={"every_steps": 5}, validation={"every_epochs": 0.4},
        evals=[{"kind": "knn", "train": str(shards), "test": str(val), "every_epochs": 0.4, "k": 5}],
    )  # fmt: skip
    train(recipe, tmp_path / "watched", 2, "runtime.step_timeout_seconds=20")
    train(recipe, tmp_path / "bare", 2, "runtime.step_timeout_seconds=null")
    assert losses(tmp_path / "watched") == losses(tmp_path / "bare")
    assert len(losses(tmp_path / "watched")) == 12


@pytest.mark.slow
def test_what_moves_on_one_rank_is_waited_for(shards: Path, tmp_path: Path) -> None:
    """kNN is rank 0's, and here takes longer than the timeout."""
    recipe = write_recipe(
        tmp_path / "r.yaml", shards, schedule={"steps": 6}, runtime={"threads": 1, "step_timeout_seconds": TIMEOUT},
        evals=[{"kind": "knn", "train": str(shards), "test": str(shards), "every_epochs": 9, "k": 5}],
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    with started(hanging_run, 2, recipe, tmp_path / "run", "evaluation", [], joined=False) as ranks:
        ranks.results(timeout=90)
    assert "has made no progress" not in (tmp_path / "stderr-1").read_text()


def test_who_is_blamed() -> None:
    waits, works, ahead = RankStatus(marks=5, waits=True), RankStatus(marks=5), RankStatus(marks=6, waits=True)
    assert stalled_ranks({0: waits, 1: works, 2: waits}, unheard={2}) == [2]
    assert stalled_ranks({0: replace(waits, blames=(1,)), 1: works, 2: waits}, unheard={0}) == [1]
    assert stalled_ranks({0: ahead, 1: waits, 2: ahead}, unheard=set()) == [1]
    assert stalled_ranks({0: waits, 1: works, 2: waits}, unheard=set()) == [1]
    assert stalled_ranks({0: works, 1: works}, unheard=set()) == [0, 1]
    assert stalled_ranks({0: waits, 1: waits}, unheard=set()) == [0, 1]
