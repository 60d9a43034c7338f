"""`pretrain report`: a page about a run, or a comparison of several results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import InputError

if TYPE_CHECKING:
    from pretrain.evals.encoder import Encoder
    from pretrain.evals.result import EvalReport


def report(paths: Sequence[Path], out: Path | None, baseline: str | None) -> None:
    """Writes the page of a run into its folder, or a comparison of suites and reports into `out`.

    Args:
        out: None: the suite's folder, where it is one.

    Raises:
        InputError: what is given is neither, or the options do not belong to it.
    """
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
    """The encoder of a report, by the arguments of its command."""
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
