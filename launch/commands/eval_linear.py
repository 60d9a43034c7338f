"""`pretrain eval linear`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import ClassData, EncoderOptions, How, Pooling, readout
from launch.commands.eval_run import judge
from launch.commands.option_groups import grouped

if TYPE_CHECKING:
    from pretrain.evals.features.readout import Readout
    from pretrain.evals.linear.config import LinearConfig


class Solver(StrEnum):
    sgd = "sgd"
    lars = "lars"
    lbfgs = "lbfgs"


class Paper(StrEnum):
    mae = "mae"


Rate = Annotated[
    list[float] | None,
    typer.Option("--lr", help="For a batch of 256; repeatable. Default: DINOv2's 13."),
]
Decay = Annotated[
    list[float] | None,
    typer.Option("--weight-decay", help="Repeatable; each goes with each learning rate. Default: 0."),
]
Penalty = Annotated[
    list[float] | None,
    typer.Option("--inverse-penalty", "-C", help="Of lbfgs, scikit-learn's C; repeatable. Default: 1e-5 to 1, by 10."),
]


# Options that one solver has, and another would pass over in silence.
_BY_STEPS = {
    "learning_rates": "--lr",
    "weight_decays": "--weight-decay",
    "epochs": "--epochs",
    "warmup_epochs": "--warmup-epochs",
    "min_steps": "--min-steps",
    "batch_size": "--head-batch-size",
    "batch_norm": "--batch-norm",
    "initial_std": "--initial-std",
    "augment": "--augment",
}


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How the probe is trained; None is the preset's."""

    solver: Annotated[
        Solver | None, typer.Option("--solver", help="sgd (default), lars, or lbfgs: to the optimum, in fp64.")
    ] = None
    paper: Annotated[
        Paper | None,
        typer.Option("--paper", help="mae: batch norm, LARS, batch 16384, 90 epochs, augmented; the rest overrides."),
    ] = None
    learning_rate: Rate = None
    weight_decay: Decay = None
    inverse_penalty: Penalty = None
    epochs: Annotated[int | None, typer.Option("--epochs", min=0, help="Default: 10.")] = None
    warmup_epochs: Annotated[float | None, typer.Option("--warmup-epochs", min=0, help="Default: 0.")] = None
    min_steps: Annotated[
        int | None, typer.Option("--min-steps", min=1, help="Or the epochs, where they are more. Default: 5000.")
    ] = None
    head_batch_size: Annotated[
        int | None, typer.Option("--head-batch-size", min=1, help="Samples of a step of the classifier. Default: 1024.")
    ] = None
    batch_norm: Annotated[
        bool | None,
        typer.Option("--batch-norm/--no-batch-norm", help="Before the classifier. Default: fixed statistics."),
    ] = None
    initial_std: Annotated[
        float | None, typer.Option("--initial-std", min=0, help="Of the classifier's first weights. Default: 0.")
    ] = None
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help="Random crops and flips, through the encoder at every step."),
    ] = None
    crop_scale: Annotated[
        tuple[float, float] | None, typer.Option("--crop-scale", help="Area of these crops. Default: 0.08 1.")
    ] = None

    def config(self, **more: int | None) -> LinearConfig:
        """The preset, or the defaults, with what was given (not None) in their place.

        Raises:
            InputError: an option that has no say in what was asked for, or a value out of range.
        """
        from pretrain.evals.linear.config import MAE, LinearConfig

        options = {
            "solver": self.solver and self.solver.value,
            "learning_rates": self.learning_rate and tuple(self.learning_rate),
            "weight_decays": self.weight_decay and tuple(self.weight_decay),
            "inverse_penalties": self.inverse_penalty and tuple(self.inverse_penalty),
            "epochs": self.epochs,
            "warmup_epochs": self.warmup_epochs,
            "min_steps": self.min_steps,
            "batch_size": self.head_batch_size,
            "batch_norm": self.batch_norm,
            "initial_std": self.initial_std,
            "augment": self.augment,
            "crop_scale": self.crop_scale,
            **more,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        preset = MAE if self.paper is Paper.mae else LinearConfig()
        exact = given.get("solver", preset.solver) == "lbfgs"
        idle = [option for name, option in _BY_STEPS.items() if exact and name in given]
        idle += ["--paper"] if exact and self.paper is not None else []
        idle += ["--inverse-penalty"] if not exact and "inverse_penalties" in given else []
        idle += ["--crop-scale"] if "crop_scale" in given and not given.get("augment", preset.augment) else []
        if idle:
            raise InputError(
                where=", ".join(idle),
                expected="options of the chosen solver",
                found=f"--solver {given.get('solver', preset.solver)}, for which they mean nothing",
                fix="Leave them out; --inverse-penalty goes with --solver lbfgs, --crop-scale with --augment.",
            )
        return replace(preset, **given)


@grouped
def linear(
    context: typer.Context,
    *,
    data: ClassData,
    probe: ProbeOptions,
    pooling: Annotated[
        list[Pooling],
        typer.Option(
            "--pooling",
            help="own: as the encoder does; else class token, mean of patches, both. Repeatable: the best is chosen.",
        ),
    ] = [Pooling.own],  # noqa: B006
    blocks: Annotated[
        list[int],
        typer.Option("--blocks", min=1, help="The last N blocks, side by side. Repeatable; each with each pooling."),
    ] = [1],  # noqa: B006
    source: EncoderOptions,
    how: How,
) -> None:
    """Linear probe: a grid trained side by side, chosen on a split of the training set, tested once."""
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.linear.protocol import Linear

    how.begin(context)
    evaluator = Linear(
        open_dataset(data.train),
        open_dataset(data.test),
        probe.config(seed=source.seed, max_train=data.limit_train, max_test=data.limit_test),
        extraction=how.extraction(readouts(pooling, blocks)),
    )
    judge(evaluator, source.load(), how.out, context)


def readouts(poolings: list[Pooling], blocks: list[int]) -> tuple[Readout, ...]:
    """Each pooling with each number of blocks; the encoder's own has no blocks and stands once, beside others."""
    others = [pooling for pooling in poolings if pooling is not Pooling.own]
    own = [readout(Pooling.own, 1)] if others and len(others) < len(poolings) else []
    return tuple(dict.fromkeys([*own, *(readout(p, b) for p in others or poolings for b in blocks)]))
