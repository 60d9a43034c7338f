"""The probe is plain logistic regression by SGD: a slow twin's weights, scikit-learn's accuracy, no leak."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from data_pipeline.errors import InputError, RunError
from data_pipeline.read import open_dataset
from pretrain.evals import probes
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import Features
from pretrain.evals.linear import Linear, LinearConfig, choose
from pretrain.evals.probes import fit, scores, topk_share
from tests.evals.conftest import Digits, Folders


def some_features(seed: int, n: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, width, generator=generator, dtype=torch.float64) * 3 + 1
    return values, torch.randint(0, classes, (n,), generator=generator)


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
    found = fit(values, labels, settings_, num_classes=4, num_steps=60, batch_size=1024, seed=0, label="")
    for s, (rate, decay) in enumerate(settings_):
        expected = twin(values, labels, rate, decay, 4, 60)
        torch.testing.assert_close(found.weight[:, :, s], expected.weight.T.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.bias[:, s], expected.bias.detach(), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
def test_an_epoch_has_no_sample_twice(num_samples: int, batch_size: int, steps: int, seed: int) -> None:
    batch_size = min(batch_size, num_samples)
    batches = list(probes._batches(num_samples, batch_size, steps, seed))
    assert [len(b) for b in batches] == [batch_size] * steps
    per_epoch = num_samples // batch_size
    for first in range(0, steps, per_epoch):
        epoch = torch.cat(batches[first : first + per_epoch]).tolist()
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_samples))


@pytest.mark.parametrize("chunk", [1, 2**25])
def test_scores_are_accuracy_and_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LOGITS_PER_CHUNK", chunk)
    values, labels = some_features(1, 50, 5, 3)
    found = fit(values, labels, [(1.0, 0.0), (0.01, 0.1)], num_classes=3, num_steps=30, batch_size=8, seed=0, label="")
    top1, loss = scores(found, values, labels)
    standard = (values - values.mean(0)) / values.std(0, correction=0)
    for s in range(2):
        logits = standard @ found.weight[:, :, s] + found.bias[:, s]
        assert top1[s].item() == (logits.argmax(1) == labels).double().mean().item()
        assert loss[s].item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_a_constant_feature_has_no_say() -> None:
    values, labels = some_features(2, 40, 4, 3)
    constant = torch.cat([values, torch.full((40, 1), 7.3, dtype=torch.float64)], dim=1)
    without, with_it = (
        fit(v, labels, [(0.5, 0.0)], num_classes=3, num_steps=20, batch_size=40, seed=0, label="")
        for v in (values, constant)
    )
    torch.testing.assert_close(with_it.logits(constant), without.logits(values))


def test_topk() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [3.0, 2, 1, 0], [0.0, 1, 2, 3]])
    labels = torch.tensor([2, 0, 0])
    assert [topk_share(logits, labels, k) for k in (1, 2, 4)] == [1 / 3, 2 / 3, 1.0]


def probe_of(train: Tensor, labels: Tensor, config: LinearConfig) -> probes.Probes:
    """What Linear does with features that are at hand."""
    features = Features(train, labels, tuple(map(str, range(len(train)))))
    choice = choose(features, config, num_classes=10)
    best = [(choice.learning_rate, choice.weight_decay)]
    return fit(train, labels, best, num_classes=10, num_steps=config.min_steps, batch_size=1024, seed=0, label="")


def test_accuracy_on_real_digits_is_that_of_scikit_learn(digits: Digits) -> None:
    probe = probe_of(digits.train, digits.train_labels, LinearConfig(min_steps=1500))
    found = 100 * scores(probe, digits.test, digits.test_labels)[0].item()
    scaler = StandardScaler().fit(digits.train.numpy())
    reference = LogisticRegression(max_iter=2000).fit(
        scaler.transform(digits.train.numpy()), digits.train_labels.numpy()
    )
    expected = 100 * reference.score(scaler.transform(digits.test.numpy()), digits.test_labels.numpy())
    assert found == pytest.approx(expected, abs=1.5)


def test_the_choice_is_made_on_samples_that_were_not_fitted_on() -> None:
    """Each sample has a feature of its own: what was fitted on is known by heart, the rest can be guessed."""
    labels = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0))
    config = LinearConfig(learning_rates=(1.0, 10.0), min_steps=200, val_share=0.3)
    train = Features(torch.eye(200), labels, tuple(map(str, range(200))))
    choice = choose(train, config, num_classes=5)
    assert (choice.num_fit, choice.num_val) == (140, 60)
    assert all(value is not None and value < 50 for value in choice.val_top1)


def test_a_setting_that_diverges_is_told_and_never_chosen(digits: Digits) -> None:
    train = Features(digits.train[:200], digits.train_labels[:200], tuple(map(str, range(200))))
    choice = choose(train, LinearConfig(learning_rates=(1e38, 0.1), min_steps=50), num_classes=10)
    assert choice.learning_rate == 0.1
    assert choice.val_top1[0] is None
    with pytest.raises(RunError, match="smaller learning rates"):
        choose(train, LinearConfig(learning_rates=(1e38,), min_steps=50), num_classes=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rates", ()),
        ("learning_rates", (0.1, 0.0)),
        ("learning_rates", (math.nan,)),
        ("weight_decays", ()),
        ("weight_decays", (-0.1,)),
        ("batch_size", 0),
        ("epochs", -1),
        ("min_steps", 0),
        ("val_share", 1.0),
    ],
)
def test_a_wrong_grid_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"linear.{field}"):
        LinearConfig(**{field: value})  # type: ignore[arg-type]


def test_a_report_says_what_was_chosen_and_repeats(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = LinearConfig(min_steps=300, learning_rates=(0.01, 0.1), weight_decays=(0.0, 0.01))
    first, again = (Linear(train, test, config).run(encoder) for _ in range(2))
    assert first.value > 70
    assert first.metrics["top5"] >= first.value == 100 * first.outcomes.correct.mean()
    assert first.metrics == again.metrics
    assert (first.outcomes.predicted == again.outcomes.predicted).all()
    assert first.protocol == again.protocol
    assert first.file_name == again.file_name
    tried = first.protocol["val_top1"]
    assert isinstance(tried, list)
    assert len(tried) == 4
    best = max(tried, key=lambda setting: setting["value"])["value"]
    chosen = (first.protocol["learning_rate"], first.protocol["weight_decay"])
    assert chosen in [(s["learning_rate"], s["weight_decay"]) for s in tried if s["value"] == best]
