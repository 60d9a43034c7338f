"""Verification finds what is wrong and names it; statistics tell what is there."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import FieldError, ManifestError, SampleError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.inspect.stats import stats
from data_pipeline.inspect.verify import verify
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.archives import as_folder, as_tar, class_folders, jpeg


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three shards of four samples."""
    convert(as_folder(tmp_path / "s", class_folders(12)), tmp_path / "out", ConvertOptions(shard_size=4))
    return tmp_path / "out"


def faults(dataset: Path) -> list[str]:
    return [str(fault) for fault in verify(str(dataset)).faults]


def test_sound_dataset_has_no_fault(dataset: Path) -> None:
    found = verify(str(dataset))
    assert (found.num_shards, found.num_samples, found.faults) == (3, 12, ())
    assert found.num_bytes == sum(path.stat().st_size for path in dataset.glob("*.tar"))
    assert verify(str(dataset), workers=2) == found


def test_every_flipped_byte_is_found_and_its_sample_named(dataset: Path) -> None:
    path = dataset / "shard-000001.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    rng = np.random.default_rng(0)
    for member in members:
        changed = bytearray(content)
        changed[member.offset_data + int(rng.integers(member.size))] ^= 0x01
        path.write_bytes(changed)
        key, _, field = member.name.rpartition(".")
        found = faults(dataset)
        assert any("another hash" in fault for fault in found)
        assert [f for f in found if f"shard-000001.tar, {key}: .{field} has other bytes" in f], member.name
        assert all("shard-000001.tar" in fault for fault in found)
    path.write_bytes(content)
    assert faults(dataset) == []


def test_flipped_headers_and_padding_are_found(dataset: Path) -> None:
    path = dataset / "shard-000000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[3]
    for at in (member.offset + 1, member.offset + 148, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 0x01
        path.write_bytes(changed)
        found = faults(dataset)
        assert any("another hash" in fault for fault in found)
        assert any("offset" in fault for fault in found)


def test_truncations_at_member_boundaries_are_found(dataset: Path) -> None:
    path = dataset / "shard-000002.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        boundaries = [member.offset for member in tar]
    for size in boundaries:
        path.write_bytes(content[:size])
        found = faults(dataset)
        assert any(f"has {size:,} bytes, not the {len(content):,}" in fault for fault in found)
        assert any("shard-000002.tar, " in fault and "has other bytes" in fault for fault in found)


def test_missing_files_and_swapped_indexes_are_found(dataset: Path) -> None:
    (dataset / "shard-000000.tar").unlink()
    (dataset / "shard-000001.idx").write_bytes((dataset / "shard-000002.idx").read_bytes())
    (dataset / "shard-000002.idx").unlink()
    found = faults(dataset)
    assert found[0] == "shard-000000.tar: is missing"
    assert "shard-000001.idx" in found[1]
    assert "no such file" in found[2]
    assert len(found) == 3


def test_wrong_manifests_are_found(dataset: Path) -> None:
    path = dataset / "manifest.json"
    good = json.loads(path.read_text())
    for change, expected in (
        ({"label_counts": [12, 0, 0]}, "histogram"),
        ({"fields": ["cls", "jpg", "txt"]}, "has no .txt"),
        ({"fields": ["jpg"]}, "the manifest has fields"),
        ({"num_samples": [3, 4, 4]}, "3 samples"),
        ({"classes": ["cat"]}, "not below 1"),
    ):
        path.write_text(json.dumps(good | change))
        assert any(expected in fault for fault in faults(dataset)), change


def test_samples_that_cannot_train_are_found(tmp_path: Path) -> None:
    files = {
        "a.jpg": jpeg(0),
        "a.cls": b"0",
        "b.jpg": jpeg(1)[:-300],
        "b.cls": b"1",
        "c.cls": b"0",
        "d.jpg": jpeg(2),
        "e.jpg": jpeg(3, 50, 60),
        "e.cls": b"0",
    }
    as_tar(tmp_path / "x.tar", files)
    as_tar(tmp_path / "y.tar", {"a.jpg": jpeg(0), "a.cls": b"0"})
    as_tar(tmp_path / "z.tar", {"a.jpg": jpeg(0), "a.cls": b"0"})
    index_shards(str(tmp_path))
    found = [str(fault) for fault in verify(str(tmp_path), max_pixels=2999).faults]
    assert [fault.partition(":")[0] for fault in found] == [f"x.tar, {key}" for key in "bcde"]
    assert "decode" in found[0]
    assert "has no image" in found[1]
    assert "has no .cls" in found[2]
    assert "3000" in found[3]
    for name in ("x.tar", "x.idx", "manifest.json"):
        (tmp_path / name).unlink()
    index_shards(str(tmp_path))
    assert any("there twice" in fault for fault in faults(tmp_path))


def test_verify_needs_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="pretrain data index"):
        verify(str(tmp_path))


def test_stats_tell_sizes_and_draw_the_images(dataset: Path, tmp_path: Path) -> None:
    found = stats(str(dataset), tmp_path / "sheet.png")
    assert found.manifest.total == 12
    assert sorted(found.image_bytes.tolist()) == sorted(len(data) for data in class_folders(12).values())
    assert found.pixels.tolist() == [[12, 10]] * 12
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet[:80, :960].std() > 20
    assert sheet.shape[1] == 960


def test_stats_leave_out_what_does_not_decode(tmp_path: Path) -> None:
    images = {f"{i}.jpg": jpeg(i) for i in range(4)}
    as_tar(tmp_path / "x.tar", {**images, "1.jpg": images["1.jpg"][:200]})
    index_shards(str(tmp_path))
    found = stats(str(tmp_path), tmp_path / "sheet.png")
    assert (len(found.image_bytes), found.pixels.tolist()) == (4, [[12, 10]] * 3)
    assert ["1.jpg: expected a whole image" in str(error) for error in found.left_out] == [True]
    for name in ("x.tar", "x.idx", "manifest.json"):
        (tmp_path / name).unlink()
    as_tar(tmp_path / "x.tar", {"1.jpg": images["1.jpg"][:200]})
    index_shards(str(tmp_path))
    with pytest.raises(SampleError, match="expected a whole image"):
        stats(str(tmp_path), tmp_path / "sheet.png")


def test_stats_need_images(tmp_path: Path) -> None:
    as_tar(tmp_path / "x.tar", {"a.txt": b"words"})
    index_shards(str(tmp_path))
    with pytest.raises(FieldError, match="1 samples with txt"):
        stats(str(tmp_path), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
