"""Nearest class mean: a test image is of the class whose mean of training features is nearest. Nothing is chosen."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data_pipeline.datasets.dataset import Dataset
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.ncm.config import NcmConfig
from pretrain.evals.result import EvalReport, Evaluator, classification_report
from pretrain.evals.task import OpenData, Task, with_readouts

CHUNK = 2**14  # samples that are added up, or compared, at a time


class NearestClassMean(Evaluator):
    """Top-1 of the class with the nearest mean, by cosine, of a frozen encoder's features.

    With several ranks only the encoder's work is shared out.

    Args:
        train: whose samples make the means.
        test: what is classified.
        config: how many samples are taken.
        extraction: how features are computed.
    """

    name = "ncm"

    def __init__(
        self, train: Dataset, test: Dataset, config: NcmConfig, *, extraction: Extraction | None = None
    ) -> None:
        self.task = Task(train, test, max_train=config.max_train, max_test=config.max_test)
        self.extraction = extraction or Extraction()

    def run(self, encoder: Encoder) -> EvalReport:
        splits = self.task.extract(encoder, self.extraction)
        start = perf_counter()
        means = class_means(splits.train.values, splits.train.labels, self.task.num_classes)
        return classification_report(
            self.name,
            encoder,
            self.task,
            splits,
            predicted=nearest_mean(splits.test.values, means),
            metric="top1",
            further={},
            protocol={
                "means": "of each class's L2-normalized features, normalized again, in fp64",
                "similarity": "cosine; of equal ones the smaller label",
            },
            seconds={"ncm": perf_counter() - start},
        )


def build(config: NcmConfig, extraction: Extraction, open_data: OpenData) -> NearestClassMean:
    """The evaluator of a config, whose data sets `open_data` opens."""
    extraction = with_readouts(extraction, config.pooling, config.blocks)
    return NearestClassMean(open_data(config.train), open_data(config.test), config, extraction=extraction)


def class_means(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Directions of the classes' means, [K, D] fp64; NaN where a class has no sample.

    Args:
        values: features, [N, D]; may be mapped into memory, and are never copied as a whole.
        labels: [N] int64, in [0, num_classes).
        num_classes: K.
    """
    sums = torch.zeros(num_classes, values.shape[1], dtype=torch.float64)
    for part, own in zip(torch.split(values, CHUNK), torch.split(labels, CHUNK), strict=True):
        sums.index_add_(0, own, normalize(part.double(), dim=1))
    empty = torch.bincount(labels, minlength=num_classes) == 0
    return normalize(sums, dim=1).masked_fill(empty[:, None], torch.nan)  # directions of sums are those of means


def nearest_mean(values: Tensor, means: Tensor) -> Tensor:
    """Labels, [Q] int64, of features [Q, D]: of the nearest of the class means [K, D], a class without one apart."""
    similarities = (part.double() @ means.T for part in torch.split(values, CHUNK))
    return torch.cat([found.nan_to_num(nan=-torch.inf).argmax(dim=1) for found in similarities])
