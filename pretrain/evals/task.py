"""A labeled training and test set that belong together: what kNN and the linear probe are run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor

from data_pipeline.datasets.classes import Relabeled, match_classes
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import FieldError, InputError
from pretrain.evals.config import Pooling
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, Features, left_out_notes
from pretrain.evals.features.readout import OWN, Readout

OpenData = Callable[[str], Dataset]  # opens a data set by its path, or by its URL through a cache


@dataclass(frozen=True)
class Splits:
    """Features of the training and the test set.

    Attributes:
        train, test: each sample once.
        seconds: that each took.
        notes: what a reader of the report should know of them.
        left_out: for the report's `data`: how many samples of each set cannot be used; empty where all can.
        protocol: how they were computed.
    """

    train: Features
    test: Features
    seconds: dict[str, float]
    notes: tuple[str, ...]
    protocol: dict[str, object]
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Classification of `test` by what is learned on `train`.

    Attributes:
        train, test: data sets with labels; those of `test` are numbered as `train` has its classes, by their names.
        max_train, max_test: the first samples only; None: all.

    Raises:
        InputError: no labels, classes of `test` that `train` does not have, or names of them in one set alone.
    """

    train: Dataset
    test: Dataset
    max_train: int | None = None
    max_test: int | None = None

    def __post_init__(self) -> None:
        for name, dataset in (("training", self.train), ("test", self.test)):
            if dataset.label_counts is None or not dataset.label_counts.any():
                raise FieldError(
                    where=f"{name} set",
                    expected="labels",
                    found="none",
                    fix="Give two class folders or more, or shards with `cls` members.",
                )
        test = match_classes(self.test, self.train, "the test set", "the training set")
        object.__setattr__(self, "test", test)

    @property
    def num_train(self) -> int:
        return min(self.train.num_samples, self.max_train or self.train.num_samples)

    @property
    def num_test(self) -> int:
        return min(self.test.num_samples, self.max_test or self.test.num_samples)

    @property
    def num_classes(self) -> int:
        sizes = [len(d.label_counts) for d in (self.train, self.test) if d.label_counts is not None]
        return max(*sizes, len(self.train.classes or ()), len(self.test.classes or ()))

    def extract(self, encoder: Encoder, extraction: Extraction) -> Splits:
        """Features of both sets, of the first readout.

        Raises:
            InputError: the training samples are all of one class.
        """
        return self.extract_each(encoder, replace(extraction, readouts=extraction.readouts[:1]))[0]

    def extract_each(self, encoder: Encoder, extraction: Extraction) -> tuple[Splits, ...]:
        """Returns the features of every readout; raises as `extract` does."""
        start = perf_counter()
        train = extraction.extract(
            encoder, self.train, num_classes=self.num_classes, limit=self.max_train, label="features of train"
        )
        between = perf_counter()
        test = extraction.extract(
            encoder, self.test, num_classes=self.num_classes, limit=self.max_test, label="features of test"
        )
        seconds = {"features_train": between - start, "features_test": perf_counter() - between}
        said, counts = left_out_notes(train=train[0], test=test[0])
        notes = (*said, *self._notes(train[0], test[0]))
        return tuple(
            Splits(
                *pair, seconds, notes, _protocol(encoder, extraction, readout, width=pair[0].values.shape[1]), counts
            )
            for readout, pair in zip(extraction.readouts, zip(train, test, strict=True), strict=True)
        )

    def _notes(self, train: Features, test: Features) -> tuple[str, ...]:
        known, asked = set(train.labels.tolist()), set(test.labels.tolist())
        if len(known) < 2:
            raise InputError(
                where="training set",
                expected="samples of several classes",
                found=f"{len(train)} samples of class {known.pop()}",
                fix="Take more of it (--limit-train takes the first), or shards with classes mixed.",
            )
        notes = self.data_notes()
        if unknown := asked - known:
            num_lost = sum(label in unknown for label in test.labels.tolist())
            notes.append(
                f"{len(unknown)} of {len(asked)} classes have no training sample: "
                f"{num_lost} of {len(test)} test samples cannot be right"
            )
        return (*notes, *untested(test.labels, self.num_classes))

    def data_notes(self) -> list[str]:
        """Notes where labels were numbered anew, and where what is asked is what was learned."""
        numbered = [self.test.note] if isinstance(self.test, Relabeled) else []
        if self.train.fingerprint != self.test.fingerprint:
            return numbered
        return [
            *numbered,
            "the training and the test set are the same data: the number says nothing of images not seen before",
        ]

    def describe(self) -> dict[str, object]:
        """Identity and size of both sets, for the report."""
        classes = self.train.classes or self.test.classes
        return {
            "train": {
                "fingerprint": self.train.fingerprint,
                "n": self.num_train,
                "of": self.train.num_samples,
            },
            "test": {"fingerprint": self.test.fingerprint, "n": self.num_test, "of": self.test.num_samples},
            "num_classes": self.num_classes,
            "classes": list(classes) if classes is not None else None,
        }


def with_readouts(
    extraction: Extraction, poolings: Pooling | tuple[Pooling, ...], blocks: int | tuple[int, ...]
) -> Extraction:
    """The same extraction, of the features of each pooling with each number of last blocks."""
    poolings = poolings if isinstance(poolings, tuple) else (poolings,)
    blocks = blocks if isinstance(blocks, tuple) else (blocks,)
    others = [pooling for pooling in poolings if pooling != "own"]
    # The encoder's own pooling knows no blocks, and stands once beside others.
    own = [OWN] if others and len(others) < len(poolings) else []
    readouts = [*own, *(Readout(pooling, num) for pooling in others or poolings for num in blocks)]
    return replace(extraction, readouts=tuple(dict.fromkeys(readouts)))


def untested(labels: Tensor, num_classes: int) -> list[str]:
    """A note on classes that none of the test set's labels, [n], is of."""
    num_asked = len(set(labels.tolist()))
    return (
        [f"{num_classes - num_asked} of {num_classes} classes have no test sample"] if num_asked < num_classes else []
    )


def _protocol(encoder: Encoder, extraction: Extraction, readout: Readout, *, width: int) -> dict[str, object]:
    own = f"own: {getattr(encoder.module, 'global_pool', 'as the module pools')}"
    return {
        "pooling": own if readout == OWN else str(readout),
        "width": width,
        "precision": extraction.precision,
        "device": encoder.device.type,
    }
