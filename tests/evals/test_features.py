"""Features: every sample once, in order, the same for any batching; and no trace left behind."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import CheckpointError, FieldError, InputError
from data_pipeline.shards.scan import index_shards
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, Features, full_precision
from pretrain.evals.task import Task
from tests.evals.conftest import Folders, small_encoder
from tests.shards import write_shards

NAMES = ["class0", "class1", "class2"]


def extract(encoder: Encoder, folder: str, limit: int | None = None, **how: object) -> Features:
    (found,) = Extraction(**how).extract(  # type: ignore[arg-type]
        encoder, open_dataset(folder), num_classes=10, limit=limit, label="test"
    )
    return found


def test_each_sample_once_in_order_with_its_own_features(folders: Folders, encoder: Encoder) -> None:
    found = extract(encoder, folders.test, batch_size=32)
    files = sorted(Path(folders.test).rglob("*.jpg"))
    assert [Path(key).name for key in found.keys] == [file.stem for file in files]
    assert found.labels.tolist() == [int(file.parent.name) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    encoder.module.eval()
    with torch.no_grad():
        expected = encoder.module((pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=0.02)  # two JPEG decoders


@pytest.mark.parametrize("how", [{"batch_size": 7}, {"batch_size": 1000}, {"batch_size": 30, "num_workers": 2}])
def test_batches_and_workers_change_nothing(folders: Folders, encoder: Encoder, how: dict[str, int]) -> None:
    expected, found = extract(encoder, folders.test), extract(encoder, folders.test, **how)
    assert found.keys == expected.keys
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)


def test_a_limit_takes_the_first(folders: Folders, encoder: Encoder) -> None:
    whole, part = extract(encoder, folders.test), extract(encoder, folders.test, limit=13)
    assert part.keys == whole.keys[:13]


class Failing(nn.Module):
    def __init__(self, fail: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout()
        self.fail = fail

    def forward(self, images: Tensor) -> Tensor:
        if self.fail == "raise":
            raise ZeroDivisionError
        values = images.flatten(1) * self.weight
        if self.fail == "nan":
            values[3, 2] = torch.nan
        return values.view(-1, 192, 1, 1) if self.fail == "map" else values


@pytest.mark.parametrize("fail", ["", "nan", "map", "raise"])
def test_flags_and_random_state_are_left_alone_also_by_a_failure(folders: Folders, fail: str) -> None:
    encoder = small_encoder(Failing(fail))
    encoder.module.train()
    encoder.module.dropout.eval()  # type: ignore[union-attr]
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    try:
        extract(encoder, folders.test, num_workers=1)
    except (CheckpointError, ZeroDivisionError):
        assert fail
    assert encoder.module.training
    assert not encoder.module.dropout.training  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_a_module_that_draws_in_evaluation_does_not_move_the_global_state(folders: Folders) -> None:
    class Noisy(Failing):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * self.weight + torch.rand(1)

    state = torch.get_rng_state()
    extract(small_encoder(Noisy("")), folders.test)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_that_are_not_finite_name_a_sample(folders: Folders) -> None:
    keys = extract(small_encoder(), folders.test).keys
    with pytest.raises(CheckpointError, match=f"1 of 100 samples, such as {keys[3]}"):
        extract(small_encoder(Failing("nan")), folders.test)


def test_feature_maps_are_refused(folders: Folders) -> None:
    with pytest.raises(CheckpointError, match=r"\[100, 192, 1, 1\].*pooling"):
        extract(small_encoder(Failing("map")), folders.test)


def test_bf16_is_autocast_and_gives_fp32(folders: Folders, encoder: Encoder) -> None:
    exact, rounded = extract(encoder, folders.test), extract(encoder, folders.test, precision="bf16")
    assert rounded.values.dtype == torch.float32
    assert not torch.equal(rounded.values, exact.values)
    torch.testing.assert_close(rounded.values, exact.values, rtol=0.05, atol=0.05)
    assert next(encoder.module.parameters()).dtype == torch.float32


def test_fp32_is_fp32_whatever_training_allows() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def image_folder(root: Path, names: list[str], each: int = 2) -> str:
    for name in names:
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
    return str(root)


@pytest.mark.parametrize(("ours", "theirs"), [(["a", "b"], ["a", "c"]), (["a", "b"], ["a", "b", "c"])])
def test_classes_that_were_not_learned_are_refused(tmp_path: Path, ours: list[str], theirs: list[str]) -> None:
    train = open_dataset(image_folder(tmp_path / "train", ours))
    test = open_dataset(image_folder(tmp_path / "test", theirs))
    with pytest.raises(InputError, match="found c, which the training set does not have"):
        Task(train, test)


def test_labels_of_the_test_set_are_numbered_by_the_names_of_the_training_set(tmp_path: Path) -> None:
    """The right class of each of its images has the number that its training images have."""
    train = open_dataset(image_folder(tmp_path / "train", ["a", "b", "c"]))
    test = open_dataset(image_folder(tmp_path / "test", ["b", "c"]))
    task = Task(train, test)
    splits = task.extract(small_encoder(), Extraction())
    assert splits.test.labels.tolist() == [1, 1, 2, 2]
    assert task.num_classes == 3
    assert task.describe()["classes"] == ["a", "b", "c"]
    assert splits.notes == (
        "labels of the test set are numbered by their names as in the training set: 2 of its 3 classes",
        "1 of 3 classes have no test sample",
    )


def test_a_set_without_labels_is_refused(tmp_path: Path, folders: Folders) -> None:
    images = open_dataset(image_folder(tmp_path / "images", ["."]))
    with pytest.raises(FieldError, match="test set: expected labels"):
        Task(open_dataset(folders.train), images)


def test_classes_that_a_limit_leaves_without_samples_are_told(tmp_path: Path) -> None:
    data = open_dataset(image_folder(tmp_path / "data", ["a", "b", "c"]))
    test = open_dataset(image_folder(tmp_path / "test", ["a", "b", "c"], each=3))
    splits = Task(data, test, max_train=4).extract(small_encoder(), Extraction())
    assert splits.notes == ("1 of 3 classes have no training sample: 3 of 9 test samples cannot be right",)
    with pytest.raises(InputError, match="several classes"):
        Task(data, data, max_train=2).extract(small_encoder(), Extraction())


def test_a_test_set_that_is_the_training_set_is_told(tmp_path: Path) -> None:
    data, again = (open_dataset(image_folder(tmp_path / name, ["a", "b"])) for name in ("data", "again"))
    (note,) = Task(data, again).extract(small_encoder(), Extraction()).notes
    assert "the same data" in note


@pytest.mark.parametrize(("train", "test"), [(NAMES, None), (None, NAMES)])
def test_names_on_one_side_alone_are_refused(tmp_path: Path, train: list[str] | None, test: list[str] | None) -> None:
    sets = []
    for name, classes in (("train", train), ("test", test)):
        write_shards(tmp_path / name, 6)
        (tmp_path / name / "manifest.json").unlink()
        index_shards(str(tmp_path / name), classes=classes)
        sets.append(open_dataset(str(tmp_path / name)))
    named, other = ("training", "test") if train else ("test", "training")
    told = f"names in the {named} set alone: class0.*Name those of the {other} set.*pretrain data index .*--classes"
    with pytest.raises(InputError, match=told):
        Task(*sets)
