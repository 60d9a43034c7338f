"""The report of a run: everything in it, nothing from outside, and text that stays text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import CheckpointError, InputError, RecipeError
from data_pipeline.messages import visible
from data_pipeline.order.spread import spread_over
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.preprocessing import Preprocessing
from data_pipeline.shards.load_manifest import load_manifest
from pretrain.checkpoints.checkpoint import complete_checkpoints, module_state
from pretrain.evals.encoder import Encoder
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn
from pretrain.evals.result import EvalReport, Outcomes, compare
from pretrain.evals.sources.load import load_source
from pretrain.monitoring.goodput import Goodput
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.objective import Mae
from pretrain.recipe.files import load_recipe
from pretrain.reports import report
from pretrain.reports.reconstructions import draw_reconstructions
from pretrain.reports.report_figures import Neighbors, Picture, curve, picture
from pretrain.reports.run_results import ProtocolResult, find_protocol_results, kept_results
from pretrain.reports.sample_images import NeighborSample, neighbours, of_several_classes
from pretrain.runtime.failure import forget_failure, note_failure
from tests import runs
from tests.shards import write_shards

SIZE = 16
OPTIONS = {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg", "fc_norm": False}
HEAD = {
    "mae": {"kind": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "supervised": {"kind": "supervised", "num_classes": 3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "train", 90, size=SIZE)
    write_shards(folder / "test", 40, size=SIZE)
    return folder


def train(folder: Path, data: Path, kind: str, **groups: Any) -> Path:
    tree = {
        "name": "tiny",
        "data": {"train": str(data / "train"), **groups},
        "model": {"name": "vit_tiny_patch16_224", "image_size": SIZE, "patch_size": 4, "options": OPTIONS},
        "objective": HEAD[kind],
        "optim": {"base_lr": 1e-2},
        "schedule": {"steps": 4},
        "batch": {"global_size": 8},
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "runtime": {"peak_tflops": 0.1, "threads": 1, "device": "cpu"},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    runs.train(folder / "recipe.yaml", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MAE for four steps, judged by kNN with its random start."""
    run = train(tmp_path_factory.mktemp("run"), data, "mae", val=str(data / "test"))
    knn = Knn(
        open_dataset(str(data / "train")),
        open_dataset(str(data / "test")),
        KnnConfig(train="", test="", k=5),
    )
    for random_init in (False, True):
        judged = knn.run(load_source(str(run), random_init=random_init))
        judged.save(run / "evals" / judged.file_name)
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    note_failure(run, "the disk was lost")
    path = report.write_report(run, notes=["it went <well>"])
    forget_failure(run)
    assert path == run / "report.html"
    return Page(path.read_text("utf-8"))


class Page(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        """What markup there is, whatever the text says."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]

    def images(self, kind: str) -> list[bytes]:
        found = [
            re.fullmatch(f"data:{re.escape(kind)};base64,(.*)", a["src"] or "") for t, a in self.elements if t == "img"
        ]
        return [base64.b64decode(match[1]) for match in found if match]


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    assert "default-src 'none'" in next(a["content"] for t, a in page.elements if a.get("http-equiv"))  # type: ignore[operator]
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "data", "action"} & attributes.keys():
            assert (attributes[name] or "").startswith("data:image/"), (tag, name)
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_every_image_can_be_seen(page: Page) -> None:
    pngs, svgs = page.images("image/png"), page.images("image/svg+xml")
    assert len(pngs) + len(svgs) == sum(tag == "img" for tag, _ in page.elements)
    assert len(svgs) == 3
    for data in svgs:
        assert ElementTree.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    expected = 3 * report.NUM_RECONSTRUCTIONS + report.NUM_QUERIES * (1 + 2 * report.NUM_NEIGHBOURS)
    assert len(pngs) == expected
    assert {Image.open(io.BytesIO(data)).size for data in pngs} == {(SIZE, SIZE)}
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")


def test_the_table_says_what_the_evaluations_found(data: Path, run: Path, page: Page) -> None:
    trained, random = (
        EvalReport.load(next((run / "evals").glob(f"knn-{tag}-*.json"))) for tag in ("encoder", "random")
    )
    interval = compare(trained, random)
    row = re.sub(r"\s+", " ", page.text)
    assert (
        f"kNN, k = 5top1_k5{trained.value:.1f} %{random.value:.1f} %33.3 %{interval.difference:+.1f}"
        f"{interval.low:+.1f} to {interval.high:+.1f}40" in row
    )
    assert "32 samples seen in 4 of 4 steps of 8, 0.4 epochs" in row
    assert f"{data / 'train'}: 90 samples of 3 classes" in row
    assert f"{data / 'test'}: 40 samples of 3 classes" in row
    assert re.search(r"last started 20\d\d-\d\d-\d\d \d\d:\d\d UTC, step_00000004 saved 20\d\d-", row)
    assert f"by kNN, k = 5 ({trained.value:.1f} % after {random.value:.1f} %, {interval.difference:+.1f} points" in row
    assert "it went <well>" in row
    assert "The run failed: the disk was lost" in row
    assert "zero_stage: 1" in row
    assert f"torch {version('torch')}" in row


def test_reconstructions_are_of_the_weights_in_the_newest_checkpoint(run: Path, page: Page) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    dataset = open_dataset(str(recipe.data.val))
    objective = build_objective(recipe.model, recipe.objective)
    assert isinstance(objective, Mae)
    fresh = [row[2].source for row in draw_reconstructions(objective, dataset, recipe.data, 4)]
    objective.load_state_dict(module_state(complete_checkpoints(run / "checkpoints")[-1]), strict=True)
    rows = draw_reconstructions(objective, dataset, recipe.data, 4)
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"][3:]
    assert [image.source for row in rows for image in row] == sources[:12]
    assert not {row[2].source for row in rows} & set(fresh)


def test_a_reconstruction_keeps_what_was_seen_and_paints_the_rest(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    dataset = open_dataset(str(recipe.data.val))
    objective = build_objective(recipe.model, recipe.objective)
    assert isinstance(objective, Mae)
    blank = np.round(255 * np.array(recipe.data.mean)).astype(np.uint8)
    for i, (original, masked, filled) in enumerate(
        map(pixels, row) for row in draw_reconstructions(objective, dataset, recipe.data, 5)
    ):
        np.testing.assert_array_equal(original, stored(dataset, i))
        hidden = (masked == blank).all(axis=2)
        assert hidden.mean() == pytest.approx(0.75, abs=0.02), "but for pixels that are of the mean colour"
        np.testing.assert_array_equal(masked[~hidden], original[~hidden])
        np.testing.assert_array_equal(filled[~hidden], original[~hidden])
        assert (filled[hidden] != original[hidden]).any(axis=1).mean() > 0.5


def pixels(shown: Picture) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))))


def stored(dataset: Dataset, i: int) -> Any:
    return decode_image(dataset.read(i).fields["jpg"], max_pixels=10**6, where="")


class Colour(nn.Module):
    """[B, 3, S, S] -> the mean colour, [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * self.scale


def test_neighbours_are_the_nearest_by_cosine(data: Path) -> None:
    bank, queries = open_dataset(str(data / "train")), open_dataset(str(data / "test"))
    encoder = Encoder(Colour(), Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), tag="colour")
    sample = neighbours(
        {"colour": encoder}, bank, queries, num_queries=3, num_rated=20, bank_size=60, k=4, max_pixels=10**6
    )
    found, chosen, rated = sample.shown, spread_over(90, 60), spread_over(40, 20)
    images = [stored(bank, i) for i in chosen]

    def feature(image: Any) -> Any:
        mean = (image / 255 - 0.5).mean(axis=(0, 1))
        return mean / np.linalg.norm(mean)

    def nearest(query: Any) -> list[int]:
        return np.argsort([-feature(query) @ feature(image) for image in images], kind="stable")[:4].tolist()

    asked = [rated[i] for i in of_several_classes([i % 3 for i in rated], 3)]
    assert [item.query.caption for item in found] == ["class0", "class1", "class2"]
    for i, item in zip(asked, found, strict=True):
        query = stored(queries, i)
        np.testing.assert_array_equal(pixels(item.query), query)
        assert item.found["colour"] == [
            picture(images[j], f"class{chosen[j] % 3}", good=chosen[j] % 3 == i % 3) for j in nearest(query)
        ]
    same = [[chosen[j] % 3 == i % 3 for j in nearest(stored(queries, i))] for i in rated]
    assert sample.hits == {"colour": pytest.approx(100 * np.mean(same))}
    assert sample.chance == pytest.approx(100 * np.mean([[j % 3 == i % 3 for j in chosen] for i in rated]))
    assert sample.num_queries == 20


@pytest.mark.parametrize("classes", [("emu", "class0", "class1"), None])
def test_neighbours_are_of_a_query_s_class_by_its_name(tmp_path: Path, classes: tuple[str, ...] | None) -> None:
    """The same images in both sets, whose labels 0, 1, 2 have other names in one of them, or none."""
    bank, queries = (write_shards(tmp_path / name, 12, size=SIZE) for name in ("bank", "queries"))
    replace(load_manifest(str(queries)), classes=classes).save()
    encoder = Encoder(Colour(), Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), tag="colour")
    sample = neighbours(
        {"colour": encoder}, open_dataset(str(bank)), open_dataset(str(queries)),
        num_queries=3, num_rated=12, bank_size=12, k=1, max_pixels=10**6,
    )  # fmt: skip
    good = {shown.good for item in sample.shown for shown in item.found["colour"]}
    if classes is None:
        assert (sample.num_queries, sample.hits, good) == (0, {}, {None}), "nobody knows which names the numbers mean"
    else:
        assert [item.query.caption for item in sample.shown] == list(classes)
        assert (sample.num_queries, sample.hits, good) == (12, {"colour": 0.0}, {False})
        assert sample.chance == pytest.approx(100 * 2 / 9), "an emu has none, the others have a third"


def test_images_without_labels_have_neighbours_without_a_verdict(tmp_path: Path) -> None:
    bank = open_dataset(str(write_shards(tmp_path / "plain", 20, size=SIZE, label=False)))
    encoder = Encoder(Colour(), Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), tag="colour")
    sample = neighbours(
        {"colour": encoder}, bank, bank, num_queries=2, num_rated=2, bank_size=20, k=2, max_pixels=10**6
    )
    found = sample.shown
    assert (sample.num_queries, sample.hits) == (0, {})
    assert [(p.caption, p.good) for item in found for p in item.found["colour"]] == [("", None)] * 4
    assert [item.found["colour"][0] for item in found] == [item.query for item in found], "each is nearest to itself"


def test_a_curve_is_the_same_picture_every_time() -> None:
    once, again = (curve("loss", [("training", [1, 2], [3.0, 2.5])]) for _ in range(2))
    assert once == again
    assert curve("loss", [("training", [1, 2], [3.0, 2.6])]) != once


def sample_page(text: str) -> dict[str, Any]:
    """A page with `text` wherever a run, its data or its machine may put words."""
    shown = Picture("data:image/png;base64,AA==", 4, 4, text or "?", good=True)
    judged = evaluated("encoder", "a", ("1",), evaluator=text)
    return {
        "name": text, "verdict": text, "facts": {text: text}, "notes": [text], "recipe": text,
        "environment": {text: text}, "packages": {text: text}, "shown_data": text, "learned": text,
        "comparisons": [
            ProtocolResult(text, judged, None, None),
            ProtocolResult(text, judged, judged, compare(judged, judged)),
        ],
        "curves": [shown], "eval_curves": [shown], "triples": [[shown] * 3], "mask_ratio": 0.75, "normalized": True,
        "goodput": Goodput(productive=3.0, lost=1.0),
        "neighbours": NeighborSample([Neighbors(shown, {text: [shown]})], 1, 1, {text: 50.0}, 33.0),
    }  # fmt: skip


def test_it_says_where_the_time_went(page: Page) -> None:
    made = Page(report.render(sample_page("x") | {"goodput": Goodput(productive=3000.0, waiting=500.0, lost=500.0)}))
    assert "Where the time went" in made.text
    assert all(text in made.text for text in ("start-up", "productive", "75.0 %", "12.5 %", "0.0 %", "4,000 s"))
    assert "Where the time went" in page.text, "the run wrote its timeline"
    assert "Where the time went" not in Page(report.render(sample_page("x") | {"goodput": None})).text


@settings(max_examples=60, deadline=None)
@given(
    st.text()
    | st.sampled_from(["<script>alert(1)</script>", '"><img src=http://x onerror=alert(1)>', "{{ 7 * 7 }}", "&lt;"])
)
def test_text_never_becomes_markup(text: str) -> None:
    made = Page(report.render(sample_page(text)))
    assert made.shape == Page(report.render(sample_page("plain"))).shape
    if text.strip():
        assert visible(text, lines=True) in made.text


def evaluated(tag: str, weights: str, keys: tuple[str, ...], evaluator: str = "knn", **protocol: Any) -> EvalReport:
    labels = np.zeros(len(keys), np.int32)
    return EvalReport(
        evaluator=evaluator, metric="top1", value=50.0, n=len(keys), metrics={}, encoder={"tag": tag, "source": "s"},
        protocol={"k": 5, **protocol}, data={"num_classes": 3}, seeds={}, weights_sha256=weights, versions={},
        seconds={}, notes=[], outcomes=Outcomes(keys, labels, labels),
    )  # fmt: skip


def test_reports_are_paired_by_what_was_asked(tmp_path: Path) -> None:
    kept = [
        evaluated("encoder", "new", ("a", "b")),
        evaluated("encoder", "old", ("a", "b")),
        evaluated("encoder", "new", ("a", "b"), evaluator="linear", learning_rate=0.1, epochs=10),
        evaluated("random", "r", ("a", "b"), k=20),
        evaluated("random", "r", ("a", "b"), evaluator="linear", learning_rate=0.2, epochs=10),
        evaluated("random", "r", ("a", "b"), evaluator="linear", learning_rate=0.1, epochs=5),
    ]
    for i, one in enumerate(kept):
        one.save(tmp_path / f"{i}.json")
    knn, linear = find_protocol_results(kept_results(tmp_path, ()), {"new"})
    assert (knn.protocol, knn.random, knn.interval) == ("kNN, k = 5", None, None)
    assert linear.protocol == "linear probe"
    assert linear.random is not None
    assert linear.random.protocol["epochs"] == 10
    assert linear.interval is not None
    assert linear.interval.difference == 0
    assert find_protocol_results(kept_results(tmp_path / "none", ()), {"new"}) == []


def test_a_run_that_paints_nothing_has_a_report_too(data: Path, tmp_path: Path) -> None:
    made = Page(report.write_report(train(tmp_path, data, "supervised")).read_text("utf-8"))
    assert len(made.images("image/svg+xml")) == 3
    assert not made.images("image/png"), "no masks to fill, and no data apart from training to ask about"
    assert "supervised on vit_tiny_patch16_224" in made.text


def test_what_is_no_run_or_damaged_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        report.write_report(tmp_path)
    for spoil, error in (
        (lambda copy: shutil.rmtree(copy / "checkpoints"), CheckpointError),
        (lambda copy: next((copy / "checkpoints").glob("*/tensors-*")).write_bytes(b"x"), CheckpointError),
        (lambda copy: (copy / "metrics.jsonl").write_text("{"), InputError),
        (lambda copy: (copy / "metrics.jsonl").unlink(), InputError),
        (lambda copy: (copy / "environment.json").write_text(json.dumps([])), InputError),
        (lambda copy: next((copy / "evals").glob("*.json")).write_text("{}"), InputError),
        (lambda copy: next((copy / "evals").glob("*.json")).write_text("[" * 200 + "]" * 200), InputError),
        (lambda copy: (copy / "metrics.jsonl").write_text("[" * 10**5), InputError),
        (lambda copy: (copy / "environment.json").write_text('{"a":' * 10**5), InputError),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        (copy / "report.html").unlink(missing_ok=True)
        spoil(copy)
        with pytest.raises(error):
            report.write_report(copy)
        assert not (copy / "report.html").exists()
        shutil.rmtree(copy)
