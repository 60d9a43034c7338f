"""Zero-shot classification: each class is a text, and an image belongs to the class whose text is nearest.

Radford et al. 2021 (arXiv:2103.00020), sections 3.1.2 and 3.1.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import FieldError, InputError
from data_pipeline.text_files import read_text
from pretrain.evals.features.extract import Extraction, full_precision, left_out_notes
from pretrain.evals.features.neighbors import nearest
from pretrain.evals.features.pairs import TOWER_LIBRARIES, embed_texts, image_side
from pretrain.evals.result import EvalReport, make_outcomes, make_report
from pretrain.evals.task import OpenData, untested
from pretrain.evals.zeroshot.config import ZeroShotConfig
from pretrain.models.towers import Towers

IMAGENET = "imagenet"
TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a blurry photo of a {}.",
        "a bright photo of a {}.",
        "a dark photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
    ),
    "openai": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}


@dataclass(frozen=True)
class Prompts:
    """Templates with one `{}` each, where the name of a class goes; `name` is what the report calls them."""

    name: str = "plain"
    templates: tuple[str, ...] = TEMPLATES["plain"]

    @classmethod
    def named(cls, given: str) -> Prompts:
        """A set of ours, or a file of the user's, a template a line.

        Raises:
            InputError: neither; or a line without exactly one `{}`.
        """
        if given in TEMPLATES:
            return cls(given, TEMPLATES[given])
        templates = nonempty_lines(Path(given), f"{' or '.join(TEMPLATES)}, or a file of templates")
        wrong = [line for line in templates if line.count("{}") != 1 or set("{}") & set(line.replace("{}", ""))]
        if wrong:
            raise InputError(
                where=given, expected="templates, one a line, each with {} once, for the class", found=repr(wrong[0])
            )
        return cls(given, templates)

    def texts(self, name: str) -> list[str]:
        return [template.replace("{}", name) for template in self.templates]


@dataclass(frozen=True)
class ZeroShot:
    """Top-1, top-5 and the mean over classes of a labeled test set, and top-1 of groups of its classes.

    Attributes:
        test: with labels, and names of its classes, unless they are given.
        prompts: what is said of a class.
        max_test: the first samples only; None: all.
        classes: names of labels 0, 1, ..., in place of the test set's own; None: those.
        groups: names of classes by what the group is called; top-1 of each group, and of all classes in none.
        extraction: how images and texts are embedded.

    Raises:
        InputError: no labels, no names of classes or too few or many, or a group with a name that is no class.
    """

    test: Dataset
    prompts: Prompts = field(default_factory=Prompts)
    max_test: int | None = None
    classes: Sequence[str] | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    extraction: Extraction = field(default_factory=Extraction)

    name = "zeroshot"

    def __post_init__(self) -> None:
        counts = self.test.label_counts
        if counts is None or not counts.any() or (self.classes is None and self.test.classes is None):
            raise FieldError(
                where="test set",
                expected="labels, and names of their classes",
                found="none" if self.test.classes is None else "names without labels",
                fix="Give class folders, shards whose manifest names the classes, or names (--classes).",
            )
        num_classes = len(self.test.classes or counts)
        if self.classes is not None and len(self.classes) != num_classes:
            raise InputError(
                where="--classes",
                expected=f"{num_classes} names, one for each class of the test set",
                found=str(len(self.classes)),
            )
        _refuse_names_elsewhere(self.classes, self.test.classes)
        for group, names in self.groups.items():
            unknown = [name for name in names if name not in self.names]
            if unknown or not names:
                raise InputError(
                    where=f"group {group}",
                    expected=f"classes of the test set, such as {self.names[0]!r}",
                    found=repr(unknown[0]) if unknown else "none",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of all classes, by their labels."""
        return tuple(self.classes or self.test.classes or ())

    def run(self, towers: Towers) -> EvalReport:
        """Judges frozen towers on the device where they are; neither they nor any random state is changed."""
        classes = self.names
        start = perf_counter()
        classifier = class_vectors(towers, classes, self.prompts, self.extraction)
        between = perf_counter()
        (features,) = self.extraction.extract(
            image_side(towers), self.test, num_classes=len(classes), limit=self.max_test, label="embeddings of images"
        )
        seconds = {"texts": between - start, "images": perf_counter() - between}
        with full_precision():
            ranked = nearest(features.values @ classifier.T, min(5, len(classes)))[1]
        said, left_out = left_out_notes(test=features)
        hits = ranked == features.labels.unsqueeze(1)
        top1 = hits[:, 0].double()
        further = {"mean_per_class": 100 * mean_per_class(top1, features.labels)}
        if len(classes) >= 5:
            further["top5"] = 100 * hits.any(1).double().mean().item()
        grouped = self._by_group(top1, features.labels)
        return make_report(
            self.name,
            towers,
            make_outcomes(features.keys, features.labels, ranked[:, 0]),
            metric="top1",
            further={**further, **grouped},
            other_means=("mean_per_class", *grouped),
            protocol={
                "templates": list(self.prompts.templates),
                "class_names": "the data set's" if self.classes is None else "given, as `data` has them",
                "class_vectors": "unit vectors of all templates, averaged, normalised",
                "similarity": "cosine; of equal ones the first class",
                "groups": {name: sorted(members) for name, members in self.groups.items()},
                "precision": self.extraction.precision,
                "device": towers.device.type,
            },
            data={
                "test": {
                    "fingerprint": self.test.fingerprint,
                    "n": len(features),
                    "of": self.test.num_samples,
                },
                "num_classes": len(classes),
                "classes": list(classes),
                **left_out,
            },
            seconds=seconds,
            notes=[*said, *untested(features.labels, len(classes)), *_alike(classes)],
            libraries=TOWER_LIBRARIES,
        )

    def _by_group(self, top1: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 over the samples of each group's classes; absent where the test set has none of them."""
        classes = self.names
        grouped = {name for members in self.groups.values() for name in members}
        all_groups: dict[str, set[str]] = {name: set(members) for name, members in self.groups.items()}
        if self.groups:
            all_groups["other classes"] = set(classes) - grouped
        found = {}
        for name, members in all_groups.items():
            chosen = torch.tensor([i for i, c in enumerate(classes) if c in members], dtype=torch.int64)
            of_group = torch.isin(labels, chosen)
            if of_group.any():
                found[f"top1 ({name})"] = 100 * top1[of_group].mean().item()
        return found


def build(config: ZeroShotConfig, extraction: Extraction, open_data: OpenData) -> ZeroShot:
    """The evaluator of a config, whose data set `open_data` opens.

    Raises:
        InputError: templates, names of classes or a group that are not there or not as expected.
    """
    return ZeroShot(
        open_data(config.test),
        Prompts.named(config.templates),
        max_test=config.max_test,
        classes=None if config.class_names is None else named_classes(config.class_names),
        groups=named_groups(config.group),
        extraction=extraction,
    )


def _refuse_names_elsewhere(given: Sequence[str] | None, own: Sequence[str] | None) -> None:
    """Names that are given take the place of a test set's own by their number, and may be other words for the same; one
    that the test set has too must stand for the same class.
    """
    for number, (name, known) in enumerate(zip(given or (), own or (), strict=False)):
        if name != known and own is not None and name in own:
            raise InputError(
                where="--classes",
                expected=f"names in the order of the test set's classes, where label {number} is {known!r}",
                found=f"{name!r} there, which is label {own.index(name)}",
                fix="Leave --classes out, or give the names in that order.",
            )


def named_groups(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of classes by the name of their group, from `NAME=FILE` of each group.

    Raises:
        InputError: another form, a name that stands twice, or no such file.
    """
    found: dict[str, tuple[str, ...]] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or name in found:
            raise InputError(where="--group", expected="NAME=FILE, each name once", found=pair)
        found[name] = nonempty_lines(Path(path), "a file of class names, one a line")
    return found


def named_classes(given: str) -> tuple[str, ...]:
    """`imagenet`: open_clip's names, in the order of sorted WordNet ids; or those of a file, one a line.

    Raises:
        InputError: neither.
    """
    return (
        tuple(IMAGENET_CLASSNAMES)
        if given == IMAGENET
        else nonempty_lines(Path(given), f"{IMAGENET}, or a file of names")
    )


def _alike(classes: Sequence[str]) -> list[str]:
    twice = [name for name, count in Counter(classes).items() if count > 1]
    return [f"several classes are called {', '.join(twice)}: the first of each is taken for all"] if twice else []


def class_vectors(towers: Towers, classes: Sequence[str], prompts: Prompts, extraction: Extraction) -> Tensor:
    """Unit vectors [K, D]: those of a class's prompts averaged, then normalized again."""
    texts = [text for name in classes for text in prompts.texts(name)]
    vectors = embed_texts(towers, texts, extraction, label="embeddings of classes")
    return F.normalize(vectors.view(len(classes), len(prompts.templates), -1).mean(dim=1), dim=1)


def nonempty_lines(path: Path, expected: str) -> tuple[str, ...]:
    """The lines of a text file that are not empty; InputError if there is none."""
    lines = tuple(line.strip() for line in read_text(path, expected).splitlines() if line.strip())
    if not lines:
        raise InputError(where=str(path), expected=expected, found="an empty file")
    return lines


def mean_per_class(top1: Tensor, labels: Tensor) -> float:
    """Over the classes that the test set has samples of."""
    counts = torch.bincount(labels)
    right = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, top1)
    return (right / counts)[counts > 0].mean().item()
