"""The typed recipe of a chain: stages one after another, each a command of its own. Imports no torch.

`${NAME}` in any value stands for what an earlier stage leaves behind: a run's folder, a folder of labels, a selection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pretrain.recipe.base import Group
from pretrain.recipe.typed import load_typed

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class Label(Group):
    """A stage that runs `pretrain data label`; the keys are its options."""

    shards: str
    teacher: str
    top_k: int | None = Field(None, ge=1)
    precision: str = Field("fp32", pattern="^(fp32|bf16)$")
    batch_size: int = Field(256, ge=1)
    num_workers: int = Field(0, ge=0)


class Select(Group):
    """A stage that runs `pretrain data select`; the keys are its options."""

    source: str
    threshold: float | None = Field(None, ge=0, le=1)
    per_class: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=1)
    per_image: int | None = Field(None, ge=1)
    without: str | None = None
    seed: int | None = Field(None, ge=0)


class Evaluate(Group):
    """A stage that runs `pretrain eval PROTOCOL`; `options` are further options of that command."""

    protocol: str
    encoder: str
    train: str
    test: str
    options: dict[str, int | float | str] = {}  # noqa: RUF012  (pydantic copies it)


class Stage(Group):
    """A stage is one command; exactly one of the keys below `name` says which."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    train: str | None = None  # a recipe, relative to the chain's file
    set: dict[str, Any] = {}  # noqa: RUF012  (of a recipe to train: values by dotted key)
    label: Label | None = None
    select: Select | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        given = [key for key in ("train", "label", "select", "evaluate") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of train, label, select, evaluate, found {', '.join(given) or 'none'}.")
        if self.name in ("chain", "code"):
            raise ValueError(f"expected another name than {self.name}, a folder that each chain has.")
        if self.set and self.train is None:
            raise ValueError(f"expected set beside train alone, found it beside {given[0]}.")
        return self

    def output(self, out: Path) -> Path:
        """Returns the path of what the stage leaves behind in the chain's folder."""
        suffix = ".select" if self.select else ".json" if self.evaluate else ""
        return out / f"{self.name}{suffix}"

    def references(self) -> list[str]:
        """Returns the names of the stages that its values refer to, each once."""
        values = self.model_dump(mode="json", exclude={"name"})
        return list(dict.fromkeys(name for text in _texts(values) for name in _REFERENCE.findall(text)))

    def filled(self, outputs: Mapping[str, Path]) -> Stage:
        """Returns the stage with paths in the place of references."""
        values = _mapped(self.model_dump(), lambda text: _REFERENCE.sub(lambda m: str(outputs[m[1]]), text))
        return Stage.model_validate(values)


class Chain(Group):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # also the name of the chain's folder
    stages: tuple[Stage, ...] = Field(min_length=1)


def load_chain(path: Path) -> Chain:
    """Reads a chain; every reference is to an earlier stage.

    Raises:
        RecipeError: with every problem found, each naming its path.
    """
    return load_typed(path, Chain, _wrong_references)


def _wrong_references(chain: Chain) -> Iterator[str]:
    earlier: list[str] = []
    for number, stage in enumerate(chain.stages):
        if stage.name in earlier:
            yield f"stages.{number}.name: expected a name of its own, found {stage.name!r} twice."
        for name in stage.references():
            if name not in earlier:
                known = ", ".join(earlier) or "none"
                yield f"stages.{number} ({stage.name}): expected an earlier stage ({known}), found ${{{name}}}."
        earlier.append(stage.name)


def stage_words(stage: Stage, folder: Path, out: Path, num_ranks: int) -> list[str]:
    """Returns the words of a stage's command behind `pretrain`.

    Args:
        stage: with paths in the place of references.
        folder: that of the chain's file.
        out: the chain's folder.
        num_ranks: processes of a training.
    """
    target = str(stage.output(out))
    if stage.train is not None:
        words = ["train", str(folder / stage.train), "--nproc", str(num_ranks), "--out", target]
        return [*words, *(f"--set={override}" for override in stage_overrides(stage))]
    if stage.label is not None:
        options = stage.label.model_dump(exclude={"shards"}, exclude_none=True)
        return ["data", "label", stage.label.shards, target, *_options(options)]
    if stage.select is not None:
        options = stage.select.model_dump(exclude={"source"}, exclude_none=True)
        return ["data", "select", stage.select.source, target, *_options(options)]
    assert stage.evaluate is not None
    judged = stage.evaluate
    options = {"train": judged.train, "test": judged.test, "out": target, **judged.options}
    return ["eval", judged.protocol, judged.encoder, *_options(options)]


def stage_overrides(stage: Stage) -> list[str]:
    """Returns `set` as overrides of a recipe; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in stage.set.items()]


def _options(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return tuple(_mapped(inner, change) for inner in value) if isinstance(value, list | tuple) else value
