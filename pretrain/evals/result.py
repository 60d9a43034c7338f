"""What every evaluation gives back, how it is kept, and how two of them are compared."""

from __future__ import annotations

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import InputError
from data_pipeline.url_secrets import tree_without_secrets
from pretrain.evals.uncertainty import (
    OVER_SAMPLES,
    Bounds,
    Interval,
    chance_of_classes,
    paired_interval,
    share_intervals,
)
from pretrain.runtime.versions import LIBRARIES, of

if TYPE_CHECKING:  # who reads and compares reports needs no torch
    from torch import Tensor

    from pretrain.evals.encoder import Encoder
    from pretrain.evals.task import Splits, Task

FORMAT = 1


@dataclass(frozen=True)
class Outcomes:
    """What became of each test sample, sorted by key, so that reports can be compared sample by sample."""

    keys: tuple[str, ...]
    labels: NDArray[np.int32]  # [n]
    predicted: NDArray[np.int32]  # [n]

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.equal(self.labels, self.predicted)


@dataclass(frozen=True)
class EvalReport:
    """A number, and all that is needed to get it again.

    Attributes:
        evaluator: knn, linear, ...
        metric: the reported one of `metrics`.
        value: its value, percent.
        n: test samples that it is a mean over.
        metrics: all that was measured, percent.
        encoder: where the encoder comes from; its `tag` stands in file names.
        protocol: everything that was chosen, preprocessing included.
        data: identity and size of the data sets, and their classes.
        seeds: by what they were for.
        weights_sha256: of the encoder (`Encoder.weights_sha256`).
        versions: of what computed it.
        seconds: by part.
        notes: what a reader should know; empty where all is as it should be.
        outcomes: of each test sample; of the first seed, where there are several.
        by_seed: the value of each seed, where `value` is their mean; empty where there is one.
        spread: standard deviation of `by_seed`, points of percent; None where there is one.
        arguments: those of the command, where one was given; they say how to ask, not what was asked.
        chance: what guessing gives, percent, by metric; one that is missing has none, or an older report said none.
        intervals: low and high end of the 95 % interval, percent, by metric; missing likewise.
        interval_over: what the intervals are over.
    """

    evaluator: str
    metric: str
    value: float
    n: int
    metrics: Mapping[str, float]
    encoder: Mapping[str, object]
    protocol: Mapping[str, object]
    data: Mapping[str, object]
    seeds: Mapping[str, int]
    weights_sha256: str
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    notes: Sequence[str]
    outcomes: Outcomes
    by_seed: Sequence[float] = field(default_factory=list)
    spread: float | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Bounds] = field(default_factory=dict)
    interval_over: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the outcomes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "outcomes"}

    @property
    def file_name(self) -> str:
        """The same for the same question, so that asking again replaces the answer and nothing else."""
        question = [self.protocol, self.data, self.seeds, self.weights_sha256]
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return f"{self.evaluator}-{self.encoder['tag']}-{digest[:8]}.json"

    def save(self, path: Path) -> None:
        """Writes `path` (JSON) and, beside it under .safetensors, the outcomes.

        Keys that come from names of files need not be UTF-8: their bytes are kept as they are.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer("\0".join(self.outcomes.keys).encode("utf-8", "surrogateescape"), np.uint8)
        tensors = {"keys": keys, "labels": self.outcomes.labels, "predicted": self.outcomes.predicted}
        with durable_file(path.with_suffix(".safetensors")) as file:
            file.write(save(tensors))
        with durable_file(path) as file:
            file.write(json.dumps({"format": FORMAT, **self.to_json()}, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path, *, alone: bool = False) -> EvalReport:
        """Reads a report. Secrets of URLs are left out, as parts of what it says get into names and tables.

        Args:
            path: of the JSON file.
            alone: whether the outcomes may be missing, which then are none.

        Raises:
            InputError: no report, one of another format, or its outcomes are missing.
        """
        beside = path.with_suffix(".safetensors")
        try:
            described = tree_without_secrets(from_json(path.read_text("utf-8")))
            if described.pop("format") != FORMAT:
                raise ValueError(f"another format than {FORMAT}")
            if alone and not beside.exists():
                none = np.zeros(0, np.int32)
                return cls(**described, outcomes=Outcomes((), none, none))
            tensors = load(beside.read_bytes())
            keys = tuple(tensors["keys"].tobytes().decode("utf-8", "surrogateescape").split("\0"))
            outcomes = Outcomes(keys, tensors["labels"], tensors["predicted"])
            return cls(**described, outcomes=outcomes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(
                where=str(path),
                expected="a report of `pretrain eval`, with its .safetensors beside it",
                found=f"{type(error).__name__}: {error}",
            ) from error


class Evaluator(ABC):
    """One protocol. It never sees an objective or the engine."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, encoder: Encoder) -> EvalReport:
        """Judges a frozen encoder on the device where it is; neither it nor any random state is changed."""


class JudgedModel(Protocol):
    """What a report says of an encoder, or of two towers."""

    @property
    def tag(self) -> str: ...
    @property
    def description(self) -> Mapping[str, object]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    def described_preprocessing(self) -> dict[str, object]: ...
    def weights_sha256(self) -> str: ...


def make_outcomes(keys: Sequence[str], labels: Tensor, predicted: Tensor) -> Outcomes:
    """Makes the outcomes of samples in any order; labels and predicted [n] int64."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Outcomes(
        keys=tuple(keys[i] for i in order),
        labels=labels.numpy()[order].astype(np.int32),
        predicted=predicted.numpy()[order].astype(np.int32),
    )


def make_report(
    evaluator: str,
    judged: JudgedModel,
    outcomes: Outcomes,
    *,
    metric: str,
    further: Mapping[str, float],
    protocol: Mapping[str, object],
    data: Mapping[str, object],
    seconds: Mapping[str, float],
    seeds: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    libraries: Sequence[str] = LIBRARIES,
    chance: Mapping[str, float] | None = None,
    other_means: Collection[str] = (),
) -> EvalReport:
    """The report of the share of right outcomes, percent, called `metric`; `further` are other measures.

    Args:
        chance: of each metric; None: of guessing among the `num_classes` of `data`.
        other_means: those of `further` that are no shares of the test samples, for which no interval is given.
    """
    value = 100 * float(outcomes.correct.mean())
    described = dict(judged.description)
    init_seed = {"init": described["init_seed"]} if "init_seed" in described else {}
    metrics, n = {**further, metric: value}, len(outcomes.keys)
    shares = {name: share for name, share in metrics.items() if name not in other_means}
    return EvalReport(
        evaluator=evaluator,
        metric=metric,
        value=value,
        n=n,
        metrics=metrics,
        encoder={"tag": judged.tag, **described},
        protocol={**protocol, "preprocessing": judged.described_preprocessing()},
        data=data,
        seeds={**init_seed, **(seeds or {})},  # type: ignore[dict-item]
        weights_sha256=judged.weights_sha256(),
        versions={"python": platform.python_version(), **of(libraries)},
        seconds=seconds,
        notes=[*judged.notes, *notes],
        outcomes=outcomes,
        chance=chance_of_classes(metrics, int(data["num_classes"])) if chance is None else chance,  # type: ignore[call-overload]
        intervals=share_intervals(shares, n),
        interval_over=OVER_SAMPLES,
    )


def classification_report(
    evaluator: str,
    encoder: Encoder,
    task: Task,
    splits: Splits,
    *,
    predicted: Tensor,
    metric: str,
    further: Mapping[str, float],
    protocol: Mapping[str, object],
    seconds: Mapping[str, float],
    seeds: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> EvalReport:
    """The report of the top-1 accuracy of `predicted` labels, [n] int64, of the test set in its order.

    It is called `metric`; `further` are other measures, percent.
    """
    return make_report(
        evaluator,
        encoder,
        make_outcomes(splits.test.keys, splits.test.labels, predicted),
        metric=metric,
        further=further,
        protocol={**protocol, "features": splits.protocol},
        data={**task.describe(), **splits.left_out},
        seconds={**splits.seconds, **seconds},
        seeds=seeds,
        notes=[*splits.notes, *notes],
    )


def compare(a: EvalReport, b: EvalReport) -> Interval:
    """`paired_interval` of two reports.

    Raises:
        InputError: they are not of the same test samples.
    """
    if a.outcomes.keys != b.outcomes.keys or not _same_labels(a, b):
        shared = len(set(a.outcomes.keys) & set(b.outcomes.keys))
        raise InputError(
            where="the two reports",
            expected="the same test samples with the same labels",
            found=f"{a.n} and {b.n} samples, {shared} keys of which are in both",
            fix="Judge both on the same test set, with the same --limit-test.",
        )
    return paired_interval(a.outcomes.correct, b.outcomes.correct)


def _same_labels(a: EvalReport, b: EvalReport) -> bool:
    """Whether the labels of the same samples in two reports are equal, or else the names of their classes, which each
    training set numbers its own way.
    """
    if np.array_equal(a.outcomes.labels, b.outcomes.labels):
        return True
    one, other = (_label_names(report) for report in (a, b))
    return one is not None and one == other


def _label_names(report: EvalReport) -> list[str] | None:
    names, labels = report.data.get("classes"), report.outcomes.labels.tolist()
    return [names[label] for label in labels] if isinstance(names, list) and max(labels) < len(names) else None
