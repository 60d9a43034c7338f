"""Features on disk: what one process computes in memory, whoever fills the store and however often it is stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError, RunError, StorageError
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import store as store_module
from pretrain.evals.features.extract import Extraction, Features
from pretrain.evals.features.readout import OWN, Readout
from pretrain.evals.features.store import CacheEntry, FeatureStore, architecture_sha256
from pretrain.runtime import versions
from pretrain.runtime.collectives import World
from tests.evals.conftest import Folders, small_encoder
from tests.ranks import run_ranks

MEAN = Readout("mean")


class Count:
    """How many images went through, and after how many it breaks down."""

    images = 0
    limit: int | None = None


class Counting(nn.Module):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.module, self.count = small_encoder().module, count

    def forward(self, images: Tensor) -> Tensor:
        self.count.images += len(images)
        if self.count.limit is not None and self.count.images > self.count.limit:
            raise KeyboardInterrupt
        values: Tensor = self.module(images)
        return values


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK", 32)


def counting() -> tuple[Encoder, Count]:
    count = Count()
    return small_encoder(Counting(count)), count


def extract(encoder: Encoder, folder: str, store: Path | None, limit: int | None = None) -> Features:
    extraction = Extraction(batch_size=10, store=FeatureStore(store) if store else None)
    (found,) = extraction.extract(encoder, open_dataset(folder), num_classes=10, limit=limit, label="test")
    return found


def same(found: Features, expected: Features) -> None:
    assert found.keys == expected.keys
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)


def test_they_are_those_in_memory_and_computed_once(folders: Folders, tmp_path: Path) -> None:
    encoder, count = counting()
    expected = extract(encoder, folders.test, None)
    count.images = 0
    same(extract(encoder, folders.test, tmp_path), expected)
    assert count.images == 100
    same(extract(encoder, folders.test, tmp_path), expected)
    assert count.images == 100


def test_a_group_may_share_a_cache_where_the_umask_says_so(folders: Folders, tmp_path: Path) -> None:
    encoder, _ = counting()
    before = os.umask(0o002)
    try:
        extraction = Extraction(store=FeatureStore(tmp_path / "cache"))
        extraction.extract(encoder, open_dataset(folders.test), num_classes=10, label="test")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}


def test_replaced_images_are_looked_at_again(folders: Folders, tmp_path: Path) -> None:
    """As large as before, so that names and sizes tell nothing."""
    copied = tmp_path / "copied"
    for i, image in enumerate(sorted(Path(folders.test).rglob("*.jpg"))[:4]):
        (copied / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.open(image).save(copied / str(i % 2) / f"{i}.bmp")
    encoder, _ = counting()
    before = extract(encoder, str(copied), tmp_path / "cache").values.clone()
    replaced = copied / "0" / "0.bmp"
    replaced.write_bytes((copied / "1" / "1.bmp").read_bytes())
    after = extract(encoder, str(copied), tmp_path / "cache").values
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def test_a_stop_loses_the_chunk_it_was_in(folders: Folders, tmp_path: Path) -> None:
    encoder, count = counting()
    count.limit = 75  # two chunks of 32, and a part of the third
    with pytest.raises(KeyboardInterrupt):
        extract(encoder, folders.test, tmp_path)
    count.limit, count.images = None, 0
    expected = extract(encoder, folders.test, None)
    count.images = 0
    same(extract(encoder, folders.test, tmp_path), expected)
    assert count.images == 100 - 64


@pytest.mark.parametrize(
    "damage", ["a bit of the values", "values cut short", "no values", "a torn record", "a deep record", "no record"]
)
def test_what_is_damaged_is_computed_again_and_nothing_else(folders: Folders, tmp_path: Path, damage: str) -> None:
    encoder, count = counting()
    expected = extract(encoder, folders.test, tmp_path)
    expected = Features(expected.values.clone(), expected.labels, expected.keys)
    (shelf,) = tmp_path.iterdir()
    values, record = shelf / "values.f32", shelf / "chunk_000003.json"
    content = bytearray(values.read_bytes())
    if damage == "a bit of the values":
        content[-3] ^= 1
        values.write_bytes(content)
    elif damage == "values cut short":
        values.write_bytes(content[:-1])
    elif damage == "no values":
        values.unlink()
    elif damage == "a torn record":
        record.write_text(record.read_text()[:-20])
    elif damage == "a deep record":
        record.write_text("[" * 10**5)
    else:
        record.unlink()
    count.images = 0
    same(extract(encoder, folders.test, tmp_path), expected)
    assert count.images == (100 if damage == "no values" else 4)


def test_another_question_has_another_answer(folders: Folders, tmp_path: Path) -> None:
    base = small_encoder()
    asked: list[tuple[Encoder, str, int | None]] = [
        (base, folders.test, None),
        (base, folders.test, 50),
        (base, folders.train, 50),
        (small_encoder(seed=1), folders.test, 50),
    ]
    for encoder, folder, limit in asked:
        same(extract(encoder, folder, tmp_path, limit), extract(encoder, folder, None, limit))
    assert len(list(tmp_path.iterdir())) == len(asked)
    questions = [json.loads((shelf / "question.json").read_text()) for shelf in tmp_path.iterdir()]
    assert {question["readout"] for question in questions} == {"own"}


def test_whatever_features_depend_on_is_part_of_the_question(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(encoder: Encoder, num_classes: int = 10, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        extraction = Extraction(precision=precision, store=FeatureStore(tmp_path))
        extraction.extract(encoder, open_dataset(folders.test), num_classes=num_classes, limit=4, label="test")

    base = small_encoder()
    smoother = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32, eps=0.1), nn.Dropout(0.5))
    smoother.load_state_dict(base.module.state_dict())
    ask(base)
    ask(replace(base, preprocessing=replace(base.preprocessing, eval_crop=0.5)))
    ask(replace(base, preprocessing=replace(base.preprocessing, mean=(0.4, 0.5, 0.5))))
    ask(replace(base, module=smoother))
    ask(base, num_classes=11)
    ask(base, precision="bf16")
    assert len(list(tmp_path.iterdir())) == 6
    for number, package in enumerate(("torch", "timm", "numpy", "simplejpeg", "pillow")):
        with monkeypatch.context() as patched:
            patched.setattr(versions, "version", lambda name, old=package: "0" if name == old else version(name))
            ask(base)
        assert len(list(tmp_path.iterdir())) == 7 + number
    ask(base)
    assert len(list(tmp_path.iterdir())) == 11


def test_what_weights_do_not_tell_is_part_of_the_question() -> None:
    def vit(heads: int, eps: float = 1e-6) -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=heads, num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=eps),
        )  # fmt: skip

    base = architecture_sha256(vit(2))
    assert architecture_sha256(vit(2).train()) == architecture_sha256(vit(2).eval()) == base
    assert len({base, architecture_sha256(vit(4)), architecture_sha256(vit(2, eps=1e-12))}) == 3


def vit_encoder() -> Encoder:
    torch.manual_seed(0)
    return small_encoder(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
        )
    )


def both_readouts(world: World, folder: str, store: str) -> tuple[tuple[Features, ...], int, int]:
    """Features of each readout, images that went through on this rank, and how often it read the store for gaps."""
    store_module.CHUNK = 16
    images, looks = [0], [0]
    encoder, look = vit_encoder(), CacheEntry.missing

    def count(_: nn.Module, given: tuple[Tensor]) -> None:
        images[0] += len(given[0])

    def counted(shelf: CacheEntry) -> list[int]:
        looks[0] += 1
        return look(shelf)

    encoder.module.patch_embed.register_forward_pre_hook(count)  # type: ignore[union-attr]
    CacheEntry.missing = counted  # type: ignore[method-assign]
    extraction = Extraction(
        batch_size=10,
        readouts=(OWN, MEAN),
        rank=world.rank,
        world_size=world.size,
        store=FeatureStore(Path(store)),
    )
    found = extraction.extract(encoder, open_dataset(folder), num_classes=10, label="test")
    return tuple(Features(f.values.clone(), f.labels, f.keys) for f in found), images[0], looks[0]


def test_ranks_share_what_is_missing_and_each_has_all(folders: Folders, tmp_path: Path) -> None:
    expected = Extraction(readouts=(OWN, MEAN)).extract(
        vit_encoder(), open_dataset(folders.test), num_classes=10, label="test"
    )
    assert not torch.equal(expected[0].values, expected[1].values)

    def check(world_size: int, images: list[int]) -> None:
        ranks = run_ranks(both_readouts, world_size, folders.test, str(tmp_path))
        for found, _, _ in ranks:
            for of_readout, wanted in zip(found, expected, strict=True):
                same(of_readout, wanted)
        assert [2 * part for part in images] == [passed for _, passed, _ in ranks]  # a pass for each readout
        assert [looks for *_, looks in ranks] == [2] + [0] * (world_size - 1)

    check(3, [16 * 2 + 4, 16 * 2, 16 * 2])
    check(3, [0, 0, 0])
    for record in tmp_path.glob("*/chunk_00000[13].json"):
        record.unlink()
    check(2, [16, 16])


def _left_out(world: World, folder: str, store: str) -> tuple[Features, str]:
    """What is left of the features, and the words of a disk that fails as rank 0 looks at what is there."""
    store_module.CHUNK = 16
    extraction = Extraction(batch_size=10, rank=world.rank, world_size=world.size, store=FeatureStore(Path(store)))
    (found,) = extraction.extract(vit_encoder(), open_dataset(folder), num_classes=10, label="test")
    found = replace(found, values=found.values.clone())

    def failing(_: CacheEntry) -> list[int]:
        raise OSError(errno.EIO, "Input/output error", store)

    CacheEntry.missing = failing  # type: ignore[method-assign]
    try:
        extraction.extract(vit_encoder(), open_dataset(folder), num_classes=10, label="test")
    except StorageError as error:
        return found, str(error)
    return found, "nothing was raised"


def test_ranks_leave_out_the_same_samples_and_fail_with_the_same_words(folders: Folders, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders.test, tmp_path / "test"))
    for victim in sorted(copied.rglob("*.jpg"))[3:90:40]:
        victim.write_bytes(b"no image")
    (expected,) = Extraction().extract(vit_encoder(), open_dataset(str(copied)), num_classes=10, label="test")
    assert len(expected) == 97
    assert expected.numbers is not None
    (tmp_path / "store").mkdir()
    for found, said in run_ranks(_left_out, 2, str(copied), str(tmp_path / "store")):
        same(found, expected)
        assert found.left_out == expected.left_out
        assert found.numbers is not None
        assert found.numbers.equal(expected.numbers)
        assert said.startswith(
            f"{tmp_path / 'store'}: expected to be read and written, found rank 0: Input/output error"
        )


def test_a_readout_more_computes_that_one_alone(folders: Folders, tmp_path: Path) -> None:
    encoder, store = vit_encoder(), FeatureStore(tmp_path)
    dataset = open_dataset(folders.test)
    Extraction(readouts=(OWN,), store=store).extract(encoder, dataset, num_classes=10, label="test")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    own, mean = Extraction(readouts=(OWN, MEAN), store=store).extract(encoder, dataset, num_classes=10, label="test")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert own.values.shape == mean.values.shape
    assert not torch.equal(own.values, mean.values)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--cache"):
        FeatureStore(tmp_path / "file")


@pytest.mark.parametrize("gone", ["the cache", "values.f32", "a record", "half of values.f32"])
def test_a_cache_that_is_removed_while_it_is_read_is_told(tmp_path: Path, gone: str) -> None:
    entry = FeatureStore(tmp_path / "cache").shelf({"encoder": "a"}, 100)
    for number, rows in enumerate(entry.chunks):
        part = torch.ones(len(rows), 4), torch.zeros(len(rows), dtype=torch.int64), tuple(map(str, rows))
        entry.put(number, Features(*part))
    assert entry.missing() == []
    held = entry.features()
    if gone == "the cache":
        shutil.rmtree(tmp_path / "cache")
    elif gone == "half of values.f32":
        os.truncate(entry.folder / "values.f32", 8)
    else:
        (entry.folder / ("values.f32" if gone == "values.f32" else "chunk_000001.json")).unlink()
    with pytest.raises(RunError, match=r"expected 4 chunks of features, .* start the evaluation again"):
        entry.features()
    if gone != "half of values.f32":
        assert held.values.sum() == 400, "what was read already stays"
