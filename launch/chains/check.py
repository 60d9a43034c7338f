"""All stages of a chain are checked before the first is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, PretrainError, RecipeError
from launch.chains.choice import check_choice
from launch.chains.config import Stage, stage_words
from launch.chains.folder import ChainFolder, fingerprint
from pretrain.recipe.resolve import split_batch

# Returns the commands of `pretrain eval` by name, as click has them; called where a stage evaluates.
Evaluations = Callable[[], Mapping[str, Any]]


def check_chain(chain: ChainFolder, num_ranks: int, evaluations: Evaluations) -> None:
    """Checks every stage, before the first is started.

    Args:
        chain: with the stages.
        num_ranks: processes of each training.
        evaluations: the commands that stages may evaluate by.

    Raises:
        RecipeError: with the problems of all stages.
    """
    problems = []
    for stage in chain.stages:
        try:
            _check_stage(chain, stage, num_ranks, evaluations)
        except RecipeError as error:
            problems += [f"{stage.name}, {error.where}, {problem}" for problem in error.problems]
        except PretrainError as error:
            problems.append(f"{stage.name}, {error}")
    if problems:
        raise RecipeError(chain.chain.name, problems)


def _check_stage(chain: ChainFolder, stage: Stage, num_ranks: int, evaluations: Evaluations) -> None:
    if stage.train is not None:
        _check_recipe(chain, stage, num_ranks)
    elif stage.label is not None:
        _check_input(chain, stage.label.shards)
        _check_teacher(chain, stage.label.teacher)
    elif stage.select is not None:
        _check_input(chain, stage.select.source)
        chosen = stage.select
        by_labels = chain.maker(chosen.source) is not None or (Path(chosen.source) / "labels.json").is_file()
        check_choice(chosen.source, by_labels, chosen.threshold, chosen.per_class, chosen.top_k)
    elif stage.evaluate is not None:
        for path in (stage.evaluate.train, stage.evaluate.test):
            _check_input(chain, path)
        _check_words(stage_words(stage, chain.folder, chain.out, num_ranks), evaluations())


def _check_recipe(chain: ChainFolder, stage: Stage, num_ranks: int) -> None:
    """Checks that a recipe loads, divides into ranks, builds its model, and finds what data are there already."""
    import torch

    from pretrain.objectives.kinds import build_objective

    recipe = chain.recipe(stage)
    split_batch(recipe, num_ranks)
    with torch.device("meta"):
        build_objective(recipe.model, recipe.objective)
    sources = [recipe.data.train] if isinstance(recipe.data.train, str) else [s.path for s in recipe.data.train]
    for path in (*sources, recipe.data.val, *(p for config in recipe.evals for p in config.datasets)):
        if path is not None:
            _check_input(chain, path)


def _check_teacher(chain: ChainFolder, path: str) -> None:
    maker = chain.maker(path)
    if maker is None:
        fingerprint(path)
    elif maker.train is None or chain.recipe(maker).objective.labeling_problem() is not None:
        raise InputError(where="label.teacher", expected="a supervised run, which has a head", found=maker.name)


def _check_input(chain: ChainFolder, path: str) -> None:
    if chain.maker(path) is None:
        fingerprint(path)


def _check_words(words: list[str], commands: Mapping[str, Any]) -> None:
    """Checks a command and its options, as its own parser sees them."""
    command = commands.get(words[1])
    if command is None:
        raise InputError(where="evaluate.protocol", expected=f"one of {', '.join(sorted(commands))}", found=words[1])
    known = {option for parameter in command.params for option in parameter.opts}
    if unknown := [word.partition("=")[0] for word in words[3:] if word.partition("=")[0] not in known]:
        raise InputError(
            where="evaluate.options", expected=f"options of `pretrain eval {words[1]}`", found=", ".join(unknown)
        )
    try:
        command.make_context(words[1], words[2:])
    except Exception as error:  # of the parser, which is typer's own in some of its versions and click's in others
        if not hasattr(error, "format_message"):
            raise
        raise InputError(
            where="evaluate.options", expected=f"what `pretrain eval {words[1]}` takes", found=error.format_message()
        ) from None
