"""A chain's folder records what each stage was made from and what it left behind. Imports no torch.

`OUT/chain/NAME.json` is written before a stage starts, with what it is made from; afterwards also with what it left.
A stage of which all of that still holds is done; one whose inputs or settings changed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.durable import write_text
from data_pipeline.errors import InputError
from launch.chains.config import Chain, Stage, load_chain, stage_overrides
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import result_settings
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.runtime.run_folder import COMPLETE, newest_checkpoint, sha256_of

_TAKEN = ("shards", "teacher", "source", "without", "encoder", "train", "test")  # keys that name what a stage reads


@dataclass(frozen=True)
class ChainFolder:
    """A chain and where its stages leave what they make.

    Attributes:
        folder: of the chain's file: recipes are found from there.
        out: the chain's own.
    """

    chain: Chain
    folder: Path
    out: Path

    @classmethod
    def open(cls, path: Path, out: Path | None) -> ChainFolder:
        """Reads a chain's file; `out` None: `runs/<name>`."""
        chain = load_chain(path)
        return cls(chain, path.parent, out or Path("runs") / chain.name)

    @property
    def stages(self) -> list[Stage]:
        """The stages with paths in the place of references."""
        outputs = {stage.name: stage.output(self.out) for stage in self.chain.stages}
        return [stage.filled(outputs) for stage in self.chain.stages]

    def stage(self, name: str) -> Stage:
        """Returns the stage of that name, with paths in the place of references.

        Raises:
            InputError: the chain has no stage of that name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(where=str(self.folder), expected=f"a stage {name}", found="none")

    def references(self, stage: Stage) -> list[str]:
        """Returns the names of the stages that a stage takes from."""
        return self._as_given(stage).references()

    def freeze(self) -> ChainFolder:
        """Writes a copy of the chain and its recipes into its folder, which later changes of the files do not reach."""
        frozen = self.out / "chain"
        stages = []
        for own, stage in zip(self.chain.stages, self.stages, strict=True):
            if stage.train is not None:
                name = f"recipes/{stage.name}.yaml"
                write_text(frozen / name, dump(self.recipe(stage)))
                own = own.model_copy(update={"train": name})
            stages.append(own)
        chain = self.chain.model_copy(update={"stages": tuple(stages)})
        write_text(frozen / "chain.yaml", write_yaml(chain.model_dump(mode="json", exclude_defaults=True)))
        return ChainFolder.open(frozen / "chain.yaml", self.out)

    def recipe(self, stage: Stage) -> Recipe:
        return load_recipe(self.folder / str(stage.train), stage_overrides(stage))

    def maker(self, path: str) -> Stage | None:
        """Returns the stage that leaves this path behind; None: the path comes from elsewhere."""
        return next((stage for stage in self.stages if path == str(stage.output(self.out))), None)

    def refuse_other_settings(self, stage: Stage) -> None:
        """Compares the settings of a stage that has begun; its inputs need not be there yet.

        Raises:
            InputError: the stage was begun with other settings.
        """
        try:
            kept = json.loads(self._record(stage).read_bytes())
        except FileNotFoundError:
            return
        if kept["settings"] != (settings := self._settings(stage)):
            raise self._other(stage, kept["settings"], settings)

    def is_done(self, stage: Stage, *, begin: bool = True) -> bool:
        """Returns whether a stage was finished, and all is as it was then. All that it takes from must be there.

        Args:
            begin: a new stage's settings and inputs are written down.

        Raises:
            InputError: the stage was begun with other settings or inputs, or its output was changed since.
        """
        made_of, path = self._ingredients(stage), self._record(stage)
        try:
            kept = json.loads(path.read_bytes())
        except FileNotFoundError:
            if begin:
                write_text(path, json.dumps(made_of, indent=1) + "\n")
            return False
        left = kept.pop("left", None)
        if kept != made_of:
            raise self._other(stage, kept, made_of)
        if left is None:
            return False
        if (found := self._digest(stage)) != left:
            raise InputError(
                where=str(stage.output(self.out)),
                expected=f"what stage {stage.name} left there",
                found="nothing" if found is None else "something else",
                fix=f"Restore it, or remove {path} to have the stage made again.",
            )
        return True

    def keep(self, stage: Stage) -> None:
        """Writes down that a stage is done."""
        record = {**self._ingredients(stage), "left": self._digest(stage)}
        write_text(self._record(stage), json.dumps(record, indent=1) + "\n")

    def _other(self, stage: Stage, kept: Mapping[str, Any], given: Mapping[str, Any]) -> InputError:
        return InputError(
            where=f"stage {stage.name} in {self.out}",
            expected=f"what it was begun with: {_differing(kept, given)}",
            found=_differing(given, kept),
            fix=f"Restore that, choose another folder with --out, or remove {self._record(stage)} and "
            f"{stage.output(self.out)}, and what later stages made of it.",
        )

    def _record(self, stage: Stage) -> Path:
        return self.out / "chain" / f"{stage.name}.json"

    def _ingredients(self, stage: Stage) -> dict[str, Any]:
        """Returns what decides the result of a stage. The place of the chain's folder does not."""
        data: dict[str, str] = {}
        if stage.train is not None:
            recipe = self.recipe(stage)
            data["data.train"] = open_training(recipe.data.train, recipe.data.cache).fingerprint
            taken = {"init_from": recipe.init_from, "resume_from": recipe.resume_from}
        else:
            given = stage.label or stage.select or stage.evaluate
            taken = {key: getattr(given, key, None) for key in _TAKEN}
        for key, path in taken.items():
            if path is not None and self.maker(path) is None:
                data[key] = fingerprint(path)
        left = {name: self._digest(self.stage(name)) for name in self.references(stage)}
        return {"settings": self._settings(stage), "data": data, "stages": left}

    def _settings(self, stage: Stage) -> Any:
        """Returns the stage's own keys on which its result depends, as JSON."""
        if stage.train is not None:
            found = result_settings(self.recipe(stage))
            return json.loads(json.dumps({k: v for k, v in found.items() if k not in ("init_from", "resume_from")}))
        how = {"label": {"batch_size", "num_workers"}}
        return self._as_given(stage).model_dump(mode="json", exclude_none=True, exclude=how)

    def _as_given(self, stage: Stage) -> Stage:
        """Returns the stage as its file has it, with references."""
        return next(own for own in self.chain.stages if own.name == stage.name)

    def _digest(self, stage: Stage) -> str | None:
        """Returns the SHA-256 of the file that stands for a stage's whole output, as it holds all other files' hashes;
        None: there is no output.
        """
        path = stage.output(self.out)
        if stage.train is not None:
            path = (newest_checkpoint(path) or path) / COMPLETE
        elif stage.label is not None:
            path = path / "labels.json"
        return sha256_of(path) if path.is_file() else None


def fingerprint(path: str) -> str:
    """Returns the identity of what a chain takes from elsewhere: labels, a run, a checkpoint, a file, or a data set."""
    folder = Path(path)
    newest = newest_checkpoint(folder) or folder
    for file in (newest / COMPLETE, folder / COMPLETE, folder / "labels.json", folder / "model.safetensors", folder):
        if file.is_file() and file.suffix != ".tar":
            return sha256_of(file)
    return open_dataset(path).fingerprint


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Returns the values of the first map that the second one does not have, each with its path."""

    def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}" if path else key)
        else:
            yield path, value

    others = dict(leaves(theirs))
    return "; ".join(f"{p} {json.dumps(v)}" for p, v in leaves(ours) if others.get(p) != v) or "nothing more"
