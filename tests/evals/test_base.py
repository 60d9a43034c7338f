"""A report comes back as it was kept; a comparison is paired, and refused where it has no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn
from pretrain.evals.result import EvalReport, Outcomes, compare
from pretrain.evals.uncertainty import paired_interval
from tests.evals.conftest import Folders, small_encoder


def knn_report(folders: Folders, encoder: Encoder, **config: object) -> EvalReport:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    inline = KnnConfig(train="", test="", **{"k": 5, **config})
    return Knn(train, test, inline).run(encoder)


def test_what_is_to_be_known_of_an_encoder_stands_in_its_reports(folders: Folders, encoder: Encoder) -> None:
    assert knn_report(folders, replace(encoder, notes=("other pixels",))).notes == ["other pixels"]


def test_a_kept_report_comes_back_whole(tmp_path: Path, folders: Folders, encoder: Encoder) -> None:
    report = knn_report(folders, encoder)
    path = tmp_path / "new" / report.file_name
    report.save(path)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".safetensors"]
    found = EvalReport.load(path)
    assert found.to_json() == report.to_json()
    assert found.outcomes.keys == report.outcomes.keys == tuple(sorted(report.outcomes.keys))
    assert (found.outcomes.predicted == report.outcomes.predicted).all()
    assert (found.outcomes.labels == report.outcomes.labels).all()


def test_the_outcome_stands_by_its_key(folders: Folders, encoder: Encoder) -> None:
    """Whatever the order in which samples were judged; the label of a digit is the name of its folder."""
    outcomes = knn_report(folders, encoder).outcomes
    assert [int(key.split("/")[0]) for key in outcomes.keys] == outcomes.labels.tolist()


def test_another_question_has_another_name(folders: Folders, encoder: Encoder) -> None:
    report = knn_report(folders, encoder)
    assert knn_report(folders, encoder).file_name == report.file_name
    names = {
        report.file_name,
        knn_report(folders, encoder, k=6).file_name,
        knn_report(folders, encoder, temperature=0.1).file_name,
        knn_report(folders, encoder, max_test=99).file_name,
        knn_report(folders, small_encoder(seed=1)).file_name,
    }
    assert len(names) == 5
    assert replace(report, arguments={"out": "x"}, seconds={}).file_name == report.file_name


@pytest.mark.parametrize("damage", ["no file", "no outcomes", "not json", "other format", "a list", "deep", "lacks n"])
def test_what_is_no_report_is_an_input_error(tmp_path: Path, folders: Folders, encoder: Encoder, damage: str) -> None:
    path = tmp_path / "report.json"
    knn_report(folders, encoder).save(path)
    described = json.loads(path.read_text())
    if damage == "no file":
        path.unlink()
    elif damage == "no outcomes":
        path.with_suffix(".safetensors").unlink()
    elif damage == "lacks n":
        del described["n"]
        path.write_text(json.dumps(described))
    else:
        other = {**described, "format": 99}
        path.write_text(
            {"not json": "{", "other format": json.dumps(other), "a list": "[]", "deep": "[" * 10**5}[damage]
        )
    with pytest.raises(InputError, match="a report of"):
        EvalReport.load(path)


correct = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(np.array)


@settings(max_examples=150, deadline=None)
@given(correct)
def test_an_interval_is_paired(pairs: np.ndarray) -> None:
    a, b = pairs.T
    found, mirrored = paired_interval(a, b), paired_interval(b, a)
    assert found.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert -100 <= found.low < found.high <= 100
    order = np.random.default_rng(0).permutation(len(a))
    assert paired_interval(a[order], b[order]) == found


def test_equal_predictions_leave_a_width_and_pairing_narrows_it() -> None:
    a = np.arange(1000) % 2 == 0
    same = paired_interval(a, a)
    assert same.low < 0 < same.high < 0.5
    opposite = paired_interval(a, ~a)  # equal accuracies, nothing in common
    assert opposite.high > 10 * same.high
    assert not same.excludes_zero
    assert paired_interval(a, a & (np.arange(1000) > 40)).excludes_zero


@pytest.mark.parametrize(("n", "both", "only_a", "only_b"), [(60, 0.5, 0.1, 0.1), (400, 0.4, 0.15, 0.05)])
def test_the_interval_covers_the_truth_in_95_of_100_cases(n: int, both: float, only_a: float, only_b: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice(4, size=(2000, n), p=[both, only_a, only_b, 1 - both - only_a - only_b])
    truth, covered = 100 * (only_a - only_b), 0
    for draw in draws:
        interval = paired_interval((draw == 0) | (draw == 1), (draw == 0) | (draw == 2))
        covered += interval.low <= truth <= interval.high
    assert 0.935 < covered / 2000 < 0.97


def test_reports_of_other_samples_are_not_compared(folders: Folders, encoder: Encoder) -> None:
    report = knn_report(folders, encoder)
    assert compare(report, report).difference == 0
    with pytest.raises(InputError, match="100 and 99 samples, 99 keys"):
        compare(report, knn_report(folders, encoder, max_test=99))
    relabelled = Outcomes(report.outcomes.keys, report.outcomes.labels + 1, report.outcomes.predicted)
    with pytest.raises(InputError, match="same labels"):
        compare(report, replace(report, outcomes=relabelled))
    names = report.data["classes"]
    assert isinstance(names, list)
    further = replace(report, outcomes=relabelled, data={**report.data, "classes": ["none", *names]})
    assert compare(report, further).difference != 0, "the same classes under other numbers; none of them was found"
    other_keys = tuple(f"{key}x" for key in report.outcomes.keys)
    renamed = Outcomes(other_keys, report.outcomes.labels, report.outcomes.predicted)
    with pytest.raises(InputError, match="0 keys"):
        compare(report, replace(report, outcomes=renamed))
