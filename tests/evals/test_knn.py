"""kNN is exact: scikit-learn's predictions on real features, a loop's on ties, for any size of a chunk."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.read import open_dataset
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn import Knn, nearest, predict
from pretrain.recipe import InlineKnn
from tests.evals.conftest import Digits, Folders, small_encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_are_those_of_scikit_learn(digits: Digits, dtype: torch.dtype) -> None:
    bank, queries = digits.train.to(dtype), digits.test.to(dtype)
    ks = (1, 10, 20, 100, 200)
    found = predict(bank, digits.train_labels, queries, ks=ks, temperature=0.07, num_classes=10)
    for k in ks:
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        reference.fit(bank.double().numpy(), digits.train_labels.numpy())
        assert (found[k].numpy() == reference.predict(queries.double().numpy())).all(), f"k={k}"


# Few distinct values, so that most rows are full of ties, inside and across the k-th place.
levels = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_of_equally_near_the_first_comes_first(data: st.DataObject, rows: int, columns: int) -> None:
    flat = data.draw(st.lists(levels, min_size=rows * columns, max_size=rows * columns))
    k = data.draw(st.integers(1, columns))
    similarities = torch.tensor(flat).view(rows, columns)
    values, found = nearest(similarities, k)
    for row in range(rows):
        expected = sorted(range(columns), key=lambda c: (-similarities[row, c].item(), c))[:k]
        assert found[row].tolist() == expected
        assert values[row].tolist() == [similarities[row, c].item() for c in expected]


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
@given(
    st.integers(0, 10**6),
    st.integers(1, 25),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([0.07, 1.0]),
)
def test_predictions_are_those_of_a_loop(seed: int, size: int, classes: int, chunk: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    queries = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (size,), generator=generator)
    ks = sorted({1, (size + 1) // 2, size})
    found = predict(bank, labels, queries, ks=ks, temperature=temperature, num_classes=classes, chunk=chunk)
    for k in ks:
        assert found[k].tolist() == [naive(bank, labels, query, k, temperature) for query in queries]


def test_of_equal_votes_the_smaller_label_wins() -> None:
    bank = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([2, 1, 1, 2])
    found = predict(bank, labels, bank[:1], ks=(1, 2, 4), temperature=0.07, num_classes=3)
    assert [found[k].item() for k in (1, 2, 4)] == [2, 1, 1]  # the first of the nearest; then ties of votes


def test_k_beyond_the_bank_is_refused_before_anything_is_computed(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = InlineKnn(kind="knn", train="", test="", k=20, max_train=15)
    with pytest.raises(InputError, match="15 training samples"):
        Knn(train, test, config)
    with pytest.raises(InputError, match="301"):
        Knn(train, test, InlineKnn(kind="knn", train="", test=""), sweep=(301,))


def test_a_report_says_what_was_done(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    config = InlineKnn(kind="knn", train="", test="", k=5, max_test=90)
    report = Knn(train, test, config, sweep=(1, 50)).run(encoder)
    assert report.n == 90 == len(report.outcomes.keys)
    assert report.metric == "top1_k5"
    assert report.value == report.metrics["top1_k5"] == 100 * report.outcomes.correct.mean()
    assert set(report.metrics) == {"top1_k1", "top1_k5", "top1_k50"}
    assert report.value > 70  # a random projection of pixels keeps neighbours
    assert report.protocol["k"] == 5
    assert report.protocol["temperature"] == 0.07
    assert report.data["train"] == {"fingerprint": train.fingerprint, "n": 300, "of": 300}
    assert report.data["test"] == {"fingerprint": test.fingerprint, "n": 90, "of": 100}


def test_judging_in_mid_training_changes_no_loss(folders: Folders) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    knn = Knn(train, test, InlineKnn(kind="knn", train="", test="", max_train=200, max_test=20))

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
                knn.run(encoder)
        return found

    assert losses(judged=True) == losses(judged=False)
