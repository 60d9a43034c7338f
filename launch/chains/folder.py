"""What is kept of a chain in its folder: of what each stage was made, and what it left behind. Imports no torch.

`OUT/chain/NAME.json` is written before a stage starts, of what it is made; afterwards also what it left. A stage of
which all of that still holds is done; one whose inputs or settings are others than they were is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.datasets.mixture import open_training
from data_pipeline.datasets.read import open_dataset
from data_pipeline.durable import write_text
from data_pipeline.errors import InputError
from launch.chains.config import Chain, Stage, load_chain, overrides_of
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
    def of(cls, path: Path, out: Path | None) -> ChainFolder:
        """Of a chain's file; `out` None: `runs/<name>`."""
        chain = load_chain(path)
        return cls(chain, path.parent, out or Path("runs") / chain.name)

    @property
    def stages(self) -> list[Stage]:
        """With paths in the place of references."""
        outputs = {stage.name: stage.output(self.out) for stage in self.chain.stages}
        return [stage.filled(outputs) for stage in self.chain.stages]

    def stage(self, name: str) -> Stage:
        """With paths in the place of references.

        Raises:
            InputError: it has none of that name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(where=str(self.folder), expected=f"a stage {name}", found="none")

    def references(self, stage: Stage) -> list[str]:
        """Names of the stages that it takes from."""
        return self._as_given(stage).references()

    def freeze(self) -> ChainFolder:
        """A copy of the chain and its recipes in its folder, which later changes of the files do not reach."""
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
        return ChainFolder.of(frozen / "chain.yaml", self.out)

    def recipe(self, stage: Stage) -> Recipe:
        return load_recipe(self.folder / str(stage.train), overrides_of(stage))

    def maker(self, path: str) -> Stage | None:
        """The stage that leaves this path behind; None: it comes from elsewhere."""
        return next((stage for stage in self.stages if path == str(stage.output(self.out))), None)

    def refuse_other_settings(self, stage: Stage) -> None:
        """What can be compared before all that the stage takes from is there.

        Raises:
            InputError: it was begun with other settings.
        """
        try:
            kept = json.loads(self._record(stage).read_bytes())
        except FileNotFoundError:
            return
        if kept["settings"] != (settings := self._settings(stage)):
            raise self._other(stage, kept["settings"], settings)

    def is_done(self, stage: Stage, *, begin: bool = True) -> bool:
        """Whether a stage was finished, and all is as it was then. All that it takes from must be there.

        Args:
            begin: writes down what it is made of where it is new.

        Raises:
            InputError: it was begun with other settings or inputs, or what it left behind is another.
        """
        made_of, path = self._made_of(stage), self._record(stage)
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
        record = {**self._made_of(stage), "left": self._digest(stage)}
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

    def _made_of(self, stage: Stage) -> dict[str, Any]:
        """What decides the result of a stage. Where the chain's folder lies does not."""
        data: dict[str, str] = {}
        if stage.train is not None:
            recipe = self.recipe(stage)
            data["data.train"] = open_training(recipe.data.train, recipe.data.cache.spec()).fingerprint
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
        """All that its own keys say and its result depends on, as JSON."""
        if stage.train is not None:
            found = result_settings(self.recipe(stage))
            return json.loads(json.dumps({k: v for k, v in found.items() if k not in ("init_from", "resume_from")}))
        how = {"label": {"batch_size", "num_workers"}}
        return self._as_given(stage).model_dump(mode="json", exclude_none=True, exclude=how)

    def _as_given(self, stage: Stage) -> Stage:
        """With its references."""
        return next(own for own in self.chain.stages if own.name == stage.name)

    def _digest(self, stage: Stage) -> str | None:
        """SHA-256 of what stands for all that a stage left: hashes of hashes; None: there is nothing."""
        path = stage.output(self.out)
        if stage.train is not None:
            path = (newest_checkpoint(path) or path) / COMPLETE
        elif stage.label is not None:
            path = path / "labels.json"
        return sha256_of(path) if path.is_file() else None


def fingerprint(path: str) -> str:
    """Identity of what a chain takes from elsewhere: labels, a run, a checkpoint, a file, or a data set."""
    folder = Path(path)
    newest = newest_checkpoint(folder) or folder
    for file in (newest / COMPLETE, folder / COMPLETE, folder / "labels.json", folder / "model.safetensors", folder):
        if file.is_file() and file.suffix != ".tar":
            return sha256_of(file)
    return open_dataset(path).fingerprint


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The leaves of the first that the second has not."""

    def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}" if path else key)
        else:
            yield path, value

    others = dict(leaves(theirs))
    return "; ".join(f"{p} {json.dumps(v)}" for p, v in leaves(ours) if others.get(p) != v) or "nothing more"
