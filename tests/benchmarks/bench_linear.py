"""The linear probe against what it cannot do without, and against scikit-learn.

1. A step of 40 settings side by side on features at hand against two matrix products of the same size: logits, and
   the gradient of the weights.
2. An epoch of 40 settings side by side against 40 of scikit-learn's `SGDClassifier`, one after the other; and the
   optimum by L-BFGS against its `LogisticRegression`, at the same tolerance of the same features.
3. Steps of 40 settings through a ViT-S at 224 px on augmented photographs, against the same with one setting.
4. Features of photographs by the same ViT-S, reading and decoding included, against its bare forward pass.

The two sides of a row are timed one after the other, in turn, so that a slow spell of the machine hits both.

    python tests/benchmarks/bench_linear.py
"""

from __future__ import annotations

import os
import statistics
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

if __name__ == "__main__":  # from a checkout, without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from torch import Tensor

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.classifiers.augmented import augmented_examples, augmented_views
from pretrain.evals.classifiers.heads import Heads, Rates, Training, fit_each, train
from pretrain.evals.classifiers.logistic import fit_logistic
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction

CPU = torch.device("cpu")
SETTINGS = [Rates(1e-3 * (i % 20 + 1), (0.0, 1e-4)[i // 20]) for i in range(40)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, IMAGES = 16, 16  # of one forward pass; of one timing

Timed = Callable[[], object]


def row(what: str, ours: Timed, other: Timed, *, pairs: int, goal: str, inverted: bool = False) -> list[str]:
    """Seconds of both, and how often `ours` fits into `other` (inverted: `other` into `ours`)."""

    def seconds(side: Timed) -> float:
        start = perf_counter()
        side()
        return perf_counter() - start

    seconds(ours), seconds(other)
    times = []
    for pair in range(pairs):
        times.append((seconds(ours), seconds(other)) if pair % 2 else (seconds(other), seconds(ours))[::-1])
    ratios = sorted(a / b if inverted else b / a for a, b in times)
    first, second = (statistics.median(side) for side in zip(*times, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return [what, f"{first:.3g} / {second:.3g} s", spread, goal]


def random_features(num_samples: int, width: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Classes that overlap, so that there is an optimum to look for."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    centres = torch.randn(num_classes, width, generator=generator)
    return 0.3 * centres[labels] + torch.randn(num_samples, width, generator=generator), labels


def on_features(batch: int, width: int, num_classes: int, *, pairs: int) -> list[str]:
    values, labels = random_features(4 * batch, width, num_classes)
    training = Training(num_steps=100, batch_size=batch, seed=0)
    heads = Heads(SETTINGS, training, num_classes=num_classes, moments=(values.mean(0), values.std(0)), device=CPU)
    columns = len(SETTINGS) * num_classes
    x, weight, residual = values[:batch].clone(), torch.randn(columns, width), torch.randn(batch, columns)
    logits, gradient = torch.empty(batch, columns), torch.empty(columns, width)

    def step() -> None:
        chosen = torch.randperm(len(values))[:batch]
        heads.step(values.index_select(0, chosen), labels[chosen], 1.0)

    def products() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(residual.T, x, out=gradient)

    what = f"probe: step of 40 settings, batch {batch}, {width} x {num_classes}, against its matrix products"
    return row(what, step, products, pairs=pairs, goal=">= 0.6")


def against_scikit_learn() -> list[list[str]]:
    values, labels = random_features(4096, 384, 10)
    training = Training(num_steps=4, batch_size=1024, seed=0)
    scaled, classes = values.numpy(), labels.numpy()

    def theirs() -> None:
        for setting in SETTINGS:
            model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=setting.learning_rate, max_iter=1)
            model.set_params(alpha=setting.weight_decay, tol=None).fit(scaled, classes)

    def ours() -> None:
        fit_each([values], labels, SETTINGS, training, num_classes=10, device=CPU, label="")

    def optimum() -> None:
        fit_logistic(values, labels, [0.01], num_classes=10, device=CPU, tolerance=1e-6, label="")

    def their_optimum() -> None:
        LogisticRegression(C=0.01, tol=1e-6, max_iter=5000).fit(values.double().numpy(), classes)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [
            row("probe: an epoch of 40 settings, against scikit-learn's SGDClassifier", ours, theirs, pairs=1, goal=""),
            row(
                "probe: the optimum, against scikit-learn's LogisticRegression",
                optimum,
                their_optimum,
                pairs=5,
                goal="",
            ),
        ]


def vit_small() -> Encoder:
    module = timm.create_model("vit_small_patch16_224", num_classes=0)
    return Encoder(module, Preprocessing(224, MEAN, STD), tag="vit_small")


def write_folders(photos: Path, root: Path) -> None:
    """The photographs over and over, `IMAGES` in all, in two classes."""
    with tarfile.open(photos) as tar:
        images = [file.read() for member in tar if member.isfile() and (file := tar.extractfile(member))]
    for i in range(IMAGES):
        folder = root / str(i % 2)
        folder.mkdir(exist_ok=True)
        (folder / f"{i:04d}.jpg").write_bytes(images[i % len(images)])


def through_encoder(encoder: Encoder, dataset: Dataset, *, pairs: int) -> list[str]:
    training = Training(num_steps=IMAGES // BATCH, batch_size=BATCH, seed=0)
    extraction = Extraction(batch_size=BATCH)
    moments = [(torch.zeros(384), torch.ones(384))]

    def steps(settings: list[Rates]) -> None:
        examples = augmented_examples(
            encoder, dataset, extraction, augmented_views(encoder, (0.08, 1.0)),
            num_classes=1000, batch_size=BATCH, seed=0,
        )  # fmt: skip
        train(examples, moments, settings, training, num_classes=1000, device=CPU, label="steps")

    return row(
        "probe: 40 settings through a ViT-S at 224 px, augmented, 1000 classes, against one setting",
        lambda: steps(SETTINGS),
        lambda: steps(SETTINGS[:1]),
        pairs=pairs,
        goal="<= 1.5",
        inverted=True,
    )


def extraction(encoder: Encoder, dataset: Dataset, *, pairs: int) -> list[str]:
    images = torch.randn(BATCH, 3, 224, 224)
    encoder.module.eval()

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(IMAGES // BATCH):
                encoder.module(images)

    def features() -> None:
        Extraction(batch_size=BATCH).extract(encoder, dataset, num_classes=2, label="features")

    what = "features of photographs by a ViT-S at 224 px, loader included, against its forward pass"
    return row(what, features, bare, pairs=pairs, goal=">= 0.9")


def rows(photos: Path) -> Iterator[list[str]]:
    """Every comparison, with as many threads as torch has.

    Args:
        photos: a tar of JPEGs; where it is missing, what needs them is left out, and that is said.
    """
    yield on_features(1024, 384, 100, pairs=9)
    yield on_features(1024, 768, 1000, pairs=3)
    yield from against_scikit_learn()
    if not photos.is_file():
        yield ["probe through an encoder", "", f"no photographs at {photos}; set PRETRAIN_TEST_DATA", ""]
        return
    with tempfile.TemporaryDirectory() as name:
        write_folders(photos, Path(name))
        dataset, encoder = open_dataset(name), vit_small()
        yield extraction(encoder, dataset, pairs=5)
        yield through_encoder(encoder, dataset, pairs=3)


def photographs() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("PRETRAIN_TEST_DATA", default)) / "photos.tar"


def run() -> list[list[str]]:
    return list(rows(photographs()))


if __name__ == "__main__":
    for cells in rows(photographs()):
        print(" | ".join(cells), flush=True)
