"""`pretrain eval zeroshot` and `retrieval`: judge two towers by the texts that go with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import Device, DeviceOption, How, ImageSize, LimitTest, RandomInit, device_of
from launch.commands.eval_run import judge
from launch.commands.option_groups import grouped

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
    Path | None,
    typer.Option("--weights", help="Local file for a name of open_clip's, whose NAME:TAG says the preprocessing."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="clip, a file of merges or a folder with tokenizer.json, in place of the towers' own."
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of fresh weights. Default: the run's, else 0.")]


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """Which two towers, and where they run."""

    towers: TowersSource
    random_init: RandomInit = False
    seed: Seed = None
    weights: Weights = None
    tokenizer: TokenizerOption = None
    image_size: ImageSize = None
    device: DeviceOption = Device.auto

    def load(self) -> Towers:
        """The towers on their device."""
        from pretrain.evals.sources.towers import load_towers

        place = device_of(self.device)
        towers = load_towers(
            self.towers,
            random_init=self.random_init,
            seed=self.seed,
            weights=self.weights,
            tokenizer=self.tokenizer,
            image_size=self.image_size,
        )
        towers.module.to(place)
        return towers


@grouped
def zeroshot(
    context: typer.Context,
    *,
    test: TestSet,
    templates: Annotated[
        str,
        typer.Option(
            "--templates",
            help="plain ({} alone), photo, openai (the 80 for ImageNet), or a file: one a line, with {} for the class.",
        ),
    ] = "plain",
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="FILE",
            help="Names of labels 0, 1, ..., one a line; or imagenet: open_clip's 1000, for classes in the order of "
            "sorted WordNet ids (n01440764, ...). Default: the test set's own.",
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group", metavar="NAME=FILE", help="Classes, one a line, whose top-1 is also given apart; repeatable."
        ),
    ] = None,
    limit_test: LimitTest = None,
    source: TowerOptions,
    how: How,
) -> None:
    """Zero-shot classification: the class whose prompts are nearest to the image (2103.00020)."""
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.zeroshot.protocol import Prompts, ZeroShot, named_classes

    how.begin(context)
    evaluator = ZeroShot(
        open_dataset(test),
        Prompts.named(templates),
        max_test=limit_test,
        classes=None if classes is None else named_classes(classes),
        groups=_groups(group or ()),
        extraction=how.extraction(),
    )
    judge(evaluator, source.load(), how.out, context)


@grouped
def retrieval(
    context: typer.Context,
    *,
    test: TestSet,
    caption_field: Annotated[str, typer.Option("--caption-field", help="Member that holds the captions.")] = "txt",
    caption_key: Annotated[
        str | None,
        typer.Option("--caption-key", help="Of a JSON member: the entry with the caption or a list of them."),
    ] = None,
    caption_lines: Annotated[bool, typer.Option("--caption-lines", help="Each line is a caption of its own.")] = False,
    limit_test: LimitTest = None,
    source: TowerOptions,
    how: How,
) -> None:
    """Recall at 1, 5, 10 of images by captions and of captions by images, exact."""
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.retrieval.protocol import Retrieval
    from pretrain.recipe.recipe import Captions

    how.begin(context)
    if caption_key is not None and caption_lines:
        raise InputError("--caption-lines", "not together with --caption-key", f"both, the key {caption_key!r}")
    evaluator = Retrieval(
        open_dataset(test),
        Captions(field=caption_field, key=caption_key, lines=caption_lines),
        max_test=limit_test,
        extraction=how.extraction(),
    )
    judge(evaluator, source.load(), how.out, context)


def _groups(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    from pretrain.evals.zeroshot.protocol import lines_of

    found: dict[str, tuple[str, ...]] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or name in found:
            raise InputError(where="--group", expected="NAME=FILE, each name once", found=pair)
        found[name] = lines_of(Path(path), "a file of class names, one a line")
    return found
