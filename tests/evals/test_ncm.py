"""The nearest class mean against its naive twin, by its command, in a suite, in a recipe and in a report."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import yaml

from data_pipeline.datasets.read import open_dataset
from data_pipeline.remote.config import CacheConfig
from launch.commands.eval import app
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.ncm.config import NcmConfig
from pretrain.evals.ncm.protocol import NearestClassMean, class_means, nearest_mean
from pretrain.evals.protocols import inline_evaluators
from pretrain.evals.result import EvalReport
from pretrain.reports.run_results import find_protocol_results, kept_results
from tests.evals.conftest import Digits, Folders
from tests.evals.test_commands import evaluate
from tests.evals.test_finetune import saved
from tests.launch.suites import in_this_process, run_suite
from tests.recipe.recipes import changed, load


def naive(values: list[list[float]], labels: list[int], queries: list[list[float]], num_classes: int) -> list[int]:
    """Sample by sample in Python's own fp64."""

    def unit(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in vector))
        return [x / length for x in vector]

    means: dict[int, list[float]] = {}
    for label in range(num_classes):
        own = [unit(v) for v, given in zip(values, labels, strict=True) if given == label]
        if own:
            means[label] = unit([sum(column) / len(own) for column in zip(*own, strict=True)])
    return [
        max(means, key=lambda label: (sum(a * b for a, b in zip(query, means[label], strict=True)), -label))
        for query in queries
    ]


def test_it_is_its_naive_twin(digits: Digits) -> None:
    values, labels, queries = digits.train[:150], digits.train_labels[:150], digits.test[:200]
    found = nearest_mean(queries, class_means(values, labels, 12))  # two classes that nobody has
    assert found.tolist() == naive(values.tolist(), labels.tolist(), queries.tolist(), 12)
    long = values * torch.linspace(1, 50, 150)[:, None]
    assert torch.equal(found, nearest_mean(queries, class_means(long, labels, 12))), "lengths have no say"
    assert (found == digits.test_labels[:200]).double().mean() > 0.7


def test_the_order_of_samples_has_no_say(digits: Digits) -> None:
    values, labels = digits.train, digits.train_labels
    whole = class_means(values, labels, 10)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole, class_means(values[order], labels[order], 10), rtol=0, atol=1e-14)


def test_a_report_is_of_its_own_features(folders: Folders, encoder: Encoder) -> None:
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    report = NearestClassMean(train, test, NcmConfig(train="", test="", max_test=60)).run(encoder)
    features = Extraction().extract(encoder, train, num_classes=10, label="")[0]
    asked = Extraction().extract(encoder, test, num_classes=10, limit=60, label="")[0]
    expected = naive(features.values.tolist(), features.labels.tolist(), asked.values.tolist(), 10)
    right = sum(a == b for a, b in zip(expected, asked.labels.tolist(), strict=True))
    assert (report.metric, report.n, report.value) == ("top1", 60, 100 * right / 60)


def test_command_suite_recipe_and_report_know_it(folders: Folders, encoder: Encoder, tmp_path: Path) -> None:
    source, out = str(saved(tmp_path / "encoder")), tmp_path / "evals" / "ncm.json"
    evaluate("ncm", source, "--train", folders.train, "--test", folders.test, "--out", str(out))
    report = EvalReport.load(out)
    suite = {
        "name": "small", "encoders": {"one": source}, 
        "datasets": {"digits": {"train": folders.train, "test": folders.test}},
        "protocols": {"means": {"kind": "ncm"}},
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert run_suite(tmp_path / "suite.yaml", tmp_path / "out", devices=[], run=in_this_process) == 0
    assert EvalReport.load(tmp_path / "out" / "one" / "digits" / "means.json").value == report.value
    entry = {"kind": "ncm", "train": folders.train, "test": folders.test, "max_test": 50}
    (inline,) = inline_evaluators(load(tmp_path, changed("evals", [entry])).evals, CacheConfig())
    assert (inline.run(encoder).evaluator, inline.run(encoder).n) == ("ncm", 50)
    (comparison,) = find_protocol_results(kept_results(out.parent, ()), {report.weights_sha256})
    assert comparison.protocol == "nearest class mean"
    assert "ncm" in {command.name for command in app.registered_commands}
