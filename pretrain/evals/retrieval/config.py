"""What may be chosen of retrieval."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from pretrain.evals.config import Count, Option, ProtocolConfig, WrongFieldsError


class RetrievalConfig(ProtocolConfig):
    """Where the captions of the test set are."""

    summary = "Recall at 1, 5, 10 of images by captions and of captions by images, exact."
    title = "retrieval"
    examples = (
        "pretrain eval retrieval runs/clip --test shards/test",
        "pretrain eval retrieval runs/clip --test shards/test --caption-field json --caption-key captions",
    )
    judges = "towers"

    kind: Literal["retrieval"] = "retrieval"
    train: None = None
    test: Annotated[str, Option("Test set: shards with captions.")]
    caption_field: Annotated[str, Option("Member that holds the captions.")] = "txt"
    caption_key: Annotated[str | None, Option("Of a JSON member: the entry with the caption or a list of them.")] = None
    caption_lines: Annotated[bool, Option("Each line is a caption of its own.")] = False
    max_test: Annotated[
        Count | None, Option("The first N test samples only.", name="limit-test", parameter="limit_test")
    ] = None

    @model_validator(mode="after")
    def _one_form(self) -> RetrievalConfig:
        if self.caption_key is not None and self.caption_lines:
            raise WrongFieldsError(
                ["caption_lines"], "not together with --caption-key", f"both, the key {self.caption_key!r}"
            )
        return self
