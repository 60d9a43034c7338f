"""The supervised loss equals its naive twin, hard labels and soft, and its means are means over B."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain import recipe, recipe_objective
from pretrain.objectives.build import build_objective
from pretrain.objectives.supervised import Supervised
from pretrain.state import Progress
from tests.objectives import naive

START = Progress(0, 1, 0)


def make(num_classes: int = 4, smoothing: float = 0.0, class_token: bool = False) -> Supervised:
    torch.manual_seed(0)
    pool = {"global_pool": "token"} if class_token else {"global_pool": "avg", "fc_norm": False}
    model = recipe.Model(
        name="vit_tiny_patch16_224", image_size=6, patch_size=2,
        options={"embed_dim": 8, "depth": 1, "num_heads": 2, "class_token": class_token, **pool},
    )  # fmt: skip
    config = recipe_objective.Supervised(kind="supervised", num_classes=num_classes, label_smoothing=smoothing)
    objective = build_objective(model, config)
    assert isinstance(objective, Supervised)
    return objective


def make_batch(size: int, num_classes: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        keys=tuple(str(i) for i in range(size)),
        views=(torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),),
        labels=torch.randint(num_classes, (size,), generator=generator),
    )


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return torch.eye(num_classes, dtype=torch.float64)[labels]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("class_token", "weighted"), [(False, False), (True, True)])
def test_loss_and_gradients_equal_the_naive_twin(
    soft: bool, smoothing: float, class_token: bool, weighted: bool
) -> None:
    objective = make(smoothing=smoothing, class_token=class_token).double()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    batch = make_batch(3, 4)
    assert batch.labels is not None
    targets = one_hot(batch.labels, 4)
    if soft:
        targets = torch.rand(3, 4, dtype=torch.float64).softmax(1)
        batch = replace(batch, labels=targets)
    if weighted:
        batch = replace(batch, weights=torch.tensor([0.5, 0.0, 2.0]))
    weights = naive.weights_of(objective)

    loss = objective(batch, START).loss
    loss.backward()
    sample_weights = [0.5, 0.0, 2.0] if weighted else [1.0, 1.0, 1.0]
    shape = naive.Shape(3, 2, 2, class_token=class_token)
    expected = naive.classifier_loss(weights, batch.views[0], targets, sample_weights, smoothing, shape)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    naive.assert_same_gradients(objective, weights)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), num_classes=st.integers(2, 8))
@settings(max_examples=15, deadline=None)
def test_loss_and_metrics_of_a_batch_are_means_of_its_samples(seed: int, size: int, num_classes: int) -> None:
    objective = make(num_classes).double()
    batch = make_batch(size, num_classes, seed)
    assert batch.labels is not None
    outputs = [
        objective(Batch((key,), (batch.views[0][i : i + 1],), batch.labels[i : i + 1]), START)
        for i, key in enumerate(batch.keys)
    ]
    whole = objective(batch, START)
    assert whole.loss.item() == pytest.approx(math.fsum(o.loss.item() for o in outputs) / size, rel=1e-12)
    for name, value in whole.metrics.items():
        assert value.item() == pytest.approx(math.fsum(o.metrics[name].item() for o in outputs) / size, abs=1e-6)


def test_starts_near_the_logarithm_of_the_number_of_classes() -> None:
    objective = make(8)
    batch = make_batch(16, 8)
    loss = objective(replace(batch, views=(batch.views[0].float(),)), START).loss
    assert loss.item() == pytest.approx(math.log(8), abs=0.1)


@given(data=st.data(), num_classes=st.integers(2, 9), size=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_accuracies_count_labels_among_the_largest_logits(data: st.DataObject, num_classes: int, size: int) -> None:
    rows = data.draw(st.lists(st.permutations(range(num_classes)), min_size=size, max_size=size))
    truth = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=size, max_size=size))
    ranks = [num_classes - 1 - row[label] for row, label in zip(rows, truth, strict=True)]
    logits, labels = torch.tensor(rows).float(), torch.tensor(truth)
    objective = make(num_classes)
    objective.head.forward = lambda _: logits  # type: ignore[method-assign]
    images = torch.zeros(size, 3, 6, 6)
    for given_labels in (labels, one_hot(labels, num_classes)):
        metrics = objective(Batch(("",) * size, (images,), given_labels), START).metrics
        assert metrics["top1"].item() == pytest.approx(sum(r < 1 for r in ranks) / size)
        assert ("top5" in metrics) == (num_classes >= 5)
        if num_classes >= 5:
            assert metrics["top5"].item() == pytest.approx(sum(r < 5 for r in ranks) / size)


def test_labels_are_asked_for() -> None:
    objective = make(10)
    assert objective.needs.num_classes == 10
    assert objective.needs.mask is None
    with pytest.raises(ValueError, match="labels"):
        objective(replace(make_batch(2, 10), labels=None), START)
