"""The options that commands of `pretrain eval` have in common, one by one and in the groups that go together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_run import check_place, over_ranks

if TYPE_CHECKING:
    import torch

    from pretrain.evals.encoder import Encoder
    from pretrain.evals.features.extract import Extraction
    from pretrain.evals.sources.timm_names import Architecture
    from pretrain.models.towers import Towers


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


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
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Keeps features there, for every later evaluation.")
]
NumRanks = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine that share the work.")]
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
WeightsIgnore = Annotated[
    list[str] | None,
    typer.Option(
        "--weights-ignore",
        metavar="PATTERN",
        help="Leaves out tensors of a weights file that the encoder does not need ('decoder_*'); repeatable.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Further argument of timm's constructor; repeatable."),
]


TowersSource = Annotated[
    str,
    typer.Argument(
        metavar="TOWERS",
        help="A run of kind clip or siglip, a checkpoint in one, its encoder folder, one of open_clip's or Hugging "
        "Face's, or a name of open_clip's, perhaps NAME:TAG.",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="clip, a file of merges or a folder with tokenizer.json, in place of the towers' own."
    ),
]
TowerSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Of fresh weights. Default: the run's, else 0.")]


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
    weights_ignore: WeightsIgnore = None
    device: DeviceOption = Device.auto

    def load(self) -> Encoder:
        """The encoder on its device."""
        from pretrain.evals.sources.load import load_source
        from pretrain.models.weights_files import Part

        place = checked_device(self.device)
        encoder = load_source(
            self.encoder,
            random_init=self.random_init,
            seed=self.seed,
            architecture=_architecture(self.encoder, self.model, self.image_size, self.option),
            weights=self.weights,
            part=Part(self.weights_key, self.weights_prefix or "", tuple(self.weights_ignore or ())),
        )
        encoder.module.to(place)
        return encoder


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """Which two towers, and where they run."""

    towers: TowersSource
    random_init: RandomInit = False
    seed: TowerSeed = None
    weights: Weights = None
    weights_ignore: WeightsIgnore = None
    tokenizer: TokenizerOption = None
    image_size: ImageSize = None
    device: DeviceOption = Device.auto

    def load(self) -> Towers:
        """The towers on their device."""
        from pretrain.evals.sources.towers import load_towers

        place = checked_device(self.device)
        towers = load_towers(
            self.towers,
            random_init=self.random_init,
            seed=self.seed,
            weights=self.weights,
            ignore=tuple(self.weights_ignore or ()),
            tokenizer=self.tokenizer,
            image_size=self.image_size,
        )
        towers.module.to(place)
        return towers


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
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

    def extraction(self) -> Extraction:
        """How features are computed by this rank."""
        from pretrain.evals.features.extract import Extraction
        from pretrain.evals.features.store import FeatureStore
        from pretrain.runtime.collectives import World

        world = World.from_environment()
        if world.size > 1 and self.cache is None:
            raise InputError(where="--cache", expected=f"a folder that all {world.size} ranks share", found="none")
        return Extraction(
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            precision=self.precision.value,
            rank=world.rank,
            world_size=world.size,
            store=FeatureStore(self.cache) if self.cache is not None else None,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Where the report of an evaluation goes that trains the encoder, and so where it trains."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Report to write (.json); training is kept beside it. Default: RUN/evals/, where there is a run.",
        ),
    ] = None

    def folder(self, run: Path | None, name: str) -> Path:
        """Where training is kept: beside the report, or in the encoder's run under a name.

        Raises:
            InputError: there is neither.
        """
        if self.out is not None:
            return self.out.with_suffix("")
        if run is None:
            raise InputError(
                where="--out", expected="a report to train beside, as the encoder is of no run", found="none",
                fix="Add --out NAME.json.",
            )  # fmt: skip
        return run / "evals" / name


def check_out(out: Path | None) -> None:
    """Raises InputError where --out is no name of a report, or none could be written there."""
    if out is not None and out.suffix != ".json":
        raise InputError(where="--out", expected="a name that ends in .json", found=str(out))
    if out is not None:
        check_place(out)


def checked_device(device: Device) -> torch.device:
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
