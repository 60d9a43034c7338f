"""Training side by side is training alone: each setting against torch's and timm's own layer, loss and optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler
from timm import optim as timm_optim
from torch import Tensor, nn

from pretrain.evals.classifiers import probes
from pretrain.evals.classifiers.heads import Rates, Training, batches, fit_each, train
from pretrain.evals.classifiers.probes import Probes, scores, statistics, topk_share

CPU = torch.device("cpu")


def some_features(seed: int, n: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, width, generator=generator, dtype=torch.float64) * 3 + 1
    return values, torch.randint(0, classes, (n,), generator=generator)


def fitted(values: Tensor, labels: Tensor, rates: list[tuple[float, float]], classes: int, **training: Any) -> Probes:
    (found,) = fit_each(
        [values],
        labels,
        [Rates(*pair) for pair in rates],
        Training(**{"num_steps": 60, "batch_size": 1024, "seed": 0, **training}),
        num_classes=classes,
        device=CPU,
        label="",
    )
    return found


def twin(values: Tensor, labels: Tensor, rate: float, decay: float, classes: int, steps: int) -> nn.Linear:
    """One setting with torch's own layer, loss and optimizer, on the whole set at each step."""
    x = torch.from_numpy(StandardScaler().fit_transform(values.numpy()))
    layer = nn.Linear(values.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [
        {"params": [layer.weight], "weight_decay": decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate * len(values) / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return layer


def test_every_setting_is_trained_as_if_alone() -> None:
    values, labels = some_features(0, 64, 7, 4)
    settings_ = [(0.5, 0.0), (0.05, 0.0), (0.5, 0.03), (0.001, 0.3)]
    found = fitted(values, labels, settings_, 4)
    for s, (rate, decay) in enumerate(settings_):
        expected = twin(values, labels, rate, decay, 4, 60)
        torch.testing.assert_close(found.weight[s], expected.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.bias[s], expected.bias.detach(), rtol=1e-9, atol=1e-12)


def test_lars_with_batch_norm_is_a_loop_over_the_settings() -> None:
    """MAE's probe: batch norm without affine, timm's LARS, warmup; the parts written out once more for each setting."""
    values, labels = some_features(3, 90, 6, 4)
    rates = [(0.5, 0.0), (4.0, 0.01)]
    training = Training(
        num_steps=12, batch_size=32, seed=5, warmup_steps=3, optimizer="lars", batch_norm=True, initial_std=0.3
    )
    chosen = list(batches(90, training))
    found = train(
        (((values[c],), labels[c]) for c in chosen),
        [statistics(values)],
        [Rates(*pair) for pair in rates],
        training,
        num_classes=4,
        device=CPU,
        label="",
    )[0]
    for s, (rate, decay) in enumerate(rates):
        norm = nn.BatchNorm1d(6, affine=False, eps=1e-6, dtype=torch.float64)
        layer = nn.Linear(6, 4, dtype=torch.float64)
        first = torch.empty(4, 6)
        nn.init.trunc_normal_(first, std=0.3, generator=torch.Generator().manual_seed(5))
        layer.weight.data.copy_(first)
        nn.init.zeros_(layer.bias)
        weights = {"params": [layer.weight], "weight_decay": decay, "always_adapt": True}
        optimizer = timm_optim.Lars([weights, {"params": [layer.bias]}], momentum=0.9, trust_coeff=1e-3)
        for t in range(12):
            share = (t + 1) / 4 if t < 3 else (1 + math.cos(math.pi * (t - 3) / 9)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * 32 / 256 * share
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(norm(values[chosen[t]])), labels[chosen[t]]).backward()
            optimizer.step()
        torch.testing.assert_close(found.weight[s], layer.weight.detach(), rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(found.bias[s], layer.bias.detach(), rtol=1e-8, atol=1e-11)
        norm.eval()
        torch.testing.assert_close(found.logits(values)[:, :, s], layer(norm(values)).detach(), rtol=1e-8, atol=1e-9)


def test_readouts_and_rows_do_not_touch_each_other() -> None:
    (a, labels), (b, _) = some_features(0, 40, 5, 3), some_features(1, 40, 8, 3)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(9))[:25]
    training = Training(num_steps=30, batch_size=10, seed=2)
    together = fit_each([a, b], labels, [Rates(0.5, 0.1)], training, rows=rows, num_classes=3, device=CPU, label="")
    for values, found in zip((a, b), together, strict=True):
        alone = fitted(values[rows], labels[rows], [(0.5, 0.1)], 3, num_steps=30, batch_size=10, seed=2)
        torch.testing.assert_close(found.weight, alone.weight)
        torch.testing.assert_close(found.mean, values[rows].mean(dim=0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
def test_an_epoch_has_no_sample_twice(num_samples: int, batch_size: int, steps: int, seed: int) -> None:
    batch_size = min(batch_size, num_samples)
    found = list(batches(num_samples, Training(num_steps=steps, batch_size=batch_size, seed=seed)))[:steps]
    assert [len(b) for b in found] == [batch_size] * steps
    per_epoch = num_samples // batch_size
    for first in range(0, steps, per_epoch):
        epoch = torch.cat(found[first : first + per_epoch]).tolist()
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_samples))


@pytest.mark.parametrize("chunk", [1, 2**25])
def test_scores_are_accuracy_and_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LOGITS_PER_CHUNK", chunk)
    values, labels = some_features(1, 50, 5, 3)
    found = fitted(values, labels, [(1.0, 0.0), (0.01, 0.1)], 3, num_steps=30, batch_size=8)
    top1, loss = scores(found, values, labels)
    standard = (values - values.mean(0)) / values.std(0, correction=0)
    for s in range(2):
        logits = standard @ found.weight[s].T + found.bias[s]
        assert top1[s].item() == (logits.argmax(1) == labels).double().mean().item()
        assert loss[s].item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    torch.testing.assert_close(Probes(found.mean, found.std, found.weight[1:], found.bias[1:]).logits_of_all(values),
                               logits)  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 2**25])
def test_statistics_are_those_of_the_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "VALUES_PER_CHUNK", chunk)
    values, _ = some_features(4, 30, 5, 3)
    rows = torch.tensor([3, 1, 28])
    for mean_and_std, part in ((statistics(values), values), (statistics(values, rows), values[rows])):
        torch.testing.assert_close(mean_and_std, (part.mean(0), part.std(0, correction=0)))


def test_a_constant_feature_has_no_say() -> None:
    values, labels = some_features(2, 40, 4, 3)
    constant = torch.cat([values, torch.full((40, 1), 7.3, dtype=torch.float64)], dim=1)
    without, with_it = (fitted(v, labels, [(0.5, 0.0)], 3, num_steps=20) for v in (values, constant))
    torch.testing.assert_close(with_it.logits(constant), without.logits(values))


def test_topk() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [3.0, 2, 1, 0], [0.0, 1, 2, 3]])
    labels = torch.tensor([2, 0, 0])
    assert [topk_share(logits, labels, k) for k in (1, 2, 4)] == [1 / 3, 2 / 3, 1.0]
