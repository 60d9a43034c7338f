"""`pretrain eval ...`: judge encoders, frozen or fine-tuned, and compare what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import command_app, examples
from launch.commands.eval_protocols import protocol_command
from launch.commands.eval_rerun import rerun
from launch.commands.eval_run import result_label
from launch.commands.eval_suite import suite
from pretrain.evals.config import config_classes

app = command_app(
    "Judges encoders: kNN, probes, few-shot, fine-tuning, zero-shot, retrieval; every number with its whole protocol.",
    is_group=True,
)


for _config in config_classes():
    app.command(_config.model_fields["kind"].default, epilog=examples(*_config.examples))(protocol_command(_config))
app.command(
    epilog=examples(
        "pretrain eval suite configs/suites/cifar10.yaml",
        "pretrain eval suite configs/suites/cifar10.yaml --cluster configs/cluster/gpu.yaml --dry-run",
    )
)(suite)


app.command(
    epilog=examples(
        "pretrain eval rerun runs/mae/evals/knn-encoder-1f.json",
        "pretrain eval rerun theirs.json --encoder mae.pth --train data/train --test data/test",
    )
)(rerun)


@app.command(epilog=examples("pretrain eval compare runs/a/evals/knn-encoder-1f.json runs/b/evals/knn-encoder-3c.json"))
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A report of `pretrain eval`.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, on the same test samples.")],
) -> None:
    """The difference A - B with its 95 % interval: over the seeds both have, else paired sample by sample."""
    from rich.table import Table

    from launch.terminal import chance_text, columns, interval_text, terminal
    from pretrain.evals.result import EvalReport
    from pretrain.reports.comparison import difference

    first, second = EvalReport.load(a), EvalReport.load(b)
    found = difference(first, second)
    interval = found.interval
    table = Table(*columns("", "encoder", "protocol", "metric", "%", "95 % interval", "chance", "n"))
    for letter, report in (("A", first), ("B", second)):
        metric, label = report.metric, result_label(report)
        told = (interval_text(report, metric), chance_text(report, metric), str(report.n))
        table.add_row(letter, label, report.evaluator, metric, f"{report.value:.2f}", *told)
    console = terminal()
    console.print(table)
    verdict = "excludes zero" if interval.excludes_zero else "includes zero"
    console.print(
        f"A - B: {interval.difference:+.2f} points, 95 % interval "
        f"{interval.low:+.2f} to {interval.high:+.2f} over {found.over}: {verdict}"
    )
