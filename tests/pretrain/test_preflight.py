"""What is settled before a run starts: which labels mean the same, which data belong to it, what is worth a word."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.batch import BatchSpec
from data_pipeline.errors import InputError
from data_pipeline.loader import evaluation_batches
from data_pipeline.shards.load_manifest import load_manifest
from pretrain.evals.sources.trained import TrainedRun
from pretrain.preflight import Plan, preflight
from pretrain.recipe.files import load_recipe
from pretrain.record import record_run
from pretrain.runtime.data_record import DataRecord
from tests.data_pipeline.tiny import evaluated
from tests.runs import write_recipe
from tests.shards import write_images, write_shards

SUPERVISED = {"kind": "supervised", "num_classes": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of three classes in `train`; in `val` images of the last two of them, which have numbers 0 and 1 there."""
    write_shards(tmp_path / "train", 12)
    write_images(tmp_path / "val", 6)
    shutil.rmtree(tmp_path / "val" / "class0")
    write_recipe(
        tmp_path / "r.yaml", tmp_path / "train", objective=SUPERVISED,
        data={"train": str(tmp_path / "train"), "val": str(tmp_path / "val")},
    )  # fmt: skip
    return tmp_path


def plan(folder: Path, *overrides: str) -> Plan:
    return preflight(load_recipe(folder / "r.yaml", list(overrides)), 1, folder / "run")


def started(folder: Path, *overrides: str) -> Plan:
    """As a run that has written down what it is, and stopped."""
    found = plan(folder, *overrides)
    (folder / "run").mkdir(exist_ok=True)
    record_run(folder / "run", load_recipe(folder / "r.yaml", list(overrides)), found.resolved, found.data, "{}")
    return found


def val_labels(found: Plan) -> list[int]:
    assert found.val is not None
    spec = BatchSpec(16, num_classes=3)
    batches = evaluation_batches(found.val, spec, evaluated(16), batch_size=8, max_pixels=10**6)
    return [int(label) for batch in batches if batch.labels is not None for label in batch.labels]


class TestLabels:
    def test_validation_is_by_the_names_of_the_training_classes(self, folder: Path) -> None:
        found = plan(folder)
        assert val_labels(found) == [1, 1, 2, 2]
        assert "labels of data.val are numbered by their names as in data.train: 2 of its 3 classes" in found.notes

    def test_the_online_probe_too(self, folder: Path) -> None:
        mae = "objective={kind: mae, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}"
        assert val_labels(plan(folder, mae, "online_probe={}")) == [1, 1, 2, 2]
        assert val_labels(plan(folder, mae)) == [0, 0, 1, 1], "nobody looks at labels"

    def test_names_that_were_not_learned_are_refused(self, folder: Path) -> None:
        (folder / "val" / "class2").rename(folder / "val" / "emu")
        with pytest.raises(InputError, match=r"classes of data\.val and data\.train: .*found emu, which data\.train"):
            plan(folder)

    def test_a_run_keeps_the_names_for_whom_it_teaches(self, folder: Path) -> None:
        names = tuple(f"class{k}" for k in range(3))
        started(folder)
        run = TrainedRun.load(folder / "run")
        shutil.rmtree(folder / "train")
        assert run.class_names(3) == names
        assert run.class_names(4) is None, "one number would have no name"
        (folder / "run" / "data.json").unlink()
        assert run.class_names(3) is None, "an older run, whose data are gone"
        write_shards(folder / "train", 12)
        assert run.class_names(3) == names


class TestData:
    def test_a_validation_set_that_was_replaced_is_refused(self, folder: Path) -> None:
        started(folder)
        plan(folder)
        shutil.copytree(folder / "val", folder / "moved")
        plan(folder, f"data.val={folder / 'moved'}")
        for path in folder.glob("val/class1/*"):
            path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(InputError, match=r"data\.val: expected the data .* start a run .*--set resume_from=.*/run"):
            plan(folder)
        plan(folder, "data.val=null")

    def test_the_sets_of_evaluations_too(self, folder: Path) -> None:
        evals = "evals=[{{kind: knn, train: {0}/train, test: {0}/{1}, k: 3}}]"
        started(folder)
        assert plan(folder, evals.format(folder, "val")).notes == started(folder).notes, "a curve may begin later"
        started(folder, evals.format(folder, "val"))
        started(folder, "data.val=null")  # both pause
        with pytest.raises(InputError, match="knn: expected the data that this run was measured on"):
            plan(folder, evals.format(folder, "train"))
        plan(folder, evals.format(folder, "val"))

    def test_an_older_run_goes_on_with_a_note(self, folder: Path) -> None:
        started(folder)
        (folder / "run" / "data.json").unlink()
        assert any("does not say which data data.val had before" in note for note in plan(folder).notes)
        found = started(folder)
        kept = DataRecord.load(folder / "run")
        assert kept == found.data
        assert not any("does not say" in note for note in plan(folder).notes)

    @pytest.mark.parametrize("where", ["data.val", "a source of data.train"])
    def test_labels_without_names_go_on_by_number_in_an_older_run_alone(self, folder: Path, where: str) -> None:
        """It began when no names decided; one that begins now, or began since, is refused."""
        train, bare = folder / "train", write_shards(folder / "bare", 12)
        replace(load_manifest(str(bare)), classes=None).save()
        sources = ", ".join(f"{{path: {path}, weight: 1}}" for path in (train, bare))
        override = f"data.val={bare}" if where == "data.val" else f"data.train=[{sources}]"
        with pytest.raises(InputError, match=r"names in .* alone: class0, class1, class2\. Name those of "):
            plan(folder, override)
        started(folder, "data.val=null")
        with pytest.raises(InputError, match=r"names in .* alone"):
            plan(folder, override)
        (folder / "run" / "data.json").unlink()
        if where != "data.val":  # its own record says which data it trained on
            path = folder / "run" / "resolved.yaml"
            path.write_text("".join(line for line in path.read_text().splitlines(True) if "fingerprint" not in line))
        for _ in range(2):  # the second time the run has a record, which says so
            found = started(folder, override)
            assert [note for note in found.notes if "by number" in note] == [
                f"the labels of {bare if where != 'data.val' else where} have no names: this run, begun when names did "
                "not decide, goes on taking them by number for those of the others"
            ]
        if where == "data.val":
            assert val_labels(found) == [0, 1, 2] * 4
            started(folder, "data.val=null")
            plan(folder, override)
            replace(load_manifest(str(bare)), classes=("class2", "class1", "class0")).save()
            assert val_labels(plan(folder, override)) == [2, 1, 0] * 4, "names decide as soon as there are some"

    def test_classes_in_another_order_are_other_data(self, folder: Path) -> None:
        started(folder)
        manifest = load_manifest(str(folder / "train"))
        assert manifest.classes is not None
        replace(manifest, classes=manifest.classes[::-1]).save()
        with pytest.raises(InputError, match=r"data\.train: expected classes numbered as this run has them, class0"):
            plan(folder)

    def test_a_record_that_is_damaged_is_named(self, folder: Path) -> None:
        started(folder)
        (folder / "run" / "data.json").write_text("{")
        with pytest.raises(InputError, match=r"data\.json: expected the record of a run's data"):
            plan(folder)


def test_a_batch_larger_than_the_data_set_is_said(folder: Path) -> None:
    assert not any("larger" in note for note in plan(folder, "batch.global_size=12").notes)
    (note,) = [note for note in plan(folder, "batch.global_size=30").notes if "larger" in note]
    assert note.startswith(
        "batch.global_size 30 is larger than the data set of 12 samples: each step takes samples 2.5 "
    )


def test_a_record_of_a_runs_data_that_is_none_is_told(tmp_path: Path) -> None:
    for text in ("", "3", "[" * 10**5):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(InputError, match=r"data\.json: expected the record of a run's data"):
            DataRecord.load(tmp_path)
