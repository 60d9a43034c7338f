"""A suite: encoders x data sets x protocols, as a typed file. Imports no torch.

What the groups hold beside the keys named here are options of `pretrain eval KIND`, spelled as there
(`limit_train: 1000`, `k: [20, 200]`); the command itself says which there are: a new protocol needs nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from pretrain.recipe.base import Group
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.recipe.typed import load_typed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
KEPT, FEATURES = "suite", "features"  # folders of a suite beside those of its encoders
# Parameters of a command on which no number depends. Fine-tuning's `num_ranks` is none: its drop path is keyed by rank.
HOW = frozenset({"out", "cache", "num_workers", "nproc"})

Scalar = bool | int | float | str
Option = Scalar | tuple[Scalar, ...] | None


class _WithOptions(Group):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Option] = Field(init=False)

    @property
    def options(self) -> dict[str, Option]:
        return dict(self.__pydantic_extra__)


class SuiteEncoder(_WithOptions):
    """An encoder and how it is loaded: `{source: runs/mae, random_init: true, seed: 0}`, or `runs/mae` alone."""

    source: str

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given


class SuiteData(_WithOptions):
    """A training set, for the protocols that learn from one, and a test set."""

    train: str | None = None
    test: str


class SuiteProtocol(_WithOptions):
    """A command of `pretrain eval`, for all encoders and data sets, or for those that are named."""

    kind: str
    encoders: tuple[str, ...] | None = Field(None, min_length=1)
    datasets: tuple[str, ...] | None = Field(None, min_length=1)


class Suite(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # also the name of its folder
    encoders: dict[str, SuiteEncoder] = Field(min_length=1)
    datasets: dict[str, SuiteData] = Field(min_length=1)
    protocols: dict[str, SuiteProtocol] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Suite:
        for name in (*self.encoders, *self.datasets, *self.protocols):
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected names of letters, digits, `.`, `_` and `-`, found {name!r}.")
        if taken := {KEPT, FEATURES} & set(self.encoders):
            raise ValueError(f"expected an encoder of another name, found {taken.pop()}, a folder that each suite has.")
        for name, protocol in self.protocols.items():
            for key, known in (("encoders", self.encoders), ("datasets", self.datasets)):
                for asked in getattr(protocol, key) or ():
                    if asked not in known:
                        raise ValueError(
                            f"protocols.{name}.{key}: expected one of {key}, found {asked!r}. {nearest(asked, known)}"
                        )
        return self

    def cells(self) -> list[tuple[str, str, str]]:
        """Encoder, data set and protocol of each result, in an order where neighbours are of different encoders."""
        return [
            (encoder, dataset, name)
            for dataset in self.datasets
            for name, protocol in self.protocols.items()
            for encoder in self.encoders
            if encoder in (protocol.encoders or self.encoders) and dataset in (protocol.datasets or self.datasets)
        ]

    def columns(self) -> list[tuple[str, str]]:
        """Data set and protocol of each column of the table."""
        return list(dict.fromkeys((dataset, protocol) for _, dataset, protocol in self.cells()))


def load_suite(path: Path) -> Suite:
    """Reads a suite; options are checked where their commands are known (launch/suites/jobs.py).

    Raises:
        RecipeError: with every problem found, each naming its path.
    """
    return load_typed(path, Suite)


def dump_suite(suite: Suite) -> str:
    """YAML; `load_suite` of it gives an equal suite."""
    return write_yaml(suite.model_dump(mode="json", exclude_none=True))


def result_path(out: Path, encoder: str, dataset: str, protocol: str) -> Path:
    """Where a suite's folder has the report of a cell."""
    return out / encoder / dataset / f"{protocol}.json"


def nearest(asked: str, known: Iterable[str]) -> str:
    """What to do about a name that is none of the known."""
    known = list(known)
    likely = get_close_matches(asked, known, n=1)
    return f"Did you mean {likely[0]}?" if likely else f"Known here: {', '.join(known)}."
