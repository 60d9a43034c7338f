"""One rank of a run, as torchrun, srun and `pretrain train` start it: `python -P -m pretrain RECIPE`."""

from __future__ import annotations

if __name__ == "__main__":  # before anything is imported that could be found in the working folder
    from pretrain.runtime.safe_path import leave_working_folder

    leave_working_folder("pretrain")

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_pipeline.errors import InputError, PretrainError, storage_error
from pretrain.inputs import refuse_wrong_inputs
from pretrain.monitoring.outlets import flush_streams, hide_secrets, write_stderr
from pretrain.recipe.files import load_recipe, print_note
from pretrain.recipe.home import expand_words
from pretrain.recipe.recipe import Recipe
from pretrain.runtime import lean_imports
from pretrain.runtime.signals import STOPPED, stop_while_starting
from pretrain.runtime.slurm_step import join_step
from pretrain.train_options import TrainOptions, add_arguments, options_from

# All ranks of a machine find the same wrong input. The first says so and ends, and the launcher then ends the
# others; if one of those ended before, the first would be ended unheard.
SECONDS_FOR_THE_FIRST_RANK = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this process's part.

    Returns:
        The exit status: 0 done, 1 the run failed, 2 the input was wrong, STOPPED where a signal asked it to stop.
    """
    lean_imports.install()
    faulthandler.enable(2)  # where a file got smaller that is mapped into memory, the process says where it was
    hide_secrets()
    join_step()
    recipe_path, options = _parse(arguments)
    stop_while_starting(speaks=_is_first())
    try:
        recipe = load_recipe(recipe_path, list(options.overrides), note=print_note if _is_first(local=True) else None)
        if _is_first(local=True):
            refuse_wrong_inputs(recipe)
        _tell("starting: loading PyTorch")
        from pretrain import run  # after all that needs none of it: loading torch takes seconds

        out = options.out or default_out(recipe)
        folder = run.output_folder(out, options.overfit_batch)
        _tell(f"starting: checking {recipe.name} and {folder}, building the model; the first step takes longer")
        whole = run.run(
            recipe,
            out,
            max_steps=options.max_steps,
            overfit_batch=options.overfit_batch,
            profile_steps=options.profile,
            evals_apart=options.evals_apart,
        )
    except InputError as error:
        if not _is_first(local=True):
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr)
        return _end(error.exit_status)
    except PretrainError as error:
        _print_error(f"error: {error}")
        return _end(error.exit_status)
    except Exception as error:
        found = storage_error(error)
        _print_error(f"error: {found}" if found else traceback.format_exc())
        return _end(1)
    flush_streams()
    return 0 if whole else _end(STOPPED)  # at once: Python, tidying up, would die of a second SIGTERM


def _end(status: int) -> int:
    """Ends this rank at once where there are several.

    To tear the process group down is to wait for the others, and they wait for this one.
    """
    flush_streams()
    if _are_several():
        os._exit(status)
    return status


def _tell(text: str) -> None:
    """Says what goes on before there is a log, on the first rank."""
    if _is_first():
        write_stderr(text)


def _are_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_first(local: bool = False) -> bool:
    """Whether this is the first rank of all, or of this machine."""
    return os.environ.get("LOCAL_RANK" if local else "RANK", "0") == "0"


def default_out(recipe: Recipe) -> Path:
    return Path("runs") / recipe.name


def _print_error(text: str) -> None:
    """Prints to stderr, each line with the number of the rank where there are several."""
    prefix = f"[rank {os.environ.get('RANK', 0)}] " if _are_several() else ""
    for line in text.splitlines():
        print(prefix + line, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if _is_first(local=True):
            super().error(message)
        sys.exit(2)


def _parse(arguments: Sequence[str] | None) -> tuple[Path, TrainOptions]:
    """Returns the recipe's path, and what stands beside it."""
    parser = _Parser(prog="python -m pretrain", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    add_arguments(parser)
    given = parser.parse_args(expand_words(sys.argv[1:] if arguments is None else arguments))
    return given.recipe, options_from(given)


if __name__ == "__main__":
    sys.exit(main())
