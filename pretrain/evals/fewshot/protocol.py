"""Few-shot: a simple classifier on a few labels of each class, drawn by several seeds; features are computed once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import InputError
from data_pipeline.progress import track
from pretrain.evals.classifiers.logistic import fit_logistic
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, Features, full_precision
from pretrain.evals.fewshot.config import FewshotConfig, Shots
from pretrain.evals.knn import protocol as knn
from pretrain.evals.result import EvalReport, Evaluator, classification_report
from pretrain.evals.task import OpenData, Task, with_readouts
from pretrain.evals.uncertainty import chance_of_classes, draws_interval, share_intervals

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of kNN; at most as many as there are labels
# Of the linear classifier: C, scikit-learn's default, as a few labels leave none to choose it on; and the gradient of
# the mean loss to which its optimum is searched.
INVERSE_PENALTY, TOLERANCE = 1.0, 1e-6


class Fewshot(Evaluator):
    """Top-1 with few labels, mean and standard deviation over draws.

    Args:
        train: what is drawn from.
        test: all of it is tested, for each draw.
        config: how many labels, how often, and what learns from them.
        extraction: how features are computed.
    """

    name = "fewshot"

    def __init__(
        self, train: Dataset, test: Dataset, config: FewshotConfig, *, extraction: Extraction | None = None
    ) -> None:
        self.task = Task(train, test, max_train=config.max_train, max_test=config.max_test)
        self.config = config
        self.extraction = extraction or Extraction()
        if config.max_train is None:
            assert train.label_counts is not None  # Task saw to it
            _refuse_too_few(torch.from_numpy(train.label_counts), config.draws, train.classes)

    def run(self, encoder: Encoder) -> EvalReport:
        """
        Raises:
            InputError: a class has fewer labels than are to be drawn of it.
        """
        splits = self.task.extract(encoder, self.extraction)
        start = perf_counter()
        train, test = splits.train, splits.test
        counts = torch.bincount(train.labels, minlength=self.task.num_classes)
        _refuse_too_few(counts, self.config.draws, self.task.train.classes)
        values: dict[Shots, list[float]] = {shots: [] for shots in self.config.draws}
        sizes: dict[str, int] = {}
        first: Tensor | None = None
        notes: list[str] = []
        queries = test.values.to(encoder.device)
        seeds = range(self.config.seeds)
        # The other classifiers show their own progress, and there can be one bar at a time.
        shown = track(seeds, label="few-shot", total=len(seeds)) if self.config.classifier == "centroid" else seeds
        for seed in shown:
            classes = ranked(train.keys, train.labels, seed)
            for shots in values:
                chosen = first_samples(classes, shots)
                sizes[called(shots)] = len(chosen)
                predicted, told = self._predict(train, chosen, queries, seed)
                notes += [f"{called(shots)}, seed {seed}: {note}" for note in told]
                first = predicted if first is None else first
                values[shots].append(100 * (predicted == test.labels).double().mean().item())
        assert first is not None  # the config has a draw
        metric = called(self.config.draws[0])
        report = classification_report(
            self.name,
            encoder,
            self.task,
            splits,
            predicted=first,
            metric=metric,
            further={},
            protocol={
                "shots": list(self.config.draws),
                "seeds": list(range(self.config.seeds)),
                "drawn": "of each class, those whose SHA-256 of (seed, key) is smallest; of a share at least 1",
                "num_drawn": sizes,
                **self._classifier(min(sizes.values())),
                "value": f"mean of {metric} over the seeds; outcomes are of seed 0",
            },
            seconds={"fewshot": perf_counter() - start},
            seeds={"first_draw": 0},
            notes=notes,
        )
        return over_draws(report, values, self.task.num_classes)

    def _classifier(self, fewest: int) -> dict[str, object]:
        match self.config.classifier:
            case "centroid":
                return {"classifier": "nearest centroid: cosine to the mean of each class's normalised features"}
            case "knn":
                k = f"{NEIGHBOURS}, at most the labels drawn" if fewest < NEIGHBOURS else NEIGHBOURS
                return {"classifier": "kNN, weights exp(cosine / temperature)", "k": k, "temperature": TEMPERATURE}
            case "linear":
                told = "multinomial logistic regression on standardised features, at its optimum"
                return {"classifier": told, "C": INVERSE_PENALTY, "tolerance": TOLERANCE}

    def _predict(self, train: Features, chosen: Tensor, queries: Tensor, seed: int) -> tuple[Tensor, tuple[str, ...]]:
        """Labels [n] int64 of the test features, on the CPU, and notes on them; computed where the queries lie."""
        device, num_classes = queries.device, self.task.num_classes
        values, labels = train.values[chosen].to(device), train.labels[chosen]
        with full_precision():
            match self.config.classifier:
                case "centroid":
                    return nearest_centroid(values, labels.to(device), queries, num_classes).cpu(), ()
                case "knn":
                    k = min(NEIGHBOURS, len(chosen))
                    asked = {"ks": [k], "temperatures": [TEMPERATURE], "num_classes": num_classes}
                    return knn.predict(values, labels, queries, **asked)[k, TEMPERATURE], ()  # type: ignore[arg-type]
                case "linear":
                    fitted = fit_logistic(
                        values, labels.to(device), [INVERSE_PENALTY], num_classes=num_classes, device=device,
                        tolerance=TOLERANCE, label=f"{len(chosen)} labels, seed {seed}",
                    )  # fmt: skip
                    return fitted.probes.logits_of_all(queries).argmax(dim=1), fitted.notes()


def build(config: FewshotConfig, extraction: Extraction, open_data: OpenData) -> Fewshot:
    """The evaluator of a config, whose data sets `open_data` opens."""
    extraction = with_readouts(extraction, config.pooling, config.blocks)
    return Fewshot(open_data(config.train), open_data(config.test), config, extraction=extraction)


def over_draws(report: EvalReport, values: Mapping[Shots, Sequence[float]], num_classes: int) -> EvalReport:
    """The report of the mean over draws, where `report` is of the first draw alone.

    Args:
        report: whose metric is that of the first number of shots.
        values: top-1 of each draw, percent, by the number of shots; the report's value comes first.
        num_classes: K.
    """
    found = {called(shots): list(of_draws) for shots, of_draws in values.items()}
    means = {name: sum(of_draws) / len(of_draws) for name, of_draws in found.items()}
    num_draws = len(found[report.metric])
    report = replace(
        report,
        value=means[report.metric],
        metrics=means,
        by_seed=found[report.metric],
        chance=chance_of_classes(means, num_classes),
        intervals=share_intervals(means, report.n),
    )
    if num_draws == 1:
        return report
    spreads = {f"{name}_std": spread(of_draws) for name, of_draws in found.items()}
    return replace(
        report,
        metrics={**means, **spreads},
        spread=spreads[f"{report.metric}_std"],
        intervals={name: draws_interval(of_draws) for name, of_draws in found.items()},
        interval_over=f"{num_draws} draws (Student's t)",
    )


def ranked(keys: Sequence[str], labels: Tensor, seed: int) -> list[list[int]]:
    """Returns the numbers of each class's samples in the order in which they are drawn; classes by their labels.

    A function of seed, keys and labels, whatever the order of the samples.

    Args:
        keys: of the samples, each once.
        labels: [N] int64.
        seed: of the draw.
    """
    ranks = [hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogateescape")).digest() for key in keys]
    of_sample = labels.tolist()
    classes: dict[int, list[int]] = {label: [] for label in sorted(set(of_sample))}
    for i in sorted(range(len(ranks)), key=ranks.__getitem__):
        classes[of_sample[i]].append(i)
    return list(classes.values())


def first_samples(classes: Sequence[Sequence[int]], shots: Shots) -> Tensor:
    """What is learned from, class after class, [n] int64.

    A larger number of shots has what a smaller one has, so that curves over it are of growing sets.

    Args:
        classes: of `ranked`, none with fewer samples than are taken.
        shots: of each class so many, or below 1 the share of its samples, rounded, and at least one.
    """
    sizes = [int(shots) if shots >= 1 else max(1, round(shots * len(members))) for members in classes]
    return torch.tensor([i for members, size in zip(classes, sizes, strict=True) for i in members[:size]])


def nearest_centroid(values: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """The class with the nearest centroid, by cosine; of equally near ones the smaller label.

    Args:
        values: features, [N, D]; normalized here, and their means again.
        labels: [N] int64; a class without a sample is never given.
        queries: features, [Q, D]; their lengths have no say.
        num_classes: K.

    Returns:
        labels, [Q] int64.
    """
    # As a product, and not by index_add_, whose order of additions on CUDA is any.
    members = torch.nn.functional.one_hot(labels, num_classes).to(values.dtype).T  # [K, N]
    centroids = normalize(members @ normalize(values, dim=1), dim=1)  # of sums, as of means
    similarities = queries @ centroids.T
    similarities[:, members.sum(dim=1) == 0] = -math.inf
    return similarities.argmax(dim=1)


def called(shots: Shots) -> str:
    """The metric of a number of shots or a share: top1_5shot, top1_1%."""
    return f"top1_{int(shots)}shot" if shots >= 1 else f"top1_{100 * shots:g}%"


def spread(values: Sequence[float]) -> float:
    """Standard deviation over draws, with n - 1; 0 of one."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else 0.0


def _refuse_too_few(counts: Tensor, shots: Sequence[Shots], classes: Sequence[str] | None) -> None:
    """Classes without any sample are left to the report's notes: a set may have labels that none of its samples has."""
    most = max((int(s) for s in shots if s >= 1), default=1)
    short = [(label, n) for label, n in enumerate(counts.tolist()) if 0 < n < most]
    if short:
        label, n = min(short, key=lambda pair: pair[1])
        name = f"class {label} ({classes[label]})" if classes is not None else f"class {label}"
        rest = f"; {len(short)} classes have too few" if len(short) > 1 else ""
        raise InputError(
            where="training set", expected=f"{most} samples of each class", found=f"{n} of {name}{rest}",
            fix=f"Ask for at most {n} shots, for a share (--fraction), or take more samples.",
        )  # fmt: skip
