"""`pretrain eval zeroshot` and `retrieval`: judge two towers by the texts that go with images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.eval_options import (
    BatchSize,
    Cache,
    Device,
    DeviceOption,
    ImageSize,
    LimitTest,
    NumRanks,
    Out,
    Precision,
    PrecisionOption,
    RandomInit,
    Workers,
    check_out,
    device_of,
    extraction,
    judge,
    over_ranks,
)

if TYPE_CHECKING:
    from pretrain.models.towers import Towers

TowersSource = Annotated[
    str,
    typer.Argument(
        metavar="TOWERS",
        help="A run of kind clip or siglip, a checkpoint in one, its encoder folder, one of open_clip's or Hugging "
        "Face's, or a name of open_clip's, perhaps NAME:TAG.",
    ),
]
TestSet = Annotated[str, typer.Option("--test", help="Test set: shards, or for zeroshot an image folder.")]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Local file of weights, where TOWERS is a name of open_clip's.")
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="clip, or a local file of merges, in place of the towers' own.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of fresh weights. Default: the run's, else 0.")]


def zeroshot(
    context: typer.Context,
    towers: TowersSource,
    test: TestSet,
    templates: Annotated[
        str, typer.Option("--templates", help="plain ({} alone), photo, or a file: one a line, with {} for the class.")
    ] = "plain",
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group", metavar="NAME=FILE", help="Classes, one a line, whose top-1 is also given apart; repeatable."
        ),
    ] = None,
    random_init: RandomInit = False,
    weights: Weights = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSize = None,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    cache: Cache = None,
    nproc: NumRanks = 1,
    limit_test: LimitTest = None,
    seed: Seed = None,
) -> None:
    """Zero-shot classification: the class whose prompts are nearest to the image (2103.00020)."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.zeroshot import Prompts, ZeroShot

    check_out(out)
    over_ranks(context, nproc, cache)
    evaluator = ZeroShot(
        open_dataset(test),
        Prompts.named(templates),
        max_test=limit_test,
        groups=_groups(group or ()),
        extraction=extraction(batch_size, num_workers, precision, cache),
    )
    judged = _load(towers, random_init, seed, weights, tokenizer, image_size, device)
    judge(evaluator, judged, out, context)


def retrieval(
    context: typer.Context,
    towers: TowersSource,
    test: TestSet,
    caption_field: Annotated[str, typer.Option("--caption-field", help="Member that holds the captions.")] = "txt",
    caption_key: Annotated[
        str | None,
        typer.Option("--caption-key", help="Of a JSON member: the entry with the caption or a list of them."),
    ] = None,
    caption_lines: Annotated[bool, typer.Option("--caption-lines", help="Each line is a caption of its own.")] = False,
    random_init: RandomInit = False,
    weights: Weights = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSize = None,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    cache: Cache = None,
    nproc: NumRanks = 1,
    limit_test: LimitTest = None,
    seed: Seed = None,
) -> None:
    """Recall at 1, 5, 10 of images by captions and of captions by images, exact."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.retrieval import Retrieval
    from pretrain.recipe import Captions

    check_out(out)
    over_ranks(context, nproc, cache)
    if caption_key is not None and caption_lines:
        raise InputError("--caption-lines", "not together with --caption-key", f"both, the key {caption_key!r}")
    evaluator = Retrieval(
        open_dataset(test),
        Captions(field=caption_field, key=caption_key, lines=caption_lines),
        max_test=limit_test,
        extraction=extraction(batch_size, num_workers, precision, cache),
    )
    judged = _load(towers, random_init, seed, weights, tokenizer, image_size, device)
    judge(evaluator, judged, out, context)


def _groups(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    from pretrain.evals.zeroshot import lines_of

    found: dict[str, tuple[str, ...]] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or name in found:
            raise InputError(where="--group", expected="NAME=FILE, each name once", found=pair)
        found[name] = lines_of(Path(path), "a file of class names, one a line")
    return found


def _load(
    source: str,
    random_init: bool,
    seed: int | None,
    weights: Path | None,
    tokenizer: str | None,
    image_size: int | None,
    device: Device,
) -> Towers:
    """The towers on their device."""
    from pretrain.evals.tower_sources import load_towers

    chosen = device_of(device)
    towers = load_towers(
        source, random_init=random_init, seed=seed, weights=weights, tokenizer=tokenizer, image_size=image_size
    )
    towers.module.to(chosen)
    return towers
