"""kNN is exact: scikit-learn's predictions on real features, a loop's on others, the same on any number of ranks."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simplejpeg import decode_jpeg
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from launch.commands.eval import app
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn import protocol as knn
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn, predict
from pretrain.evals.result import EvalReport
from tests.evals.conftest import Digits, Folders, small_encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_are_those_of_scikit_learn(digits: Digits, dtype: torch.dtype) -> None:
    bank, queries = digits.train.to(dtype), digits.test.to(dtype)
    ks = (1, 10, 20, 100, 200)
    found = predict(bank, digits.train_labels, queries, ks=ks, temperatures=(0.07,), num_classes=10)
    for k in ks:
        reference = scikit_learn(bank, digits.train_labels, k, 0.07)
        assert (found[k, 0.07].numpy() == reference.predict(queries.double().numpy())).all(), f"k={k}"


def scikit_learn(bank: Tensor, labels: Tensor, k: int, temperature: float) -> KNeighborsClassifier:
    """In fp64."""
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature))
    return model.fit(bank.double().numpy(), labels.numpy())


def features_of(images: list[bytes]) -> Tensor:
    """Random filters, rectified, averaged over quarters: [N, 512]."""
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(128, 3, 6, 6, generator=generator)
    filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
    pixels = torch.stack([torch.from_numpy(decode_jpeg(image)) for image in images])
    scaled = pixels.permute(0, 3, 1, 2).float() / 255 - 0.5
    maps = [F.conv2d(part, filters, stride=2).relu() for part in scaled.split(250)]
    return torch.cat([F.adaptive_avg_pool2d(part, 2).flatten(1) for part in maps])


def test_predictions_on_cifar10_are_those_of_scikit_learn(cifar10: dict[str, list[bytes]]) -> None:
    bank = features_of([image for images in cifar10.values() for image in images[:200]])
    queries = features_of([image for images in cifar10.values() for image in images[200:]])
    labels, right = (torch.arange(10).repeat_interleave(each) for each in (200, 50))
    ks, temperatures = (1, 10, 20, 200), (0.07, 0.5)
    found = predict(bank, labels, queries, ks=ks, temperatures=temperatures, num_classes=10)
    for k, temperature in product(ks, temperatures):
        reference = scikit_learn(bank, labels, k, temperature)
        votes = np.sort(reference.predict_proba(queries.double().numpy()), axis=1)
        # No image's vote is so close that rounding could turn it: all have to be equal.
        assert (votes[:, -1] - votes[:, -2]).min() > 1e-9
        assert (found[k, temperature].numpy() == reference.predict(queries.double().numpy())).all()
        assert (found[k, temperature] == right).double().mean() > 0.3  # features that tell something
    different = {tuple(predicted.tolist()) for predicted in found.values()}
    assert len(different) == len(ks) * len(temperatures) - (len(temperatures) - 1)  # all but k = 1


def naive(bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float) -> int:
    """One query, written out."""
    cosines = [
        sum(float(a) * float(b) for a, b in zip(row, query, strict=True)) / float(row.norm() * query.norm())
        for row in bank
    ]
    votes: dict[int, float] = {}
    for i in sorted(range(len(bank)), key=lambda i: (-cosines[i], i))[:k]:
        votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(cosines[i] / temperature)
    return min(votes, key=lambda label: (-votes[label], label))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 6))
def test_predictions_are_those_of_a_loop(seed: int, size: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    queries = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (size,), generator=generator)
    ks, temperatures = (size, 1, (size + 1) // 2), (0.07, 1.0)
    with patch.object(knn, "VOTES", 4 * classes):  # four queries at a time
        found = predict(bank, labels, queries, ks=ks, temperatures=temperatures, num_classes=classes)
    assert set(found) == set(product(ks, temperatures))
    for (k, temperature), predicted in found.items():
        assert predicted.tolist() == [naive(bank, labels, query, k, temperature) for query in queries]


def test_of_equal_votes_the_smaller_label_wins() -> None:
    bank = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([2, 1, 1, 2])
    found = predict(bank, labels, bank[:1], ks=(1, 2, 4), temperatures=(0.07,), num_classes=3)
    assert [found[k, 0.07].item() for k in (1, 2, 4)] == [2, 1, 1]  # the first of the nearest; then ties of votes


def test_weights_do_not_overflow() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6]]), torch.tensor([1, 0, 0])
    found = predict(bank, labels, bank[:1], ks=(3,), temperatures=(1e-4, 10.0), num_classes=2)
    assert [found[3, t].item() for t in (1e-4, 10.0)] == [1, 0]


def test_k_beyond_the_bank_is_refused_before_anything_is_computed(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = KnnConfig(train="", test="", k=20, max_train=15)
    with pytest.raises(InputError, match="15 training samples"):
        Knn(train, test, config)
    with pytest.raises(InputError, match="301"):
        Knn(train, test, KnnConfig(train="", test="", k=(20, 301)))


def test_a_report_says_what_was_done(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = KnnConfig(train="", test="", k=(5, 1, 50), temperature=(0.07, 0.5), max_test=90)
    report = Knn(train, test, config).run(encoder)
    assert report.n == 90 == len(report.outcomes.keys)
    assert report.metric == "top1_k5"
    assert report.value == report.metrics["top1_k5"] == 100 * report.outcomes.correct.mean()
    ks = ("top1_k1", "top1_k5", "top1_k50")
    assert set(report.metrics) == {*ks, *(f"{k}_t0.5" for k in ks)}
    assert report.metrics["top1_k1"] == report.metrics["top1_k1_t0.5"]
    assert report.metrics["top1_k50"] != report.metrics["top1_k50_t0.5"]
    assert report.value > 70  # a random projection of pixels keeps neighbours
    assert report.protocol["k"] == 5
    assert report.protocol["temperature"] == 0.07
    assert report.protocol["temperatures"] == [0.07, 0.5]
    assert report.data["train"] == {"fingerprint": train.fingerprint, "n": 300, "of": 300}
    assert report.data["test"] == {"fingerprint": test.fingerprint, "n": 90, "of": 100}


def test_judging_in_mid_training_changes_no_loss(folders: Folders) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    evaluator = Knn(train, test, KnnConfig(train="", test="", max_train=200, max_test=20))

    def losses(judged: bool) -> list[float]:
        torch.manual_seed(3)
        encoder = small_encoder()
        head = nn.Linear(32, 10)
        optimizer = torch.optim.SGD([*encoder.module.parameters(), *head.parameters()], lr=0.1)
        found = []
        for _ in range(4):
            loss = head(encoder.module(torch.rand(8, 3, 8, 8))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            if judged:
                evaluator.run(encoder)
        return found

    assert losses(judged=True) == losses(judged=False)


def test_the_command_sweeps_k_and_temperature(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    architecture = ["--random-init", "--image-size", "8", "--option", "patch_size=4", "--option", "depth=1"]
    command = ["knn", "vit_tiny_patch16_224", *architecture, "--train", folders.train, "--test", folders.test]
    result = CliRunner().invoke(
        app, [*command, "--k", "5", "--k", "1", "--temperature", "0.1", "--temperature", "0.07", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    report = EvalReport.load(out)
    assert report.metric == "top1_k5"
    assert set(report.metrics) == {"top1_k5", "top1_k1", "top1_k5_t0.07", "top1_k1_t0.07"}
    assert report.protocol["temperature"] == 0.1
    for wrong in ("0", "-1", "nan", "inf"):
        error = CliRunner().invoke(app, [*command, "--temperature", "0.1", "--temperature", wrong]).exception
        assert isinstance(error, InputError)
        assert "--temperature" in str(error)
