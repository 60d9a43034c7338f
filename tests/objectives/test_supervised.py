"""The supervised losses equal their naive twins and timm's, hard labels and soft; their means are means over B."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch
from pretrain.models.encoders import build_encoder
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.objectives.supervised.objective import Supervised
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress
from tests.objectives import cases, naive, papers
from tests.objectives.cases import Case, Twin

START = Progress(0, 1, 0)


def make(num_classes: int = 4, smoothing: float = 0.0, class_token: bool = False, **further: Any) -> Supervised:
    torch.manual_seed(0)
    pool = {"global_pool": "token"} if class_token else {"global_pool": "avg", "fc_norm": False}
    model = recipe.Model(
        name="vit_tiny_patch16_224", image_size=6, patch_size=2,
        options={"embed_dim": 8, "depth": 1, "num_heads": 2, "class_token": class_token, **pool},
    )  # fmt: skip
    config = SupervisedConfig(kind="supervised", num_classes=num_classes, label_smoothing=smoothing, **further)
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


LOSSES: dict[str, dict[str, Any]] = {
    "ce": {},
    "bce": {"loss": "bce"},
    "bce, threshold": {"loss": "bce", "target_threshold": 0.2},
    "bce, sum": {"loss": "bce", "over_classes": "sum"},
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("class_token", "weighted"), [(False, False), (True, True)])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_loss_and_gradients_equal_the_naive_twin(
    loss: dict[str, Any], soft: bool, smoothing: float, class_token: bool, weighted: bool
) -> None:
    objective = make(smoothing=smoothing, class_token=class_token, **loss).double()
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

    found = objective(batch, START).loss
    found.backward()
    sample_weights = [0.5, 0.0, 2.0] if weighted else [1.0, 1.0, 1.0]
    given = (weights, batch.views[0], targets, sample_weights, smoothing)
    shape = naive.Shape(3, 2, 2, class_token=class_token)
    if loss:
        expected = naive.binary_loss(*given, loss.get("target_threshold"), shape)
        expected = expected * 4 if "over_classes" in loss else expected
    else:
        expected = naive.classifier_loss(*given, shape)
    expected.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
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


def loss_of_logits(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The objective's loss where its classifier says `logits`, [B, K]."""
    objective = make(logits.shape[1], **settings)
    objective.head.forward = lambda _: logits  # type: ignore[method-assign]
    return objective(Batch(("",) * len(logits), (torch.zeros(len(logits), 3, 6, 6),), labels), START).loss


def random_logits(size: int = 6, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(size, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (size,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_binary_losses_are_timm_s(smoothing: float, threshold: float | None, sum_classes: bool) -> None:
    """Mixed labels timm smooths where it mixes them, plain ones in the loss; ours come unsmoothed."""
    logits, labels = random_logits()
    over = "sum" if sum_classes else "mean"
    ours = {"loss": "bce", "smoothing": smoothing, "target_threshold": threshold, "over_classes": over}
    theirs = BinaryCrossEntropy(smoothing, threshold, sum_classes=sum_classes)
    torch.testing.assert_close(loss_of_logits(logits, labels, **ours), theirs(logits, labels))
    for lam in (0.15, 0.5, 0.9):
        mixed = lam * F.one_hot(labels, 5) + (1 - lam) * F.one_hot(labels.flip(0), 5)
        target = mixup_target(labels, 5, lam, smoothing)
        torch.testing.assert_close(loss_of_logits(logits, mixed, **ours), theirs(logits, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_are_timm_s(smoothing: float) -> None:
    logits, labels = random_logits()
    plain = loss_of_logits(logits, labels, smoothing=smoothing)
    torch.testing.assert_close(plain, LabelSmoothingCrossEntropy(smoothing)(logits, labels))
    mixed = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(labels.flip(0), 5)
    target = mixup_target(labels, 5, 0.3, smoothing)
    found = loss_of_logits(logits, mixed, smoothing=smoothing)
    torch.testing.assert_close(found, SoftTargetCrossEntropy()(logits, target))


def test_dropout_acts_on_the_features_in_training_only() -> None:
    objective, plain = make(dropout=0.5), make()
    batch = replace(make_batch(4, 4), views=(make_batch(4, 4).views[0].float(),))
    assert torch.equal(objective.eval()(batch, START).loss, plain.eval()(batch, START).loss)
    objective.train()
    torch.manual_seed(5)
    first = objective(batch, START).loss
    assert not torch.equal(objective(batch, START).loss, first)
    torch.manual_seed(5)
    assert torch.equal(objective(batch, START).loss, first)
    seen: list[Tensor] = []
    objective.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(batch, START)
    features = objective.encoder(batch.views[0])
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], 2 * features[kept])
    assert 0.2 < kept.float().mean() < 0.8


def test_the_classifier_starts_as_asked() -> None:
    for std in (0.01, 0.1):
        head = make(400, classifier_init=std).head
        assert head.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not head.bias.any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_blocks_start_as_the_identity(name: str) -> None:
    """Goyal et al. 2017 (arXiv:1706.02677), section 5.1: gamma 0 in the last norm of each block, 1 in the others."""
    for options, expected in (({}, 0.0), ({"zero_init_last": False}, 1.0)):
        model = recipe.Model(name=name, image_size=32, options=options)  # type: ignore[arg-type]
        encoder = build_encoder(model)
        last = "bn2" if name == "resnet18" else "bn3"
        gammas = {n: m.weight for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert sum(n.endswith(last) for n in gammas) == (8 if name == "resnet18" else 16)
        for n, gamma in gammas.items():
            assert gamma.unique().tolist() == [expected if n.endswith(last) else 1.0]


VIT_OPTIONS = {"embed_dim": 8, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_stochastic_depth_acts_in_training_only(name: str) -> None:
    options: dict[str, Any] = {} if name == "test_resnet" else VIT_OPTIONS
    plain, dropping = (
        build_encoder(recipe.Model(name=name, image_size=32, options={**options, **more}))
        for more in ({}, {"drop_path_rate": 0.6})
    )
    with torch.no_grad():
        for parameter in plain.parameters():  # off the zeros at which branches of a ResNet start
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(dropping.eval()(images), plain.eval()(images), rtol=0, atol=0)
    dropping.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropping(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


SUPERVISED = SupervisedConfig(kind="supervised", num_classes=6, label_smoothing=0.1)
CASES = {
    "supervised": Case(cases.TINY_VIT, SUPERVISED),
    "supervised, class token and registers": Case(cases.CLASS_TOKEN_VIT, SUPERVISED),
    "supervised, resnet": Case(cases.TINY_RESNET, SUPERVISED),
    "supervised, binary": Case(cases.TINY_VIT, SUPERVISED.model_copy(update={"loss": "bce", "over_classes": "sum"})),
    "supervised, swin": Case(cases.TINY_SWIN, SUPERVISED),
}


def naive_loss(objective: Supervised, weights: naive.Weights, batch: Batch) -> Tensor:
    assert batch.labels is not None
    grid = objective.encoder.patch_embed.grid_size[0]  # type: ignore[union-attr, index]
    shape = naive.Shape(int(grid), batch.views[0].shape[-1] // int(grid), 2, class_token=False)
    targets = one_hot(batch.labels, 6)
    return naive.classifier_loss(weights, batch.views[0], targets, [1.0] * len(batch), 0.1, shape)


TWIN = Twin(Case(cases.TWIN_VIT, SUPERVISED), naive_loss)


PUBLISHED: dict[str, papers.Numbers] = {}

# Goyal et al. 2017 (1706.02677), section 5.1.
PUBLISHED["supervised_resnet50_goyal"] = {
    "batch": 8192,
    "schedule": {"kind": "step", "epochs": 90, "warmup": 5, "milestones": (30, 60, 80), "gamma": 0.1},
    "optim": {
        "kind": "sgd", "peak_lr": 0.1 * 8192 / 256, "lr_batch": 256, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-4,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {**papers.CLASSES, "classifier_init": 0.01},
}  # fmt: skip
# Wightman et al. 2021 (2110.00476), table 2.
PUBLISHED["rsb_a1_resnet50"] = {
    "batch": 2048,
    "schedule": {"kind": "cosine", "epochs": 600, "warmup": 5},
    "optim": {
        "kind": "lamb", "peak_lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 1.0,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.95},
    "augment": ({"rand_augment": papers.rand_augment(7)},),
    "mixing": {"mixup": 0.2, "cutmix": 1.0},
    "repeats": 3,
    "model": {"name": "resnet50", "image_size": 224, "options": {"drop_path_rate": 0.05}},
    "objective": {**papers.CLASSES, "loss": "bce", "label_smoothing": 0.1},
}  # fmt: skip
PUBLISHED["rsb_a2_resnet50"] = {
    **PUBLISHED["rsb_a1_resnet50"],
    "schedule": {"kind": "cosine", "epochs": 300, "warmup": 5},
    "optim": PUBLISHED["rsb_a1_resnet50"]["optim"] | {"weight_decay": 0.02},
    "mixing": {"mixup": 0.1, "cutmix": 1.0},
    "objective": {**papers.CLASSES, "loss": "bce", "target_threshold": 0.2},
}
PUBLISHED["rsb_a3_resnet50"] = {
    **PUBLISHED["rsb_a2_resnet50"],
    "schedule": {"kind": "cosine", "epochs": 100, "warmup": 5},
    "optim": PUBLISHED["rsb_a2_resnet50"]["optim"] | {"peak_lr": 8e-3},
    "augment": ({"rand_augment": papers.rand_augment(6)},),
    "repeats": 1,
    "model": {"name": "resnet50", "image_size": 160, "eval_size": 224},
}
# Dosovitskiy et al. 2020 (2010.11929), table 3 and appendix B.1.
PUBLISHED["supervised_vit_b16"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 300, "warmup": 10_000 * 4096 / papers.IMAGENET},
    "optim": {"kind": "adamw", "peak_lr": 3e-3, "betas": (0.9, 0.999), "weight_decay": 0.3, "clip_norm": 1.0},
    "views": {"scale": (0.05, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    **papers.HALVES,
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224, "options": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1},
    },
    "objective": papers.CLASSES,
}  # fmt: skip
# Xie et al. 2019 (1911.04252), section 3.1, by a ResNet-50 and its optimizer (Goyal et al.).
PUBLISHED["noisy_student_resnet50"] = {
    "batch": 2048,
    "schedule": {"kind": "cosine", "epochs": 350, "warmup": 5},
    "optim": {"kind": "sgd", "peak_lr": 0.1 * 2048 / 256, "lr_batch": 256, "momentum": 0.9, "weight_decay": 1e-4},
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "resnet50", "image_size": 224, "options": {"zero_init_last": True}},
    "objective": {**papers.CLASSES, "label_smoothing": 0.1},
}
