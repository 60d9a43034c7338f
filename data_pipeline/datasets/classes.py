"""Where two sets of labels meet, the names of the classes decide which numbers mean the same.

A data set numbers its classes by itself, in the order of its folders or of the list it was indexed with, so that label
0 is a cat in one and a dog in another. Whoever brings two together (training and validation, the training and the test
set of an evaluation, the sources of a mixture, a teacher's labels and true ones) numbers one as the other has them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.datasets.dataset import Dataset, Part, Single, singles
from data_pipeline.errors import FieldError, SampleError
from data_pipeline.messages import short_list
from data_pipeline.order.order import Integers
from data_pipeline.shards.index import LABEL_FIELD

NOT_THERE = -1  # the number of a class that the other list has not; no sample is of it


class Relabeled(Single):
    """A data set whose labels are numbered as another list of classes has them. Hard labels change their number, soft
    ones are laid out anew, with zeros for classes that they do not know.

    Args:
        base: the data set; its classes have names.
        classes: names of labels 0, 1, ... as they are to be.
        where: what messages call the data set.
        like: what messages call the one with these classes.

    Raises:
        FieldError: a class that samples are of is not among `classes`, or a name stands for two numbers.
    """

    def __init__(self, base: Dataset, classes: tuple[str, ...], where: str, like: str) -> None:
        self.base, self.classes, self._where, self._like = base, classes, where, like
        self._numbers = _numbers(base, classes, where, like)
        self.num_samples, self.shard_sizes, self.fields = base.num_samples, base.shard_sizes, base.fields
        self.num_soft_classes = None if base.num_soft_classes is None else len(classes)
        self.label_counts: Integers | None = None
        if base.label_counts is not None:
            self.label_counts = np.zeros(len(classes), np.int64)
            occurring = np.flatnonzero(base.label_counts)
            self.label_counts[self._numbers[occurring]] = base.label_counts[occurring]
        self.fingerprint = base.fingerprint  # the same data
        digest = hashlib.sha256(json.dumps([base.state, self._numbers.tolist()]).encode())
        self.state = digest.hexdigest()  # under other labels

    @property
    def note(self) -> str:
        """A sentence for logs and reports."""
        found = f"{int((self._numbers != NOT_THERE).sum())} of its {len(self.classes)} classes"
        return f"labels of {self._where} are numbered by their names as in {self._like}: {found}"

    def beneath(self) -> tuple[Dataset, Integers | None]:
        return self.base.beneath()

    def read(self, i: int) -> Sample:
        sample = self.base.read(i)
        label = _own_label(sample)
        if label is None:
            return sample  # whoever needs one says what is wrong with it
        if isinstance(label, np.ndarray):
            row = np.zeros(len(self.classes), np.float32)
            row[self._numbers] = label
            return replace(sample, label=row)
        number = int(self._numbers[label]) if 0 <= label < len(self._numbers) else NOT_THERE
        if number == NOT_THERE:
            expected = f"one of the labels that were counted, numbered as in {self._like}"
            raise SampleError(where=f"{sample.key}.{LABEL_FIELD}", expected=expected, found=str(label))
        return replace(sample, label=number)

    def origin(self, i: int) -> tuple[str, str]:
        return self.base.origin(i)


def match_classes(dataset: Dataset, reference: Dataset, where: str, like: str, *, by_number: bool = False) -> Dataset:
    """Returns the data set with its labels numbered as `reference` has its classes; itself, where they are so already.

    Of two sets without names the numbers are taken for the same. Soft labels that were written without names are taken
    by number too, which `label_notes` says; elsewhere names against bare numbers are refused.

    Args:
        dataset: what is validated or tested on.
        reference: what is learned from.
        where, like: what messages call the two.
        by_number: whether labels without names are taken for the named ones of the same numbers.

    Raises:
        FieldError: classes that `reference` has not, or names on one side alone.
    """
    reference.check_classes()
    if not (_has_labels(dataset) and _has_labels(reference)):
        return dataset  # whoever needs labels says what lacks them
    ours, theirs = reference.classes, dataset.classes
    if ours is not None and theirs is not None:
        return dataset if ours == theirs else Relabeled(dataset, ours, where, like)
    if by_number:
        return dataset
    if ours is None and theirs is not None and _has_bare_numbers(reference):
        raise _names_on_one_side(where, theirs, like)
    if theirs is None and ours is not None and _has_bare_numbers(dataset):
        raise _names_on_one_side(like, ours, where)
    return dataset


def share_classes(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Numbers the labels of all sources as the first that has every class; as they are, where none has or all agree."""
    known = [part.dataset for part in parts if part.dataset.classes is not None]
    lists = list(dict.fromkeys(dataset.classes for dataset in known if dataset.classes is not None))
    if len(lists) < 2:
        return tuple(parts)
    for classes in lists:
        if not any(_misfits(dataset, classes) for dataset in known):
            like = next(part.name for part in parts if part.dataset.classes == classes)
            return tuple(
                part
                if part.dataset.classes in (None, classes)
                else part._replace(dataset=Relabeled(part.dataset, classes, part.name, like))
                for part in parts
            )
    return tuple(parts)


def check_shared_classes(parts: Sequence[Part], *, by_number: bool = False) -> None:
    """Raises FieldError where a label means two things: no source has the classes of all, or one has numbers alone,
    unless these are taken `by_number`.
    """
    known = [part for part in parts if part.dataset.classes is not None]
    lists = {part.dataset.classes for part in known}
    if len(lists) > 1:
        widest = max(known, key=lambda part: len(part.dataset.classes or ()))
        classes = widest.dataset.classes or ()
        other, misfits = next((part, found) for part in known if (found := _misfits(part.dataset, classes)))
        raise FieldError(
            where=f"labels of {widest.name} and {other.name}",
            expected="names of the classes of all sources in one of them, once each, as names decide which labels "
            "mean the same",
            found=f"{other.name} with {short_list(misfits, 5)}, which {widest.name} does not have so",
            fix="Correct the names (`classes` in manifest.json), convert them together, or train without labels and "
            "without online_probe.",
        )
    bare = [part for part in parts if _has_labels(part.dataset) and _has_bare_numbers(part.dataset)]
    if known and bare and not by_number:
        raise _names_on_one_side(known[0].name, known[0].dataset.classes or (), bare[0].name)


def label_notes(train: Dataset, val: Dataset | None) -> list[str]:
    """Sentences on labels that were numbered anew, and on those that meet names and have none themselves."""
    sets = _labeled_sets(train, val)
    notes = [dataset.note for dataset in sets.values() if isinstance(dataset, Relabeled)]
    if any(dataset.classes is not None for dataset in sets.values()):
        notes += [
            f"the soft labels of {name} do not name their classes: they are taken by number for those of the others"
            for name, dataset in sets.items()
            if dataset.classes is None and dataset.num_soft_classes is not None
        ]
    return notes + [
        f"the labels of {name} have no names: this run, begun when names did not decide, goes on taking them by number "
        "for those of the others"
        for name in taken_by_number(train, val)
    ]


def taken_by_number(train: Dataset, val: Dataset | None) -> list[str]:
    """What messages call the sets whose labels have no names where others' have: a new run refuses them."""
    sets = _labeled_sets(train, val)
    if all(dataset.classes is None for dataset in sets.values()):
        return []
    return [name for name, dataset in sets.items() if dataset.classes is None and _has_bare_numbers(dataset)]


def _labeled_sets(train: Dataset, val: Dataset | None) -> dict[str, Dataset]:
    """Each source of the training data, or that itself, and the validation data, as far as they have labels."""
    sets: dict[str, Dataset] = {part.name: part.dataset for part in train.parts} or {"data.train": train}
    sets |= {} if val is None else {"data.val": val}
    return {name: dataset for name, dataset in sets.items() if _has_labels(dataset)}


def _own_label(sample: Sample) -> int | NDArray[np.float32] | None:
    if sample.label is not None:
        return sample.label
    text = sample.fields.get(LABEL_FIELD)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _has_labels(dataset: Dataset) -> bool:
    return any(each.label_counts is not None or each.num_soft_classes is not None for each in singles(dataset))


def _has_bare_numbers(dataset: Dataset) -> bool:
    return any(each.classes is None and each.num_soft_classes is None for each in singles(dataset))


def _occurring(dataset: Dataset) -> list[str]:
    """Names of the classes that samples are of; of soft labels all, as each may have a share."""
    names = list(dataset.classes or ())
    if dataset.num_soft_classes is not None or dataset.label_counts is None:
        return names
    return [name for name, count in zip(names, dataset.label_counts.tolist(), strict=False) if count]


def _misfits(dataset: Dataset, classes: tuple[str, ...]) -> list[str]:
    """Names of a data set's classes that are not, or not once, in a list; empty: its labels can be numbered so."""
    if dataset.classes == classes:
        return []
    ours, theirs = Counter(classes), Counter(dataset.classes or ())
    return [name for name in dict.fromkeys(_occurring(dataset)) if ours[name] != 1 or theirs[name] != 1]


def _numbers(base: Dataset, classes: tuple[str, ...], where: str, like: str) -> NDArray[np.int64]:
    """The number in `classes` of each of a data set's own, [K]."""
    own = base.classes or ()
    if misfits := _misfits(base, classes):
        twice = [name for name in misfits if name in classes]
        raise FieldError(
            where=f"classes of {where} and {like}",
            expected=f"classes of {like} alone, each under one name, as names decide which labels mean the same",
            found=f"{short_list(twice, 5)} more than once"
            if twice
            else f"{short_list(misfits, 5)}, which {like} does not have ({short_list(classes, 5)})",
            fix="Correct the names (`classes` in manifest.json, or the folders'), or leave those samples out.",
        )
    place = {name: number for number, name in enumerate(classes)}
    occurring = set(_occurring(base))
    return np.array([place[name] if name in occurring else NOT_THERE for name in own], np.int64)


def _names_on_one_side(named: str, names: Sequence[str], bare: str) -> FieldError:
    return FieldError(
        where=f"classes of {named} and {bare}",
        expected="names in both, or in neither, as numbers alone may mean other classes",
        found=f"names in {named} alone: {short_list(names, 5)}",
        fix=f"Name those of {bare}: in its manifest.json a list `classes`, by number, or index it again with "
        "`pretrain data index SHARDS --classes FILE`.",
    )
