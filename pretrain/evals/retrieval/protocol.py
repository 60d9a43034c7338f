"""Retrieval over a captioned set: for each image its captions among all, for each caption its images among all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from data_pipeline.batch import LeftOut
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import FieldError, InputError, PretrainError, SampleError
from data_pipeline.progress import track
from data_pipeline.samples.captions import read_captions
from data_pipeline.samples.config import Captions
from pretrain.evals.features.extract import Extraction, full_precision, left_out_notes
from pretrain.evals.features.pairs import TOWER_LIBRARIES, embed_texts, image_side
from pretrain.evals.features.store import Features
from pretrain.evals.result import EvalReport, make_outcomes, make_report
from pretrain.evals.retrieval.config import RetrievalConfig
from pretrain.evals.task import OpenData
from pretrain.evals.uncertainty import chance_of_recall
from pretrain.models.towers import Towers
from pretrain.monitoring.budgets import too_many_left_out

KS = (1, 5, 10)
SIMILARITY_BYTES = 256 * 2**20  # of one chunk of queries against all candidates


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5, 10 in both directions; the reported one is image to text at 1.

    Attributes:
        test: with captions, one or several an image.
        captions: where they are, as in a recipe.
        max_test: the first samples only; None: all.
        extraction: how images and texts are embedded.

    Raises:
        FieldError: no member of that name.
    """

    test: Dataset
    captions: Captions = field(default_factory=Captions)
    max_test: int | None = None
    extraction: Extraction = field(default_factory=Extraction)

    name = "retrieval"

    def __post_init__(self) -> None:
        if self.captions.field not in self.test.fields:
            raise FieldError(
                where="test set",
                expected=f"captions (`{self.captions.field}` members)",
                found=f"the fields {', '.join(self.test.fields) or '(none)'}",
                fix="Name the member with --caption-field.",
            )

    def run(self, towers: Towers) -> EvalReport:
        """Judges frozen towers on the device where they are; neither they nor any random state is changed.

        Images without a caption are left out, as those are that do not decode.

        Raises:
            RunError: more samples than `extraction.max_bad_samples` cannot be used.
            DataError: none can.
        """
        start = perf_counter()
        texts, pairs, silent = self._texts()
        vectors = embed_texts(towers, texts, self.extraction, label="embeddings of captions")
        between = perf_counter()
        (features,) = self.extraction.extract(
            image_side(towers), self.test, num_classes=None, limit=self.max_test, label="embeddings of images"
        )
        features = _without_silent(features, silent)
        if len(features.left_out) > self.extraction.max_bad_samples or not len(features):
            raise _too_many(features.left_out, self.extraction.max_bad_samples if len(features) else None)
        said, left_out = left_out_notes(test=features)
        images, device = features.values, towers.device
        if features.numbers is not None:  # texts of images that were left out go with them
            pairs, used = _without(pairs, features.numbers)
            vectors = vectors[used]
        text_ranks = ranks_of_own(images.to(device), vectors.to(device), pairs)
        image_ranks = ranks_of_own(vectors.to(device), images.to(device), pairs.flip(1))[pairs[:, 1]]
        seconds = {"texts": between - start, "images": perf_counter() - between}
        further = {f"image_to_text_r{k}": recall(text_ranks, k) for k in KS}
        further |= {f"text_to_image_r{k}": recall(image_ranks, k) for k in KS}
        return make_report(
            self.name,
            towers,
            make_outcomes(features.keys, torch.ones_like(text_ranks), (text_ranks < 1).long()),
            metric="image_to_text_r1",
            further=further,
            chance=chance(pairs, len(features), len(vectors)),
            other_means=[name for name in further if name.startswith("text_to_image")],
            protocol={
                "captions": self.captions.model_dump(),
                "similarity": "cosine; what is as near as the right one counts as nearer",
                "equal_captions": "are one text, which is right for every image that has it",
                "image_to_text": "share of images with one of their captions among the k nearest texts",
                "text_to_image": "share of captions, each as often as it stands, with an image of theirs among the "
                "k nearest",
                "outcomes": "of each image: 1 where the nearest text is one of its own, else 0",
                "precision": self.extraction.precision,
                "device": device.type,
            },
            data={
                "test": {"fingerprint": self.test.fingerprint, "n": len(features), "of": self.test.num_samples},
                "num_captions": len(pairs),
                "num_texts": len(vectors),
                **left_out,
            },
            seconds=seconds,
            notes=said,
            libraries=TOWER_LIBRARIES,
        )

    def _texts(self) -> tuple[list[str], Tensor, list[LeftOut]]:
        """Every text once, in the order of its first image; (image, text) of each caption, [P, 2] int64; and the
        samples that have none, or that cannot be read.
        """
        total = min(self.test.num_samples, self.max_test or self.test.num_samples)
        numbers: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        silent: list[LeftOut] = []
        where = (self.captions.field, self.captions.key)
        for i in track(range(total), label="reading captions", total=total):
            try:
                sample = self.test.read(i)
                captions = read_captions(sample.fields, sample.key, *where, lines=self.captions.lines)
            except SampleError as error:
                silent.append(LeftOut(i, *self.test.origin(i), str(error)))
                if len(silent) == total:
                    raise
                continue
            for caption in captions:
                pairs.append((i, numbers.setdefault(caption.strip(), len(numbers))))
        if not pairs:
            raise InputError(where="test set", expected="samples", found="none")
        if len(silent) > self.extraction.max_bad_samples:
            raise _too_many(silent, self.extraction.max_bad_samples)
        return list(numbers), torch.tensor(pairs), silent


def build(config: RetrievalConfig, extraction: Extraction, open_data: OpenData) -> Retrieval:
    """The evaluator of a config, whose data set `open_data` opens."""
    captions = Captions(field=config.caption_field, key=config.caption_key, lines=config.caption_lines)
    return Retrieval(open_data(config.test), captions, max_test=config.max_test, extraction=extraction)


def _without_silent(features: Features, silent: Sequence[LeftOut]) -> Features:
    """Features without the images that have no caption, which are named with those that were left out before."""
    if not silent:
        return features
    numbers = torch.arange(len(features)) if features.numbers is None else features.numbers
    mask = ~torch.isin(numbers, torch.tensor([one.row for one in silent]))
    keys = tuple(key for key, kept in zip(features.keys, mask.tolist(), strict=True) if kept)
    left_out = {one.row: one for one in (*silent, *features.left_out)}
    ordered = tuple(left_out[row] for row in sorted(left_out))
    return Features(features.values[mask], features.labels[mask], keys, ordered, numbers[mask])


def _too_many(left_out: Sequence[LeftOut], budget: int | None) -> PretrainError:
    one = left_out[0]
    return too_many_left_out(f"test set; {one.file}: {one.key}: {one.reason}", len(left_out), budget)


def _without(pairs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The (image, text) pairs of the images `numbers`, counted anew, and the texts that are left, [P', 2] and [T']."""
    kept = pairs[torch.isin(pairs[:, 0], numbers)]
    used, texts = torch.unique(kept[:, 1], return_inverse=True)
    return torch.stack([torch.searchsorted(numbers, kept[:, 0].contiguous()), texts], dim=1), used


def ranks_of_own(queries: Tensor, candidates: Tensor, pairs: Tensor, *, chunk: int | None = None) -> Tensor:
    """How many foreign candidates are at least as near to each query as the nearest of its own.

    Equals count against the query: vectors that are all the same find nothing.

    Args:
        queries: unit vectors, [Q, D].
        candidates: unit vectors, [C, D].
        pairs: (query, candidate) that belong together, [P, 2] int64; each query has one at least.
        chunk: queries compared at a time; None: as many as keep [chunk, C] small.

    Returns:
        [Q] int64 on the CPU; 0: one of its own is the nearest.
    """
    chunk = chunk or max(1, SIMILARITY_BYTES // (len(candidates) * candidates.element_size()))
    pairs = pairs.to(queries.device)
    ranks = []
    with full_precision():
        for first in range(0, len(queries), chunk):
            rows = queries[first : first + chunk]
            similarities = rows @ candidates.T
            inside = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + chunk)]
            own = torch.zeros_like(similarities, dtype=torch.bool)
            own[inside[:, 0] - first, inside[:, 1]] = True
            best = similarities.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            ranks.append(((similarities >= best) & ~own).sum(1).cpu())
    return torch.cat(ranks)


def chance(pairs: Tensor, num_images: int, num_texts: int) -> dict[str, float]:
    """What candidates drawn at random give, percent, by the name of the recall.

    Args:
        pairs: (image, text) of each caption, [P, 2] int64.
        num_images: which texts look for.
        num_texts: which images look for, each text once.
    """
    different = torch.unique(pairs, dim=0)
    texts, images = torch.bincount(different[:, 0]).tolist(), torch.bincount(different[:, 1])[pairs[:, 1]].tolist()
    return {
        **{f"image_to_text_r{k}": chance_of_recall(texts, num_texts, k) for k in KS},
        **{f"text_to_image_r{k}": chance_of_recall(images, num_images, k) for k in KS},
    }


def recall(ranks: Tensor, k: int) -> float:
    """Share of ranks below k, percent."""
    return 100 * (ranks < k).double().mean().item()
