"""kNN: the label of a test image by the weighted votes of its nearest training images. Nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import InputError
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.features.neighbors import search
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.result import EvalReport, Evaluator, classification_report
from pretrain.evals.task import OpenData, Task, with_readouts

VOTES = 2**22  # counted at a time: 32 MiB


class Knn(Evaluator):
    """Exact weighted kNN on the L2-normalized features of a frozen encoder.

    Wu et al. 2018 (arXiv:1805.01978), section 3.4: cosine similarity s, weights exp(s / temperature).

    With extraction.world_size > 1 each rank searches a slice of the bank, and all find the same.

    Args:
        train: the bank.
        test: the queries.
        config: every k with every temperature, and how many samples to take.
        extraction: how features are computed.
    """

    name = "knn"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        config: KnnConfig,
        *,
        extraction: Extraction | None = None,
    ) -> None:
        self.task = Task(train, test, max_train=config.max_train, max_test=config.max_test)
        self.ks, self.temperatures = config.ks, config.temperatures
        self.extraction = extraction or Extraction()
        _check_ks(self.ks, self.task.num_train)

    def run(self, encoder: Encoder) -> EvalReport:
        splits = self.task.extract(encoder, self.extraction)
        start = perf_counter()
        predicted = predict(
            splits.train.values,
            splits.train.labels,
            splits.test.values,
            ks=self.ks,
            temperatures=self.temperatures,
            num_classes=self.task.num_classes,
            device=encoder.device,
            rank=self.extraction.rank,
            world_size=self.extraction.world_size,
        )
        right = {asked: (found == splits.test.labels).double() for asked, found in predicted.items()}
        return classification_report(
            self.name,
            encoder,
            self.task,
            splits,
            predicted=predicted[self.ks[0], self.temperatures[0]],
            metric=self._metric(self.ks[0], self.temperatures[0]),
            further={self._metric(*asked): 100 * share.mean().item() for asked, share in right.items()},
            protocol={
                "k": self.ks[0],
                "sweep": sorted(self.ks),
                "temperature": self.temperatures[0],
                "temperatures": sorted(self.temperatures),
                "similarity": "cosine",
                "weights": "exp(similarity / temperature)",
                "ties": "of equally near ones the first of the bank, of equal votes the smaller label",
            },
            seconds={"knn": perf_counter() - start},
        )

    def _metric(self, k: int, temperature: float) -> str:
        return f"top1_k{k}" if temperature == self.temperatures[0] else f"top1_k{k}_t{temperature}"


def build(config: KnnConfig, extraction: Extraction, open_data: OpenData) -> Knn:
    """The evaluator of a config, whose data sets `open_data` opens."""
    extraction = with_readouts(extraction, config.pooling, config.blocks)
    return Knn(open_data(config.train), open_data(config.test), config, extraction=extraction)


def predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[tuple[int, float], Tensor]:
    """Labels by weighted votes of the k nearest rows of the bank, for each k and temperature, from one search.

    Of equally near rows the first in the bank is the nearer, of equal votes the smaller label wins.

    Args:
        bank: features, [N, D].
        bank_labels: [N] int64, in [0, num_classes).
        queries: features, [Q, D].
        ks: numbers of neighbours, each in [1, N].
        temperatures: of the weights exp(cosine / temperature).
        num_classes: K.
        device, rank, world_size: as `neighbours.search` takes them.

    Returns:
        predicted labels by (k, temperature), each [Q] int64 on the CPU.

    Raises:
        InputError: a k is larger than the bank.
    """
    _check_ks(ks, len(bank))
    cosines, rows = search(bank, queries, max(ks), device=device, rank=rank, world_size=world_size)
    labels = bank_labels.cpu()[rows]
    chunk = max(1, VOTES // num_classes)
    predicted: dict[tuple[int, float], Tensor] = {}
    for temperature in temperatures:
        # Relative to the nearest one's, so that none overflows; in fp64 on the CPU, added in the order of nearness.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        pairs = zip(torch.split(labels, chunk), torch.split(weights, chunk), strict=True)
        parts = [_votes(*pair, ks, num_classes) for pair in pairs]
        for k in ks:
            predicted[k, temperature] = torch.cat([part[k] for part in parts])
    return predicted


def _votes(labels: Tensor, weights: Tensor, ks: Sequence[int], num_classes: int) -> dict[int, Tensor]:
    """By k, the labels [q] with the most votes among the first k of `labels` [q, max(ks)] with their `weights`."""
    votes = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    elected, counted = {}, 0
    for k in sorted(set(ks)):
        votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
        elected[k], counted = votes.argmax(dim=1), k
    return elected


def _check_ks(ks: Sequence[int], bank_size: int) -> None:
    too_large = [k for k in ks if not 1 <= k <= bank_size]
    if too_large:
        raise InputError(
            where="k",
            expected=f"between 1 and the {bank_size} training samples",
            found=", ".join(map(str, too_large)),
            fix="Choose smaller k, or take more training samples.",
        )
