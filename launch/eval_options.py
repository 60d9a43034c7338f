"""What the commands of `pretrain eval` have in common: their options, and what becomes of a report."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError

if TYPE_CHECKING:
    import torch

    from pretrain.evals.base import EvalReport
    from pretrain.evals.encoder import Encoder
    from pretrain.evals.features import Extraction
    from pretrain.evals.readout import Readout
    from pretrain.evals.timm_sources import Architecture


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
    batch_size: int, num_workers: int, precision: Precision, readouts: Sequence[Readout] | None = None
) -> Extraction:
    from pretrain.evals.features import Extraction
    from pretrain.evals.readout import OWN

    return Extraction(
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision.value,
        readouts=tuple(readouts or (OWN,)),
    )


def readout(pooling: Pooling, blocks: int) -> Readout:
    from pretrain.evals.readout import Readout

    return Readout(pooling.value, blocks)


def device_of(device: Device) -> torch.device:
    """What --device names; raises InputError where it is not there."""
    import torch

    present = torch.cuda.is_available()
    if device is Device.cuda and not present:
        raise InputError(where="--device", expected="auto or cpu, as there is no CUDA device", found="cuda")
    return torch.device("cuda" if present and device is not Device.cpu else "cpu")


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
