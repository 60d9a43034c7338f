"""The options that commands of `pretrain eval` have in common, one by one and in the groups that go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_run import over_ranks

if TYPE_CHECKING:
    import torch

    from pretrain.evals.encoder import Encoder
    from pretrain.evals.features.extract import Extraction
    from pretrain.evals.features.readout import Readout
    from pretrain.evals.sources.timm_names import Architecture


def examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Pooling(StrEnum):
    own = "own"
    cls = "cls"
    mean = "mean"
    both = "both"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


Source = Annotated[
    str,
    typer.Argument(
        metavar="ENCODER",
        help="A run's folder, a checkpoint in one, an encoder folder (timm's, open_clip's, Hugging Face's), "
        "a weights file, a timm name, or open_clip's NAME:TAG.",
    ),
]
Train = Annotated[str, typer.Option("--train", help="Labelled training set: shards or an image folder.")]
Test = Annotated[str, typer.Option("--test", help="Test set with the same classes: shards or an image folder.")]
RandomInit = Annotated[
    bool, typer.Option("--random-init", help="The same architecture with fresh weights; of a run, its first.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Report to write (.json). Default: RUN/evals/, where there is a run."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: CUDA where present.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images of one forward pass.")]
Workers = Annotated[int, typer.Option("--num-workers", min=0, help="Loader processes; 0: in this one.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Of the forward pass.")]
PoolingOption = Annotated[
    Pooling, typer.Option("--pooling", help="own: as the encoder does; else class token, mean of patches, or both.")
]
BlocksOption = Annotated[int, typer.Option("--blocks", min=1, help="The last N blocks, side by side.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Keeps features there, for every later evaluation.")
]
NumRanks = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine that share the work.")]
LimitTrain = Annotated[int | None, typer.Option("--limit-train", min=1, help="The first N training samples only.")]
LimitTest = Annotated[int | None, typer.Option("--limit-test", min=1, help="The first N test samples only.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of fresh weights and of the probe. Default: the run's for weights, else 0."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="timm's name of a weights file; NAME.TAG says the preprocessing."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Pixels; a ViT's position embedding is interpolated if it has others."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Local file for a name of open_clip's, whose NAME:TAG says the preprocessing."),
]
WeightsKey = Annotated[
    str | None,
    typer.Option("--weights-key", metavar="KEY", help="Entry of a weights file that holds several (teacher, ...)."),
]
WeightsPrefix = Annotated[
    str | None,
    typer.Option(
        "--weights-prefix", metavar="TEXT", help="Of the encoder's names in a weights file (backbone., ...); taken off."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Further argument of timm's constructor; repeatable."),
]


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Which encoder, and where it runs."""

    encoder: Source
    random_init: RandomInit = False
    seed: Seed = None
    model: ModelName = None
    image_size: ImageSize = None
    option: Options = None
    weights: Weights = None
    weights_key: WeightsKey = None
    weights_prefix: WeightsPrefix = None
    device: DeviceOption = Device.auto

    def load(self) -> Encoder:
        """The encoder on its device."""
        from pretrain.evals.sources.load import load_source
        from pretrain.models.weights_files import Part

        place = device_of(self.device)
        encoder = load_source(
            self.encoder,
            random_init=self.random_init,
            seed=self.seed,
            architecture=_architecture(self.encoder, self.model, self.image_size, self.option),
            weights=self.weights,
            part=Part(self.weights_key, self.weights_prefix or "") if self.weights_key or self.weights_prefix else None,
        )
        encoder.module.to(place)
        return encoder


@dataclass(frozen=True, kw_only=True)
class ClassData:
    """What is learned from, and what is asked."""

    train: Train
    test: Test
    limit_train: LimitTrain = None
    limit_test: LimitTest = None


@dataclass(frozen=True, kw_only=True)
class ReadoutOptions:
    """What of the encoder is a feature."""

    pooling: PoolingOption = Pooling.own
    blocks: BlocksOption = 1

    def readout(self) -> Readout:
        return readout(self.pooling, self.blocks)


@dataclass(frozen=True, kw_only=True)
class How:
    """How features are computed, by how many, and where the report goes; nothing here decides the number."""

    out: Out = None
    batch_size: BatchSize = 256
    num_workers: Workers = 0
    precision: PrecisionOption = Precision.fp32
    cache: Cache = None
    nproc: NumRanks = 1

    def begin(self, context: typer.Context) -> None:
        """To be called first: the same command in each of several ranks goes on from here, this process does not."""
        check_out(self.out)
        over_ranks(context, self.nproc, self.cache)

    def extraction(self, readouts: Sequence[Readout] | None = None) -> Extraction:
        """For this rank, of the readouts given; None: of the encoder's own."""
        from pretrain.evals.features.extract import Extraction
        from pretrain.evals.features.readout import OWN
        from pretrain.evals.features.store import FeatureStore
        from pretrain.runtime.collectives import World

        world = World.from_environment()
        if world.size > 1 and self.cache is None:
            raise InputError(where="--cache", expected=f"a folder that all {world.size} ranks share", found="none")
        return Extraction(
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            precision=self.precision.value,
            readouts=tuple(readouts or (OWN,)),
            rank=world.rank,
            world_size=world.size,
            store=FeatureStore(self.cache) if self.cache is not None else None,
        )


def check_out(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise InputError(where="--out", expected="a name that ends in .json", found=str(out))


def readout(pooling: Pooling, blocks: int) -> Readout:
    from pretrain.evals.features.readout import Readout

    return Readout(pooling.value, blocks)


def device_of(device: Device) -> torch.device:
    """What --device names; raises InputError where it is not there."""
    import torch

    from pretrain.runtime.collectives import World

    present = torch.cuda.is_available()
    if device is Device.cuda and not present:
        raise InputError(where="--device", expected="auto or cpu, as there is no CUDA device", found="cuda")
    if not present or device is Device.cpu:
        return torch.device("cpu")
    return torch.device("cuda", World.from_environment().local_rank)


def _architecture(
    encoder: str, model: str | None, image_size: int | None, option: list[str] | None
) -> Architecture | None:
    """None where nothing about it was given."""
    from pretrain.evals.sources.timm_names import Architecture
    from pretrain.recipe.strict_yaml import StrictYamlError, read_yaml

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
