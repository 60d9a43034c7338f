"""Every byte of a shard damaged, one after the other, and the shard cut off at every member: nothing passes.

What is caught where. `verify` finds a change of any byte: header, payload, padding or end mark. Training reads payloads
only, at the offsets of the index, and finds every change in one that it reads; it does not read headers and padding,
so a change there does it no harm and goes unseen. What comes from a URL is hashed whole before its first use.
"""

from __future__ import annotations

import tarfile

import numpy as np
import pytest

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import SampleError, ShardError
from data_pipeline.inspect.verify import verify
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scan import scan_shard
from tests.data_pipeline.tiny import write_shards

PATTERNS = (0x01, 0x80, 0xFF)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(tmp_path_factory.mktemp("shard"), [2]).manifest


def unreadable(manifest: Manifest) -> set[str]:
    """Keys of the samples that training could not use."""
    dataset, bad = ShardDataset(manifest), set()
    for i in range(dataset.num_samples):
        try:
            dataset.read(i)
        except SampleError:
            bad.add(dataset.origin(i)[0])
    return bad


def test_a_change_of_any_byte_is_found(manifest: Manifest) -> None:
    """By `verify` at each byte, by reading exactly where the byte is part of a payload, and there of that sample."""
    path = manifest.path(0)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    spans = {m.name.partition(".")[0]: range(0) for m in members}
    payload = np.full(len(content), -1)
    for m in members:
        payload[m.offset_data : m.offset_data + m.size] = list(spans).index(m.name.partition(".")[0])
    assert verify(str(manifest.root)).faults == ()
    counted = 0
    try:
        with path.open("r+b", buffering=0) as file:
            for at in range(len(content)):
                for pattern in PATTERNS:
                    file.seek(at)
                    file.write(bytes([content[at] ^ pattern]))
                    hit = {list(spans)[payload[at]]} if payload[at] >= 0 else set()
                    assert unreadable(manifest) == hit, (at, pattern)
                    counted += len(hit)
                    assert verify(str(manifest.root)).faults, (at, pattern)
                file.seek(at)
                file.write(content[at : at + 1])
    finally:
        path.write_bytes(content)
    assert counted == len(PATTERNS) * int((payload >= 0).sum())
    assert verify(str(manifest.root)).faults == ()


def test_a_shard_that_is_cut_off_is_found(manifest: Manifest) -> None:
    """At each boundary of a header, payload or padding, beside it, and at each 97th byte."""
    path = manifest.path(0)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [(m.offset, m.offset_data, m.offset_data + m.size) for m in tar.getmembers()]
    boundaries = {at + by for triple in starts for at in triple for by in (-1, 0, 1) if 0 <= at + by < len(content)}
    last_payload = max(end for *_, end in starts)
    try:
        for size in sorted(boundaries | set(range(0, len(content), 97))):
            path.write_bytes(content[:size])
            with pytest.raises(ShardError, match=r"the manifest says"):
                load_manifest(str(manifest.root))  # before a run starts
            assert verify(str(manifest.root)).faults
            assert bool(unreadable(manifest)) == (size < last_payload)
            if size < last_payload:
                with pytest.raises(ShardError):
                    scan_shard(path)
    finally:
        path.write_bytes(content)
