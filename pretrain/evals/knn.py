"""kNN: the label of a test image by the weighted votes of its nearest training images. Nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.read import Dataset
from pretrain.evals.base import EvalReport, Evaluator, classification_report
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import Extraction, full_precision
from pretrain.evals.task import Task
from pretrain.recipe import InlineKnn

SIMILARITY_BYTES = 256 * 2**20  # of one chunk of queries against the whole bank


class Knn(Evaluator):
    """Exact weighted kNN on the L2-normalised features of a frozen encoder.

    Wu et al. 2018 (arXiv:1805.01978), section 3.4: cosine similarity s, weights exp(s / temperature).

    Args:
        train: the bank.
        test: the queries.
        config: k and temperature of the reported value, and how many samples to take.
        sweep: further k, reported beside it.
        extraction: how features are computed.
    """

    name = "knn"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        config: InlineKnn,
        *,
        sweep: Sequence[int] = (),
        extraction: Extraction | None = None,
    ) -> None:
        self.task = Task(train, test, max_train=config.max_train, max_test=config.max_test)
        self.config = config
        self.ks = tuple(dict.fromkeys((config.k, *sweep)))
        self.extraction = extraction or Extraction()
        _check_ks(self.ks, self.task.num_train)

    def run(self, encoder: Encoder) -> EvalReport:
        splits = self.task.extract(encoder, self.extraction)
        start = perf_counter()
        device = encoder.device
        predicted = predict(
            splits.train.values.to(device),
            splits.train.labels,
            splits.test.values.to(device),
            ks=self.ks,
            temperature=self.config.temperature,
            num_classes=self.task.num_classes,
        )
        top1 = {k: 100 * (p == splits.test.labels).double().mean().item() for k, p in predicted.items()}
        return classification_report(
            self.name,
            encoder,
            self.task,
            splits,
            predicted=predicted[self.config.k],
            metric=f"top1_k{self.config.k}",
            further={f"top1_k{k}": value for k, value in top1.items()},
            protocol={
                "k": self.config.k,
                "sweep": sorted(self.ks),
                "temperature": self.config.temperature,
                "similarity": "cosine",
                "weights": "exp(similarity / temperature)",
            },
            seconds={"knn": perf_counter() - start},
        )


def predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Labels by weighted votes of the k nearest rows of the bank, for each k, in one pass.

    Of equally near rows the first in the bank is the nearer, of equal votes the smaller label wins.

    Args:
        bank: features, [N, D], normalised here.
        bank_labels: [N] int64, in [0, num_classes).
        queries: features, [Q, D], normalised here.
        ks: numbers of neighbours, each in [1, N].
        temperature: of the weights exp(cosine / temperature).
        num_classes: K.
        chunk: queries compared at a time; None: as many as keep [chunk, N] small.

    Returns:
        predicted labels by k, each [Q] int64 on the CPU.

    Raises:
        InputError: a k is larger than the bank.
    """
    _check_ks(ks, len(bank))
    bank = F.normalize(bank, dim=1)
    chunk = chunk or max(1, SIMILARITY_BYTES // (len(bank) * bank.element_size()))
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    with full_precision():
        for rows in torch.split(queries, chunk):
            similarities, neighbours = nearest(F.normalize(rows, dim=1) @ bank.T, max(ks))
            # In fp64 on the CPU: sums of votes do not depend on the device or on the order of its atomics.
            weights = (similarities.cpu().double() / temperature).exp()
            labels = bank_labels.cpu()[neighbours.cpu()]
            for k in ks:
                votes = torch.zeros(len(rows), num_classes, dtype=torch.float64)
                votes.scatter_add_(1, labels[:, :k], weights[:, :k])
                predicted[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64) for k, parts in predicted.items()}


def nearest(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in falling order; of equal ones the first column comes first.

    Args:
        similarities: [Q, N].
        k: in [1, N].

    Returns:
        values [Q, k] and columns [Q, k].
    """
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    # topk takes any of equal values. Inside the result a stable sort mends the order; where an equal was left
    # outside (the value after the last is the same), the row is sorted whole, which is rare.
    columns, by_column = columns.sort(dim=1)
    values, by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, by_value)
    if values.shape[1] > k:
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        if len(tied):
            sorted_values, sorted_columns = similarities[tied].sort(dim=1, descending=True, stable=True)
            values[tied, :k], columns[tied, :k] = sorted_values[:, :k], sorted_columns[:, :k]
    return values[:, :k], columns[:, :k]


def _check_ks(ks: Sequence[int], bank_size: int) -> None:
    too_large = [k for k in ks if not 1 <= k <= bank_size]
    if too_large:
        raise InputError(
            where="k",
            expected=f"between 1 and the {bank_size} training samples",
            found=", ".join(map(str, too_large)),
            fix="Choose smaller k, or take more training samples.",
        )
