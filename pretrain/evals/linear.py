"""Linear probe: logistic regression on frozen features; the best of many settings, tested once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

import torch

from data_pipeline.errors import InputError, RunError
from data_pipeline.read import Dataset
from pretrain.evals.base import EvalReport, Evaluator, classification_report
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import Extraction, Features, full_precision
from pretrain.evals.probes import LR_BATCH, Probes, fit, scores, topk_share
from pretrain.evals.task import Task

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class LinearConfig:
    """The grid and how each of its settings is trained.

    Attributes:
        learning_rates: for a batch of 256; scaled linearly with the batch. DINOv2's 13 (arXiv:2304.07193).
        weight_decays: of the weights, never of the biases; each goes with each learning rate.
        batch_size: samples of a step, at most the training set.
        epochs, min_steps: steps are those of so many epochs, but no fewer than min_steps.
        val_share: share of the training set on which the setting is chosen.
        seed: of that split and of the order of samples.
        max_train, max_test: the first samples only.
    """

    learning_rates: tuple[float, ...] = DINOV2_LEARNING_RATES
    weight_decays: tuple[float, ...] = (0.0,)
    batch_size: int = 1024
    epochs: int = 10
    min_steps: int = 5000
    val_share: float = 0.1
    seed: int = 0
    max_train: int | None = None
    max_test: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (
                "learning_rates",
                all(0 < lr < math.inf for lr in self.learning_rates),
                "finite numbers above 0",
            ),
            (
                "weight_decays",
                all(0 <= wd < math.inf for wd in self.weight_decays),
                "finite numbers of at least 0",
            ),
            ("learning_rates", bool(self.learning_rates), "at least one"),
            ("weight_decays", bool(self.weight_decays), "at least one"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("epochs", self.epochs >= 0, "at least 0"),
            ("min_steps", self.min_steps >= 1, "at least 1"),
            ("val_share", 0 < self.val_share < 1, "a share between 0 and 1"),
        )
        for field, holds, expected in checks:
            if not holds:
                raise InputError(where=f"linear.{field}", expected=expected, found=str(getattr(self, field)))

    @property
    def settings(self) -> tuple[tuple[float, float], ...]:
        """All pairs of a learning rate and a weight decay."""
        return tuple((lr, wd) for wd in self.weight_decays for lr in self.learning_rates)

    def num_steps(self, num_samples: int) -> int:
        return max(self.min_steps, self.epochs * math.ceil(num_samples / self.batch_size))


@dataclass(frozen=True)
class Choice:
    """The setting that did best on the held-out part of the training set."""

    learning_rate: float
    weight_decay: float
    val_top1: tuple[float | None, ...]  # percent, by setting; None: diverged
    num_fit: int
    num_val: int


class Linear(Evaluator):
    """A linear classifier: chosen on a split of the training set, retrained on all of it, tested once.

    Features are standardised by mean and deviation of what is fitted on: the batch norm without affine of
    MAE's probe (arXiv:2111.06377) with fixed statistics. The grid, trained side by side, is DINOv2's.
    """

    name = "linear"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        config: LinearConfig | None = None,
        *,
        extraction: Extraction | None = None,
    ) -> None:
        self.config = config or LinearConfig()
        self.task = Task(train, test, max_train=self.config.max_train, max_test=self.config.max_test)
        self.extraction = extraction or Extraction()
        if self.task.num_train < 2:
            raise InputError(
                where="training set",
                expected="samples to fit on and others to choose on",
                found="a single one",
            )

    def run(self, encoder: Encoder) -> EvalReport:
        splits = self.task.extract(encoder, self.extraction)
        start = perf_counter()
        train, test = splits.train.to(encoder.device), splits.test.to(encoder.device)
        with full_precision():
            choice = choose(train, self.config, num_classes=self.task.num_classes)
            probe = self._retrain(train, choice)
            logits = probe.logits(test.values).squeeze(2).cpu()
        top5 = {"top5": 100 * topk_share(logits, splits.test.labels, 5)} if self.task.num_classes >= 10 else {}
        return classification_report(
            self.name,
            encoder,
            self.task,
            splits,
            predicted=logits.argmax(dim=1),
            metric="top1",
            further=top5,
            protocol=self._protocol(choice),
            seconds={"linear": perf_counter() - start},
            seeds={"linear": self.config.seed},
            notes=self._notes(choice),
        )

    def _retrain(self, train: Features, choice: Choice) -> Probes:
        probe = fit(
            train.values,
            train.labels,
            [(choice.learning_rate, choice.weight_decay)],
            num_classes=self.task.num_classes,
            num_steps=self.config.num_steps(len(train)),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            label="linear probe: retraining",
        )
        if not probe.weight.isfinite().all():
            raise RunError(
                where="linear probe",
                expected="finite weights after retraining on the whole training set",
                found=f"none at learning rate {choice.learning_rate:g}",
                fix="Leave out the largest learning rates.",
            )
        return probe

    def _protocol(self, choice: Choice) -> dict[str, object]:
        num_train = self.task.num_train
        return {
            "classifier": "multinomial logistic regression",
            "standardised": "per feature, by mean and deviation of the samples that are fitted on",
            "optimizer": "SGD, momentum 0.9, cosine to 0; weights from 0, biases without decay",
            "batch_size": min(self.config.batch_size, num_train),
            "num_steps": self.config.num_steps(num_train),
            "learning_rates": list(self.config.learning_rates),
            "learning_rates_are_for_batch": LR_BATCH,
            "weight_decays": list(self.config.weight_decays),
            "chosen_on": f"{choice.num_val} random training samples, fitted on the other {choice.num_fit}",
            "val_top1": [
                {"learning_rate": lr, "weight_decay": wd, "value": value}
                for (lr, wd), value in zip(self.config.settings, choice.val_top1, strict=True)
            ],
            "learning_rate": choice.learning_rate,
            "weight_decay": choice.weight_decay,
            "retrained": "on all training samples, with the chosen setting",
        }

    def _notes(self, choice: Choice) -> list[str]:
        rates = self.config.learning_rates
        edges = {min(rates): "smallest", max(rates): "largest"} if len(rates) > 1 else {}
        return [
            f"the chosen learning rate {rate:g} is the {word} of the grid; a wider grid may do better"
            for rate, word in edges.items()
            if choice.learning_rate == rate
        ]


def choose(train: Features, config: LinearConfig, *, num_classes: int) -> Choice:
    """Fits every setting on one part of the training set; on the other the best top-1 wins, then the loss.

    Raises:
        RunError: every setting diverged.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    num_val = min(len(train) - 1, max(1, round(config.val_share * len(train))))
    val, rest = order[:num_val].to(train.labels.device), order[num_val:].to(train.labels.device)
    probes = fit(
        train.values[rest],
        train.labels[rest],
        config.settings,
        num_classes=num_classes,
        num_steps=config.num_steps(len(rest)),
        batch_size=config.batch_size,
        seed=config.seed,
        label=f"linear probe: {len(config.settings)} settings",
    )
    top1, loss = (values.tolist() for values in scores(probes, train.values[val], train.labels[val]))
    finite = [s for s in range(len(loss)) if math.isfinite(loss[s])]
    if not finite:
        raise RunError(
            where="linear probe",
            expected="a setting that does not diverge",
            found=f"{len(loss)} that did",
            fix="Add smaller learning rates.",
        )
    learning_rate, weight_decay = config.settings[min(finite, key=lambda s: (-top1[s], loss[s]))]
    return Choice(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        val_top1=tuple(100 * top1[s] if s in finite else None for s in range(len(loss))),
        num_fit=len(rest),
        num_val=num_val,
    )
