"""Intervals against scipy's, chance against counting, and both in the table and the report of every protocol."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from scipy import stats

from pretrain.evals.result import EvalReport
from pretrain.evals.retrieval.protocol import chance
from pretrain.evals.uncertainty import chance_of_classes, chance_of_recall, draws_interval, share_intervals
from tests.evals.conftest import Folders
from tests.evals.test_commands import evaluate
from tests.evals.test_rerun_and_ranks import VIT


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (731, 1000), (1, 10_000)])
def test_intervals_of_shares_are_scipy_s_wilson(right: int, n: int) -> None:
    (found,) = share_intervals({"top1": 100 * right / n}, n).values()
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert found == pytest.approx([100 * expected.low, 100 * expected.high], abs=1e-4)


def test_intervals_of_draws_are_scipy_s_t() -> None:
    values = [40.0, 42.0, 47.0]
    expected = stats.t.interval(0.95, 2, loc=43.0, scale=stats.sem(values))
    assert draws_interval(values) == pytest.approx(list(expected))
    assert draws_interval([0.0, 100.0]) == [0.0, 100.0], "no share is beyond all or nothing"


@pytest.mark.parametrize(("own", "total", "k"), [(1, 6, 1), (2, 6, 3), (5, 6, 2), (1, 4, 10)])
def test_chance_of_recall_is_counted_over_all_choices(own: int, total: int, k: int) -> None:
    choices = list(itertools.combinations(range(total), min(k, total)))
    share = sum(min(choice) < own for choice in choices) / len(choices)
    assert chance_of_recall([own, own], total, k) == pytest.approx(100 * share)


def test_chance_knows_texts_that_several_images_share() -> None:
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2], [2, 2]])  # the second text is of two images
    found = chance(pairs, num_images=3, num_texts=3)
    assert found["image_to_text_r1"] == pytest.approx(100 * (2 + 1 + 1) / 9)
    assert found["text_to_image_r1"] == pytest.approx(100 * (1 + 2 + 2 + 1 + 1) / 15)
    assert found["text_to_image_r5"] == 100


def test_chance_of_five_guesses_is_five_times_that_of_one() -> None:
    assert chance_of_classes(["top1_k5", "mean_per_class", "top5"], 10) == {
        "top1_k5": 10, "mean_per_class": 10, "top5": 50,
    }  # fmt: skip
    assert chance_of_classes(["top5"], 3) == {"top5": 100}


@pytest.mark.parametrize(
    ("words", "over"),
    [
        (["knn", "--k", "5", "--k", "3"], "the test samples"),
        (["ncm"], "the test samples"),
        (["linear", "--lr", "0.1", "--min-steps", "5"], "the test samples"),
        (["fewshot", "--shots", "2", "--shots", "1", "--seeds", "3"], "3 draws"),
        (["fewshot", "--shots", "2", "--seeds", "1"], "the test samples"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_table_and_the_report_have_them(folders: Folders, tmp_path: Path, words: list[str], over: str) -> None:
    out, (kind, *options) = tmp_path / "a.json", words
    said = evaluate(kind, *VIT, "--train", folders.train, "--test", folders.test, *options, "--out", str(out)).stdout
    report = EvalReport.load(out)
    told = json.loads(out.read_text())
    shares = [name for name in report.metrics if not name.endswith("_std")]
    assert set(told["intervals"]) == set(told["chance"]) == set(shares)
    assert told["interval_over"].startswith(over)
    for name in shares:
        low, high = told["intervals"][name]
        assert low <= report.metrics[name] <= high
        row = next(line for line in said.splitlines() if re.search(rf"│ {name} ", line))
        assert f"{low:.2f} to {high:.2f} │ {told['chance'][name]:.2f}" in re.sub(" +", " ", row)
    first = next(line for line in said.splitlines() if line.startswith("│ "))
    assert first.split()[1] == report.metric, "what is compared stands first"
    assert told["chance"][report.metric] == 10, "of ten classes"
    compared = re.sub(" +", " ", evaluate("compare", str(out), str(out)).stdout)
    low, high = told["intervals"][report.metric]
    assert compared.count(f"{low:.2f} to {high:.2f} │ 10.00") == 2


def test_a_report_of_before_has_neither_and_is_read(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    evaluate("ncm", *VIT, "--train", folders.train, "--test", folders.test, "--out", str(out))
    told = json.loads(out.read_text())
    for name in ("chance", "intervals", "interval_over"):
        del told[name]
    out.write_text(json.dumps(told))
    assert EvalReport.load(out).intervals == {}
    assert "top1" in evaluate("compare", str(out), str(out)).stdout
