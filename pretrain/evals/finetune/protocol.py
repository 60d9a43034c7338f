"""Fine-tuning: the whole encoder is trained with a classifier, by the project's trainer, and tested once at the end."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
from torch import nn

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError, RecipeError, RunError
from pretrain.checkpoints.checkpoint import module_state, read_state
from pretrain.evals.classifiers.probes import topk_share
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, left_out_notes
from pretrain.evals.finetune.config import FinetuneConfig
from pretrain.evals.finetune.recipe import finetune_recipe, starting_encoder
from pretrain.evals.result import EvalReport, Evaluator, make_outcomes, make_report
from pretrain.evals.task import OpenData, Task
from pretrain.models.config import Model
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.folders import CONFIG, weights_sha256
from pretrain.models.load_encoder import load_encoder
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import load_strictly
from pretrain.monitoring.goodput import read_goodput
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.supervised.objective import Supervised
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import differences, result_settings
from pretrain.recipe.strict_yaml import read_yaml
from pretrain.runtime.run_folder import newest_checkpoint
from pretrain.runtime.state import Progress
from pretrain.runtime.versions import LIBRARIES

START, RUN = "start", "finetune-run"


class Trainer(Protocol):
    """What trains by a recipe in a run's folder."""

    def check(self, recipe: Recipe, run: Path) -> None:
        """Raises InputError where the recipe, its data and the folder do not go together; writes nothing."""

    def train(self, recipe: Recipe, run: Path) -> None:
        """Trains to the end, or goes on; raises where it does not get there."""


class Finetune(Evaluator):
    """Top-1 after supervised training of the whole encoder with a linear classifier.

    The last step is what is tested (its moving averages, where there are any), each test sample once: nothing is chosen
    on the test set. The training is a run like any other, in a folder of its own: started again, it goes on.

    Args:
        train, test: labeled data sets with the same classes, those of the config.
        config: what the recipe is made of.
        out: the folder; `start/` is the encoder that training starts from, `finetune-run/` the run.
        trainer: checks and starts the run.
        extraction: how the test set is gone through.
    """

    name = "finetune"

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        config: FinetuneConfig,
        *,
        out: Path,
        trainer: Trainer,
        extraction: Extraction | None = None,
    ) -> None:
        self.task = Task(train, test)
        self.config, self.out, self.trainer = config, out.resolve(), trainer
        self.extraction = extraction or Extraction()
        if self.extraction.world_size > 1:
            raise InputError(
                where="finetune", expected="one process, which starts the ranks that train",
                found=f"one of {self.extraction.world_size}", fix="Start it once, with --nproc.",
            )  # fmt: skip

    def run(self, encoder: Encoder) -> EvalReport:
        """
        Raises:
            InputError: an encoder that recipes cannot train, a wrong override, or a folder with another fine-tuning;
                nothing was changed.
            RunError: training did not get to its end.
        """
        run, start = self.out / RUN, self.out / START
        recipe = finetune_recipe(encoder, self.config, num_classes=self.task.num_classes, start=start)
        assert isinstance(recipe.model, Model)  # or there would be no recipe
        _refuse_other(recipe, run)
        self.trainer.check(recipe, run)
        module, new, left = starting_encoder(encoder, recipe.model, recipe.seed)
        _keep_start(start, module, recipe)
        self.trainer.train(recipe, run)
        report, classifier = self._test(
            encoder,
            recipe,
            run,
            {
                "initialised_anew": ["head.bias", "head.weight", *new],
                "left_behind": list(left),
            },
        )
        finetuned = {"run": str(run), "weights_sha256": weights_sha256(classifier)}
        return replace(report, encoder={**report.encoder, "finetuned": finetuned})

    def _test(
        self, encoder: Encoder, recipe: Recipe, run: Path, start: dict[str, object]
    ) -> tuple[EvalReport, nn.Module]:
        """The report of the trained classifier on the test set, and the classifier.

        Args:
            encoder: as it was before.
            recipe: of the run that trained it.
            run: the folder of that run.
            start: what the report says of the weights that training started from.
        """
        begun = perf_counter()
        classifier = _classifier(recipe, run)
        judged = replace(encoder, preprocessing=recipe.data.preprocessing(recipe.model.judged_size))
        classified = replace(judged, module=classifier.to(encoder.device))
        (logits,) = self.extraction.extract(
            classified, self.task.test, num_classes=self.task.num_classes, label="test of the fine-tuned"
        )
        seconds = {"test": perf_counter() - begun}
        if (goodput := read_goodput(run)) is not None:
            seconds |= {f"train_{kind}": value for kind, value in asdict(goodput).items()}
        said, left_out = left_out_notes(test=logits)
        several = self.task.num_classes >= 10
        report = make_report(
            self.name,
            judged,
            make_outcomes(logits.keys, logits.labels, logits.values.argmax(dim=1)),
            metric="top1",
            further={"top5": 100 * topk_share(logits.values, logits.labels, 5)} if several else {},
            protocol={**self._protocol(recipe, run), "device": encoder.device.type, **start},
            data={**self.task.describe(), **left_out},
            seconds=seconds,
            seeds={"finetune": recipe.seed},
            notes=[*said, *self.task.data_notes(), *_unseen(self.task), *_watched(recipe, self.task)],
            libraries=(*LIBRARIES, "deepspeed"),
        )
        return report, classifier

    def _protocol(self, recipe: Recipe, run: Path) -> dict[str, object]:
        settings = result_settings(recipe, with_defaults=True)
        del settings["init_from"]  # a path; whose weights they are, the report says
        return {
            "preset": self.config.preset,
            "recipe": settings,
            "resolved": read_yaml((run / "resolved.yaml").read_text("utf-8"))[0]["resolved"],
            "precision": {
                "training": load_recipe(run / "recipe.yaml").engine.settled_precision,
                "test": self.extraction.precision,
            },
            "tested": f"the {'moving averages' if recipe.ema else 'weights'} of the last step, once",
            "chosen_on_test": "nothing",
        }


def build(
    config: FinetuneConfig, extraction: Extraction, open_data: OpenData, *, out: Path, trainer: Trainer
) -> Finetune:
    """The evaluator of a config, whose data sets `open_data` opens; it trains in the folder `out`."""
    train, test = open_data(config.train), open_data(config.test)
    return Finetune(train, test, config, out=out, trainer=trainer, extraction=extraction)


def _refuse_other(recipe: Recipe, run: Path) -> None:
    """Other than a run of pretraining, a fine-tuning may not even go on for longer: its learning rate has come down."""
    if not (run / "recipe.yaml").is_file():
        return
    kept = load_recipe(run / "recipe.yaml")
    problems = differences(recipe, kept)
    if recipe.engine.precision not in ("auto", kept.engine.precision):  # of which the report tells, too
        problems.append(f"engine.precision: {recipe.engine.precision} given, {kept.engine.precision} kept")
    if problems:
        raise RecipeError(f"{run} holds another fine-tuning", [*problems, "Choose another folder with --out."])


def is_finished(run: Path) -> bool:
    """Whether a fine-tuning got to its end."""
    progress = _progress(run)
    return progress is not None and progress.step >= progress.total_steps


def _progress(run: Path) -> Progress | None:
    """None: it has no complete checkpoint."""
    newest = newest_checkpoint(run)
    return read_state(newest).progress if newest is not None else None


def _keep_start(folder: Path, module: nn.Module, recipe: Recipe) -> None:
    """Written once; whoever goes on must have started from the same weights."""
    if not (folder / CONFIG).is_file():
        assert isinstance(recipe.model, Model)
        pixels = recipe.data.preprocessing(recipe.model.judged_size)
        save_encoder(folder, module.state_dict(), recipe.model, pixels)
    elif (kept := weights_sha256(load_encoder(folder)[0])) != (given := weights_sha256(module)):
        raise InputError(
            where=str(folder), expected=f"the encoder that is to be fine-tuned, weights {given[:12]}",
            found=f"another, weights {kept[:12]}", fix="Choose another folder with --out.",
        )  # fmt: skip


def _classifier(recipe: Recipe, run: Path) -> nn.Module:
    """The classifier of the last step, on the CPU: normalized images [B, 3, S, S] to logits [B, K]."""
    if not is_finished(run):
        progress = _progress(run)
        raise RunError(
            where=str(run), expected="a fine-tuning that got to its end", fix="Ask again: it goes on.",
            found=f"step {progress.step} of {progress.total_steps}" if progress else "no complete checkpoint",
        )  # fmt: skip
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None  # it is finished
    model = seeded(0, lambda: build_objective(recipe.model, recipe.objective))
    assert isinstance(model, Supervised)
    load_strictly(model, module_state(checkpoint), where=str(checkpoint))
    return nn.Sequential(model.encoder, model.head)


def _unseen(task: Task) -> list[str]:
    counts = [np.zeros(task.num_classes, np.int64) for _ in range(2)]
    for count, dataset in zip(counts, (task.train, task.test), strict=True):
        assert dataset.label_counts is not None  # Task saw to it
        count[: len(dataset.label_counts)] = dataset.label_counts
    known, asked = counts
    lost = (known == 0) & (asked > 0)
    if not lost.any():
        return []
    return [
        f"{lost.sum()} of {(asked > 0).sum()} classes have no training sample: "
        f"{asked[lost].sum()} of {asked.sum()} test samples cannot be right"
    ]


def _watched(recipe: Recipe, task: Task) -> list[str]:
    """What was looked at while it trained, where that was the test set."""
    paths = [recipe.data.val, *(path for evaluation in recipe.evals for path in evaluation.datasets)]
    if all(open_dataset(path).fingerprint != task.test.fingerprint for path in paths if path):
        return []
    return ["the test set was watched during training, by --set; nothing was chosen by it here"]
