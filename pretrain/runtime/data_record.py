"""The data that belong to a run, as its folder keeps them in `data.json`: what it learns from and is measured on.

A curve is of one set of images. Where they lie may change between attempts, which images they are may not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import InputError
from data_pipeline.messages import short_list

FILE_NAME = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """Identities of data sets, as hex.

    Attributes:
        train: fingerprint of the training data.
        classes: names of its labels, by number; None: not known, or no label is learned from.
        measured_on: fingerprints of the sets of each curve, by its name: `data.val`, or that of an evaluation.
        by_number: whether labels without names are taken for the named ones of the same numbers, as they were when the
            run began; a run that begins now refuses them.
    """

    train: str
    classes: tuple[str, ...] | None = None
    measured_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_number: bool = False

    @classmethod
    def load(cls, run: Path) -> DataRecord | None:
        """What a run's folder says; None: it is of an older version, which did not.

        Raises:
            InputError: the file cannot be read.
        """
        path = run / FILE_NAME
        try:
            found = from_json(path.read_text("utf-8"))
            classes = None if found["classes"] is None else tuple(map(str, found["classes"]))
            measured_on = {str(name): tuple(map(str, sets)) for name, sets in found["measured_on"].items()}
            return cls(str(found["train"]), classes, measured_on, bool(found.get("by_number", False)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                where=str(path), expected="the record of a run's data", found=str(error) or repr(error),
                fix="Put it back from a copy, or move it away: the run then goes on without the comparison.",
            ) from error  # fmt: skip

    def save(self, run: Path) -> None:
        """Writes the file; curves that are not measured this time keep their sets, as they may go on one day."""
        kept, whole = DataRecord.load(run), self
        if kept is not None:
            measured_on = {**kept.measured_on, **self.measured_on}
            whole = replace(self, measured_on=measured_on, by_number=self.by_number or kept.by_number)
        with durable_file(run / FILE_NAME) as file:
            file.write(json.dumps(asdict(whole), indent=1).encode() + b"\n")

    def problems(self, kept: DataRecord, run: Path) -> list[str]:
        """Says which data are others than the run has had; empty: none. A curve that begins now is no problem."""
        found = []
        if kept.classes is not None and self.classes is not None and kept.classes != self.classes:
            shown = short_list(kept.classes, 3), short_list(self.classes, 3)
            found.append(f"data.train: expected classes numbered as this run has them, {shown[0]}, found {shown[1]}.")
        for name, sets in self.measured_on.items():
            before = kept.measured_on.get(name, sets)
            if before != sets:
                found.append(
                    f"{name}: expected the data that this run was measured on, with fingerprint {_shown(before)}, "
                    f"found others, {_shown(sets)}: its curve would be of two sets. Put the first back or leave {name} "
                    "out; to measure on the new ones start a run that goes on from this one: "
                    f"--out FOLDER --set resume_from={run}"
                )
        return found


def goes_by_number(run: Path) -> bool:
    """Whether a run in this folder takes labels without names by number: it is of an older version, or was then."""
    kept = DataRecord.load(run)
    return (run / "recipe.yaml").is_file() if kept is None else kept.by_number


def _shown(fingerprints: tuple[str, ...]) -> str:
    return " and ".join(f"{each[:12]}..." for each in fingerprints)
