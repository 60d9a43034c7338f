"""`pretrain eval ...`: judge a frozen encoder, and compare what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.eval_options import (
    BatchSize,
    Device,
    DeviceOption,
    ImageSize,
    LimitTest,
    LimitTrain,
    ModelName,
    Options,
    Out,
    Precision,
    PrecisionOption,
    RandomInit,
    Seed,
    Source,
    Test,
    Train,
    Workers,
    called,
    check_out,
    device_of,
    examples,
    extraction,
    keep,
)
from launch.eval_towers import retrieval, zeroshot

if TYPE_CHECKING:
    from pretrain.evals.encoder import Encoder
    from pretrain.evals.timm_sources import Architecture


app = typer.Typer(
    help="Judge a frozen encoder; every number comes with its whole protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(
    epilog=examples(
        "pretrain eval knn runs/mae --train shards/train --test shards/test",
        "pretrain eval knn runs/mae --random-init --train shards/train --test shards/test",
        "pretrain eval knn mae.pth --model vit_base_patch16_224 --train images/train --test images/val",
    )
)
def knn(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    k: Annotated[
        list[int], typer.Option("--k", min=1, help="Neighbours; repeatable, the first is the reported one.")
    ] = [20, 10, 100, 200],  # noqa: B006
    temperature: Annotated[float, typer.Option("--temperature", help="Of the weights exp(cosine / T).")] = 0.07,
    random_init: RandomInit = False,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    seed: Seed = None,
    model: ModelName = None,
    image_size: ImageSize = None,
    option: Options = None,
) -> None:
    """Exact weighted k nearest neighbours on L2-normalised features (1805.01978)."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.knn import Knn
    from pretrain.recipe import InlineKnn

    if temperature <= 0:
        raise InputError(where="--temperature", expected="a number above 0", found=str(temperature))
    check_out(out)
    evaluator = Knn(
        open_dataset(train),
        open_dataset(test),
        InlineKnn(
            kind="knn",
            train=train,
            test=test,
            k=k[0],
            temperature=temperature,
            max_train=limit_train,
            max_test=limit_test,
        ),
        sweep=k[1:],
        extraction=extraction(batch_size, num_workers, precision),
    )
    judged = _load(encoder, random_init, seed, _architecture(encoder, model, image_size, option), device)
    keep(evaluator.run(judged), judged.run, out, context)


@app.command(
    epilog=examples(
        "pretrain eval linear runs/mae --train shards/train --test shards/test",
        "pretrain eval linear runs/mae/checkpoints/step_00001000 --train shards/train --test shards/test",
    )
)
def linear(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    learning_rate: Annotated[
        list[float] | None, typer.Option("--lr", help="For a batch of 256; repeatable. Default: DINOv2's 13.")
    ] = None,
    weight_decay: Annotated[
        list[float], typer.Option("--weight-decay", help="Repeatable; each goes with each learning rate.")
    ] = [0.0],  # noqa: B006
    min_steps: Annotated[int, typer.Option("--min-steps", min=1, help="Or 10 epochs, where that is more.")] = 5000,
    random_init: RandomInit = False,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    seed: Seed = None,
    model: ModelName = None,
    image_size: ImageSize = None,
    option: Options = None,
) -> None:
    """Linear probe on cached features: a grid trained side by side, chosen on a split of the training set."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.linear import DINOV2_LEARNING_RATES, Linear, LinearConfig

    check_out(out)
    evaluator = Linear(
        open_dataset(train),
        open_dataset(test),
        LinearConfig(
            learning_rates=tuple(learning_rate or DINOV2_LEARNING_RATES),
            weight_decays=tuple(weight_decay),
            min_steps=min_steps,
            seed=seed or 0,
            max_train=limit_train,
            max_test=limit_test,
        ),
        extraction=extraction(batch_size, num_workers, precision),
    )
    judged = _load(encoder, random_init, seed, _architecture(encoder, model, image_size, option), device)
    keep(evaluator.run(judged), judged.run, out, context)


app.command(
    epilog=examples(
        "pretrain eval zeroshot runs/clip --test shards/test --templates photo",
        "pretrain eval zeroshot ViT-B-32 --weights clip.safetensors --test images/val --templates templates.txt",
        "pretrain eval zeroshot runs/clip --test shards/test --group held_out=names.txt",
    )
)(zeroshot)
app.command(
    epilog=examples(
        "pretrain eval retrieval runs/clip --test shards/test",
        "pretrain eval retrieval runs/clip --test shards/test --caption-field json --caption-key captions",
    )
)(retrieval)


@app.command(epilog=examples("pretrain eval compare runs/a/evals/knn-encoder-1f.json runs/b/evals/knn-encoder-3c.json"))
def compare(
    a: Annotated[Path, typer.Argument(help="A report of `pretrain eval`.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same test samples.")],
) -> None:
    """The difference A - B with its 95 % interval, paired sample by sample."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.evals.base import EvalReport
    from pretrain.evals.base import compare as compared

    first, second = EvalReport.load(a), EvalReport.load(b)
    interval = compared(first, second)
    table = Table("", "encoder", "protocol", "top-1 %", "n")
    for letter, report in (("A", first), ("B", second)):
        table.add_row(letter, called(report), report.evaluator, f"{report.value:.2f}", str(report.n))
    console = Console(soft_wrap=True)
    console.print(table)
    verdict = "excludes zero" if interval.excludes_zero else "includes zero"
    console.print(
        f"A - B: {interval.difference:+.2f} points, 95 % interval "
        f"{interval.low:+.2f} to {interval.high:+.2f}: {verdict}"
    )


def _architecture(
    encoder: str, model: str | None, image_size: int | None, option: list[str] | None
) -> Architecture | None:
    """None where nothing about it was given."""
    from pretrain.evals.timm_sources import Architecture
    from pretrain.strict_yaml import StrictYamlError, read_yaml

    if model is None and image_size is None and not option:
        return None
    options: dict[str, Any] = {}
    for pair in option or []:
        key, equals, text = pair.partition("=")
        try:
            value, _ = read_yaml(text)
        except StrictYamlError as error:
            raise InputError(where=f"--option {pair}", expected="KEY=VALUE", found=str(error)) from None
        if not equals or not key.isidentifier():
            raise InputError(where="--option", expected="KEY=VALUE", found=pair)
        options[key] = value
    return Architecture(model or encoder, image_size, options)


def _load(
    source: str, random_init: bool, seed: int | None, architecture: Architecture | None, device: Device
) -> Encoder:
    """The encoder on its device."""
    from pretrain.evals.sources import load_source

    place = device_of(device)
    encoder = load_source(source, random_init=random_init, seed=seed, architecture=architecture)
    encoder.module.to(place)
    return encoder
