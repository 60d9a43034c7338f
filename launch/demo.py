"""`pretrain demo`: images made on the spot, SimCLR that is killed and resumed, an evaluated encoder, a report."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_pipeline.errors import InputError, RecipeError
from data_pipeline.parallel import num_cores
from data_pipeline.procedural.make import make
from launch.ranks.child import Command, started_command
from pretrain.recipe.configs_folder import configs_folder
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import differences, resolve
from pretrain.runtime.run_folder import is_claimed
from pretrain.runtime.signals import STOPPED

if TYPE_CHECKING:
    from pretrain.reports.run_results import ProtocolResult

RECIPE = configs_folder() / "recipes" / "cpu" / "simclr_fractals.yaml"
NUM_RANKS = 2
NUM_CLASSES = 6
PROBE_STEPS = 1000  # of the linear probe, where `pretrain eval linear` takes 5,000: enough for so few images


def main(out: Path, *, num_train: int = 6000, num_test: int = 1200, overrides: Sequence[str] = ()) -> None:
    """Runs the whole demo in `out`, which becomes the run's folder; what is complete there is kept.

    Args:
        out: images go to `data/`, the rest lies as in any run.
        num_train, num_test: images to make.
        overrides: of the recipe, `a.b=c`.

    Raises:
        InputError: `out` cannot be used.
        RunError: a step failed.
    """
    train, test = out / "data" / "train", out / "data" / "test"
    overrides = [f"data.train={_yaml(train)}", f"data.val={_yaml(test)}", *overrides]
    recipe = _checked_recipe(out, overrides)
    watch = _Watch()
    if (out / "recipe.yaml").is_file():
        print(f"{out} is there already: what is complete in it is kept. Remove it to start over.")

    print(
        f"\n[1/4] images: {num_train:,} fractals to train on, {num_test:,} to test, {NUM_CLASSES} classes", flush=True
    )
    for folder, split, num_samples in ((train, "train", num_train), (test, "test", num_test)):
        make(
            "fractals", folder, num_samples=num_samples, size=recipe.model.image_size, split=split,
            num_classes=NUM_CLASSES, workers=num_cores(),
        )  # fmt: skip
    watch.lap("images")

    total_steps = resolve(recipe, NUM_RANKS, num_train).total_steps
    command = ["train", str(RECIPE), "--nproc", str(NUM_RANKS), "--out", str(out)]
    command += [f"--set={override}" for override in overrides]
    print(f"\n[2/4] training: {NUM_RANKS} processes, ZeRO {recipe.engine.zero_stage}, {total_steps:,} steps")
    interruption = _train(command, out, total_steps)
    watch.lap("training")

    print("\n[3/4] judging: the encoder, and the same one as it was at its random start", flush=True)
    comparisons = _judge(out, train, test)
    watch.lap("judging")

    print("\n[4/4] report", flush=True)
    from pretrain.reports.report import write_report

    path = write_report(out, notes=_notes(command, recipe.engine.zero_stage, interruption))
    watch.lap("report")
    _print_table(comparisons)
    print(f"{watch}\nreport: {path}")


def _checked_recipe(out: Path, overrides: Sequence[str]) -> Recipe:
    if not RECIPE.is_file():
        raise InputError(
            where="pretrain demo", expected=f"its recipe, {RECIPE}", found="no such file",
            fix="Run it from a checkout of the repository, or from the wheel that `pip wheel --no-deps .` makes there.",
        )  # fmt: skip
    recipe = load_recipe(RECIPE, list(overrides))
    if (out / "recipe.yaml").is_file():
        problems = differences(recipe, load_recipe(out / "recipe.yaml"))
        if problems:
            raise RecipeError(f"{out} holds another run", problems, "Choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            where=f"--out {out}", expected="a folder that can be made", found=error.strerror or str(error)
        ) from None
    return recipe


@dataclass(frozen=True)
class Interruption:
    """The training was killed after `killed_after` steps, and went on from the checkpoint of `resumed_from`."""

    killed_after: int
    resumed_from: int

    @classmethod
    def load(cls, path: Path) -> Interruption | None:
        return cls(**json.loads(path.read_text())) if path.is_file() else None

    def __str__(self) -> str:
        again = "no step had to be taken again"
        if self.killed_after > self.resumed_from:
            again = f"steps {self.resumed_from + 1} to {self.killed_after} were taken again, on the same samples"
        return (
            f"All processes were killed (SIGKILL) after step {self.killed_after}; started again, the run went on "
            f"from its checkpoint of step {self.resumed_from}: {again}."
        )


def _train(command: Sequence[str], out: Path, total_steps: int) -> Interruption | None:
    """Trains to the end, killed once on the way; a finished training is left as it is."""
    kept = out / "interruption.json"
    if _saved_step(out) == total_steps:
        print("finished before")
        return Interruption.load(kept)
    half = total_steps // 2
    if _saved_step(out) < half:
        with _started(command) as started:
            interruption = _kill_in_mid_interval(started.process, out, half)
        if interruption is not None:
            kept.write_text(json.dumps(asdict(interruption)))
            print(f"\n\n{interruption}", flush=True)
    if _saved_step(out) < total_steps:
        with _started(command) as started:
            started.wait()
    return Interruption.load(kept)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[Command]:
    """Runs `pretrain COMMAND` beside the block.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    print(f"$ pretrain {shlex.join(command)}", flush=True)
    with started_command(command) as started:
        yield started
    status = started.wait()
    if status == STOPPED or started.process.returncode not in (0, -signal.SIGKILL):
        raise typer.Exit(status)


def _kill_in_mid_interval(process: subprocess.Popen[str], out: Path, half: int) -> Interruption | None:
    """Kills the training past its first checkpoint from step `half` on; None: the process ended before."""
    while process.poll() is None:
        saved, logged = _saved_step(out), _logged_step(out)
        if saved >= half and logged > saved:
            process.kill()
            process.wait()
            while is_claimed(out):  # the ranks die with their launcher, moments later
                time.sleep(0.01)
            return Interruption(_logged_step(out), _saved_step(out))
        time.sleep(0.02)
    return None


def _saved_step(out: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0: there is none."""
    complete = (out / "checkpoints").glob("step_*/COMPLETE")
    return max((int(path.parent.name.removeprefix("step_")) for path in complete), default=0)


def _logged_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = (re.match(r'\{"step": (\d+),', line) for line in lines[-1:])
    return next((int(match[1]) for match in found if match), 0)


def _judge(out: Path, train: Path, test: Path) -> list[ProtocolResult]:
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.knn.config import KnnConfig
    from pretrain.evals.knn.protocol import Knn
    from pretrain.evals.linear.config import LinearConfig
    from pretrain.evals.linear.protocol import Linear
    from pretrain.evals.sources.load import load_source
    from pretrain.reports.run_results import find_protocol_results, kept_results

    bank, queries = open_dataset(str(train)), open_dataset(str(test))
    knn = Knn(bank, queries, KnnConfig(train=str(train), test=str(test)))
    linear = Linear(bank, queries, LinearConfig(train=str(train), test=str(test), min_steps=PROBE_STEPS))
    trained, random = load_source(str(out)), load_source(str(out), random_init=True)
    for encoder in (trained, random):
        for evaluator in (knn, linear):
            report = evaluator.run(encoder)
            report.save(out / "evals" / report.file_name)
            print(f"{report.evaluator} of the {encoder.tag} one: {report.value:.1f} %", flush=True)
    return find_protocol_results(kept_results(out / "evals", ()), {trained.weights_sha256()})


def _notes(command: Sequence[str], zero_stage: int, interruption: Interruption | None) -> list[str]:
    started = f"{NUM_RANKS} processes, ZeRO {zero_stage}: pretrain {shlex.join(command)}"
    return [started, *([str(interruption)] if interruption else [])]


def _print_table(comparisons: Sequence[ProtocolResult]) -> None:
    from rich.table import Table

    from launch.terminal import terminal

    table = Table("top-1 on the test images", title_justify="left")
    for column in ("trained", "random start", "difference", "95 % interval"):
        table.add_column(column, justify="right")
    for c in comparisons:
        assert c.random is not None
        assert c.interval is not None
        table.add_row(
            c.protocol, f"{c.trained.value:.1f} %", f"{c.random.value:.1f} %", f"{c.interval.difference:+.1f}",
            f"{c.interval.low:+.1f} to {c.interval.high:+.1f}",
        )  # fmt: skip
    terminal().print(table)


class _Watch:
    """A stopwatch for the parts of the demo."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self._laps.items())
        return f"took {sum(self._laps.values()):.0f} s: {parts}"


def _yaml(path: Path) -> str:
    """Returns a path as the value of an override, which is YAML: plain, unless YAML reads that as something else."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path))
