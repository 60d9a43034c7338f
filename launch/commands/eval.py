"""`pretrain eval ...`: judge a frozen encoder, and compare what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.eval_fewshot import fewshot
from launch.commands.eval_finetune import finetune
from launch.commands.eval_knn import knn
from launch.commands.eval_linear import linear
from launch.commands.eval_options import examples
from launch.commands.eval_rerun import rerun
from launch.commands.eval_run import called
from launch.commands.eval_suite import suite
from launch.commands.eval_towers import retrieval, zeroshot

app = typer.Typer(
    help="Judge a frozen encoder; every number comes with its whole protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.command(
    epilog=examples(
        "pretrain eval knn runs/mae --train shards/train --test shards/test",
        "pretrain eval knn runs/mae --random-init --train shards/train --test shards/test",
        "pretrain eval knn mae.pth --model vit_base_patch16_224.mae --train images/train --test images/val",
    )
)(knn)
app.command(
    epilog=examples(
        "pretrain eval linear runs/mae --train shards/train --test shards/test",
        "pretrain eval linear runs/mae/checkpoints/step_00001000 --train shards/train --test shards/test",
    )
)(linear)
app.command(
    epilog=examples(
        "pretrain eval fewshot runs/mae --train shards/train --test shards/test --shots 1 --shots 5",
        "pretrain eval fewshot runs/mae --train shards/train --test shards/test --fraction 0.01 --classifier linear",
    )
)(fewshot)
app.command(
    epilog=examples(
        "pretrain eval finetune runs/mae --train shards/train --test shards/test --epochs 20",
        "pretrain eval finetune runs/mae --paper mae --train imagenet/train --test imagenet/val --nproc 8",
        "pretrain eval finetune resnet50 --train shards/train --test shards/test --out tuned.json --set ema=null",
    )
)(finetune)
app.command(
    epilog=examples(
        "pretrain eval zeroshot runs/clip --test shards/test --templates photo",
        "pretrain eval zeroshot ViT-B-32:openai --weights clip.safetensors --test images/val --templates templates.txt",
        "pretrain eval zeroshot ViT-B-32:openai --test imagenet/val --classes imagenet --templates openai",
        "pretrain eval zeroshot runs/clip --test shards/test --group held_out=names.txt",
    )
)(zeroshot)
app.command(
    epilog=examples(
        "pretrain eval retrieval runs/clip --test shards/test",
        "pretrain eval retrieval runs/clip --test shards/test --caption-field json --caption-key captions",
    )
)(retrieval)
app.command(
    epilog=examples(
        "pretrain eval suite configs/suites/cifar10.yaml",
        "pretrain eval suite configs/suites/cifar10.yaml --cluster configs/cluster/gpu.yaml --dry-run",
    )
)(suite)


app.command(epilog=examples("pretrain eval rerun runs/mae/evals/knn-encoder-1f.json"))(rerun)


@app.command(epilog=examples("pretrain eval compare runs/a/evals/knn-encoder-1f.json runs/b/evals/knn-encoder-3c.json"))
def compare(
    a: Annotated[Path, typer.Argument(help="A report of `pretrain eval`.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same test samples.")],
) -> None:
    """The difference A - B with its 95 % interval: over the seeds both have, else paired sample by sample."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.evals.result import EvalReport
    from pretrain.reports.comparison import difference

    first, second = EvalReport.load(a), EvalReport.load(b)
    found = difference(first, second)
    interval = found.interval
    table = Table("", "encoder", "protocol", "top-1 %", "n")
    for letter, report in (("A", first), ("B", second)):
        table.add_row(letter, called(report), report.evaluator, f"{report.value:.2f}", str(report.n))
    console = Console(soft_wrap=True)
    console.print(table)
    verdict = "excludes zero" if interval.excludes_zero else "includes zero"
    console.print(
        f"A - B: {interval.difference:+.2f} points, 95 % interval "
        f"{interval.low:+.2f} to {interval.high:+.2f} over {found.over}: {verdict}"
    )
