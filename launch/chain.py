"""`pretrain chain FILE`: stages one after another on this machine, each a command that goes on by itself.

What is known of a stage lies in `OUT/chain/NAME.json`: written before it starts, of what it is made; afterwards also
what it left behind. A stage of which all of that still holds is passed over; one that was interrupted is given its
command again; one whose inputs or settings are others than they were is refused.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, PretrainError, RecipeError, RunError
from launch.chain_recipe import Chain, Stage, load_chain, overrides_of, words_of
from launch.local import ASKING, STOPPING

if TYPE_CHECKING:
    from pretrain.recipe import Recipe

_TAKEN = ("shards", "teacher", "source", "without", "encoder", "train", "test")  # keys that name what a stage reads


def run_chain(path: Path, out: Path | None, num_ranks: int) -> int:
    """Runs what is left of a chain. Returns the exit status: 0 when all of it is done.

    Args:
        path: of the chain's recipe.
        out: its folder; None: `runs/<name>`.
        num_ranks: processes of each training.

    Raises:
        InputError: a stage is wrong, or is not what lies in the folder; nothing was started.
        RunError: a stage failed.
    """
    chain = load_chain(path)
    job = _Job(chain, path.parent, out or Path("runs") / chain.name, num_ranks)
    _check(job)
    (job.out / "chain").mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(job.stages, 1):
        head = f"[{number}/{len(chain.stages)}] {stage.name}"
        if _is_done(job, stage):
            print(f"{head}: done before", flush=True)
            continue
        words = words_of(stage, job.folder, job.out, job.num_ranks)
        print(f"{head}: pretrain {shlex.join(words)}", flush=True)
        status = _run(words)
        if status > 128:
            return status  # a signal to this process, which the stage has answered
        if status:
            raise RunError(
                where=f"stage {stage.name}", expected="its command to succeed", found=f"exit status {status}",
                fix="See what it said above; the same command goes on from there.",
            )  # fmt: skip
        _keep(job, stage, {**_made_of(job, stage), "left": _digest(stage, job.out)})
    for line in _results(job):
        print(line)
    return 0


@dataclass(frozen=True)
class _Job:
    chain: Chain
    folder: Path  # of the chain's file: recipes are found from there
    out: Path
    num_ranks: int

    @property
    def outputs(self) -> Mapping[str, Path]:
        return {stage.name: stage.output(self.out) for stage in self.chain.stages}

    @property
    def stages(self) -> list[Stage]:
        """With paths in the place of references."""
        return [stage.filled(self.outputs) for stage in self.chain.stages]

    def recipe(self, stage: Stage) -> Recipe:
        from pretrain.recipe_io import load_recipe

        return load_recipe(self.folder / str(stage.train), overrides_of(stage))

    def record(self, stage: Stage) -> Path:
        return self.out / "chain" / f"{stage.name}.json"


def _check(job: _Job) -> None:
    """Every stage, before the first is started.

    Raises:
        RecipeError: with the problems of all stages.
    """
    problems = []
    for stage in job.stages:
        try:
            _check_stage(job, stage)
        except RecipeError as error:
            problems += [f"{stage.name}, {error.where}, {problem}" for problem in error.problems]
        except PretrainError as error:
            problems.append(f"{stage.name}, {error}")
    if problems:
        raise RecipeError(job.chain.name, problems)


def _check_stage(job: _Job, stage: Stage) -> None:
    if stage.train is not None:
        _check_recipe(job, stage)
    elif stage.label is not None:
        _check_input(job, stage.label.shards)
        _check_teacher(job, stage.label.teacher)
    elif stage.select is not None:
        from launch.label_commands import check_choice

        _check_input(job, stage.select.source)
        chosen = stage.select
        by_labels = _maker(job, chosen.source) is not None or (Path(chosen.source) / "labels.json").is_file()
        check_choice(chosen.source, by_labels, chosen.threshold, chosen.per_class, chosen.top_k)
    elif stage.evaluate is not None:
        for path in (stage.evaluate.train, stage.evaluate.test):
            _check_input(job, path)
        _check_words(words_of(stage, job.folder, job.out, job.num_ranks))


def _check_recipe(job: _Job, stage: Stage) -> None:
    """That it loads, divides into ranks, builds its model, and finds what data are there already."""
    import torch

    from pretrain.objectives.build import build_objective
    from pretrain.resolve import split_batch

    recipe = job.recipe(stage)
    split_batch(recipe, job.num_ranks)
    with torch.device("meta"):
        build_objective(recipe.model, recipe.objective)
    sources = [recipe.data.train] if isinstance(recipe.data.train, str) else [s.path for s in recipe.data.train]
    for path in (*sources, recipe.data.val, *(p for config in recipe.evals for p in (config.train, config.test))):
        if path is not None:
            _check_input(job, path)


def _check_teacher(job: _Job, path: str) -> None:
    maker = _maker(job, path)
    if maker is None:
        _fingerprint(path)
    elif maker.train is None or job.recipe(maker).objective.kind != "supervised":
        raise InputError(where="label.teacher", expected="a supervised run, which has a head", found=maker.name)


def _maker(job: _Job, path: str) -> Stage | None:
    """The stage that leaves this path behind; None: it comes from elsewhere."""
    return next((stage for stage in job.stages if path == str(stage.output(job.out))), None)


def _check_input(job: _Job, path: str) -> None:
    if _maker(job, path) is None:
        _fingerprint(path)


def _fingerprint(path: str) -> str:
    """Identity of what a chain takes from elsewhere: labels, a run, a checkpoint, a file, or a data set."""
    from data_pipeline.read import open_dataset
    from pretrain.checkpoint import COMPLETE, complete_checkpoints, sha256_of

    folder = Path(path)
    runs = [checkpoint / COMPLETE for checkpoint in complete_checkpoints(folder / "checkpoints")[-1:]]
    for file in (*runs, folder / COMPLETE, folder / "labels.json", folder / "model.safetensors", folder):
        if file.is_file() and file.suffix != ".tar":
            return sha256_of(file)
    return open_dataset(path).fingerprint


def _check_words(words: list[str]) -> None:
    """The command and its options, as its own parser sees them."""
    import typer

    from launch import eval_commands

    group: Any = typer.main.get_command(eval_commands.app)
    command = group.commands.get(words[1])
    if command is None:
        raise InputError(
            where="evaluate.protocol", expected=f"one of {', '.join(sorted(group.commands))}", found=words[1]
        )
    known = {option for parameter in command.params for option in parameter.opts}
    if unknown := [word.partition("=")[0] for word in words[3:] if word.partition("=")[0] not in known]:
        raise InputError(
            where="evaluate.options", expected=f"options of `pretrain eval {words[1]}`", found=", ".join(unknown)
        )


def _made_of(job: _Job, stage: Stage) -> dict[str, Any]:
    """What decides the result of a stage, all earlier ones being done. Where the chain's folder lies does not."""
    own = next(other for other in job.chain.stages if other.name == stage.name)
    by_name = {other.name: other for other in job.stages}
    how = {"label": {"batch_size", "num_workers"}}
    settings: Any = own.model_dump(mode="json", exclude_none=True, exclude=how)
    data: dict[str, str] = {}
    if stage.train is not None:
        from data_pipeline.mixture import open_training
        from pretrain.resolve import result_settings

        recipe = job.recipe(stage)
        settings = {key: value for key, value in result_settings(recipe).items() if key != "init_from"}
        data["data.train"] = open_training(recipe.data.train, recipe.data.cache.spec()).fingerprint
        taken = {"init_from": recipe.init_from}
    else:
        given = stage.label or stage.select or stage.evaluate
        assert given is not None
        taken = {key: getattr(given, key, None) for key in _TAKEN}
    for key, path in taken.items():
        if path is not None and _maker(job, path) is None:
            data[key] = _fingerprint(path)
    left = {name: _digest(by_name[name], job.out) for name in own.references()}
    return {"settings": json.loads(json.dumps(settings)), "data": data, "stages": left}


def _is_done(job: _Job, stage: Stage) -> bool:
    """Whether a stage was finished, and all is as it was then; writes down what it is made of where it is new.

    Raises:
        InputError: it was begun with other settings or inputs, or what it left behind is another.
    """
    made_of, path = _made_of(job, stage), job.record(stage)
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        _keep(job, stage, made_of)
        return False
    left = kept.pop("left", None)
    if kept != made_of:
        raise InputError(
            where=f"stage {stage.name} in {job.out}",
            expected=f"what it was begun with: {_differing(kept, made_of)}",
            found=_differing(made_of, kept),
            fix=f"Restore that, choose another folder with --out, or remove {path} and {stage.output(job.out)}, and "
            "what later stages made of it.",
        )
    if left is None:
        return False
    if (found := _digest(stage, job.out)) != left:
        raise InputError(
            where=str(stage.output(job.out)),
            expected=f"what stage {stage.name} left there",
            found="nothing" if found is None else "something else",
            fix=f"Restore it, or remove {path} to have the stage made again.",
        )
    return True


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The leaves of the first that the second has not."""

    def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}" if path else key)
        else:
            yield path, value

    others = dict(leaves(theirs))
    return "; ".join(f"{p} {json.dumps(v)}" for p, v in leaves(ours) if others.get(p) != v) or "nothing more"


def _keep(job: _Job, stage: Stage, record: Mapping[str, Any]) -> None:
    with durable_file(job.record(stage)) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def _digest(stage: Stage, out: Path) -> str | None:
    """SHA-256 of what stands for all that a stage left: hashes of hashes; None: there is nothing."""
    from pretrain.checkpoint import COMPLETE, complete_checkpoints, sha256_of

    path = stage.output(out)
    if stage.train is not None:
        complete = complete_checkpoints(path / "checkpoints")
        path = complete[-1] / COMPLETE if complete else path / COMPLETE
    elif stage.label is not None:
        path = path / "labels.json"
    return sha256_of(path) if path.is_file() else None


def _run(words: list[str]) -> int:
    """`pretrain WORDS` in a process that ends with this one and gets its signals; 128 + N where signal N came."""
    # Of a group of its own, so that Ctrl-C reaches it once, through us.
    command = [sys.executable, "-m", "launch.rank", str(os.getpid()), "launch.cli", *words]
    asked: list[int] = []
    process = subprocess.Popen(command, process_group=0)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if signum in STOPPING:
            asked.append(signum)
        elif words[0] != "train":
            return  # it would end what does not know the signal
        process.send_signal(signum if len(asked) < 2 else signal.SIGKILL)

    with _handled(pass_on):
        status = process.wait()
    return 128 + asked[0] if asked else status if status >= 0 else 1


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to the handler, except those that this process was told to ignore (nohup)."""
    before = {s: signal.getsignal(s) for s in (*STOPPING, *ASKING) if signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def _results(job: _Job) -> Iterator[str]:
    """The last validation of each run, and each evaluation."""
    for stage in job.stages:
        path = stage.output(job.out)
        if stage.train is not None and (path / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            values = {k: v for line in lines for k, v in line.items() if k.startswith("val/")}
            yield f"{stage.name}: " + (", ".join(f"{k} {v:.4f}" for k, v in values.items()) or "trained")
        elif stage.evaluate is not None:
            report = json.loads(path.read_text())
            yield f"{stage.name}: {report['metric']} {report['value']:.2f} %"
