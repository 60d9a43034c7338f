"""JSON in JSON in JSON, from elsewhere: each reader says which file it is, none dies of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from data_pipeline.datasets.selection import Selection
from data_pipeline.datasets.soft_labels import SoftLabels, file_name, read_file
from data_pipeline.durable import MAX_DEPTH
from data_pipeline.errors import DataError, ManifestError, SampleError, ShardError
from data_pipeline.samples.captions import read_captions
from data_pipeline.shards.index import ShardIndex, is_index
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest
from data_pipeline.shards.write import check_output
from tests.data_pipeline.test_labels import write_labels
from tests.data_pipeline.tiny import write_shards

DEPTHS = [MAX_DEPTH + 1, 100_000]  # of which Python's own reader takes the first


def deep(depth: int) -> str:
    return '{"format":' + "[" * depth + "]" * depth + "}"


def deep_header(depth: int) -> bytes:
    text = deep(depth).encode()
    return len(text).to_bytes(8, "little") + text


def deep_metadata(name: str, depth: int) -> bytes:
    content: bytes = save({"keys": np.zeros(1, np.int64)}, metadata={name: deep(depth)})
    return content


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_manifest_and_a_plan(tmp_path: Path, depth: int) -> None:
    for name in (FILE_NAME, PLAN_NAME):
        (tmp_path / name).write_text(deep(depth))
    with pytest.raises(ManifestError, match=r"manifest\.json: .* more than 100 deep"):
        Manifest.read(tmp_path / FILE_NAME)
    with pytest.raises(DataError, match=r"plan\.json: .* more than 100 deep"):
        check_output(tmp_path, {})


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("content", [lambda depth: deep_metadata("index", depth), deep_header], ids=["inner", "header"])
def test_an_index(tmp_path: Path, depth: int, content: Callable[[int], bytes]) -> None:
    path = tmp_path / "shard.idx"
    path.write_bytes(content(depth))
    with pytest.raises(ManifestError, match=r"shard\.idx"):
        ShardIndex.load(path)
    assert not is_index(path)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["header", "selection"])
def test_a_selection(tmp_path: Path, depth: int, name: str) -> None:
    path = tmp_path / "selection"
    path.write_bytes(deep_header(depth) if name == "header" else deep_metadata(name, depth))
    with pytest.raises(ManifestError, match=r"selection: .* more than 100 deep"):
        Selection.load(path)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["header", "labels"])
def test_soft_labels(tmp_path: Path, depth: int, name: str) -> None:
    write_labels(tmp_path / "soft", write_shards(tmp_path / "shards", [3]))
    path = tmp_path / "soft" / file_name(0)
    path.write_bytes(deep_header(depth) if name == "header" else deep_metadata(name, depth))
    with pytest.raises(ValueError, match="more than 100 deep"):
        read_file(path)
    with pytest.raises(ShardError, match="expected the labels of a shard"):
        SoftLabels(tmp_path / "soft").row(0, "0000")


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_caption(depth: int) -> None:
    with pytest.raises(SampleError, match=r"a\.json: .* more than 100 deep"):
        read_captions({"json": deep(depth).encode()}, "a", "json", "caption")


@pytest.mark.parametrize("text", ['"words"', "3", "null", "[]"])
def test_values_that_are_no_objects(tmp_path: Path, text: str) -> None:
    content: bytes = save({"keys": np.zeros(1, np.int64)}, metadata={"selection": text, "index": text, "labels": text})
    for header in (content, len(text).to_bytes(8, "little") + text.encode()):
        (tmp_path / "file").write_bytes(header)
        with pytest.raises(ManifestError, match="expected a selection"):
            Selection.load(tmp_path / "file")
        with pytest.raises(ManifestError, match="expected the index of a shard"):
            ShardIndex.load(tmp_path / "file")
        assert not is_index(tmp_path / "file")
