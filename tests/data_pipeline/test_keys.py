"""Keys that start again in each shard are told apart by their shard, everywhere; older manifests keep theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import ManifestError, SampleError
from data_pipeline.inspect.verify import verify
from data_pipeline.loader import evaluation_batches
from data_pipeline.shards.keys import first_repeat, hash_keys, refuse_repeated_keys, repeated_key
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.test_labels import write_labels
from tests.data_pipeline.test_reshard import write_tar
from tests.data_pipeline.tiny import SPEC, evaluated, loader, photo, rows_of, steps

SHARDS, EACH = ("a/00.tar", "a/01.tar", "b.tar"), 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars of four samples, each with keys 000000 to 000003; all images differ."""
    for number, name in enumerate(SHARDS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        members = [{"jpg": photo(10 * number + i), "cls": str(i % 3).encode()} for i in range(EACH)]
        write_tar(tmp_path / name, [(f"{i:06d}", fields) for i, fields in enumerate(members)])
    return tmp_path


def pattern(folder: Path) -> str:
    return str(folder / "{a/00,a/01,b}.tar")


def as_older(folder: Path) -> Manifest:
    """The manifest as an older version wrote it, which did not look at keys."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["keys"]
    path.write_text(json.dumps(content))
    return load_manifest(str(path))


def test_a_key_that_comes_again_is_made_unique_by_its_shard(folder: Path) -> None:
    index_shards(pattern(folder), workers=2)
    manifest = load_manifest(str(folder))
    assert manifest.keys == "by shard"
    dataset = ShardDataset(manifest)
    wanted = [f"{shard}/{i:06d}" for shard in SHARDS for i in range(EACH)]
    assert [dataset.read(i).key for i in range(12)] == wanted
    assert [dataset.origin(i) for i in (0, 11)] == [(wanted[0], "a/00.tar"), (wanted[11], "b.tar")]
    batches = evaluation_batches(dataset, BatchSpec(8, num_classes=3), evaluated(8), batch_size=5, max_pixels=10**6)
    assert [key for batch in batches for key in batch.keys] == wanted
    assert not verify(str(folder)).faults
    assert ShardDataset(load_manifest(str(folder / "b.tar"))).read(0).key == wanted[8], "alone, it is the same sample"


def test_masks_and_labels_beside_follow(folder: Path, tmp_path: Path) -> None:
    index_shards(pattern(folder))
    dataset = ShardDataset(load_manifest(str(folder)))
    (step,) = steps(loader(dataset, SPEC, global_size=12), 0, 1)
    (batch,) = step.micro_batches
    assert batch.masks is not None
    masks = {key: mask.tolist() for key, mask in zip(batch.keys, batch.masks, strict=True)}
    assert len(masks) == 12
    for i in range(EACH):
        assert len({str(masks[f"{shard}/{i:06d}"]) for shard in SHARDS}) > 1, "equal keys would share one mask"
    keys = [dataset.origin(i)[0] for i in range(12)]
    labels = write_labels(tmp_path / "soft", dataset, keys=[key[-6:] for key in keys])
    with pytest.raises(SampleError, match=r"expected the label of a/00\.tar/000000, found that of another key"):
        labels.row(0, dataset.read(0).key)


def test_an_older_manifest_goes_on_as_it_was_and_is_other_data(folder: Path) -> None:
    index_shards(pattern(folder))
    new = load_manifest(str(folder))
    older = as_older(folder)
    dataset = ShardDataset(older)
    assert [dataset.read(i).key for i in (0, 4)] == ["000000", "000000"]
    assert older.fingerprint != new.fingerprint, "crops and masks differ, and a run must not mix them"
    unsaid = replace(new, keys=None)
    assert unsaid.fingerprint == replace(new, keys="unique").fingerprint == older.fingerprint
    before = [rows_of(step) for step in steps(loader(dataset), 0, 3)]
    assert before == [rows_of(step) for step in steps(loader(ShardDataset(unsaid)), 0, 3)]


def test_an_older_manifest_with_equal_keys_is_told(folder: Path) -> None:
    index_shards(pattern(folder))
    older = as_older(folder)
    told = "the key 000000 in a/00.tar and again in a/01.tar"
    assert repeated_key(older) == told
    (fault,) = verify(str(folder)).faults
    assert told in str(fault)
    with pytest.raises(ManifestError, match=rf"found {told}\. Index the shards again"):
        refuse_repeated_keys(older)
    refuse_repeated_keys(older, limit=EACH)  # of the first shard alone
    with pytest.raises(ManifestError, match=told):
        refuse_repeated_keys(older, limit=EACH + 1)


def test_keys_that_differ_stay_as_they_are(folder: Path) -> None:
    (folder / "a" / "01.tar").unlink()
    write_tar(folder / "b.tar", [("other", {"jpg": photo(1)})])
    manifest = index_shards(str(folder / "{a/00,b}.tar"))
    assert manifest.keys == "unique"
    assert ShardDataset(manifest).read(0).key == "000000"
    assert repeated_key(manifest) == ""


keys = st.lists(st.lists(st.text("ab/.", max_size=2), max_size=4), max_size=4)


@given(keys=keys)
def test_the_first_repeat_is_found_wherever_it_lies(keys: list[list[str]]) -> None:
    flat = [key for shard in keys for key in shard]
    found = first_repeat([hash_keys(shard) for shard in keys])
    assert (found is None) == (len(set(flat)) == len(flat))
    if found is not None:
        assert found[0] < found[1]
        assert flat[found[0]] == flat[found[1]]
