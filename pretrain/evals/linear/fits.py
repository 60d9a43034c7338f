"""The ways in which linear classifiers are fitted: to features at hand, to those of augmented views, to the optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.datasets.selection import Subset
from pretrain.evals.classifiers.augmented import augmented_examples, augmented_views
from pretrain.evals.classifiers.heads import fit_each, train
from pretrain.evals.classifiers.logistic import fit_logistic
from pretrain.evals.classifiers.probes import Probes, statistics
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.task import Splits, Task


@dataclass(frozen=True)
class FitRequest:
    """What is to be fitted.

    Attributes:
        readouts: their numbers.
        settings: numbers of the settings of each.
        rows: numbers of the training samples to fit on, in any order; None: all.
        label: of the progress line.
    """

    readouts: Sequence[int]
    settings: Sequence[int]
    rows: Tensor | None
    label: str


@dataclass(frozen=True)
class Fitted:
    """The classifiers of each readout of a job, in the order of the settings, and what a reader should know."""

    probes: tuple[Probes, ...]
    notes: tuple[str, ...] = ()


Fit = Callable[[FitRequest], Fitted]


def choose_fit(
    config: LinearConfig, encoder: Encoder, task: Task, extraction: Extraction, splits: Sequence[Splits]
) -> Fit:
    """The way that the configuration asks for; `splits` has the features of each readout of the extraction."""
    num_classes, device = task.num_classes, encoder.device
    labels, numbers = splits[0].train.labels, splits[0].train.numbers
    numbers = torch.arange(len(labels)) if numbers is None else numbers  # in the data set

    def values(job: FitRequest) -> list[Tensor]:
        return [splits[i].train.values for i in job.readouts]

    def num_samples(job: FitRequest) -> int:
        return len(labels) if job.rows is None else len(job.rows)

    def to_features(job: FitRequest) -> Fitted:
        settings, training = [config.settings[i] for i in job.settings], config.training(num_samples(job))
        probes = fit_each(
            values(job), labels, settings, training,
            rows=job.rows, num_classes=num_classes, device=device, label=job.label,
        )  # fmt: skip
        return Fitted(probes)

    def to_views(job: FitRequest) -> Fitted:
        training = config.training(num_samples(job))
        rows = torch.arange(len(labels)) if job.rows is None else job.rows.sort().values
        examples = augmented_examples(
            encoder,
            Subset(task.train, numbers[rows].numpy(), labels[rows].bincount(minlength=num_classes).numpy()),
            replace(extraction, readouts=tuple(extraction.readouts[i] for i in job.readouts)),
            augmented_views(encoder, config.crop_scale),
            num_classes=num_classes,
            batch_size=training.batch_size,
            seed=config.seed,
        )
        return Fitted(
            train(
                examples,
                [statistics(v, job.rows) for v in values(job)],
                [config.settings[i] for i in job.settings],
                training,
                num_classes=num_classes,
                device=device,
                label=job.label,
            )
        )

    def to_the_optimum(job: FitRequest) -> Fitted:
        penalties = [config.inverse_penalties[i] for i in job.settings]
        found = [
            fit_logistic(v, labels, penalties, rows=job.rows, num_classes=num_classes, device=device, label=job.label)
            for v in values(job)
        ]
        return Fitted(tuple(o.probes for o in found), tuple(note for o in found for note in o.notes()))

    if config.solver == "lbfgs":
        return to_the_optimum
    return to_views if config.augment else to_features
