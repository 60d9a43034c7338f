"""What may be chosen of zero-shot classification."""

from __future__ import annotations

from typing import Annotated, Literal

from pretrain.evals.config import Count, Option, ProtocolConfig


class ZeroShotConfig(ProtocolConfig):
    """What is said of a class, and how classes are named and grouped."""

    summary = "Zero-shot classification: the class whose prompts are nearest to the image (2103.00020)."
    title = "zeroshot"
    examples = (
        "pretrain eval zeroshot runs/clip --test shards/test --templates photo",
        "pretrain eval zeroshot ViT-B-32:openai --weights clip.safetensors --test images/val --templates templates.txt",
        "pretrain eval zeroshot ViT-B-32:openai --test imagenet/val --classes imagenet --templates openai",
        "pretrain eval zeroshot runs/clip --test shards/test --group held_out=names.txt",
    )
    judges = "towers"

    kind: Literal["zeroshot"] = "zeroshot"
    train: None = None
    test: Annotated[str, Option("Test set: shards or an image folder.")]
    templates: Annotated[
        str,
        Option("plain ({} alone), photo, openai (the 80 for ImageNet), or a file: one a line, with {} for the class."),
    ] = "plain"
    class_names: Annotated[
        str | None,
        Option(
            "Names of labels 0, 1, ..., one a line; or imagenet: open_clip's 1000, for classes in the order of sorted "
            "WordNet ids (n01440764, ...). Default: the test set's own.",
            name="classes",
            parameter="classes",
            metavar="FILE",
        ),
    ] = None
    group: Annotated[
        tuple[str, ...],
        Option("Classes, one a line, whose top-1 is also given apart; repeatable.", metavar="NAME=FILE", default=None),
    ] = ()
    max_test: Annotated[
        Count | None, Option("The first N test samples only.", name="limit-test", parameter="limit_test")
    ] = None
