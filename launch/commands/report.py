"""`pretrain report`: a page about a run, or a comparison of several results."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.arguments import command_app, examples

if TYPE_CHECKING:
    from pretrain.evals.encoder import Encoder
    from pretrain.evals.result import EvalReport


app = command_app()


@app.command(
    epilog=examples(
        "pretrain report runs/mae_cifar10",
        "pretrain report runs/cifar10 --baseline random",
        "pretrain report runs/a/evals/knn-encoder-1f.json runs/b/evals/knn-encoder-3c.json --out runs/a_and_b",
    )
)
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="A run; or a suite's folder, or reports of pretrain eval.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a comparison goes [the suite's folder].")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder that others are compared with [the first].")
    ] = None,
) -> None:
    """Writes report.html: a page about a run, or tables, figures and differences of several encoders."""
    runs = [path for path in paths if (path / "recipe.yaml").is_file()]
    if runs:
        if len(paths) > 1 or out is not None or baseline is not None:
            raise InputError(
                where="pretrain report", expected=f"a run alone, {runs[0]}, whose page goes into its folder",
                found="more beside it", fix="To compare encoders, give reports (RUN/evals/*.json) or a suite's folder.",
            )  # fmt: skip
        from pretrain.reports.report import write_report

        print(f"report: {write_report(runs[0])}")
        return
    from pretrain.reports.comparison import compare_results, is_suite, table_markdown
    from pretrain.reports.comparison_page import write_comparison

    if out is None and not (len(paths) == 1 and is_suite(paths[0])):
        compare_results(paths, baseline)  # what is wrong with them is told first
        raise InputError("--out", "a folder for the comparison of several reports", "none", "Name one with --out.")
    comparison = compare_results(paths, baseline)
    print(table_markdown(comparison))
    print(f"report: {write_comparison(comparison, out or paths[0], load_judged)}")


def load_judged(report: EvalReport) -> Encoder:
    """Loads the encoder that a report is about, by the arguments of the command that wrote it."""
    from launch.commands.eval_options import EncoderOptions

    given = report.arguments
    source = given.get("encoder", given.get("towers"))
    if source is None:
        raise InputError(
            where=str(report.encoder.get("source")), expected="a report that a command wrote",
            found="one without arguments",
        )  # fmt: skip
    names = {field.name for field in fields(EncoderOptions)} - {"encoder", "weights", "device"}
    weights = given.get("weights")
    return EncoderOptions(
        encoder=str(source),
        weights=Path(str(weights)) if weights is not None else None,
        **{name: given[name] for name in names & given.keys()},  # type: ignore[arg-type]
    ).load()
