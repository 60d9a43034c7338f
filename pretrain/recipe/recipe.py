"""The typed recipe. Imports no torch, so that wrong input is answered at once.

How a recipe is read from YAML and written back: files.py. What follows from it: resolve.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.datasets.config import Source
from data_pipeline.remote.config import CacheConfig
from data_pipeline.samples.config import Augmentation, Captions, Mixing, Views
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.models.config import Model as Model  # where recipes are made in code
from pretrain.models.config import ModelConfig
from pretrain.objectives.config import ImageTextConfig
from pretrain.optim import config as optimizers
from pretrain.optim.config import Ema, Schedule
from pretrain.recipe.base import Group, Positive
from pretrain.recipe.unions import AnyEvaluation, AnyObjective, AnyOptimizer


class Data(Group):
    # A folder with a manifest, or a brace pattern of tars that has one beside it, here or behind a URL; or several
    # of them, mixed. The epoch of a mixture, for the schedule, is as many samples as all of them have together.
    train: str | Annotated[tuple[Source, ...], Field(min_length=1)]
    val: str | None = None
    read_streams: int = Field(16, ge=1, serialization_alias="lanes")  # contiguous stretches that are read side by side
    shuffle_window: int = Field(1024, ge=1, serialization_alias="window")  # samples shuffled with each other
    repeats: int = Field(1, ge=1)  # of each sample in a row, drawn anew; an epoch is still as many samples long
    views: Views = Views()
    augment: tuple[Augmentation, ...] = ()  # of training views: one entry for all, or one for each
    mixing: Mixing = Mixing()
    captions: Captions = Captions()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_pixels: int = Field(50_000_000, ge=1)  # an image of more pixels is refused before it is decoded
    max_bad_samples: int = Field(100, ge=0)  # replaced samples before the run stops
    cache: CacheConfig = CacheConfig()

    def preprocessing(self, image_size: int) -> Preprocessing:
        """How images become evaluation views of this many pixels a side."""
        return Preprocessing(image_size, self.mean, self.std, self.views.interpolation, self.views.eval_crop)


class BatchSize(Group):
    global_size: int = Field(ge=1, lt=2**31)  # over all ranks and micro-batches
    micro_size: int | None = Field(None, ge=1)  # of one forward pass on one rank; None: no accumulation


class EngineConfig(Group):
    zero_stage: Literal[0, 1, 2, 3] = 1
    # bf16 is autocast: parameters and optimizer state stay fp32; auto: bf16 where the device has instructions for it,
    # settled at the start of a run and kept in its recipe.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Literal["none", "blocks"] = "none"  # blocks: each is computed again in the backward pass
    offload_activations: bool = False  # what checkpointed blocks keep lies in CPU memory
    offload_optimizer: bool = False  # fp32 partitions and optimizer state lie in CPU memory, and are stepped there
    sdpa: Literal["auto", "on", "off"] = "auto"  # torch's fused attention; auto: where it is the faster
    tf32: bool = False  # of fp32 matrix products and convolutions on CUDA, those of contrastive losses too
    channels_last: bool = False  # memory format of the images, and so of convolutions
    fused_adamw: bool = False
    compile: bool = False  # torch.compile of each block

    @property
    def settled_precision(self) -> Literal["fp32", "bf16"]:
        """The precision, which is no longer `auto` once a run has begun."""
        assert self.precision != "auto", "engine.precision is settled before anything is computed"
        return self.precision

    @model_validator(mode="after")
    def _go_together(self) -> EngineConfig:
        if self.offload_activations and self.activation_checkpointing == "none":
            raise ValueError("expected activation_checkpointing blocks with offload_activations, found none.")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("expected zero_stage 1, 2 or 3 with offload_optimizer, found 0.")
        if self.compile and (self.zero_stage == 3 or self.activation_checkpointing != "none"):
            raise ValueError(
                "expected zero_stage 0, 1 or 2 and activation_checkpointing none with compile, as compiled blocks "
                "neither see weights that are gathered around them nor are recomputed reliably, "
                f"found {self.zero_stage} and {self.activation_checkpointing}."
            )
        return self


class Runtime(Group):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = Field(0, ge=0)  # loader processes per rank; 0: in the training process
    threads: int | None = Field(None, ge=1)  # per rank; None: cores / ranks on this machine
    peak_tflops: float | None = Field(None, gt=0)  # of the device, for MFU; None: measured
    max_skipped_steps: int = Field(10, ge=0)  # non-finite steps before the run stops
    step_timeout_seconds: float | None = Field(1800, gt=0)  # without progress, then the job is ended; None: never


class Wandb(Group):
    """Weights & Biases; its key comes from its own login or from WANDB_API_KEY, never from a recipe."""

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class Logging(Group):
    every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    wandb: Wandb | None = None
    images_every_steps: int | None = Field(1000, ge=1)  # what the model sees and paints; None: never


class CheckpointConfig(Group):
    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(10, gt=0)
    keep_last: int = Field(2, ge=1)


class Validation(Group):
    every_epochs: float = Field(1, gt=0)


class OnlineProbe(Group):
    """A linear classifier on the encoder, trained beside the objective, which it leaves as it is to the bit.

    Each of its steps costs one more forward pass of the encoder, of the first view.
    """

    lr: float = Field(0.1, gt=0)  # constant, whatever the batch
    weight_decay: float = Field(0.0, ge=0)  # as an L2 penalty, on the weights alone
    batch_norm: bool = True  # without weights of its own, before the classifier
    every_steps: int = Field(1, ge=1)


class Recipe(Group):
    """One run. Groups above the line change results and make up its identity; those below must not."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # also the name of the run's folder
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data
    model: ModelConfig
    objective: AnyObjective
    optim: AnyOptimizer
    schedule: Schedule
    batch: BatchSize
    ema: Ema | None = None
    resume_from: str | None = None  # a checkpoint or run: its whole state, where this run has no checkpoint of its own
    init_from: str | None = None  # a run, checkpoint, encoder folder or safetensors file: its weights alone
    init_ignore: tuple[str, ...] = ()  # patterns of tensors of init_from that are left out: the encoder has none such

    engine: EngineConfig = EngineConfig()
    runtime: Runtime = Runtime()
    logging: Logging = Logging()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: Validation = Validation()
    evals: tuple[AnyEvaluation, ...] = ()  # protocols (pretrain/evals/config.py), on the encoder as it is then
    online_probe: OnlineProbe | None = None  # needs labels, whatever the objective does

    @property
    def start_from(self) -> dict[str, Any]:
        """The keys that say where a run starts that has no checkpoint of its own, as `find_start` takes them."""
        return {key: getattr(self, key) for key in ("resume_from", "init_from", "init_ignore")}

    @model_validator(mode="after")
    def _go_together(self) -> Recipe:
        if self.optim.update == "norm per tensor" and self.engine.zero_stage:
            raise ValueError(
                f"expected engine.zero_stage 0 with optim.kind {self.optim.kind}, which takes the norm of each whole "
                f"parameter where ZeRO steps pieces of them, found {self.engine.zero_stage}."
            )
        if self.init_ignore and self.init_from is None:
            raise ValueError("expected init_from with init_ignore, whose tensors it leaves out, found none.")
        if self.engine.fused_adamw and not self.optim.has_fused:
            kinds = " or ".join(kind for kind in optimizers.KINDS if optimizers.config_class(kind).has_fused)
            raise ValueError(f"expected optim.kind {kinds} with engine.fused_adamw, found {self.optim.kind}.")
        if self.online_probe is not None and self.logging.every_steps % self.online_probe.every_steps:
            raise ValueError(
                f"expected an online_probe.every_steps that divides logging.every_steps {self.logging.every_steps}, so "
                f"that the log has its numbers as often, found {self.online_probe.every_steps}."
            )
        for index, evaluation in enumerate(self.evals):
            if evaluation.judges == "towers" and not isinstance(self.objective, ImageTextConfig):
                raise ValueError(
                    f"expected objective.kind clip or siglip with evals.{index}.kind {evaluation.kind}, which judges "
                    f"two towers, found {self.objective.kind}."
                )
        return self
