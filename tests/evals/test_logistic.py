"""The optimum is scikit-learn's, on digits and on features of CIFAR-10; the gradient is autograd's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from data_pipeline.datasets.read import open_dataset
from pretrain.evals.classifiers import logistic
from pretrain.evals.classifiers.logistic import Objective, fit_logistic
from pretrain.evals.features.extract import Extraction
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.protocol import Linear
from tests.evals.conftest import Digits, small_encoder

CPU = torch.device("cpu")


def reference(values: Any, labels: Any, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, tol=1e-9, max_iter=20_000).fit(values, labels)


def penalised_loss(values: Any, labels: Any, weight: Any, bias: Any, c: float) -> float:
    """Written out: C * sum of the cross entropies + |weights|^2 / 2, over C * N."""
    logits = values @ weight.T + bias
    entropies = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float(entropies.mean() + (weight**2).sum() / (2 * c * len(labels)))


@pytest.mark.parametrize(("chunk", "held"), [(1, 2**20), (2**20, 2**20), (900, 0)])
def test_loss_and_gradient_are_autograds(
    digits: Digits, chunk: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "VALUES_PER_CHUNK", chunk)
    monkeypatch.setattr(logistic, "HELD_BYTES", held)
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:40]
    objective = Objective(digits.train, digits.train_labels, rows=rows, num_classes=10, device=CPU)
    theta = torch.randn(objective.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, gradient = objective.loss_and_gradient(theta, 0.3)
    theta.requires_grad_()
    x = (digits.train[rows].double() - objective.mean) / objective.std
    logits = x @ theta[:, :-1].T + theta[:, -1]
    expected = nn.functional.cross_entropy(logits, digits.train_labels[rows])
    expected = expected + theta[:, :-1].square().sum() / (2 * 0.3 * 40)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, theta.grad)


def test_for_each_penalty_the_optimum_is_scikit_learns(digits: Digits) -> None:
    penalties = [1.0, 0.001, 30.0]
    found = fit_logistic(digits.train, digits.train_labels, penalties, num_classes=10, device=CPU, label="")
    assert not found.notes()
    scaled, labels = StandardScaler().fit_transform(digits.train.double().numpy()), digits.train_labels.numpy()
    for i, c in enumerate(penalties):
        expected = reference(scaled, labels, c)
        lowest = penalised_loss(scaled, labels, expected.coef_, expected.intercept_, c)
        assert found.loss[i] == pytest.approx(lowest, rel=1e-6)
        weight, bias = found.probes.weight[i].double().numpy(), found.probes.bias[i].double().numpy()
        assert penalised_loss(scaled, labels, weight, bias, c) == pytest.approx(lowest, rel=1e-5)


def test_a_search_that_ends_too_early_is_told(digits: Digits) -> None:
    found = fit_logistic(
        digits.train, digits.train_labels, [1e6], num_classes=10, device=CPU, max_iterations=1, label=""
    )
    (note,) = found.notes()
    assert "C = 1e+06" in note
    assert found.iterations == (1,)


def test_a_gradient_is_small_enough_where_the_loss_tells_no_point_from_another(digits: Digits) -> None:
    """At a strong penalty that is above the tolerance, at a weak one far below it, where it excuses nothing."""
    penalties = [1e-5, 30.0]
    found = fit_logistic(digits.train, digits.train_labels, penalties, num_classes=10, device=CPU, label="")
    assert not found.notes()
    strong, weak = found.floor
    assert weak < found.tolerance < strong
    objective = Objective(digits.train, digits.train_labels, rows=None, num_classes=10, device=CPU)
    theta = torch.cat([found.probes.weight[0], found.probes.bias[0][:, None]], dim=1).double()
    theta[3, 20] += strong * 1e-5 * objective.num  # so that this gradient is that of the floor
    loss, gradient = objective.loss_and_gradient(theta, 1e-5)
    assert gradient[3, 20].item() == pytest.approx(strong, rel=0.5)
    assert abs(loss.item() - found.loss[0]) < 8 * np.spacing(found.loss[0])
    for place, limit in enumerate((strong, found.tolerance)):
        for factor, notes in ((0.9, 0), (1.1, 1)):
            gradients = [0.0, 0.0]
            gradients[place] = factor * limit
            assert len(replace(found, gradient=tuple(gradients)).notes()) == notes


def test_a_search_is_held_to_the_tolerance_that_it_was_given(digits: Digits) -> None:
    found = fit_logistic(digits.train, digits.train_labels, [1.0], num_classes=10, device=CPU, tolerance=1e-3, label="")
    assert 1e-8 < found.gradient[0] <= 1e-3
    assert not found.notes()


def test_what_is_fitted_on_is_gathered_once_where_it_fits(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([5, 3, 9])
    objective = Objective(digits.train, digits.train_labels, rows=rows, num_classes=10, device=CPU)
    assert objective.rows is None
    assert torch.equal(objective.values, digits.train[rows.sort().values])
    monkeypatch.setattr(logistic, "HELD_BYTES", 0)
    objective = Objective(digits.train, digits.train_labels, rows=rows, num_classes=10, device=CPU)
    assert objective.values is digits.train
    assert objective.rows is not None
    assert objective.rows.tolist() == [3, 5, 9]


def write_cifar10(images: dict[str, list[bytes]], root: Path, num_train: int, num_test: int) -> None:
    """So many images of each class."""
    for name, files in images.items():
        for i, content in enumerate(files[: num_train + num_test]):
            folder = root / ("train" if i < num_train else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(content)


def test_on_cifar10_loss_and_accuracy_are_scikit_learns(cifar10: dict[str, list[bytes]], tmp_path: Path) -> None:
    write_cifar10(cifar10, tmp_path, 40, 30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model("resnet18", num_classes=0)
    encoder = small_encoder(module.eval())
    encoder = replace(encoder, preprocessing=replace(encoder.preprocessing, image_size=32))
    data = open_dataset(str(tmp_path / "train")), open_dataset(str(tmp_path / "test"))
    train, test = (Extraction().extract(encoder, part, num_classes=10, label="")[0] for part in data)
    c = 0.003
    scaler = StandardScaler().fit(train.values.double().numpy())
    scaled, labels = scaler.transform(train.values.double().numpy()), train.labels.numpy()
    expected = reference(scaled, labels, c)
    lowest = penalised_loss(scaled, labels, expected.coef_, expected.intercept_, c)
    found = fit_logistic(train.values, train.labels, [c], num_classes=10, device=CPU, label="")
    assert found.loss[0] == pytest.approx(lowest, rel=1e-6)
    report = Linear(*data, LinearConfig(train="", test="", solver="lbfgs", inverse_penalties=(c,))).run(encoder)
    accuracy = 100 * expected.score(scaler.transform(test.values.double().numpy()), test.labels.numpy())
    assert accuracy > 15
    assert report.value == pytest.approx(accuracy, abs=0.1)
