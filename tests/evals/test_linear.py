"""The linear probe: nothing leaks into its choice, the report says all of it, and readouts compete as settings do."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import RunError
from pretrain.evals.classifiers.probes import scores
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, Features
from pretrain.evals.features.readout import Readout
from pretrain.evals.linear import fits as linear_fits
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.fits import FitRequest, choose_fit
from pretrain.evals.linear.protocol import Choice, Linear, choose
from pretrain.evals.task import Splits
from tests.evals.conftest import Digits, Folders, small_encoder


def splits_of(values: Tensor, labels: Tensor) -> Splits:
    """Of features that are at hand; nothing to test on."""
    features = Features(values, labels, tuple(map(str, range(len(values)))))
    return Splits(features, features, {}, (), {})


def choice_of(config: LinearConfig, *splits: Splits, num_classes: int) -> Choice:
    task: Any = SimpleNamespace(num_classes=num_classes)
    fit = choose_fit(config, small_encoder(), task, Extraction(), splits)
    return choose(fit, splits, len(config.described), val_share=config.val_share, seed=config.seed)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_accuracy_on_real_digits_is_that_of_scikit_learn(digits: Digits, solver: Any) -> None:
    grid = {"learning_rates": (1e-3, 1e-2, 1e-1), "min_steps": 300} if solver == "sgd" else {}
    config = LinearConfig(train="", test="", solver=solver, **grid)
    splits = (splits_of(digits.train, digits.train_labels),)
    task: Any = SimpleNamespace(num_classes=10)
    fit = choose_fit(config, small_encoder(), task, Extraction(), splits)
    choice = choose(fit, splits, len(config.described), val_share=0.1, seed=0)
    (probe,) = fit(FitRequest([0], [choice.setting], None, "")).probes
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
    config = LinearConfig(train="", test="", learning_rates=(1.0, 10.0), min_steps=200, val_share=0.3)
    choice = choice_of(config, splits_of(torch.eye(200), labels), num_classes=5)
    assert (choice.num_fit, choice.num_val) == (140, 60)
    assert all(value is not None and value < 50 for value in choice.val_top1[0])


def test_of_readouts_the_better_is_chosen_whatever_its_width(digits: Digits) -> None:
    poor, good = digits.train[:, :20], digits.train
    config = LinearConfig(train="", test="", learning_rates=(0.01, 0.1), min_steps=100)
    splits = [splits_of(values, digits.train_labels) for values in (poor, good)]
    choice = choice_of(config, *splits, num_classes=10)
    assert choice.readout == 1
    alone = [choice_of(config, of_one, num_classes=10).val_top1[0] for of_one in splits]
    assert choice.val_top1 == tuple(alone)


def test_a_setting_that_diverges_is_told_and_never_chosen(digits: Digits) -> None:
    splits = splits_of(digits.train[:200], digits.train_labels[:200])
    choice = choice_of(
        LinearConfig(train="", test="", learning_rates=(1e38, 0.1), min_steps=50), splits, num_classes=10
    )
    assert choice.setting == 1
    assert choice.val_top1[0][0] is None
    with pytest.raises(RunError, match="smaller learning rates"):
        choice_of(LinearConfig(train="", test="", learning_rates=(1e38, 1e37), min_steps=50), splits, num_classes=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rates", ()),
        ("learning_rates", (0.1, 0.0)),
        ("learning_rates", (math.nan,)),
        ("weight_decays", ()),
        ("weight_decays", (-0.1,)),
        ("inverse_penalties", (0.0,)),
        ("batch_size", 0),
        ("epochs", -1),
        ("warmup_epochs", 10),
        ("crop_scale", (0.5, 0.4)),
        ("min_steps", 0),
        ("val_share", 1.0),
    ],
)
def test_a_wrong_grid_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        LinearConfig(train="", test="", **{field: value})  # type: ignore[arg-type]


def test_a_report_says_what_was_chosen_and_repeats(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = LinearConfig(train="", test="", min_steps=300, learning_rates=(0.01, 0.1), weight_decays=(0.0, 0.01))
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


def test_a_search_that_falls_short_while_choosing_is_told(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_fits, "fit_logistic", partial(linear_fits.fit_logistic, max_iterations=1))
    splits = splits_of(digits.train[:200], digits.train_labels[:200])
    choice = choice_of(
        LinearConfig(train="", test="", solver="lbfgs", inverse_penalties=(0.1, 1.0)), splits, num_classes=10
    )
    assert [note.split(" the search")[0] for note in choice.notes] == [
        f"while choosing, for C = {c}" for c in ("0.1", "1")
    ]


def test_a_single_setting_is_not_chosen_but_said(folders: Folders, encoder: Encoder) -> None:
    config = LinearConfig(train="", test="", solver="lbfgs", inverse_penalties=(0.1,))
    report = Linear(open_dataset(folders.train), open_dataset(folders.test), config).run(encoder)
    assert report.protocol["chosen_on"] == "nothing: there is one setting"
    assert report.protocol["inverse_penalty"] == 0.1
    assert not report.notes


def test_the_report_is_of_the_readout_that_was_chosen(folders: Folders) -> None:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=0
        )
        nn.init.zeros_(module.cls_token)
    readouts = (Readout("cls", 1), Readout("mean", 1), Readout("both", 2))
    config = LinearConfig(train="", test="", min_steps=100, learning_rates=(0.1,), max_test=20)
    data = open_dataset(folders.train), open_dataset(folders.test)
    report = Linear(*data, config, extraction=Extraction(readouts=readouts)).run(small_encoder(module))
    tried: Any = report.protocol["val_top1"]
    assert [t["readout"] for t in tried] == [str(r) for r in readouts]
    best = max(t["value"] for t in tried)
    assert report.protocol["readout"] in [t["readout"] for t in tried if t["value"] == best]
    features: Any = report.protocol["features"]
    assert features["pooling"] == report.protocol["readout"]
    chosen = next(r for r in readouts if str(r) == report.protocol["readout"])
    alone = Linear(*data, config, extraction=Extraction(readouts=(chosen,))).run(small_encoder(module))
    assert (alone.outcomes.predicted == report.outcomes.predicted).all()
