"""Batches for evaluation: every sample once, in order, with nothing random."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import FieldError
from data_pipeline.loader import evaluation_batches
from tests.data_pipeline.tiny import SPEC, evaluated, rows, write_shards

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 0, 7, 1, 10])


def evaluation(dataset: Dataset, spec: BatchSpec = SPEC, **options: Any) -> Iterator[Batch]:
    return evaluation_batches(
        dataset, spec, evaluated(spec.image_size), **({"batch_size": 4, "max_pixels": 10**6} | options)
    )


@FEW
@given(world=st.integers(1, 8), batch_size=st.integers(1, 30), limit=st.none() | st.integers(1, 40))
def test_an_evaluation_sees_each_sample_once_in_order(
    dataset: ShardDataset, world: int, batch_size: int, limit: int | None
) -> None:
    batches = [
        list(evaluation(dataset, batch_size=batch_size, rank=rank, world_size=world, limit=limit))
        for rank in range(world)
    ]
    keys = [key for rank in batches for batch in rank for key in batch.keys]
    assert keys == [f"{i:04d}" for i in range(min(limit or 23, 23))]
    counts = [sum(len(batch) for batch in rank) for rank in batches]
    assert max(counts) - min(counts) <= 1
    assert all(len(batch) == batch_size for rank in batches for batch in rank[:-1])


def test_an_evaluation_is_not_random(dataset: ShardDataset) -> None:
    first = rows(list(evaluation(dataset)))
    assert rows(list(evaluation(dataset, batch_size=7))) == first
    assert rows(list(evaluation(dataset, num_workers=2))) == first
    assert rows([b for rank in range(3) for b in evaluation(dataset, rank=rank, world_size=3)]) == first
    batch = next(evaluation(dataset))
    assert torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_sample_that_cannot_be_used_is_a_blank_row_and_named(tmp_path: Path, num_workers: int, world: int) -> None:
    dataset = write_shards(tmp_path, [4, 3], replaced={2: {"jpg": b"not an image", "cls": b"0"}})
    batches = [
        b for rank in range(world) for b in evaluation(dataset, num_workers=num_workers, rank=rank, world_size=world)
    ]
    assert [key for batch in batches for key in batch.keys] == [f"{i:04d}" for i in range(7)]
    assert [key for batch in batches for key in batch.kept().keys] == [f"{i:04d}" for i in range(7) if i != 2]
    (batch,) = [batch for batch in batches if batch.left_out]
    (left_out,) = batch.left_out
    assert (left_out.key, left_out.file) == ("0002", dataset.manifest.names[0])
    assert "0002.jpg" in left_out.reason
    assert not batch.views[0][left_out.row].any()


def test_data_that_lacks_what_is_needed_is_refused_by_the_call(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [1], replaced={0: {"txt": b"words", "cls": b"0"}})
    with pytest.raises(FieldError, match="image field"):
        evaluation(dataset)


def test_a_very_narrow_image_is_not_blown_up(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(file, "PNG")
    dataset = write_shards(tmp_path, [1], replaced={0: {"png": file.getvalue(), "cls": b"0"}})
    (batch,) = evaluation(dataset)
    assert "resized 8 x 160000" in batch.left_out[0].reason
    assert len(batch.kept()) == 0
