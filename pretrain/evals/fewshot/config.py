"""What may be chosen of few-shot classification."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.evals.config import Count, FeatureConfig, Option, WrongFieldsError

Classifier = Literal["centroid", "knn", "linear"]
Shots = int | float  # labels per class; below 1: the share of each class's
ProperShare = Annotated[float, Field(gt=0, lt=1)]


class FewshotConfig(FeatureConfig):
    """What is drawn and what is made of it.

    `shots` are labels of each class, or below 1 shares of each class's labels, of which at least one is drawn;
    `fraction`, in their place, are shares alone. The first is the reported one.
    There are as many draws as `seeds`, from 0 on.
    """

    summary = "A simple classifier on a few labels of each class, on frozen features, over several draws."
    title = "fewshot"
    examples = (
        "pretrain eval fewshot runs/mae --train shards/train --test shards/test --shots 1 --shots 5",
        "pretrain eval fewshot runs/mae --train shards/train --test shards/test --fraction 0.01 --classifier linear",
    )

    kind: Literal["fewshot"] = "fewshot"
    shots: Annotated[
        tuple[Count | ProperShare, ...],
        Field(min_length=1),
        Option("Labels per class; repeatable, the first is reported. Default: 1, 5, 10.", default=None),
    ] = (1, 5, 10)
    fraction: Annotated[
        tuple[ProperShare, ...],
        Option("In place of --shots: share of each class's labels, as 0.01; repeatable.", default=None),
    ] = ()
    seeds: Annotated[Count, Option("Draws, of which mean and spread are given.")] = 5
    classifier: Annotated[Classifier, Option("What learns from the labels: nothing in it is chosen.")] = "centroid"

    @model_validator(mode="after")
    def _one_of_them(self) -> FewshotConfig:
        if self.fraction and self.shots != type(self).model_fields["shots"].default:
            raise WrongFieldsError(["fraction"], "it or shots", "both")
        return self

    @property
    def draws(self) -> tuple[Shots, ...]:
        """Shares below 1 or numbers of labels, of each class; the reported one first."""
        return self.fraction or self.shots
