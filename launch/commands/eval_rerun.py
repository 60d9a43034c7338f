"""`pretrain eval rerun`: asks again what a report answers, and says whether the answer is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import Device, check_out
from launch.commands.option_groups import grouped
from launch.suites.words import command_words

if TYPE_CHECKING:
    from pretrain.evals.result import EvalReport


@dataclass(frozen=True, kw_only=True)
class OwnPlaces:
    """Where things are here that the report has elsewhere: on a colleague's machine, or before they were moved."""

    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="ENCODER", help="The encoder, or the two towers, as here.")
    ] = None
    train: Annotated[str | None, typer.Option("--train", help="The training set, as here.")] = None
    test: Annotated[str | None, typer.Option("--test", help="The test set, as here.")] = None
    weights: Annotated[
        Path | None, typer.Option("--weights", help="The file of weights for a name of open_clip's, as here.")
    ] = None
    device: Annotated[Device | None, typer.Option("--device", help="Another device than then.")] = None

    def given(self) -> dict[str, str]:
        """What was given, by the names of the commands' arguments."""
        values = {name: getattr(value, "value", value) for name, value in vars(self).items() if value is not None}
        return {name: str(value) for name, value in values.items()}


@grouped
def rerun(
    context: typer.Context,
    result: Annotated[Path, typer.Argument(help="A report of `pretrain eval`; its .json alone will do.")],
    places: OwnPlaces,
    out: Annotated[
        Path | None, typer.Option("--out", help="The new report (.json). Default: beside it, RESULT.rerun.json.")
    ] = None,
) -> None:
    """Asks again what a report answers: the same number, or status 1 and what is not as it was.

    Features are computed anew, whatever a cache holds. Encoder and data are those of the report by their hashes,
    wherever they are.
    """
    from launch.terminal import terminal
    from pretrain.evals.finetune.protocol import RUN, is_finished
    from pretrain.evals.result import EvalReport

    before = EvalReport.load(result, alone=True)
    out = out or result.with_name(f"{result.stem}.rerun.json")
    check_out(out)
    if out == result:
        raise InputError(where="--out", expected="another file than the report itself", found=str(out))
    name, command = _command(context, before, result)
    asked = {**_arguments(before, command, result, places.given()), "out": out, "cache": None}
    if is_finished(trained := out.with_suffix("") / RUN):
        raise InputError(
            where=str(trained), expected="no fine-tuning that got to its end: it would be taken for the new answer",
            found="one", fix="Remove it, or choose another file with --out.",
        )  # fmt: skip
    for path in (out, out.with_suffix(".safetensors")):  # or it could be read as what was found now
        path.unlink(missing_ok=True)
    if status := command.main(command_words(command, asked), prog_name=f"pretrain eval {name}", standalone_mode=False):
        raise typer.Exit(status)
    after = EvalReport.load(out)
    say = terminal().print
    for line in differences(before, after):
        say(f"not as it was: {line}")
    if not before.outcomes.keys:
        say(f"the answers for each sample are not compared: {result.with_suffix('.safetensors')} is not there")
    verdict = "the same number" if after.value == before.value else "ANOTHER NUMBER"
    say(f"{before.metric}: {before.value:.4f} then, {after.value:.4f} now: {verdict}")
    if after.value != before.value:
        raise typer.Exit(1)


def _command(context: typer.Context, before: EvalReport, result: Path) -> tuple[str, Any]:
    """The command of `pretrain eval` that made a report, after its name."""
    name = str(before.arguments.get("command", "")).removeprefix("eval ")
    group = context.parent.command if context.parent is not None else None
    command = getattr(group, "commands", {}).get(name)
    if command is None:
        raise InputError(
            where=str(result),
            expected="a report that tells the command which made it",
            found=name or "none, as it was made during training",
            fix="Judge the checkpoint with `pretrain eval`.",
        )
    return name, command


def _arguments(before: EvalReport, command: Any, result: Path, given: dict[str, str]) -> dict[str, Any]:
    """The arguments that ask the same, with what was given in the place of the report's.

    Raises:
        InputError: the command has no such argument, or a place of the report is not here and none was given for it.
    """
    known = {parameter.name: parameter for parameter in command.params}
    asked = {key: value for key, value in before.arguments.items() if key != "command"}
    unknown = {key: asked.pop(key) for key in sorted(asked.keys() - known.keys())}
    if told := ", ".join(f"{key} {value!r}" for key, value in unknown.items() if value not in (None, False, [])):
        raise InputError(
            where=str(result), expected=f"arguments that `pretrain {before.arguments['command']}` has", found=told,
            fix="Ask again with the version of this program that made it.",
        )  # fmt: skip
    if "towers" in known and "encoder" in given:
        given["towers"] = given.pop("encoder")
    for key in given:
        if key not in known:
            raise InputError(
                where=f"--{key}", expected=f"nothing, as `pretrain {before.arguments['command']}` has none",
                found=given[key],
            )  # fmt: skip
    for key, option in (("encoder", "encoder"), ("towers", "encoder"), ("train", "train"), ("test", "test"),
                        ("weights", "weights")):  # fmt: skip
        if key in known and key not in given and _is_missing(asked.get(key)):
            raise InputError(
                where=f"{result}: {key}", expected="what is here", found=f"{asked[key]}, which is not",
                fix=f"Say where it is with --{option}.",
            )  # fmt: skip
    return {**asked, **given}


def _is_missing(place: object) -> bool:
    """Whether it is a path, and nothing there; names, patterns of shards and URLs are for the command to look up."""
    text = str(place or "")
    return "/" in text and "://" not in text and not set("{*") & set(text) and not Path(text).exists()


def differences(before: EvalReport, after: EvalReport) -> list[str]:
    """What a number depends on and is not the same in two reports, a line each; and predictions that differ."""
    found = [
        f"{name}: {getattr(before, name)!r} then, {getattr(after, name)!r} now"
        for name in ("metric", "n", "weights_sha256", "seeds")
        if getattr(before, name) != getattr(after, name)
    ]
    for group in ("protocol", "data", "versions"):
        old, new = getattr(before, group), getattr(after, group)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        found += [f"{group}.{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed]
    if before.outcomes.keys and before.outcomes.keys == after.outcomes.keys:
        num = int((before.outcomes.predicted != after.outcomes.predicted).sum())
        found += [f"predictions: {num} of {after.n} differ"] if num else []
    return found
