"""Zero-shot: class vectors are open_clip's, measures are a loop's, and wrong prompts are told."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import FieldError, InputError
from data_pipeline.procedural.make import make
from data_pipeline.procedural.shapes import HELD_OUT
from data_pipeline.shards.scan import index_shards
from pretrain.evals.features.extract import Extraction
from pretrain.evals.features.pairs import image_side
from pretrain.evals.result import EvalReport
from pretrain.evals.sources.towers import load_towers
from pretrain.evals.zeroshot.protocol import (
    TEMPLATES,
    Prompts,
    ZeroShot,
    class_vectors,
    mean_per_class,
    named_classes,
    nonempty_lines,
)
from pretrain.models.towers import Towers
from tests.models.test_towers import saved
from tests.shards import write_shards

PROMPTS = Path(__file__).resolve().parents[2] / "configs" / "prompts"
CLASSES = ["red circle", "blue star", "pink cross"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes") / "test"
    make("shapes", folder, num_samples=120, size=16, split="test", shard_size=50)
    return str(folder)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    saved(path, request.param)
    return path


@pytest.fixture(scope="module")
def towers(folder: Path) -> Towers:
    return load_towers(str(folder))


@pytest.mark.parametrize("templates", TEMPLATES)
def test_class_vectors_and_logits_are_open_clip_s(folder: Path, towers: Towers, templates: str) -> None:
    prompts = Prompts.named(templates)
    found = class_vectors(towers, CLASSES, prompts, Extraction(batch_size=5))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=6)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, prompts.templates)
    images = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(found, expected.T, rtol=0, atol=1e-5)
        ours = towers.encode_image(images) @ found.T
        theirs = model.encode_image(images, normalize=True) @ expected
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def image_vectors(towers: Towers, shapes: str) -> tuple[Tensor, list[int]]:
    (found,) = Extraction().extract(image_side(towers), open_dataset(shapes), num_classes=48, label="")
    return found.values, found.labels.tolist()


def test_measures_are_those_of_a_loop(towers: Towers, shapes: str) -> None:
    dataset = open_dataset(shapes)
    held_out = {f"{color} {shape}" for color, shape in HELD_OUT}
    report = ZeroShot(dataset, Prompts("one", ("a large {}",)), groups={"held out": sorted(held_out)}).run(towers)
    assert dataset.classes is not None
    texts = towers.tokenize([f"a large {name}" for name in dataset.classes])
    with torch.no_grad():
        vectors = towers.encode_text(texts).double()
    right: dict[str, list[float]] = {name: [] for name in dataset.classes}
    in_five = []
    images, labels = image_vectors(towers, shapes)
    for image, label in zip(images.double(), labels, strict=True):
        scores = [float((image * vector).sum()) for vector in vectors]
        rank = sum(score > scores[label] for score in scores)
        right[dataset.classes[label]].append(float(rank == 0))
        in_five.append(rank < 5)
    every = [hit for hits in right.values() for hit in hits]
    assert report.n == len(every) == 120
    assert report.value == pytest.approx(100 * sum(every) / 120)
    assert report.metrics["top5"] == pytest.approx(100 * sum(in_five) / 120)
    means = [sum(hits) / len(hits) for hits in right.values() if hits]
    assert report.metrics["mean_per_class"] == pytest.approx(100 * sum(means) / len(means))
    for group, members in (("held out", held_out), ("other classes", set(dataset.classes) - held_out)):
        hits = [hit for name in members for hit in right[name]]
        assert hits
        assert report.metrics[f"top1 ({group})"] == pytest.approx(100 * sum(hits) / len(hits))
    assert report.metrics["top5"] > 0
    assert report.weights_sha256 == towers.weights_sha256()
    assert report.outcomes.correct.mean() == pytest.approx(report.value / 100)


def test_a_report_is_kept_and_names_its_prompts(towers: Towers, shapes: str, tmp_path: Path) -> None:
    report = ZeroShot(open_dataset(shapes), Prompts.named("photo"), max_test=30).run(towers)
    report.save(tmp_path / "a.json")
    assert EvalReport.load(tmp_path / "a.json").to_json() == report.to_json()
    assert report.n == 30
    assert report.protocol["templates"] == list(TEMPLATES["photo"])
    other = ZeroShot(open_dataset(shapes), Prompts.named("plain"), max_test=30).run(towers)
    assert other.file_name != report.file_name


def test_names_can_be_given_and_are_what_is_said_of_a_class(towers: Towers, shapes: str, tmp_path: Path) -> None:
    dataset = open_dataset(shapes)
    assert dataset.classes is not None
    (tmp_path / "names.txt").write_text("\n".join(["a star", *dataset.classes[1:-1], "a star"]))
    names = named_classes(str(tmp_path / "names.txt"))
    own, given = (ZeroShot(dataset, classes=c, max_test=30).run(towers) for c in (None, names))
    assert given.data["classes"] == list(names)
    assert given.file_name != own.file_name
    assert (own.protocol["class_names"], own.data["classes"]) == ("the data set's", list(dataset.classes))
    expected = class_vectors(towers, names, Prompts(), Extraction())
    images, _ = image_vectors(towers, shapes)
    best = (images[:30] @ expected.T)[:, :-1].argmax(1)  # the last is called as the first is
    assert sorted(given.outcomes.predicted.tolist()) == sorted(best.tolist())
    assert "called a star" in given.notes[-1]
    with pytest.raises(InputError, match=r"--classes: expected 48 names.*found 47"):
        ZeroShot(dataset, classes=names[:-1])


def test_shards_that_name_no_classes_are_judged_by_names_that_are_given(towers: Towers, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 6)
    (shards / "manifest.json").unlink()
    index_shards(str(shards))
    with pytest.raises(FieldError, match="--classes"):
        ZeroShot(open_dataset(str(shards)))
    report = ZeroShot(open_dataset(str(shards)), classes=CLASSES, groups={"red": CLASSES[:1]}).run(towers)
    assert report.data["num_classes"] == 3
    assert "top1 (red)" in report.metrics


def test_imagenet_s_names_and_templates_are_open_clip_s() -> None:
    names = named_classes("imagenet")
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet paper")
    prompts = Prompts.named("openai")
    assert prompts.texts("tench") == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_classes_that_a_limit_leaves_without_images_are_told(towers: Towers, shapes: str) -> None:
    (note,) = ZeroShot(open_dataset(shapes), max_test=5).run(towers).notes
    assert re.fullmatch(r"4[3-7] of 48 classes have no test sample", note)
    assert ZeroShot(open_dataset(shapes)).run(towers).n == 120


def test_classes_that_share_all_their_vectors_are_no_luck(towers: Towers, shapes: str) -> None:
    """Towers that have collapsed are right where the first class is, and nowhere else."""
    report = ZeroShot(open_dataset(shapes), Prompts("same", ("the same",))).run(towers)
    assert set(report.outcomes.predicted.tolist()) == {0}


def test_the_prompts_for_shapes_are_those_of_the_scenes() -> None:
    assert nonempty_lines(PROMPTS / "shapes_held_out.txt", "") == tuple(f"{color} {shape}" for color, shape in HELD_OUT)
    assert Prompts.named(str(PROMPTS / "shapes.txt")).texts("red star") == ["a large red star"]


@pytest.mark.parametrize("text", ["", "a photo", "a {} and a {}", "a {name}", "{{}}"])
def test_wrong_templates_are_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "templates.txt"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match=r"templates\.txt"):
        Prompts.named(str(path))
    with pytest.raises(InputError, match="No such file"):
        Prompts.named(str(tmp_path / "none.txt"))


def test_a_set_without_classes_and_a_group_without_a_class_are_told(shapes: str, tmp_path: Path) -> None:
    unlabelled = open_dataset(str(write_shards(tmp_path / "none", 4, label=False)))
    with pytest.raises(FieldError, match="labels, and names"):
        ZeroShot(unlabelled)
    with pytest.raises(InputError, match=r"group new.*'red cube'"):
        ZeroShot(open_dataset(shapes), groups={"new": ["red cube"]})


def test_classes_without_a_sample_have_no_part_in_the_mean_over_classes() -> None:
    assert mean_per_class(torch.tensor([1.0, 1.0, 0.0]).double(), torch.tensor([0, 3, 3])) == 0.75


def test_names_that_are_given_in_another_order_are_told(shapes: str) -> None:
    """By number they would be said of other classes."""
    dataset = open_dataset(shapes)
    assert dataset.classes is not None
    with pytest.raises(InputError, match=r"--classes: expected names in the order .* label 0 is .*which is label 1"):
        ZeroShot(dataset, classes=[dataset.classes[1], dataset.classes[0], *dataset.classes[2:]])
