"""What a report says of a run's evaluations and of itself: nothing left out, nothing twice, nothing that is not so."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.batch import BatchSpec, TokenSpec
from data_pipeline.datasets.read import open_dataset
from data_pipeline.order.spread import spread_over
from pretrain.evals.result import EvalReport, Outcomes
from pretrain.evals.retrieval.config import RetrievalConfig
from pretrain.evals.retrieval.protocol import Retrieval
from pretrain.evals.sources.towers import load_towers
from pretrain.reports import report
from pretrain.reports.comparison_figures import draw_class_accuracy, draw_confusion, draw_principal_axes
from pretrain.reports.report_figures import curve
from pretrain.reports.run_facts import environment_rows, learned_from, shown_data
from pretrain.reports.run_results import (
    chance_level,
    curves_over_steps,
    find_protocol_results,
    kept_results,
    verdict,
)
from pretrain.reports.sample_images import of_several_classes
from tests import runs
from tests.integration.test_image_text_run import recipe as image_text_recipe
from tests.integration.test_mixed_captions import captioned
from tests.launch.test_hostile_names import CLASSES
from tests.shards import write_shards


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CLIP that was judged by retrieval at steps 4 and 6, then by a command twice and at its start."""
    folder = tmp_path_factory.mktemp("clip")
    shards = captioned(folder, 32)
    evals = [{"kind": "retrieval", "test": str(shards), "every_epochs": 1}]
    runs.train(image_text_recipe(folder / "r.yaml", shards, "clip", False, evals=evals), folder / "run")
    run, protocol = folder / "run", Retrieval(open_dataset(str(shards)))
    for source, random in ((run, False), (run / "checkpoints" / "step_00000006", False), (run, True)):
        judged = protocol.run(load_towers(str(source), random_init=random))
        judged.save(run / "evals" / judged.file_name)
    return run


def test_what_judges_two_towers_is_shown_once_and_step_by_step(clip: Path) -> None:
    assert len(list((clip / "evals").glob("*.json"))) == 5
    page = report.write_report(clip).read_text()
    last = EvalReport.load(clip / "evals" / "retrieval_step_00000006.json")
    assert page.count('data-label="trained"') == 1
    assert (
        '<td>retrieval<br><span class="soft">image_to_text_r1</span>'
        f'<td class="number" data-label="trained">{last.value:.1f} %' in page
    )
    assert '<td class="number" data-label="chance">3.1 %' in page, "one caption of 32 is right for each image"
    assert "by retrieval (" in page
    (figure,) = curves_over_steps(kept_results(clip / "evals", [RetrievalConfig(test="the pairs")]))
    assert figure.caption == "retrieval on the pairs: image_to_text_r1, %"
    assert page.count("data:image/svg") == 3 + 1
    assert "captions; no class label was used" in page
    assert "which is part of the training set" in page, "its validation set is its training set"
    assert "not trained on" not in page


def test_a_supervised_run_owes_its_neighbors_to_labels(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", 24, size=16)
    path = runs.write_recipe(
        tmp_path / "r.yaml", shards, data={"train": str(shards), "val": str(shards)}, schedule={"steps": 2},
        objective={"kind": "supervised", "num_classes": 3},
    )  # fmt: skip
    runs.train(path, tmp_path / "run")
    page = report.write_report(tmp_path / "run").read_text()
    assert "It was trained with labels" in page
    assert "No label was used" not in page
    assert "which is part of the training set" in page
    assert "was not judged yet" in page
    assert "['" not in page, "lists are words"
    assert "GB" in page


def test_what_taught_an_encoder_is_said_by_what_its_objective_needs() -> None:
    assert learned_from(BatchSpec(8), None) == "No label was used in this training."
    assert "weights of elsewhere" in learned_from(BatchSpec(8), "elsewhere")
    assert "with labels" in learned_from(BatchSpec(8, num_classes=3), None)
    assert "captions" in learned_from(BatchSpec(8, tokens=TokenSpec("clip", 8)), None)


def test_images_are_called_unseen_of_no_set(tmp_path: Path) -> None:
    a, b = (open_dataset(str(write_shards(tmp_path / name, n, size=16))) for name, n in (("a", 6), ("b", 9)))
    assert shown_data(a, b) == "Images of the validation set"
    assert "part of the training set" in shown_data(a, a)
    assert "as the run has no other" in shown_data(a, None)


def result(value: float, n: int = 100, **changes: Any) -> EvalReport:
    """Of n samples so many percent are right."""
    labels = np.zeros(n, np.int32)
    predicted = (np.arange(n) >= value * n / 100).astype(np.int32)
    found = EvalReport(
        evaluator="knn", metric="top1_k20", value=value, n=n, metrics={}, encoder={"tag": "encoder", "source": "s"},
        protocol={"k": 20, "sweep": [20]}, data={"num_classes": 4}, seeds={}, weights_sha256="w", versions={},
        seconds={}, notes=[], outcomes=Outcomes(tuple(map(str, range(n))), labels, predicted),
    )  # fmt: skip
    return replace(found, **changes)


def kept(folder: Path, reports: dict[str, EvalReport]) -> Path:
    for name, one in reports.items():
        one.save(folder / f"{name}.json")
    return folder


def test_one_question_is_one_row_whoever_asked_it(tmp_path: Path) -> None:
    """In between steps, by a command that measured other k beside it, on the run and on its checkpoint."""
    folder = kept(tmp_path, {
        "knn_step_00000004": result(50, encoder={"tag": "step_00000004", "source": "s", "step": 4}),
        "knn-a": result(50, protocol={"k": 20, "sweep": [10, 20]}, arguments={"test": "digits"}),
        "knn-b": result(50, encoder={"tag": "step_00000004", "source": "s", "step": 4}),
        "knn-c": result(40, encoder={"tag": "random", "source": "s"}, weights_sha256="r", seeds={"init": 3}),
        "knn-other": result(60, data={"num_classes": 9}, arguments={"test": "letters"}),
    })  # fmt: skip
    first, second = find_protocol_results(kept_results(folder, ()), {"w"})
    assert (first.protocol, first.trained.value, first.chance) == ("kNN, k = 20, digits", 50, 25)
    assert first.random is not None
    assert first.random.value == 40
    assert (second.protocol, second.random, second.chance) == ("kNN, k = 20, letters", None, pytest.approx(100 / 9))


def test_chance_is_the_report_s_own_where_it_says_it() -> None:
    counts = {"num_captions": 40, "num_texts": 20}
    assert chance_level(result(50, chance={"top1_k20": 12.5, "top5": 50})) == 12.5
    assert chance_level(result(50, chance={"top5": 50})) is None
    assert chance_level(result(50)) == 25, "an older one"
    assert chance_level(result(50, data=counts)) == 2
    assert chance_level(result(50, data={})) is None


@pytest.mark.parametrize(("value", "word"), [(90, "better"), (10, "worse"), (52, "not told apart")])
def test_the_verdict_goes_by_the_interval(tmp_path: Path, value: float, word: str) -> None:
    random = result(50, encoder={"tag": "random", "source": "s"}, weights_sha256="r")
    folder = kept(tmp_path, {"a": result(value), "b": random})
    said = verdict(find_protocol_results(kept_results(folder, ()), {"w"}))
    assert said.startswith(f"Beside its random start the encoder is {word} by kNN, k = 20 ({value:.1f} % after 50.0 %")
    assert "--random-init" in verdict(
        find_protocol_results(kept_results(kept(tmp_path / "c", {"a": result(1)}), ()), {"w"})
    )
    assert "pretrain eval" in verdict([])


def drawn_paths(source: str) -> str:
    return base64.b64decode(source.partition(",")[2]).decode()


def test_the_beginning_does_not_rule_the_axis_of_the_loss_and_chance_has_a_line() -> None:
    steps = list(range(1, 101))
    flat = [1.0 + 0.001 * step for step in steps]
    steep = [1000.0 / step if step < 5 else value for step, value in zip(steps, flat, strict=True)]
    ruled = [
        tick
        for tick in ("200", "400", "800")
        if f"<!-- {tick} -->" in drawn_paths(curve("loss", [("l", steps, steep)]).source)
    ]
    assert ruled, "the axis begins at zero where nothing else is asked for"
    free = drawn_paths(curve("loss", [("l", steps, steep)], from_zero=False).source)
    assert "<!-- 1.04 -->" in free
    assert "<!-- 200 -->" not in free
    dashed = drawn_paths(curve("kNN", [("knn", steps, flat)], lines={"chance": 2.0}).source)
    assert "<!-- chance -->" in dashed
    assert "stroke-dasharray" in dashed
    assert "stroke-dasharray" not in free


def test_names_out_of_data_are_drawn_as_they_are() -> None:
    """No formula, no name that leaves the legend, no glyph that is missing; nothing is warned of."""
    rng = np.random.default_rng(0)
    labels = np.arange(200, dtype=np.int32) % len(CLASSES)
    outcomes = Outcomes(tuple(map(str, range(200))), labels, rng.permutation(labels))
    names: Sequence[str] = CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = [
            draw_class_accuracy("$\\frac{$", dict.fromkeys(names, outcomes), names),
            draw_confusion("_a", outcomes, names),
            draw_principal_axes(
                "\x1b[31m", rng.normal(size=(200, 4)).astype(np.float32), labels.astype(np.int64), names
            ),
            curve("_$\\frac{$", [(names[0], [1, 2], [1.0, 2.0]), (names[1], [1, 2], [1.0, 2.0])]),
        ]
    for picture in pictures:
        for name in ("$\\frac{$", "_private"):
            assert f"<!-- {name} -->" in drawn_paths(picture.source), name
    assert "<!-- \\x1b[31mred -->" in drawn_paths(pictures[2].source)


def test_samples_are_of_all_classes_also_where_classes_take_turns() -> None:
    for num_classes in (2, 5, 6, 10):
        chosen = spread_over(6000, 600)
        assert {i % num_classes for i in chosen} == set(range(num_classes))
        assert [i // 10 for i in chosen] == list(range(600)), "one of each stretch"
        shown = of_several_classes([i % num_classes for i in chosen], 6)
        assert len({chosen[i] % num_classes for i in shown}) == min(6, num_classes)
        assert len(set(shown)) == 6
    assert spread_over(3, 9) == [0, 1, 2]
    assert of_several_classes([-1, -1], 6) == [0, 1]


def test_an_environment_is_told_in_words() -> None:
    told = {"hosts": ["vm", "vm", "n1"], "memory_bytes": 25_300_000_000, "arguments": ["a", "b"], "cuda": None,
            "packages": {"torch": "2"}, "cores": 2}  # fmt: skip
    assert environment_rows(told) == {
        "hosts": "vm (2 processes), n1",
        "memory": "25.3 GB",
        "arguments": "a b",
        "cores": "2",
    }
