"""`pretrain eval KIND` for each protocol of the table: its options, made of its config, and what the command does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from launch.commands.eval_options import EncoderOptions, ExecutionOptions, TowerOptions, TrainingOptions, check_out
from launch.commands.eval_run import check_report, judge, keep
from launch.commands.option_groups import build_group, command_parameters
from launch.commands.protocol_options import build_config, parameters
from pretrain.evals.config import ProtocolConfig

if TYPE_CHECKING:
    from pretrain.evals.features.extract import Extraction
    from pretrain.evals.protocols import AnyEvaluator

Source = EncoderOptions | TowerOptions
Execution = ExecutionOptions | TrainingOptions


def protocol_command(config: type[ProtocolConfig]) -> Callable[..., None]:
    """The command that judges by the protocol of a config, as typer is to see it."""
    source_options: type[Source] = TowerOptions if config.judges == "towers" else EncoderOptions
    execution_options: type[Execution] = TrainingOptions if config.trains else ExecutionOptions

    def command(context: typer.Context, **given: Any) -> None:
        source, execution = build_group(source_options, given), build_group(execution_options, given)
        asked = build_config(config, given, vars(source))
        if isinstance(execution, TrainingOptions):
            _train(asked, source, execution, context)
        else:
            _judge(asked, source, execution, context)

    told = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    told += [
        *parameters(config),
        *(option for options in (source_options, execution_options) for option in command_parameters(options)),
    ]
    return _as_typer_sees_it(command, told, config.summary)


def _as_typer_sees_it(command: Callable[..., None], told: list[inspect.Parameter], summary: str) -> Callable[..., None]:
    @functools.wraps(command)
    def plain(**given: Any) -> None:
        command(**given)

    del plain.__wrapped__  # or its signature would be looked up
    plain.__doc__ = summary
    plain.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
    plain.__annotations__ = {parameter.name: parameter.annotation for parameter in told}
    return plain


def _judge(asked: ProtocolConfig, source: Source, execution: ExecutionOptions, context: typer.Context) -> None:
    execution.begin(context)
    evaluator = _evaluator(asked, execution.extraction())
    judge(evaluator, source.load(), execution.out, context)


def _train(asked: ProtocolConfig, source: Source, execution: TrainingOptions, context: typer.Context) -> None:
    """Trains beside the report, which is written in the end."""
    from launch.commands.eval_training import LocalTrainer

    check_out(execution.out)
    judged = source.load()
    folder = execution.folder(judged.run, f"{asked.kind}-{judged.tag}")
    check_report(judged.run, execution.out)
    evaluator = _evaluator(
        asked,
        ExecutionOptions(num_workers=getattr(asked, "num_workers")).extraction(),  # noqa: B009
        out=folder,
        trainer=LocalTrainer(getattr(asked, "num_ranks")),  # noqa: B009
    )
    keep(evaluator.run(judged), judged.run, execution.out, context)


def _evaluator(asked: ProtocolConfig, extraction: Extraction, **more: Any) -> AnyEvaluator:
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.protocols import build_evaluator

    return build_evaluator(asked, extraction, open_dataset, **more)
