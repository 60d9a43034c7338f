"""What may be chosen of a fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain.evals.config import ClassificationConfig, Count, Option

PresetName = Literal["small", "mae"]


class FinetuneConfig(ClassificationConfig):
    """The preset that a fine-tuning's recipe begins from, and what is changed of it.

    `epochs` and `batch_size` are of the whole run, over all processes. `seed` is of the head's weights, the order of
    samples, and everything drawn. `overrides` are `a.b=c`, of any key of the recipe.
    """

    summary = "The whole encoder is trained with a classifier; the last step is tested. Started again, it goes on."
    title = "finetune"
    examples = (
        "pretrain eval finetune runs/mae --train shards/train --test shards/test --epochs 20",
        "pretrain eval finetune runs/mae --paper mae --train imagenet/train --test imagenet/val --nproc 8",
        "pretrain eval finetune resnet50 --train shards/train --test shards/test --out tuned.json --set ema=null",
    )
    trains = True

    kind: Literal["finetune"] = "finetune"
    max_train: None = None
    max_test: None = None
    paper: Annotated[
        Literal["mae"] | None,
        Option("A paper's setting, for the model's size. Default: one for small data sets, 20 epochs."),
    ] = None
    epochs: Annotated[float | None, Option("In place of the setting's.")] = Field(None, gt=0)
    batch_size: Annotated[Count | None, Option("Of one step, over all processes; the setting's else.")] = None
    overrides: Annotated[
        tuple[str, ...],
        Option("Overrides a key of the recipe; may be repeated.", name="set", metavar="KEY=VALUE", default=None),
    ] = ()
    num_ranks: Annotated[Count, Option("Processes on this machine, to train.", name="nproc")] = 1
    num_workers: Annotated[int, Option("Loader processes; 0: in this one.")] = Field(0, ge=0)
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Option("Of training. Default: bf16 on GPUs that have it, else fp32."),
    ] = None
    seed: Annotated[int, Option(shared=True)] = Field(0, ge=0)
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(shared=True)] = "auto"

    @property
    def preset(self) -> PresetName:
        """The name of the setting that the recipe begins from."""
        return self.paper or "small"
