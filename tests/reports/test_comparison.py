"""Results side by side: whose figures they are, how they differ, and what is told where they cannot be compared."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from launch.commands.report import load_judged, report
from pretrain.evals.result import EvalReport, Outcomes, compare
from pretrain.evals.suite import KEPT
from pretrain.reports.comparison import compare_results, difference, table_csv, table_markdown
from pretrain.reports.comparison_figures import (
    class_accuracy,
    confusion,
    draw_class_accuracy,
    draw_confusion,
    draw_principal_axes,
    principal_axes,
)
from pretrain.reports.comparison_images import look
from pretrain.reports.comparison_page import build_page, write_comparison
from pretrain.reports.sample_images import look_at
from tests.launch.suites import in_this_process, make_run, run_suite, tree_of, write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite of which all is there."""
    folder = tmp_path_factory.mktemp("comparison")
    path = write_suite(folder, tree_of(folder))
    assert run_suite(path, folder / "out", devices=[], run=in_this_process) == 0
    return folder / "out"


def load(suite: Path, encoder: str, protocol: str = "knn") -> EvalReport:
    return EvalReport.load(suite / encoder / "colours" / f"{protocol}.json")


def kept(tmp_path: Path, name: str, report: EvalReport, **changes: Any) -> Path:
    replace(report, **changes).save(tmp_path / name)
    return tmp_path / name


# Differences.


def test_with_several_seeds_the_interval_is_of_their_paired_differences(suite: Path) -> None:
    a, b = (replace(load(suite, "first"), by_seed=seeds) for seeds in ([50.0, 52.0, 57.0], [49.0, 49.0, 52.0]))
    found = difference(a, b)
    gaps = [1.0, 3.0, 5.0]
    half = 4.302653 * statistics.stdev(gaps) / math.sqrt(3)  # t of two degrees of freedom, from its table
    assert found.over == "3 seeds"
    assert found.interval.difference == pytest.approx(3.0)
    assert (found.interval.low, found.interval.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_seeds_are_paired_where_they_are_the_same_and_of_the_same_samples(suite: Path) -> None:
    a, b = (replace(load(suite, name), by_seed=[50.0, 52.0]) for name in ("first", "second"))
    ours, theirs = (replace(r, protocol={**r.protocol, "seeds": s}) for r, s in ((a, [0, 1]), (b, [2, 3])))
    assert difference(ours, theirs).interval == compare(a, b)
    assert "seeds" in difference(ours, theirs).over
    fewer = Outcomes(b.outcomes.keys[1:], b.outcomes.labels[1:], b.outcomes.predicted[1:])
    with pytest.raises(InputError, match="the same test samples"):
        difference(a, replace(b, outcomes=fewer))


@pytest.mark.parametrize(
    ("ours", "theirs"), [((), ()), ((50.0, 52.0), ()), ((50.0, 52.0), (1.0, 2.0, 3.0)), ((1.0,), (2.0,))]
)
def test_else_it_is_paired_sample_by_sample(suite: Path, ours: Sequence[float], theirs: Sequence[float]) -> None:
    a, b = replace(load(suite, "first"), by_seed=ours), replace(load(suite, "second"), by_seed=theirs)
    assert difference(a, b).interval == compare(a, b)
    assert ("first seeds" in difference(a, b).over) == bool(ours)


# Tables.


def test_the_table_has_each_value_and_its_difference_from_the_baseline(suite: Path) -> None:
    comparison = compare_results([suite], "random")
    assert comparison.name == "small"
    assert comparison.encoders == ("first", "second", "random")
    assert comparison.columns == (("colours", "knn"), ("colours", "linear"))
    assert comparison.warnings == ()
    rows = list(csv.DictReader(io.StringIO(table_csv(comparison))))
    markdown = table_markdown(comparison)
    for row in rows:
        for protocol in ("knn", "linear"):
            own, base = load(suite, row["encoder"], protocol), load(suite, "random", protocol)
            assert float(row[f"colours {protocol} value"]) == own.value
            assert row[f"colours {protocol} weights_sha256"] == own.weights_sha256
            if row["encoder"] == "random":
                assert row[f"colours {protocol} difference"] == ""
                continue
            expected = compare(own, base)
            for kind in ("difference", "low", "high"):
                assert float(row[f"colours {protocol} {kind}"]) == getattr(expected, kind)
            text = f"{expected.difference:+.2f} ({expected.low:+.2f} to {expected.high:+.2f})"
            assert re.search(rf"^\| {row['encoder']} \|.*{re.escape(text)}", markdown, flags=re.MULTILINE)
    assert "Difference from random" in markdown


def test_a_spread_over_seeds_is_shown(suite: Path, tmp_path: Path) -> None:
    path = kept(tmp_path, "a.json", load(suite, "first"), by_seed=[40.0, 42.0], spread=1.4142, value=41.0)
    assert "| 41.00 ± 1.41 |" in table_markdown(compare_results([path]))


def test_the_first_encoder_is_the_baseline_unless_another_is_named(suite: Path) -> None:
    assert compare_results([suite]).baseline == "first"
    with pytest.raises(InputError, match=r"found randon\. Did you mean random\?"):
        compare_results([suite], "randon")


def test_what_is_missing_is_told(suite: Path, tmp_path: Path) -> None:
    for path in [*suite.glob("*/colours/*"), suite / KEPT / "suite.yaml"]:
        target = tmp_path / path.relative_to(suite)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "second" / "colours" / "linear.json").unlink()
    comparison = compare_results([tmp_path])
    assert comparison.warnings == ("there is no result of second by colours linear",)
    assert "–" in table_markdown(comparison)


def test_other_test_samples_cannot_be_compared_and_other_versions_are_told(suite: Path, tmp_path: Path) -> None:
    a, b = load(suite, "first"), load(suite, "second")
    fewer = Outcomes(b.outcomes.keys[1:], b.outcomes.labels[1:], b.outcomes.predicted[1:])
    paths = [
        kept(tmp_path, "a.json", a),
        kept(tmp_path, "b.json", b, outcomes=fewer, n=fewer.labels.size, versions={**b.versions, "torch": "0.1"}),
    ]
    comparison = compare_results(paths)
    assert not comparison.differences
    told = " ".join(comparison.warnings)
    assert "second and first by" in told
    assert "cannot be compared" in told
    assert "several versions of torch: 0.1; " in told
    assert "several numbers of test samples: 23; 24" in told


def test_answers_to_other_questions_are_told(suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite, tmp_path / "out")
    path = tmp_path / "out" / "second" / "colours" / "knn.json"
    own = load(suite, "second")
    replace(
        own,
        arguments={**own.arguments, "limit_train": 10},
        data={**own.data, "train": {**own.data["train"], "fingerprint": "another"}},  # type: ignore[dict-item]
        weights_sha256="f" * 64,
    ).save(path)
    told = " ".join(compare_results([tmp_path / "out"]).warnings)
    assert "results by colours knn have several protocols: limit_train 10; limit_train null" in told
    assert "several training sets" in told
    assert "several test sets" not in told
    assert f"results of second are of several weights: {own.weights_sha256[:12]}; ffffffffffff" in told or (
        f"results of second are of several weights: ffffffffffff; {own.weights_sha256[:12]}" in told
    )


def test_reports_alone_are_named_by_what_they_are_of(suite: Path, tmp_path: Path) -> None:
    a = load(suite, "first")
    paths = [
        kept(tmp_path, "a.json", a),
        kept(tmp_path, "b.json", load(suite, "random")),
        kept(tmp_path, "c.json", a, arguments={**a.arguments, "k": [3]}),
    ]
    of_a_file = kept(tmp_path, "e.json", a, arguments={**a.arguments, "weights_key": "teacher", "weights_prefix": "m."})
    assert compare_results([of_a_file]).columns == compare_results(paths[:1]).columns
    comparison = compare_results(paths)
    assert comparison.encoders == ("first", "first random")
    folder = suite.parent.name
    assert comparison.columns == ((folder, "knn k [5, 3]"), (folder, "knn k [3]"))
    again = kept(tmp_path, "d.json", a, weights_sha256="f" * 64)
    marked = compare_results([*paths, again]).encoders
    assert marked == (f"first {a.weights_sha256[:8]}", "first random", "first ffffffff")
    with pytest.raises(InputError, match=r"one result, found .*a\.json and .*a\.json"):
        compare_results([paths[0], paths[0]])


def test_what_is_no_result_is_refused(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a run, a suite's folder, or reports"):
        compare_results([tmp_path])
    with pytest.raises(InputError, match="a report of `pretrain eval`"):
        compare_results([tmp_path / "none.json"])


# Figures.

OUTCOMES = Outcomes(("a", "b", "c", "d", "e"), np.array([0, 0, 0, 0, 2], np.int32), np.array([0, 0, 0, 1, 0], np.int32))


def test_shares_by_class_are_of_that_classs_samples() -> None:
    assert class_accuracy(OUTCOMES, 3).tolist()[::2] == [75.0, 0.0]
    assert np.isnan(class_accuracy(OUTCOMES, 3)[1])
    assert confusion(OUTCOMES, 3).tolist() == [[75, 25, 0], [0, 0, 0], [100, 0, 0]]


def test_principal_axes_are_those_of_the_covariance() -> None:
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * np.array([1, 5, 2, 0.1], np.float32)
    points, shares = principal_axes(values + 100)
    variances, vectors = np.linalg.eigh(np.cov(values.T.astype(np.float64)))
    for axis, index in ((0, -1), (1, -2)):
        expected = (values - values.mean(axis=0)) @ vectors[:, index]
        assert np.allclose(np.abs(points[:, axis]), np.abs(expected), atol=1e-3)
        assert shares[axis] == pytest.approx(variances[index] / variances.sum(), rel=1e-4)
    assert np.array_equal(principal_axes(values[:, :1])[0][:, 1], np.zeros(50)), "a single feature has one axis"


def test_figures_of_many_classes_are_drawn(suite: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 300, 2000).astype(np.int32)
    many = Outcomes(tuple(map(str, range(2000))), labels, rng.permutation(labels))
    classes = [f"a class of a long name {i}" for i in range(300)]
    assert "20 of " in draw_class_accuracy("x", {"a": many, "b": many}, classes).caption
    assert draw_confusion("x", many, classes).source == draw_confusion("x", many, classes).source, "the same each time"
    axes = draw_principal_axes("x", rng.normal(size=(2000, 8)).astype(np.float32), labels.astype(np.int64), classes)
    assert axes.source.startswith("data:image/svg+xml;base64,")


# The page.


def test_bold_is_what_is_better_than_its_rivals_beyond_chance(suite: Path, tmp_path: Path) -> None:
    own = load(suite, "first")
    labels = np.zeros(400, np.int32)

    def right(percent: float) -> dict[str, Any]:
        predicted = (np.arange(400) >= 4 * percent).astype(np.int32)
        outcomes = Outcomes(tuple(map(str, range(400))), labels, predicted)
        return {"value": percent, "n": 400, "outcomes": outcomes, "weights_sha256": str(percent)}

    def bold(*values: float) -> list[str]:
        paths = [
            kept(tmp_path, f"{i}.json", own, encoder={**own.encoder, "source": f"e{i}"}, **right(value))
            for i, value in enumerate(values)
        ]
        rows = build_page(compare_results(paths), load_judged)["values"]
        return [row["name"] for row in rows if row["cells"][0]["best"]]

    assert bold(90, 50) == ["e0"]
    assert bold(50, 90, 89.75) == [], "the rival is as good"
    assert bold(50, 50) == []
    assert bold(50) == []


def test_neighbours_are_the_nearest_of_images_from_all_over_the_training_set(suite: Path) -> None:
    own = load(suite, "first")
    shown = look("colours", {"first": own}, load_judged)
    assert shown.skipped == []
    assert len(shown.neighbours) == 6
    assert {n.query.caption for n in shown.neighbours} == {"class0", "class1", "class2"}
    assert all(len(n.found["first"]) == 5 for n in shown.neighbours)
    itself = replace(own, arguments={**own.arguments, "train": own.arguments["test"]})
    for item in look("colours", {"first": itself}, load_judged).neighbours:
        assert item.found["first"][0].source == item.query.source, "nearest to an image is itself"
        assert item.found["first"][0].good


def test_neighbours_are_of_a_query_s_class_by_its_name_and_unusable_images_are_passed_over(
    suite: Path, tmp_path: Path
) -> None:
    """The last test image is none, and the first class has the number of another in the training set."""
    own = load(suite, "first")
    test = Path(shutil.copytree(str(own.arguments["test"]), tmp_path / "test"))
    (test / "class0").rename(test / "zebra")
    sorted(test.rglob("*.jpg"))[-1].write_bytes(b"no image")
    shown = look("colours", {"first": replace(own, arguments={**own.arguments, "test": str(test)})}, load_judged)
    assert shown.skipped == []
    assert {item.query.caption for item in shown.neighbours} == {"class1", "class2", "zebra"}
    for item in shown.neighbours:
        assert [near.good for near in item.found["first"]] == [
            near.caption == item.query.caption for near in item.found["first"]
        ]


def test_images_are_taken_from_all_over_a_set_that_is_sorted_by_class(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.reports.comparison_images.BANK_SIZE", 6)
    monkeypatch.setattr("pretrain.reports.comparison_images.NUM_POINTS", 6)
    shown = look("colours", {"first": load(suite, "first")}, load_judged).neighbours
    assert {item.query.caption for item in shown} == {"class0", "class1", "class2"}
    assert {near.caption for item in shown for near in item.found["first"]} == {"class0", "class1", "class2"}


def test_sizes_that_do_not_divide_leave_no_end_out(suite: Path) -> None:
    own = load(suite, "first")
    test = open_dataset(str(own.arguments["test"]))
    encoder = load_judged(own)
    for count in (1, 13, 23, 24, 100):
        keys = look_at(encoder, test, count, max_pixels=10**6, label="").features.keys
        chosen = [i for i in range(24) if test.read(i).key in keys]
        assert len(chosen) == len(keys) == min(count, 24)
        edges = [i * 24 // len(keys) for i in range(len(keys))] + [24]
        assert all(low <= i < high for low, i, high in zip(edges, chosen, edges[1:], strict=False)), (
            "one of each stretch"
        )


def test_what_cannot_be_shown_is_told_with_its_reason(suite: Path, tmp_path: Path) -> None:
    own = load(suite, "first")
    others = make_run(tmp_path / "first", 9)
    moved = replace(own, arguments={**own.arguments, "encoder": str(others)})
    gone = replace(own, arguments={**own.arguments, "encoder": str(tmp_path / "gone")})
    shown = look("colours", {"first": own, "moved": moved, "gone": gone}, load_judged)
    assert [picture.caption for picture in shown.axes] == ["first"]
    assert "the weights that were judged" in shown.skipped[0]
    assert "gone" in shown.skipped[1]
    nowhere = replace(own, arguments={**own.arguments, "test": str(tmp_path / "nowhere")})
    assert "nowhere" in look("colours", {"first": nowhere}, load_judged).skipped[0]
    assert "do not say where" in look("colours", {"first": replace(own, arguments={})}, load_judged).skipped[0]
    towers = replace(own, arguments={"towers": str(suite.parent / "first"), "test": own.arguments["test"]})
    assert "of two towers" in look("colours", {"first": towers}, load_judged).skipped[0]


def test_the_page_says_how_each_number_came_about(suite: Path, tmp_path: Path) -> None:
    path = write_comparison(compare_results([suite], "random"), tmp_path / "page", load_judged)
    text = path.read_text()
    for name in ("first", "second", "random"):
        for protocol in ("knn", "linear"):
            own = load(suite, name, protocol)
            assert own.weights_sha256 in text
            assert f"{own.value:.2f}" in text
    assert text.count("eval linear: encoder ") == 3
    assert "±" not in text, "no result has a spread"
    assert not re.search(r"""(?:src|href)=(?!["']data:)""", text), "nothing from outside"
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "table.md", "table.csv"}


def test_outcomes_that_are_no_classes_have_no_figures_by_class(suite: Path, tmp_path: Path) -> None:
    own = load(suite, "first")
    data = {key: value for key, value in own.data.items() if key != "num_classes"}
    comparison = compare_results([kept(tmp_path, "a.json", own, data=data)])
    (column,) = build_page(comparison, load_judged)["columns"]
    assert column["by_class"] is None
    assert "nothing by class" in column["skipped"]


def test_of_too_many_classes_there_is_no_matrix(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.reports.comparison_page.MAX_PAIRED", 2)
    column, *_ = build_page(compare_results([suite]), load_judged)["columns"]
    assert column["matrices"] == []
    assert "more than 2 classes" in column["unpaired"]


def test_the_command_writes_into_the_suites_folder_or_where_it_is_told(suite: Path, tmp_path: Path) -> None:
    report([suite], None, "random")
    assert (suite / "report.html").is_file()
    paths = [suite / name / "colours" / "knn.json" for name in ("first", "second")]
    with pytest.raises(InputError, match="--out"):
        report(paths, None, None)
    report(paths, tmp_path / "both", None)
    assert "| second |" in (tmp_path / "both" / "table.md").read_text()
    with pytest.raises(InputError, match="a run alone"):
        report([suite.parent / "first", suite], None, None)
