"""The options of a training, stated once: for `python -m pretrain`, and for the commands and jobs that start it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.local_paths import path_text


@dataclass(frozen=True)
class Option:
    """How a field of `TrainOptions` stands on a command line.

    Attributes:
        flag: its name there.
        help: a sentence.
        metavar: what stands for its value in help; None: it is a switch without a value.
        kind: of the value; a list of texts is given by repeating the flag.
        own_jobs_only: jobs of ours give it, and people have no use for it.
    """

    flag: str
    help: str
    metavar: str | None
    kind: type[Path] | type[int] | type[bool] | type[list[str]]
    own_jobs_only: bool = False


def _described(flag: str, help: str, metavar: str | None, kind: Any, own_jobs_only: bool = False) -> dict[str, Option]:
    return {"option": Option(flag, help, metavar, kind, own_jobs_only)}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training is given beside its recipe."""

    out: Path | None = field(
        default=None, metadata=_described("--out", "Folder of the run [runs/<name of the recipe>].", "RUN", Path)
    )
    overrides: tuple[str, ...] = field(
        default=(), metadata=_described("--set", "Overrides a key of the recipe; may be repeated.", "KEY=VALUE", list)
    )
    max_steps: int | None = field(
        default=None, metadata=_described("--max-steps", "Stops after so many steps, to debug.", "N", int)
    )
    overfit_batch: bool = field(
        default=False, metadata=_described("--overfit-batch", "Trains on the first batch only, to debug.", None, bool)
    )
    profile: int | None = field(
        default=None, metadata=_described("--profile", "Writes a PyTorch trace of N steps to RUN/profile.", "N", int)
    )
    evals_apart: bool = field(
        default=False, metadata=_described("--evals-apart", "Leaves `evals` to jobs of their own.", None, bool, True)
    )

    @classmethod
    def described(cls) -> Iterator[tuple[str, Option, Any]]:
        """Yields name, option and default of each field."""
        for each in fields(cls):
            yield each.name, each.metadata["option"], each.default

    def words(self) -> list[str]:
        """Returns the words of a command line that say the same."""
        words: list[str] = []
        for name, option, default in self.described():
            value = getattr(self, name)
            if value == default:
                continue
            if option.kind is bool:
                words.append(option.flag)
            elif option.kind is list:
                words += [f"{option.flag}={one}" for one in value]
            else:
                words += [option.flag, str(value)]
        return words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options to a parser, whose result then has the fields of `TrainOptions`."""
    for name, option, default in TrainOptions.described():
        if option.kind is bool:
            parser.add_argument(option.flag, dest=name, action="store_true", help=option.help)
        elif option.kind is list:
            parser.add_argument(
                option.flag, dest=name, action="append", default=[], metavar=option.metavar, help=option.help
            )
        else:
            kind: Any = {int: _count, Path: _local_path}[option.kind]
            parser.add_argument(
                option.flag, dest=name, type=kind, default=default, metavar=option.metavar, help=option.help
            )


def options_from(given: argparse.Namespace) -> TrainOptions:
    """Returns what a parser with these arguments was given."""
    values = {name: getattr(given, name) for name, _, _ in TrainOptions.described()}
    return TrainOptions(**{**values, "overrides": tuple(given.overrides)})


def _local_path(text: str) -> Path:
    try:
        return Path(path_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)
