"""What the commands of `pretrain eval` have in common: their options, and what becomes of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer

from data_pipeline.errors import InputError

if TYPE_CHECKING:
    import torch

    from pretrain.evals.base import EvalReport
    from pretrain.evals.encoder import Encoder
    from pretrain.evals.features import Extraction
    from pretrain.evals.readout import Readout
    from pretrain.evals.timm_sources import Architecture


class OnDevice(Protocol):
    """An encoder, or two towers."""

    @property
    def device(self) -> torch.device: ...
    @property
    def run(self) -> Path | None: ...


T = TypeVar("T", bound=OnDevice)
T_contra = TypeVar("T_contra", bound=OnDevice, contravariant=True)


class Judge(Protocol[T_contra]):
    def run(self, judged: T_contra, /) -> EvalReport: ...


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
    typer.Option("--model", metavar="NAME", help="timm's name of the architecture of a weights file."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Pixels; a ViT's position embedding is interpolated if it has others."),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Local file of weights, for a name of open_clip's.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Further argument of timm's constructor; repeatable."),
]


def check_out(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise InputError(where="--out", expected="a name that ends in .json", found=str(out))


def extraction(
    batch_size: int,
    num_workers: int,
    precision: Precision,
    cache: Path | None,
    readouts: Sequence[Readout] | None = None,
) -> Extraction:
    """For this rank, of the readouts given."""
    from pretrain.collectives import World
    from pretrain.evals.features import Extraction
    from pretrain.evals.readout import OWN
    from pretrain.evals.store import FeatureStore

    world = World.from_environment()
    if world.size > 1 and cache is None:
        raise InputError(where="--cache", expected=f"a folder that all {world.size} ranks share", found="none")
    return Extraction(
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision.value,
        readouts=tuple(readouts or (OWN,)),
        rank=world.rank,
        world_size=world.size,
        store=FeatureStore(cache) if cache is not None else None,
    )


def over_ranks(context: typer.Context, num_ranks: int, cache: Path | None) -> None:
    """Starts the same command once for each rank and exits with their status, unless this is one of them already."""
    if num_ranks == 1 or "RANK" in os.environ:
        return
    from tempfile import TemporaryDirectory

    from launch.local import launch

    with TemporaryDirectory(prefix="pretrain-features-") as folder:
        shared = {**context.params, "cache": cache or folder}
        words = ["eval", str(context.info_name), *words_of(context.command, shared)]
        status = launch(words, num_ranks, module="launch.cli")
    raise typer.Exit(status)


def words_of(command: Any, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these values to the parameters of a click command."""
    positional: list[str] = []
    words: list[str] = []
    for parameter in command.params:
        value = values.get(str(parameter.name))
        given = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            positional += given
        elif isinstance(value, bool):
            words += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        elif parameter.multiple:
            words += [word for text in given for word in (parameter.opts[0], text)]
        else:
            words += [parameter.opts[0], *given]
    return [*words, "--", *positional]


def readout(pooling: Pooling, blocks: int) -> Readout:
    from pretrain.evals.readout import Readout

    return Readout(pooling.value, blocks)


def device_of(device: Device) -> torch.device:
    """What --device names; raises InputError where it is not there."""
    import torch

    from pretrain.collectives import World

    present = torch.cuda.is_available()
    if device is Device.cuda and not present:
        raise InputError(where="--device", expected="auto or cpu, as there is no CUDA device", found="cuda")
    if not present or device is Device.cpu:
        return torch.device("cpu")
    return torch.device("cuda", World.from_environment().local_rank)


def architecture(
    encoder: str, model: str | None, image_size: int | None, option: list[str] | None
) -> Architecture | None:
    """None where nothing about it was given."""
    from pretrain.evals.timm_sources import Architecture
    from pretrain.strict_yaml import StrictYamlError, read_yaml

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


def load_encoder(
    source: str,
    random_init: bool,
    seed: int | None,
    architecture: Architecture | None,
    device: Device,
    weights: Path | None = None,
) -> Encoder:
    """The encoder on its device."""
    from pretrain.evals.sources import load_source

    place = device_of(device)
    encoder = load_source(source, random_init=random_init, seed=seed, architecture=architecture, weights=weights)
    encoder.module.to(place)
    return encoder


def judge(evaluator: Judge[T], judged: T, out: Path | None, context: typer.Context) -> None:
    """Runs an evaluation, with the other ranks where there are any; the first keeps the report."""
    from pretrain.collectives import World, process_group

    world = World.from_environment()
    with process_group(world, judged.device) if world.size > 1 else nullcontext():
        report = evaluator.run(judged)
    if world.is_main:
        keep(report, judged.run, out, context)


def keep(report: EvalReport, run: Path | None, out: Path | None, context: typer.Context) -> None:
    """Writes the report where it belongs, and prints what it says."""
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    plain = {name: str(v) if isinstance(v, (Path, Enum)) else v for name, v in context.params.items()}
    report = replace(report, arguments={"command": f"eval {report.evaluator}", **plain})
    path = out or (run / "evals" / report.file_name if run else None)
    if path is not None:
        report.save(path)
    console = Console(soft_wrap=True)
    table = Table("metric", "%", "n", title=f"{report.evaluator}: {called(report)}", title_justify="left")
    for name, value in report.metrics.items():
        table.add_row(name, f"{value:.2f}", str(report.n), style="bold" if name == report.metric else None)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"report: {path}" if path else "not kept: name a file with --out FILE.json")


def called(report: EvalReport) -> str:
    return f"{report.encoder['source']} ({report.encoder['tag']})"
