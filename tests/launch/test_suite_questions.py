"""Which results of a suite are there: those that answer what is asked now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.suites.jobs import Questions, digest
from tests.launch.suites import answered, cells, in_this_process, make_run, run_suite, with_option, write_suite
from tests.shards import write_images


def test_a_result_is_there_once_it_answers_what_is_asked(done: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = done
    assert answered(folder, tree)
    assert answered(folder, with_option(tree, "protocols", "knn", num_workers=1)), "no number depends on it"
    assert not answered(folder, with_option(tree, "protocols", "knn", k=[5]))
    assert not answered(folder, with_option(tree, "encoders", "own", random_init=True))


def test_an_option_that_a_later_version_has_makes_no_answer_old(done: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = done
    (cell,) = cells(folder, tree)
    asked = json.loads(cell.asked.read_text())
    assert None not in asked["arguments"].values()
    cell.asked.write_text(json.dumps(asked | {"arguments": {**asked["arguments"], "another": None}}))
    assert answered(folder, tree)
    cell.asked.write_text(json.dumps(asked | {"arguments": {**asked["arguments"], "another": 1}}))
    assert not answered(folder, tree)


def test_what_a_download_keeps_for_itself_is_no_part_of_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"weights")
    before = digest(str(tmp_path / "vit"))
    (tmp_path / "vit" / ".cache").mkdir()
    (tmp_path / "vit" / ".cache" / "fetched.metadata").write_text("today")
    assert digest(str(tmp_path / "vit")) == before
    (tmp_path / "vit" / "towers").mkdir()
    (tmp_path / "vit" / "towers" / "model.safetensors").write_bytes(b"text")
    assert digest(str(tmp_path / "vit")) != before


@pytest.mark.parametrize("name", ["knn.json", "knn.safetensors"])
def test_half_a_result_is_none(done: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, tree = done
    path = folder / "out" / "own" / "colours" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not answered(folder, tree)
    path.unlink()
    assert not answered(folder, tree)


def test_other_weights_ask_another_question(done: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = done
    make_run(folder / "own", 8)
    assert not answered(folder, tree)
    make_run(folder / "own", 7)
    assert answered(folder, tree)


def test_other_images_ask_another_question(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, tree = done
    write_images(tmp_path / "other", 24, num_classes=3)
    (tmp_path / "other" / "class0" / "0000.jpg").write_bytes((tmp_path / "other" / "class1" / "0001.jpg").read_bytes())
    assert not answered(folder, with_option(tree, "datasets", "colours", test=str(tmp_path / "other")))


def test_other_images_under_the_same_path_ask_another_question(tmp_path: Path, tree: dict[str, Any]) -> None:
    write_images(tmp_path / "test", 24)
    own = with_option(tree, "datasets", "colours", test=str(tmp_path / "test"))
    own = {**own, "encoders": {"own": tree["encoders"]["first"]}, "protocols": {"knn": tree["protocols"]["knn"]}}
    path, out = write_suite(tmp_path, own), tmp_path / "out"
    assert run_suite(path, out, devices=[], run=in_this_process) == 0
    assert answered(tmp_path, own)
    write_images(tmp_path / "test", 30)
    assert not answered(tmp_path, own)

    (cell,) = cells(tmp_path, own)
    Questions().begin(cell)
    (tmp_path / "test").rename(tmp_path / "aside")
    write_images(tmp_path / "test", 27)  # while it was answered
    assert in_this_process(cell, None, print) == 0
    asked = json.loads(cell.asked.read_text())
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "aside").rename(tmp_path / "test")
    assert Questions().of(cell) == asked
    assert not answered(tmp_path, own), "the report is of other images"


def test_an_image_that_was_replaced_by_one_as_large_asks_another_question(tmp_path: Path, tree: dict[str, Any]) -> None:
    write_images(tmp_path / "test", 24)
    own = with_option(tree, "datasets", "colours", test=str(tmp_path / "test"))
    before = Questions().of(cells(tmp_path, own)[0])
    assert Questions().of(cells(tmp_path, own)[0]) == before
    image = tmp_path / "test" / "class0" / "0000.jpg"
    image.write_bytes(image.read_bytes()[:-1] + b"\0")
    after = Questions().of(cells(tmp_path, own)[0])
    assert after["data"] == before["data"]
    assert after["states"] != before["states"]


def test_a_report_by_hand_is_not_taken_for_the_result(done: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = done
    (cell,) = cells(folder, with_option(tree, "protocols", "knn", k=[3]))
    assert in_this_process(cell, None, print) == 0
    assert not answered(folder, tree)


def test_a_file_that_is_named_belongs_to_the_question(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "templates.txt").write_text("a {}\n")
    given = {"kind": "zeroshot", "templates": str(tmp_path / "templates.txt"), "group": [f"x={tmp_path / 'names.txt'}"]}
    (tmp_path / "names.txt").write_text("class0\n")
    (cell, *_) = cells(tmp_path, {**tree, "protocols": {"zeroshot": given}})
    before = Questions().of(cell)
    assert len(before["files"]) == 2
    (tmp_path / "names.txt").write_text("class1\n")
    assert Questions().of(cell) != before


def test_the_digest_of_a_run_is_of_its_recipe_and_encoder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    before = digest(str(run))
    (run / "metrics.jsonl").write_text("{}")
    assert digest(str(run)) == before
    with (run / "recipe.yaml").open("a") as file:
        file.write("# changed\n")
    assert digest(str(run)) != before
    assert digest("resnet18") != digest("resnet34")


def test_the_digest_of_a_run_is_also_of_a_text_tower_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    (run / "encoder" / "towers").mkdir()
    found = {digest(str(run))}
    for name, weights in (("a", b"0"), ("a", b"1"), ("b", b"1")):
        for path in (run / "encoder" / "towers").iterdir():
            path.unlink()
        (run / "encoder" / "towers" / name).write_bytes(weights)
        found.add(digest(str(run)))
    assert len(found) == 4
