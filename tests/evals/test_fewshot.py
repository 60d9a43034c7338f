"""Few-shot: what is drawn, what is made of it, and how several draws are told."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Features
from pretrain.evals.fewshot import protocol as fewshot
from pretrain.evals.fewshot.config import Classifier, FewshotConfig, Shots
from pretrain.evals.fewshot.protocol import (
    Fewshot,
    first_samples,
    nearest_centroid,
    ranked,
)
from pretrain.evals.result import EvalReport
from tests.evals.conftest import Digits, Folders
from tests.evals.test_commands import evaluate

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 2, 1, 0, 2, 2, 2] * 3)
KEYS = [f"{i:03d}" for i in range(len(LABELS))]


def draw(keys: Sequence[str], labels: torch.Tensor, shots: Shots, seed: int) -> torch.Tensor:
    return first_samples(ranked(keys, labels, seed), shots)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.permutations(range(len(LABELS))))
def test_a_draw_has_so_many_of_each_class_whatever_the_order(shots: int, seed: int, order: list[int]) -> None:
    chosen = draw(KEYS, LABELS, shots, seed)
    assert Counter(LABELS[chosen].tolist()) == {0: shots, 1: shots, 2: shots}
    assert len(set(chosen.tolist())) == 3 * shots
    again = draw([KEYS[i] for i in order], LABELS[order], shots, seed)
    assert [KEYS[order[i]] for i in again.tolist()] == [KEYS[i] for i in chosen.tolist()]


def test_draws_differ_by_seed_and_grow() -> None:
    draws = {seed: frozenset(draw(KEYS, LABELS, 3, seed).tolist()) for seed in range(5)}
    assert len(set(draws.values())) == 5
    assert all(draws[seed] < set(draw(KEYS, LABELS, 4, seed).tolist()) for seed in draws)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.01, {0: 1, 1: 1, 2: 1}), (0.25, {0: 2, 1: 2, 2: 5}), (0.5, {0: 4, 1: 4, 2: 10}), (0.99, {0: 9, 1: 9, 2: 21})],
)
def test_a_share_is_of_each_class_and_at_least_one(share: float, expected: dict[int, int]) -> None:
    assert Counter(LABELS[draw(KEYS, LABELS, share, 0)].tolist()) == expected


def test_every_sample_has_the_same_chance() -> None:
    """Of 9 samples of class 0, in 600 draws of 3: 200 times each; 4 standard deviations are 46."""
    times = Counter(i for seed in range(600) for i in draw(KEYS, LABELS, 3, seed).tolist() if LABELS[i] == 0)
    assert len(times) == 9
    assert all(abs(count - 200) < 46 for count in times.values())


def test_a_class_with_too_few_is_named(folders: Folders, encoder: Encoder) -> None:
    data = open_dataset(folders.train), open_dataset(folders.test)
    with pytest.raises(InputError, match=r"1000 samples of each class, found \d+ of class \d \(\d\)"):
        Fewshot(*data, FewshotConfig(train="", test="", shots=(1, 1000)))
    told = r"30 samples of each class, found \d+ of class \d \(\d\); \d+ classes have too few"
    with pytest.raises(InputError, match=told):
        Fewshot(*data, FewshotConfig(train="", test="", shots=(30,), max_train=200)).run(encoder)


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")
def test_the_nearest_centroid_is_that_of_scikit_learn(digits: Digits) -> None:
    values, labels = digits.train[:100], digits.train_labels[:100]
    found = nearest_centroid(values, labels, digits.test, 12)  # two classes that nobody has
    unit = normalize(values.numpy())
    reference = NearestCentroid().fit(unit, labels.numpy())
    # By distance to centroids of length 1, which is by cosine.
    reference.centroids_ = normalize(reference.centroids_)
    expected = reference.predict(normalize(digits.test.numpy()))
    assert np.array_equal(found.numpy(), expected)
    centroids = NearestCentroid().fit(values.numpy(), labels.numpy()).predict(digits.test.numpy())
    assert not np.array_equal(found.numpy(), centroids)  # the normalisation has a say


def test_few_labels_are_learned_as_by_scikit_learn(folders: Folders, encoder: Encoder, digits: Digits) -> None:
    """The linear classifier on digits, 5 labels a class, against L-BFGS on the same labels."""
    evaluator = Fewshot(
        open_dataset(folders.train), open_dataset(folders.test), FewshotConfig(train="", test="", classifier="linear")
    )
    keys = tuple(map(str, range(len(digits.train))))
    train = Features(digits.train, digits.train_labels, keys)
    chosen = draw(keys, digits.train_labels, 5, 0)
    found, notes = evaluator._predict(train, chosen, digits.test, 0)
    assert not notes
    scaler = StandardScaler().fit(digits.train[chosen].numpy())
    reference = LogisticRegression(max_iter=2000, tol=1e-8).fit(
        scaler.transform(digits.train[chosen].numpy()), digits.train_labels[chosen].numpy()
    )
    expected = reference.predict(scaler.transform(digits.test.numpy()))
    assert (found.numpy() == expected).mean() > 0.995
    assert (found == digits.test_labels).double().mean() > 0.75


@pytest.mark.parametrize("classifier", ["centroid", "knn", "linear"])
def test_a_report_has_mean_and_spread_over_draws(classifier: Classifier, folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    first, again = (
        Fewshot(train, test, FewshotConfig(train="", test="", shots=(5, 1, 0.5), seeds=3, classifier=classifier)).run(
            encoder
        )
        for _ in range(2)
    )
    assert len(set(first.by_seed)) > 1
    assert first.value == pytest.approx(statistics.mean(first.by_seed))
    assert first.spread == pytest.approx(statistics.stdev(first.by_seed))
    assert first.metric == "top1_5shot"
    assert first.metrics.keys() == {
        *("top1_5shot", "top1_1shot", "top1_50%"), *("top1_5shot_std", "top1_1shot_std", "top1_50%_std"),
    }  # fmt: skip
    assert first.metrics["top1_50%"] > first.value > first.metrics["top1_1shot"] > 10
    assert train.label_counts is not None
    halves = sum(round(0.5 * n) for n in train.label_counts.tolist())
    assert first.protocol["num_drawn"] == {"top1_5shot": 50, "top1_1shot": 10, "top1_50%": halves}
    assert first.by_seed[0] == pytest.approx(100 * first.outcomes.correct.mean())
    assert (first.metrics, first.file_name) == (again.metrics, again.file_name)
    single = Fewshot(train, test, FewshotConfig(train="", test="", shots=(5,), seeds=1, classifier=classifier)).run(
        encoder
    )
    assert (single.value, single.spread) == (first.by_seed[0], None)


def test_a_search_that_falls_short_is_told(folders: Folders, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(folders.train), open_dataset(folders.test)
    config = FewshotConfig(train="", test="", shots=(1, 2), seeds=2, classifier="linear")
    assert not Fewshot(*data, config).run(encoder).notes
    monkeypatch.setattr(fewshot, "fit_logistic", partial(fewshot.fit_logistic, max_iterations=1))
    notes = Fewshot(*data, config).run(encoder).notes
    assert [note.split(": ")[0] for note in notes] == [f"top1_{n}shot, seed {seed}" for seed in (0, 1) for n in (1, 2)]
    assert all("ended after 1 iterations" in note for note in notes)


@pytest.mark.parametrize("wanted", [{"shots": ()}, {"shots": (1.5,)}, {"shots": (0,)}, {"shots": (1,), "seeds": 0}])
def test_a_wrong_question_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"shots|seeds"):
        FewshotConfig(train="", test="", **wanted)


def test_the_command(folders: Folders, tmp_path: Path) -> None:
    from tests.evals.test_finetune import saved

    data = [str(saved(tmp_path / "encoder")), "--train", folders.train, "--test", folders.test]
    out = tmp_path / "a.json"
    shown = evaluate("fewshot", *data, "--fraction", "0.2", "--fraction", "0.5", "--seeds", "2", "--out", str(out))
    report = EvalReport.load(out)
    assert report.metric == "top1_20%"
    assert f"{report.value:.2f}" in shown.stdout
    assert len(report.by_seed) == 2
    evaluate("fewshot", *data, "--shots", "2", "--classifier", "knn", "--out", str(out))
    assert (EvalReport.load(out).metric, len(EvalReport.load(out).by_seed)) == ("top1_2shot", 5)
    for wrong in (["--shots", "1", "--fraction", "0.5"], ["--fraction", "1.0"]):
        with pytest.raises(InputError, match="--fraction"):
            evaluate("fewshot", *data, *wrong)
