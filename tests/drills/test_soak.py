"""The soak's judge catches what a run leaves behind, and its harness goes through both phases; a few steps of them."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Command, begun, program
from tests.gate import Gate, behind, until
from tests.soak import judge
from tests.soak.__main__ import soak
from tests.soak.local import Attempt, Killer, Settings, prepared
from tests.soak.sampler import LAUNCHER, Held, Sample, Sampler, newest_step

PERIOD, STEPS = 200, 20_000
Change = Callable[[int], dict[str, float]]  # number of evaluations and saves before -> what a measure is more by


def samples(change: Change = lambda saves: {}) -> tuple[list[Sample], dict[int, float]]:
    """Of an hour of two ranks on a busy machine: memory and files that come and go, steps that others slow down."""
    rng, found, times = random.Random(0), [], {}
    for step in range(0, STEPS, 10):
        saves = step // PERIOD
        more = change(saves)
        evaluating = step % PERIOD < 30
        held = [
            Held(
                f"rank {rank}", 100 + rank,
                pss=rng.randrange(3 * 10**8, 5 * 10**8),
                # It grows while the run is new; an evaluation takes more, of which once a bit stays.
                memory=int(
                    4e8 + 5e7 * (1 - 0.9**saves) + 3e7 * evaluating + 6e5 * (saves > 70) + rng.randrange(200_000)
                    + (more.get("memory", 0.0) if rank else 0.0)
                ),
                files=int(80 + rng.randrange(3) + 5 * evaluating + more.get("files", 0)),
                threads=int(28 + evaluating + more.get("threads", 0)),
                mappings=int(900 + rng.randrange(4) + more.get("mappings", 0)),
                cpu=step * 0.012 + rng.uniform(0, 0.1) + more.get("cpu", 0.0),
            )
            for rank in range(2)
        ]  # fmt: skip
        passing = [replace(held[0], name="rank 0 child 7", pid=900, memory=10**6, files=0)] * int(
            evaluating + more.get("processes", 0)
        )
        found.append(Sample(step * 0.05, step, int(1 + evaluating + more.get("tempfiles", 0)), (*held, *passing)))
        times[step] = (0.02 + more.get("seconds", 0.0)) * rng.choice((1, 1, 1.5, 3))
    return found, times


def grown(change: Change = lambda saves: {}) -> set[tuple[str, str]]:
    return {(each.who, each.measure) for each in judge.judge(*samples(change), PERIOD) if each.grows}


def test_nothing_grows_where_all_comes_and_goes() -> None:
    assert not grown()


@pytest.mark.parametrize(
    ("measure", "of_each_save", "who"),
    [
        ("memory", 100_000, {"rank 1"}),
        ("files", 1, {"rank 0", "rank 1"}),
        ("threads", 1, {"rank 0", "rank 1"}),
        ("mappings", 1, {"rank 0", "rank 1"}),
        ("tempfiles", 1, {judge.ALL}),
        ("processes", 1, {judge.ALL}),
    ],
)
def test_what_each_save_leaves_behind_is_found(measure: str, of_each_save: float, who: set[str]) -> None:
    """A file, a thread, 100 kB of one rank: in figures that shake by more."""
    found = grown(lambda saves: {measure: of_each_save * saves})
    assert {name for name, what in found if what == measure} >= who
    assert measure == "processes" or {what for _, what in found} == {measure}
    # What was left behind in the first half alone, while the run was new, is no growth.
    assert not grown(lambda saves: {measure: of_each_save * min(saves, 45)})


def test_a_step_that_takes_longer_and_longer_is_found() -> None:
    """Waiting, or computing: at the end five times as long as in the beginning."""
    assert grown(lambda saves: {"seconds": 0.02 * (saves / 50) ** 2}) == {(judge.ALL, "seconds per step")}
    slower = grown(lambda saves: {"cpu": 0.012 * PERIOD * saves**2 / 40})
    assert slower == {("rank 0", "cpu per step"), ("rank 1", "cpu per step")}


def test_too_short_a_run_is_not_judged() -> None:
    found, times = samples()
    with pytest.raises(ValueError, match=r"expected samples of 8 periods of 200 steps or more .* found 7"):
        judge.judge([sample for sample in found if sample.step < 27 * PERIOD], times, PERIOD)


def leak(run: Path, what: str, steps: int) -> None:
    """A process that logs steps, and leaves something behind at each; it waits until each was sampled twice."""
    kept: list[object] = []
    with (run / "metrics.jsonl").open("w") as log, ExitStack() as stack:
        for step in range(1, steps + 1):
            if what == "file":
                kept.append(stack.enter_context(open(os.devnull)))
            elif what == "memory":
                kept.append(os.urandom(100_000))
            elif what == "thread":
                threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            elif what == "tempfile":
                (run / "tmp" / str(step)).touch()
            log.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
            log.flush()
            until(lambda step=step: _samples_at(run, step) >= 2)  # type: ignore[misc]


def _samples_at(run: Path, step: int) -> int:
    """Of the last few: so that this process needs no more memory as the file grows."""
    with (run / "samples.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**12))
        return file.read().count(f'"step": {step}, '.encode())


@pytest.mark.parametrize(
    ("what", "measure", "who"),
    [
        ("nothing", None, ""),
        ("file", "files", "root"),
        ("memory", "memory", "root"),
        ("thread", "threads", "root"),
        ("tempfile", "tempfiles", judge.ALL),
    ],
)
def test_a_process_that_leaks_is_seen(what: str, measure: str | None, who: str, tmp_path: Path) -> None:
    """Each step is a period here."""
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "samples.jsonl"
    path.touch()
    roots: dict[str, int] = {}
    steps = judge.WARM_UP_PERIODS + judge.LEAST_PERIODS + 2
    sampler = Sampler(lambda: dict(roots), tmp_path, path, temporary=tmp_path / "tmp", every_seconds=0.01)
    with sampler, begun(partial(leak, tmp_path, what, steps)) as command:
        roots["root"] = command.pid
        assert command.wait().status == 0
    seen = [sample for sample in Sample.read(path) if sample.processes]
    growths = judge.judge(seen, dict.fromkeys(range(1, steps + 1), 0.01), 1)
    found = {(each.who, each.measure) for each in growths if each.grows and each.measure in judge.LIMITS}
    assert (who, measure) in found or measure is None
    assert {name for _, name in found} <= {measure, "mappings"}, found  # a thread's stack is one, too


class Forked:
    """A command forked from a warm process, as the soak starts its own."""

    def __init__(self, command: Command, log: Path) -> None:
        self._command, self._log = command, log

    @property
    def pid(self) -> int:
        return self._command.pid

    def poll(self) -> int | None:
        if self._command.running():
            return None
        self._log.write_text(self._command.said())
        return self._command.wait().status

    def kill(self) -> None:
        self._command.end()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """The last step that a run of the soak may take: of the one that is to be killed, two after its first save."""
    return Gate(tmp_path / "gate")


@pytest.fixture
def start_forked(gate: Gate) -> Iterator[Callable[[Sequence[str], Mapping[str, str], Path], Forked]]:
    last_steps = iter([12, 6, 12])
    with ExitStack() as stack:

        def start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
            gate.open(next(last_steps))
            program_behind = partial(behind, gate, program("launch.cli", *words))
            return Forked(stack.enter_context(begun(program_behind, environment=environment)), log)

        yield start


class OpeningKiller(Killer):
    """Opens the gate when it has killed: the rank that is left then finds that the other is gone."""

    def __init__(self, settings: Settings, gate: Gate) -> None:
        super().__init__(settings)
        self._gate = gate

    def kill_once(self, attempt: Attempt, run: Path) -> bool:
        killed = super().kill_once(attempt, run)
        self._gate.open(12)
        return killed


def test_both_phases(
    tmp_path: Path,
    gate: Gate,
    start_forked: Callable[[Sequence[str], Mapping[str, str], Path], Forked],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twelve steps with a save and two evaluations every four; the second run is killed once, and ends as the first."""
    settings = Settings(steps=12, every=4, kill_seconds=0, max_kills=1, sample_seconds=0.1, log_every=1)
    with prepared(tmp_path / "soak", settings, start_forked) as bench:
        killer = OpeningKiller(settings, gate)
        wrong = soak(bench, killer)
        assert any(bench.faults)
    said = capsys.readouterr().out
    assert len(wrong) == 1, wrong
    assert "growth cannot be judged" in wrong[0]  # too few periods; all else is right
    assert "the same to the bit" in said
    assert len(killer.kills) == 1
    assert 4 <= killer.kills[0][0] <= 6
    for name in ("undisturbed", "killed"):
        assert newest_step(tmp_path / "soak" / name) == 12
        assert (tmp_path / "soak" / f"{name}.png").is_file()
        names = {held.name for sample in Sample.read(tmp_path / "soak" / f"{name}.samples.jsonl")
                 for held in sample.processes}  # fmt: skip
        assert {LAUNCHER, "rank 0", "rank 1", "rank 0 child 0", "rank 1 child 0"} <= names


def test_runs_that_differ_are_told(tmp_path: Path) -> None:
    for name, loss, weight in (("one", 1.0, b"1"), ("same", 1.0, b"1"), ("other", 1.5, b"2")):
        checkpoint = tmp_path / name / "checkpoints" / "step_00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
        (checkpoint / "tensors-00000-of-00001.safetensors").write_bytes(weight)
        (tmp_path / name / "encoder").mkdir()
        (tmp_path / name / "encoder" / "model.safetensors").write_bytes(weight)
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": loss}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not judge.differences(tmp_path / "one", tmp_path / "same")
    found = judge.differences(tmp_path / "one", tmp_path / "other")
    assert [what.partition(":")[0] for what in found] == [
        "1 of 2 logged results; the first is loss at step 2", "the checkpoint", "the encoder",
    ]  # fmt: skip
