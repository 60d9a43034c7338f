"""`pretrain eval rerun`: asks again what a report answers, and says whether the answer is the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import check_out
from launch.suites.words import command_words

if TYPE_CHECKING:
    from pretrain.evals.result import EvalReport


def rerun(
    context: typer.Context,
    result: Annotated[Path, typer.Argument(help="A report of `pretrain eval`.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The new report (.json). Default: beside it, RESULT.rerun.json.")
    ] = None,
) -> None:
    """Asks again what a report answers: the same number, or status 1 and what is not as it was.

    Features are computed anew, whatever a cache holds.
    """
    from launch.terminal import terminal
    from pretrain.evals.finetune.protocol import RUN, is_finished
    from pretrain.evals.result import EvalReport

    before = EvalReport.load(result)
    out = out or result.with_name(f"{result.stem}.rerun.json")
    check_out(out)
    if out == result:
        raise InputError(where="--out", expected="another file than the report itself", found=str(out))
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
    if is_finished(trained := out.with_suffix("") / RUN):
        raise InputError(
            where=str(trained), expected="no fine-tuning that got to its end: it would be taken for the new answer",
            found="one", fix="Remove it, or choose another file with --out.",
        )  # fmt: skip
    for path in (out, out.with_suffix(".safetensors")):  # or it could be read as what was found now
        path.unlink(missing_ok=True)
    asked = {**before.arguments, "out": out, "cache": None}
    if status := command.main(command_words(command, asked), prog_name=f"pretrain eval {name}", standalone_mode=False):
        raise typer.Exit(status)
    after = EvalReport.load(out)
    console = terminal()
    for line in differences(before, after):
        console.print(f"not as it was: {line}")
    verdict = "the same number" if after.value == before.value else "ANOTHER NUMBER"
    console.print(f"{before.metric}: {before.value:.4f} then, {after.value:.4f} now: {verdict}")
    if after.value != before.value:
        raise typer.Exit(1)


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
    if before.outcomes.keys == after.outcomes.keys:
        num = int((before.outcomes.predicted != after.outcomes.predicted).sum())
        found += [f"predictions: {num} of {after.n} differ"] if num else []
    return found
