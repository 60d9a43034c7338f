"""The trainer that an evaluation is given which trains the encoder: ranks of their own on this machine."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe


@dataclass(frozen=True)
class LocalTrainer:
    """Trains in processes of their own, even one: DeepSpeed keeps what belongs to its first run in a process.

    Attributes:
        num_ranks: processes on this machine.
    """

    num_ranks: int

    def check(self, recipe: Recipe, run: Path) -> None:
        """Raises InputError where the recipe, its data and the folder do not go together; writes nothing."""
        from pretrain.preflight import preflight

        preflight(recipe, self.num_ranks, run)

    def train(self, recipe: Recipe, run: Path) -> None:
        """Trains to the end, or goes on; exits with the ranks' status where they do not get there."""
        from launch.ranks.launcher import SAVING, launch
        from pretrain.recipe.files import dump
        from pretrain.runtime.signals import STOPPED, second_ends

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(dump(recipe), "utf-8")
            arguments, threads = [str(path), "--out", str(run)], recipe.runtime.threads
            status = launch(arguments, self.num_ranks, threads=threads, passed_on=SAVING, second_ends=second_ends())
        if status == STOPPED:
            print(f"{run}: asked to stop, and saved; the same command goes on", file=sys.stderr)
        if status:  # a rank has said why
            raise typer.Exit(status)
