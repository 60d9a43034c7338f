"""Linear probe: logistic regression on frozen features; the best of many settings, tested once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import InputError, RunError
from pretrain.evals.classifiers.probes import Probes, scores, topk_share
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, full_precision
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.description import describe
from pretrain.evals.linear.fits import Fit, FitRequest, choose_fit
from pretrain.evals.result import EvalReport, Evaluator, classification_report
from pretrain.evals.task import OpenData, Splits, Task, with_readouts
from pretrain.runtime.collectives import from_main

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """The readout and the setting that did best on the held-out part of the training set, by their numbers.

    Attributes:
        val_top1: percent, by readout and setting; None: diverged. Empty where there was nothing to choose.
        num_fit, num_val: samples that settings were fitted on, and those that they were judged on.
        notes: what a reader should know of those fits.
    """

    readout: int
    setting: int
    val_top1: tuple[tuple[float | None, ...], ...]
    num_fit: int
    num_val: int
    notes: tuple[str, ...] = ()


class Linear(Evaluator):
    """A linear classifier: chosen on a split of the training set, retrained on all of it, tested once.

    Features are standardized by mean and deviation of what is fitted on: the batch norm without affine of
    MAE's probe (arXiv:2111.06377) with fixed statistics. The grid, trained side by side, is DINOv2's.

    With several ranks each of them trains the same classifiers, on the same features; only the encoder's work is
    shared out.
    """

    name = "linear"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        config: LinearConfig,
        *,
        extraction: Extraction | None = None,
    ) -> None:
        self.config = config
        self.task = Task(train, test, max_train=self.config.max_train, max_test=self.config.max_test)
        self.extraction = extraction or Extraction()
        if self.task.num_train < 2:
            raise InputError(
                where="training set",
                expected="samples to fit on and others to choose on",
                found="a single one",
            )

    def run(self, encoder: Encoder) -> EvalReport:
        splits = self.task.extract_each(encoder, self.extraction)
        start = perf_counter()
        with full_precision():
            fit = choose_fit(self.config, encoder, self.task, self.extraction, splits)
            choice = self._agreed(self._choose(fit, splits))
            chosen = splits[choice.readout]
            fitted = fit(FitRequest([choice.readout], [choice.setting], None, "linear probe: retraining"))
            _check(fitted.probes[0])
            logits = fitted.probes[0].logits_of_all(chosen.test.values)
        top5 = {"top5": 100 * topk_share(logits, chosen.test.labels, 5)} if self.task.num_classes >= 10 else {}
        report = classification_report(
            self.name,
            encoder,
            self.task,
            chosen,
            predicted=logits.argmax(dim=1),
            metric="top1",
            further=top5,
            protocol=self._protocol(choice, encoder),
            seconds={"linear": perf_counter() - start},
            seeds={"linear": self.config.seed},
            notes=[*self._notes(choice), *choice.notes, *fitted.notes],
        )
        return self._agreed(report)

    def _choose(self, fit: Fit, splits: Sequence[Splits]) -> Choice:
        num_settings = len(self.config.described)
        if len(splits) * num_settings == 1:
            return Choice(readout=0, setting=0, val_top1=(), num_fit=len(splits[0].train), num_val=0)
        return choose(fit, splits, num_settings, val_share=self.config.val_share, seed=self.config.seed)

    def _agreed(self, value: T) -> T:
        """Rank 0's, where there are several ranks: their devices may differ in the last bit."""
        return from_main(value) if self.extraction.world_size > 1 else value

    def _protocol(self, choice: Choice, encoder: Encoder) -> dict[str, object]:
        readouts, settings = self.extraction.readouts, self.config.described
        several = len(readouts) > 1
        tried = [
            {**({"readout": str(readout)} if several else {}), **setting, "value": value}
            for readout, values in zip(readouts, choice.val_top1, strict=False)
            for setting, value in zip(settings, values, strict=True)
        ]
        by_choice = {
            "chosen_on": f"{choice.num_val} random training samples, fitted on the other {choice.num_fit}",
            "val_top1": tried,
        }
        by_default = {"chosen_on": "nothing: there is one setting"}
        return {
            **describe(self.config, self.task.num_train, encoder),
            **({"readouts": [str(readout) for readout in readouts]} if several else {}),
            **(by_choice if tried else by_default),
            **({"readout": str(readouts[choice.readout])} if several else {}),
            **settings[choice.setting],
            "retrained": "on all training samples, with the chosen setting",
        }

    def _notes(self, choice: Choice) -> list[str]:
        name = "inverse_penalty" if self.config.solver == "lbfgs" else "learning_rate"
        tried = [setting[name] for setting in self.config.described]
        chosen = self.config.described[choice.setting][name]
        edges = {min(tried): "smallest", max(tried): "largest"} if len(set(tried)) > 1 else {}
        word = edges.get(chosen)
        called = {"inverse_penalty": "C", "learning_rate": "learning rate"}[name]
        return [f"the chosen {called} {chosen:g} is the {word} of the grid; a wider grid may do better"] if word else []


def build(config: LinearConfig, extraction: Extraction, open_data: OpenData) -> Linear:
    """The evaluator of a config, whose data sets `open_data` opens."""
    extraction = with_readouts(extraction, config.pooling, config.blocks)
    return Linear(open_data(config.train), open_data(config.test), config, extraction=extraction)


def choose(fit: Fit, splits: Sequence[Splits], num_settings: int, *, val_share: float, seed: int) -> Choice:
    """Fits all on one part of the training set; on the other the best top-1 wins, then the loss.

    Args:
        fit: see `choose_fit`.
        splits: of each readout; their training sets alone are looked at.
        num_settings: of each readout.
        val_share: share of the training set to choose on.
        seed: of that split.

    Raises:
        RunError: every setting diverged.
    """
    num_train = len(splits[0].train)
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(seed))
    num_val = min(num_train - 1, max(1, round(val_share * num_train)))
    val, rest = order[:num_val], order[num_val:]
    readouts = range(len(splits))
    of_readouts = f" on each of {len(readouts)} readouts" if len(readouts) > 1 else ""
    fitted = fit(FitRequest(readouts, range(num_settings), rest, f"linear probe: {num_settings} settings{of_readouts}"))
    labels = splits[0].train.labels[val]
    top1, loss = {}, {}
    for readout, probes in zip(readouts, fitted.probes, strict=True):
        found = scores(probes, splits[readout].train.values[val], labels)
        for setting, (right, entropy) in enumerate(zip(*(values.tolist() for values in found), strict=True)):
            if math.isfinite(entropy):
                top1[readout, setting], loss[readout, setting] = 100 * right, entropy
    if not top1:
        raise RunError(
            where="linear probe",
            expected="a setting that does not diverge",
            found=f"{len(readouts) * num_settings} that did",
            fix="Add smaller learning rates.",
        )
    readout, setting = min(top1, key=lambda candidate: (-top1[candidate], loss[candidate]))
    return Choice(
        readout=readout,
        setting=setting,
        val_top1=tuple(tuple(top1.get((r, s)) for s in range(num_settings)) for r in readouts),
        num_fit=len(rest),
        num_val=num_val,
        notes=tuple(f"while choosing, {note}" for note in fitted.notes),
    )


def _check(probes: Probes) -> None:
    if not (probes.weight.isfinite().all() and probes.bias.isfinite().all()):
        raise RunError(
            where="linear probe",
            expected="finite weights after retraining on the whole training set",
            found="others",
            fix="Leave out the largest learning rates.",
        )
