"""Which samples to take: by a teacher's confidence, balanced over classes; by rank within a class; by true labels.

Everything here works on columns of numbers, a few bytes a sample, and reads soft labels shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.selection import Selection
from data_pipeline.datasets.soft_labels import SoftLabels
from data_pipeline.errors import DataError
from data_pipeline.order import keyed
from data_pipeline.order.order import Integers

Scores = NDArray[np.float16]

_SUBSET = 4  # what a key is for, beside those of order.py and mixture.py
_MERGED = 4_000_000  # candidates that are ranked at a time
_ROWS = 65_536  # read at a time


def confident(
    labels: SoftLabels, *, threshold: float, per_class: int | None, without: Integers | None = None
) -> Selection:
    """Predictions of more than `threshold`, as many of each predicted class; samples keep their soft labels.

    Xie et al. 2019 (arXiv:1911.04252), section 3.1: of a class with more than `per_class` the most confident are
    taken; one with fewer is filled by duplicates. The paper draws these at random; here each is repeated equally often,
    and the most confident once more where that does not come out even.

    Args:
        threshold: of the largest probability, as it is stored (fp16).
        per_class: M; None: all that are confident, once.
        without: indices of samples that are never taken, ascending.

    Raises:
        DataError: no prediction is as confident.
    """
    confidence = np.empty(labels.num_samples, np.float16)
    predicted = np.empty(labels.num_samples, np.int32)
    for start, classes, values in _chunks(labels):
        rows = slice(start, start + len(values))
        confidence[rows] = values.max(1)
        best = values.argmax(1)  # of equal ones the first: the smaller class, or the first of the k largest
        predicted[rows] = best if classes is None else np.take_along_axis(classes, best[:, None], 1)[:, 0]
    taken = np.flatnonzero(confidence.astype(np.float32) > threshold)
    taken = _without(taken, without)
    if not len(taken):
        raise DataError(
            where="--threshold",
            expected="some predictions above it",
            found=f"{threshold:g}, and none of {labels.num_samples}",
            fix="Lower it, or train the teacher for longer.",
        )
    if per_class is not None:
        taken = _balanced(taken, predicted, confidence, per_class)
    return Selection.of(
        taken,
        predicted[taken].astype(np.int64),
        keep_labels=False,
        rule={"kind": "confident", "threshold": threshold, "per_class": per_class},
        **_origin(labels),
    )


def ranked(labels: SoftLabels, *, top_k: int, per_sample: int, without: Integers | None = None) -> Selection:
    """The `top_k` samples of each class by the teacher's probability of it, labeled with that class.

    Yalniz et al. 2019 (arXiv:1905.00546), section 3: each sample is a candidate for its `per_sample` most probable
    classes (P, 10 in the paper), so that one may be listed under several. Of equal probabilities the sample with the
    smaller index ranks first. A class with fewer candidates has all of them.

    Args:
        without: indices of samples that are never taken, ascending.

    Raises:
        DataError: the labels keep fewer classes of a sample than it is to be ranked in, or no sample is left.
    """
    kept_classes = labels.described.top_k or labels.num_classes
    if kept_classes < min(per_sample, labels.num_classes):
        raise DataError(
            where="--per-image",
            expected=f"at most {kept_classes}, as {labels.folder} keeps that many of {labels.num_classes} classes",
            found=str(per_sample),
            fix=f"Give --per-image {kept_classes}, or label anew with --top-k {per_sample} or more.",
        )
    kept = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float16)
    waiting = [kept]
    least = np.full(labels.num_classes, -np.inf, np.float32)  # score that a candidate must exceed: of the last kept
    for start, classes, values in _chunks(labels):
        found = _candidates(start, classes, values, per_sample)
        found = tuple(column[found[2] > least[found[1]]] for column in found)  # type: ignore[assignment]
        if without is not None:
            inside = np.isin(found[0], without, invert=True)
            found = tuple(column[inside] for column in found)  # type: ignore[assignment]
        waiting.append(found)
        if sum(len(part[0]) for part in waiting) > _MERGED:
            waiting = [_first_of_each(waiting, top_k)]
            least = _least(waiting[0], labels.num_classes, top_k)
    indices, chosen, _ = _first_of_each(waiting, top_k)
    if not len(indices):
        raise DataError(where="--without", expected="some samples left to rank", found="none")
    return Selection.of(
        indices,
        chosen.astype(np.int64),
        keep_labels=True,
        rule={"kind": "ranked", "top_k": top_k, "per_sample": per_sample},
        **_origin(labels),
    )


def labeled(dataset: ShardDataset, *, per_class: int, seed: int, without: Integers | None = None) -> Selection:
    """`per_class` samples of each true label, drawn by the seed: how a small labeled set is made of a large one.

    Raises:
        DataError: there are no labels, or a class has fewer samples.
    """
    counts = dataset.label_counts
    if counts is None:
        raise DataError(where="SHARDS", expected="labels (`cls` members) to choose by", found="none")
    manifest = dataset.manifest
    true = np.concatenate([manifest.index(shard).labels for shard in range(len(manifest.names))])
    taken = _without(np.flatnonzero(true >= 0), without)
    drawn = keyed.key_of(_SUBSET, seed, taken)
    order = np.lexsort((drawn, true[taken]))
    taken = taken[order][_number_in_class(true[taken][order]) < per_class]
    found = np.bincount(true[taken], minlength=len(counts))
    if (found < per_class).any():
        scarce = int(found.argmin())
        name = dataset.classes[scarce] if dataset.classes is not None else str(scarce)
        raise DataError(
            where="--per-class", expected=f"at most {found[scarce]}, the samples of class {name}", found=str(per_class)
        )
    return Selection.of(
        taken,
        true[taken],
        keep_labels=True,
        num_classes=len(counts),
        data_fingerprint=dataset.fingerprint,
        labels_fingerprint=None,
        rule={"kind": "labelled", "per_class": per_class, "seed": seed},
    )


def _origin(labels: SoftLabels) -> dict[str, object]:
    return {
        "num_classes": labels.num_classes,
        "data_fingerprint": labels.described.data_fingerprint,
        "labels_fingerprint": labels.described.fingerprint,
        "classes": labels.classes,
    }


def _chunks(labels: SoftLabels) -> Iterator[tuple[int, NDArray[np.int32] | None, Scores]]:
    """(number of the first sample, classes [n, k] or None, probabilities [n, k]) of some rows of one shard."""
    first = 0
    for number, size in enumerate(labels.described.num_samples):
        shard = labels.shard(number)
        for start in range(0, size, _ROWS):
            rows = slice(start, min(start + _ROWS, size))
            yield first + start, None if shard.classes is None else shard.classes[rows], shard.values[rows]
        first += size


def _without(taken: Integers, without: Integers | None) -> Integers:
    return taken if without is None else taken[np.isin(taken, without, invert=True)]


def _balanced(taken: Integers, predicted: NDArray[np.int32], confidence: Scores, per_class: int) -> Integers:
    """Takes `per_class` samples of each class, the most confident first, and around again where they are too few."""
    order = np.lexsort((taken, -confidence[taken], predicted[taken]))
    taken = taken[order]
    _, first, counts = np.unique(predicted[taken], return_index=True, return_counts=True)
    at = first[:, None] + np.arange(per_class) % counts[:, None]
    balanced: Integers = taken[at.ravel()]
    return balanced


Columns = tuple[Integers, NDArray[np.int32], Scores]  # index of the sample, class, score


def _candidates(start: int, classes: NDArray[np.int32] | None, values: Scores, per_sample: int) -> Columns:
    """The most probable classes of each row; of equal ones the smaller."""
    if classes is None:
        columns = np.argsort(-values.astype(np.float32), axis=1, kind="stable")[:, :per_sample]
        classes, values = columns.astype(np.int32), np.take_along_axis(values, columns, 1)
    else:
        classes, values = classes[:, :per_sample], values[:, :per_sample]
    indices = np.repeat(start + np.arange(len(values)), values.shape[1])
    return indices, classes.ravel(), values.ravel()


def _first_of_each(parts: list[Columns], top_k: int) -> Columns:
    """The best of each class, [at most K * top_k]."""
    indices, classes, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((indices, -scores, classes))
    order = order[_number_in_class(classes[order]) < top_k]
    return indices[order], classes[order], scores[order]


def _least(kept: Columns, num_classes: int, top_k: int) -> NDArray[np.float32]:
    """Returns, for each class that is full, the lowest score kept; a later sample of the same score ranks behind it."""
    _, classes, scores = kept
    least = np.full(num_classes, np.inf, np.float32)
    np.minimum.at(least, classes, scores.astype(np.float32))
    return np.where(np.bincount(classes, minlength=num_classes) >= top_k, least, -np.inf).astype(np.float32)


def _number_in_class(classes: NDArray[np.integer]) -> Integers:
    """Counts, for each entry of a sorted column, how many equal ones come before it."""
    first = np.flatnonzero(np.diff(classes, prepend=-1))
    numbers: Integers = np.arange(len(classes)) - np.repeat(first, np.diff(np.append(first, len(classes))))
    return numbers
