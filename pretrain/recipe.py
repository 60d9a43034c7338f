"""The typed recipe. Imports no torch, so that wrong input is answered at once.

How a recipe is read from YAML and written back: recipe_io.py. What follows from it: resolve.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pretrain.recipe_augment import Augment, Mixing
from pretrain.recipe_group import Group, Positive, Probability, Share, ordered


class Views(Group):
    """Geometry of a training view (random resized crop, flip) and an evaluation view (resize, centre)."""

    scale: Annotated[tuple[Share, Share], AfterValidator(ordered)] = (0.2, 1.0)  # of the image's area
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(ordered)] = (0.75, 4 / 3)  # width / height
    flip: Probability = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    eval_crop: Share = 1.0  # side of the centre crop, as a share of the resized shorter side


class Source(Group):
    path: str
    weight: float = Field(1, gt=0)  # share of the samples: this over the sum of all weights, whatever the sizes


class Captions(Group):
    """Where captions are, for objectives that read them; of several of one image, each epoch draws one."""

    field: str = "txt"  # the member that holds them
    key: str | None = None  # of a JSON member: the entry that is the caption, or a list of them
    lines: bool = False  # of a text member: each line is a caption of its own

    @model_validator(mode="after")
    def _one_form(self) -> Captions:
        if self.key is not None and self.lines:
            raise ValueError("expected key (of a JSON member) or lines (of a text member), found both.")
        return self


class Data(Group):
    # A folder with a manifest, or a brace pattern of tars that has one beside it; or several of them, mixed. The
    # epoch of a mixture, for the schedule, is as many samples as all of them have together.
    train: str | Annotated[tuple[Source, ...], Field(min_length=1)]
    val: str | None = None
    lanes: int = Field(16, ge=1)  # contiguous stretches that are read side by side
    window: int = Field(1024, ge=1)  # samples of a lane that are shuffled among each other
    repeats: int = Field(1, ge=1)  # of each sample in a row, drawn anew; an epoch is still as many samples long
    views: Views = Views()
    augment: tuple[Augment, ...] = ()  # of training views: one entry for all, or one for each
    mixing: Mixing = Mixing()
    captions: Captions = Captions()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_pixels: int = Field(50_000_000, ge=1)  # an image of more pixels is refused before it is decoded
    max_bad_samples: int = Field(100, ge=0)  # replaced samples before the run stops


class Model(Group):
    """A timm ViT or ResNet. `options` go to its constructor (embed_dim, depth, num_heads, ...)."""

    name: str
    image_size: int = Field(224, ge=1)
    patch_size: int | None = Field(None, ge=1)  # ViT only; None: the model's own
    options: dict[str, int | float | bool | str | None] = {}  # noqa: RUF012  (pydantic copies it)

    @model_validator(mode="after")
    def _patches(self) -> Model:
        if self.patch_size is not None and self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"expected an image_size that patch_size {self.patch_size} divides, found {self.image_size}. "
                f"Nearest: {below + self.patch_size}{f' or {below}' * (below > 0)}."
            )
        return self


class Supervised(Group):
    kind: Literal["supervised"]
    num_classes: int = Field(ge=2)
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Mae(Group):
    kind: Literal["mae"]
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    decoder_width: int = Field(512, ge=1)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    normalize_target: bool = True

    @model_validator(mode="after")
    def _heads(self) -> Mae:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"expected a decoder_width that decoder_heads {self.decoder_heads} divides, found {self.decoder_width}."
            )
        return self


ObjectiveConfig = Annotated[Supervised | Mae, Field(discriminator="kind")]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Group):
    """What every optimizer has. Biases, norms, tokens and position embeddings are never decayed."""

    base_lr: float = Field(gt=0)  # peak_lr = base_lr * global_size / lr_batch
    lr_batch: int | None = Field(256, ge=1)  # None: base_lr is the peak_lr
    layer_decay: float = Field(1.0, gt=0, le=1)  # learning rate of a layer, as a share of that of the layer above
    clip_norm: float | None = Field(None, gt=0)  # of the global gradient; None: no clipping


class AdamW(_Optimizer):
    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)


class Sgd(_Optimizer):
    kind: Literal["sgd"]
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)  # as an L2 penalty: part of the gradient

    @model_validator(mode="after")
    def _nesterov(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("expected a momentum above 0 with nesterov, found 0.")
        return self


class Lars(_Optimizer):
    """What is not decayed is not adapted either, as in BYOL. ZeRO 0 only."""

    kind: Literal["lars"]
    momentum: Decay = 0.9
    eta: float = Field(1e-3, gt=0)  # of the trust ratio
    weight_decay: float = Field(1.5e-6, ge=0)  # as an L2 penalty


class Lamb(_Optimizer):
    """What is not decayed is not adapted either. ZeRO 0 only."""

    kind: Literal["lamb"]
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.02, ge=0)


def _kind_or(default: str) -> Discriminator:
    """Recipes may leave the commonest kind out."""
    return Discriminator(lambda v: v.get("kind", default) if isinstance(v, dict) else getattr(v, "kind", default))


OptimConfig = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[Lars, Tag("lars")]
    | Annotated[Lamb, Tag("lamb")],
    _kind_or("adamw"),
]


class _Schedule(Group):
    """Linear warmup, then what the kind says. Exactly one of epochs, steps, samples says how long."""

    epochs: float | None = Field(None, gt=0, le=1e6)
    steps: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the run

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in ("epochs", "steps", "samples") if getattr(self, key) is not None]
        if len(given) != 1:
            fix = " Set those you do not want to null." if given else ""
            raise ValueError(
                f"expected exactly one of epochs, steps, samples, found {' and '.join(given) or 'none'}.{fix}"
            )
        return self


class Cosine(_Schedule):
    kind: Literal["cosine"] = "cosine"
    final_lr: float = Field(0.0, ge=0, le=1)  # as a share of peak_lr


class Steps(_Schedule):
    """The learning rate is multiplied by gamma at each milestone."""

    kind: Literal["step"]
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)  # shares of the run
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _ascending(self) -> Steps:
        given = [self.warmup, *self.milestones]
        if any(a >= b for a, b in pairwise(given)):
            raise ValueError(
                f"expected milestones that ascend from above warmup {self.warmup}, found {list(self.milestones)}."
            )
        return self


class Constant(_Schedule):
    kind: Literal["constant"]


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")] | Annotated[Steps, Tag("step")] | Annotated[Constant, Tag("constant")],
    _kind_or("cosine"),
]


class BatchSize(Group):
    global_size: int = Field(ge=1, lt=2**31)  # over all ranks and micro-batches
    micro_size: int | None = Field(None, ge=1)  # of one forward pass on one rank; None: no accumulation


class EngineConfig(Group):
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16 is autocast: parameters and optimizer state stay fp32


class Runtime(Group):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = Field(0, ge=0)  # loader processes per rank; 0: in the training process
    threads: int | None = Field(None, ge=1)  # per rank; None: cores / ranks on this machine
    peak_tflops: float | None = Field(None, gt=0)  # of the device, for MFU; None: measured
    max_skipped_steps: int = Field(10, ge=0)  # non-finite steps before the run stops


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


class InlineKnn(Group):
    kind: Literal["knn"]
    train: str
    test: str
    every_epochs: float = Field(1, gt=0)
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    max_train: int | None = Field(None, ge=1)  # the first samples only
    max_test: int | None = Field(None, ge=1)


class Recipe(Group):
    """One run. Groups above the line change results and make up its identity; those below must not."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # also the name of the run's folder
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data
    model: Model
    objective: ObjectiveConfig
    optim: OptimConfig
    schedule: Schedule
    batch: BatchSize
    resume_from: str | None = None  # a checkpoint or run: its whole state, where this run has no checkpoint of its own
    init_from: str | None = None  # a run, checkpoint, encoder folder or safetensors file: its weights alone

    engine: EngineConfig = EngineConfig()
    runtime: Runtime = Runtime()
    logging: Logging = Logging()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: Validation = Validation()
    evals: tuple[InlineKnn, ...] = ()

    @model_validator(mode="after")
    def _whole_parameters(self) -> Recipe:
        if self.optim.kind in ("lars", "lamb") and self.engine.zero_stage:
            raise ValueError(
                f"expected engine.zero_stage 0 with optim.kind {self.optim.kind}, which takes the norm of each whole "
                f"parameter where ZeRO steps pieces of them, found {self.engine.zero_stage}."
            )
        return self
