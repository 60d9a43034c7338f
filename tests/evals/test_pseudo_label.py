"""A teacher's labels: what the classifier says, once for each image, the same bytes after a kill; and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline.batch import Sample
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.datasets.soft_labels import SoftLabels, file_name
from data_pipeline.errors import CheckpointError, DataError, InputError, PretrainError, RunError
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.views import evaluation_view
from launch import cli
from pretrain.checkpoints.checkpoint import complete_checkpoints
from pretrain.evals.pseudo_label import Labelling, Teacher, label, load_teacher
from tests.runs import train, write_recipe
from tests.shards import write_shards

SUPERVISED = {"kind": "supervised", "num_classes": 3}
HOW = Labelling(batch_size=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", 70)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With averages that lag far behind the weights."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(
        folder / "r.yaml", shards, objective=SUPERVISED, schedule={"steps": 12}, ema={"decay": 0.8},
    )  # fmt: skip
    train(recipe, folder / "teacher")
    return folder / "teacher"


def opened(shards: Path) -> ShardDataset:
    dataset = open_dataset(str(shards))
    assert isinstance(dataset, ShardDataset)
    return dataset


@pytest.fixture
def dataset(shards: Path) -> ShardDataset:
    return opened(shards)


@pytest.fixture
def teacher(run: Path) -> Teacher:
    return load_teacher(str(run))


def naive_probabilities(run: Path, dataset: ShardDataset) -> np.ndarray:
    """One image after the other, from the exported encoder and the averages of the head in the checkpoint."""
    import timm
    from safetensors.torch import load_file

    from pretrain.recipe.files import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    encoder = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).eval()
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(complete_checkpoints(run / "checkpoints")[-1].glob("*.safetensors")):
        stored |= load_file(file)
    weight = torch.cat([t for n, t in sorted(stored.items()) if n.startswith("ema/head.weight@")]).view(3, -1)
    bias = torch.cat([t for n, t in sorted(stored.items()) if n.startswith("ema/head.bias@")])
    rows = []
    for i in range(dataset.num_samples):
        pixels = decode_image(dataset.read(i).fields["jpg"], max_pixels=10**6, where="")
        view = evaluation_view(pixels, recipe.data.preprocessing(recipe.model.image_size))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
        with torch.no_grad():
            features = encoder((view.float() / 255 - mean)[None] / std)
            rows.append(F.linear(features, weight, bias).double().softmax(1)[0].numpy())
    return np.array(rows)


def test_labels_are_what_the_averaged_classifier_says(
    run: Path, dataset: ShardDataset, teacher: Teacher, tmp_path: Path
) -> None:
    wanted = naive_probabilities(run, dataset)
    labels = label(dataset, teacher, tmp_path / "all", HOW)
    found = np.array([labels.row(i, dataset.origin(i)[0]) for i in range(70)])
    assert np.abs(found - wanted).max() < 1e-3, "fp16 has eleven bits"
    assert np.abs(wanted - wanted.mean(0)).max() > 0.02, "the teacher tells images apart"
    assert labels.classes == ("class0", "class1", "class2"), "of the data that the teacher learned from"
    two = label(dataset, teacher, tmp_path / "two", replace(HOW, top_k=2, batch_size=7))
    pairs = np.array([two.row(i, dataset.origin(i)[0]) for i in range(70)])
    assert np.abs(pairs - wanted).max() < 2e-3, "of three classes the third has all of the rest"


def test_an_image_that_cannot_be_used_is_left_out_named_and_counted(
    dataset: ShardDataset, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardDataset.read

    def damaged(self: ShardDataset, i: int) -> Sample:
        sample = read(self, i)
        return replace(sample, fields={"jpg": b"no image"}) if i in (3, 40) else sample

    whole = label(dataset, teacher, tmp_path / "whole", HOW)
    monkeypatch.setattr(ShardDataset, "read", damaged)
    for k in (None, 2):
        labels = label(dataset, teacher, tmp_path / f"damaged{k}", replace(HOW, top_k=k))
        assert [name.split(":")[0] for name in labels.described.left_out] == [
            "000003 in shard-000000.tar", "000040 in shard-000001.tar",
        ]  # fmt: skip
        assert np.allclose(labels.row(3, "000003"), 1 / 3, atol=1e-3)
        assert np.allclose(labels.row(4, "000004"), whole.row(4, "000004"), atol=1e-3)
    (labels.folder / "labels.json").unlink()  # the shards are done, and say themselves what is left out
    assert len(label(dataset, teacher, labels.folder, replace(HOW, top_k=2)).described.left_out) == 2
    few = replace(teacher, run=replace(teacher.run, data=teacher.run.data.model_copy(update={"max_bad_samples": 1})))
    for _ in range(2):  # what was left out before a stop counts as well
        with pytest.raises(RunError, match=r"000040 in shard-000001.*at most 1 samples .*found 2 that"):
            label(dataset, few, tmp_path / "few", HOW)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_going_on_makes_what_is_missing_and_the_same_bytes(
    dataset: ShardDataset, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = label(dataset, teacher, tmp_path / "whole", HOW).folder
    part = label(dataset, teacher, tmp_path / "part", HOW).folder
    (part / "labels.json").unlink()
    (part / file_name(0)).unlink()
    torn = (part / file_name(2)).read_bytes()
    (part / file_name(2)).write_bytes(torn[:-1] + bytes([torn[-1] ^ 1]))
    (part / ".labels-000000.safetensors.77.tmp").write_bytes(b"left")
    kept = (part / file_name(1)).stat()
    seen: list[int] = []
    monkeypatch.setattr("pretrain.evals.pseudo_label._of_shard", _counting(seen))
    label(dataset, teacher, part, replace(HOW, num_workers=1))
    assert seen == [30, 10], "the first and the third shard alone"
    assert contents(part) == contents(whole)
    assert (part / file_name(1)).stat().st_mtime_ns == kept.st_mtime_ns
    label(dataset, teacher, part, HOW)
    assert len(seen) == 2, "what is finished is left as it is"


def _counting(seen: list[int]):  # type: ignore[no-untyped-def]
    from pretrain.evals import pseudo_label

    made = pseudo_label._of_shard

    def counting(model, batches, size, *rest):  # type: ignore[no-untyped-def]
        seen.append(size)
        return made(model, batches, size, *rest)

    return counting


def test_a_process_that_is_killed_goes_on(run: Path, tmp_path: Path) -> None:
    many = write_shards(tmp_path / "many", 300)
    command = [sys.executable, "-m", "launch.cli", "data", "label", str(many), str(tmp_path / "out")]
    command += ["--teacher", str(run), "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / file_name(0)).is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out" / "labels.json").exists(), "it was killed on its way"
    dataset = opened(many)
    done = label(dataset, load_teacher(str(run)), tmp_path / "out", replace(HOW, batch_size=1))
    whole = label(dataset, load_teacher(str(run)), tmp_path / "whole", replace(HOW, batch_size=1))
    assert contents(done.folder) == contents(whole.folder)


def test_only_one_process_writes(dataset: ShardDataset, teacher: Teacher, tmp_path: Path) -> None:
    import fcntl

    label(dataset, teacher, tmp_path / "out", HOW)
    with (tmp_path / "out" / "plan.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another"):
            label(dataset, teacher, tmp_path / "out", HOW)


class TestRefused:
    def test_other_labels_in_the_folder(self, dataset: ShardDataset, teacher: Teacher, tmp_path: Path) -> None:
        label(dataset, teacher, tmp_path / "out", HOW)
        before = contents(tmp_path / "out")
        with pytest.raises(DataError, match="top_k"):
            label(dataset, teacher, tmp_path / "out", replace(HOW, top_k=2))
        with torch.no_grad():
            teacher.model.head.bias += 1
        with pytest.raises(DataError, match="teacher"):
            label(dataset, teacher, tmp_path / "out", HOW)
        assert contents(tmp_path / "out") == before
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "x.jpg").write_bytes(b"")
        with pytest.raises(DataError, match="other files"):
            label(dataset, teacher, tmp_path / "photos", HOW)

    def test_more_than_all_classes(self, dataset: ShardDataset, teacher: Teacher, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--top-k"):
            label(dataset, teacher, tmp_path / "out", replace(HOW, top_k=4))
        assert not (tmp_path / "out").exists()

    def test_a_run_without_a_head(self, shards: Path, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path / "r.yaml", shards, schedule={"steps": 1})
        train(recipe, tmp_path / "mae")
        with pytest.raises(InputError, match=r"objective\.kind supervised"):
            load_teacher(str(tmp_path / "mae"))

    def test_no_run_and_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(PretrainError):
            load_teacher(str(tmp_path / "nowhere"))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").write_text("")
        with pytest.raises(CheckpointError, match="complete checkpoint"):
            load_teacher(str(tmp_path / "run"))

    def test_labels_that_are_not_finite(self, dataset: ShardDataset, teacher: Teacher, tmp_path: Path) -> None:
        with torch.no_grad():
            teacher.model.head.bias += float("nan")
        with pytest.raises(RunError, match="finite"):
            label(dataset, teacher, tmp_path / "out", HOW)
        assert not (tmp_path / "out" / "labels.json").exists()


def test_a_student_trains_on_labels_and_selection_made_by_commands(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretrain(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
        try:
            return cli.main()
        except SystemExit as end:
            return int(end.code or 0)

    labels, few, chosen = tmp_path / "labels", tmp_path / "few.select", tmp_path / "chosen.select"
    assert pretrain("data", "select", shards, few, "--per-class", 4) == 0
    assert pretrain("data", "label", shards, labels, "--teacher", run) == 0
    assert pretrain("data", "select", labels, chosen, "--threshold", 0.3, "--per-class", 30, "--without", few) == 0
    said = capsys.readouterr().out
    assert "12 entries, 12 different" in said
    assert "70 samples, 3 classes, 3 files" in said
    assert SoftLabels(labels).num_samples == 70
    data = [{"path": str(shards), "select": str(few)}]
    data.append({"path": str(shards), "weight": 2, "labels": str(labels), "select": str(chosen)})
    recipe = write_recipe(
        tmp_path / "r.yaml", shards, objective=SUPERVISED, schedule={"steps": 6},
        data={"train": data, "read_streams": 3, "shuffle_window": 16, "mixing": {"mixup": 0.2}},
    )  # fmt: skip
    train(recipe, tmp_path / "student", 2, max_steps=3)
    train(recipe, tmp_path / "student")
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    for words in ((labels, "--per-class", 3), (labels, "--threshold", 0.1, "--top-k", 2), (shards, "--top-k", 3)):
        assert pretrain("data", "select", words[0], tmp_path / "x", *words[1:]) == 2
