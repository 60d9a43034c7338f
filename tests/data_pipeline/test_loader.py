"""The loader: each epoch's keys once, the same pixels for any ranks and workers, resumed at any position."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.errors import DataError, FieldError, RunError, ShardError
from data_pipeline.loader import BadSample, StepData
from data_pipeline.order.order import Order
from data_pipeline.samples.config import Views
from data_pipeline.samples.views import training_view
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.tiny import SPEC, Row, loader, photo, rows_of, steps, write_shards

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 0, 7, 1, 10])


@pytest.fixture(scope="module")
def bad_dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Sample 2 is no image, 3 is cut short, 7 has no image at all, 9 a label that is none."""
    bad = {
        2: {"jpg": b"not an image", "cls": b"2"},
        3: {"jpg": photo(3)[:-40], "cls": b"0"},
        7: {"cls": b"1"},
        9: {"jpg": photo(9), "cls": b"0"},
    }
    found = write_shards(tmp_path_factory.mktemp("bad"), [6, 8], replaced=bad)
    index = found.manifest.index(1)
    data = bytearray((found.manifest.path(1)).read_bytes())
    data[int(index.offsets[9 - 6, index.fields.index("cls")])] ^= 1
    found.manifest.path(1).write_bytes(data)
    return found


BAD = {"0002", "0003", "0007", "0009"}


@FEW
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    read_streams=st.integers(1, 40),
    shuffle_window=st.integers(1, 9),
    local=st.integers(1, 4),
    world=st.integers(1, 8),
    seed=st.integers(0, 2**40),
)
def test_each_epoch_has_each_key_once_at_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    read_streams: int,
    shuffle_window: int,
    local: int,
    world: int,
    seed: int,
) -> None:
    """Every rank's loader over two epochs: together, position by position, what one rank alone has."""
    dataset = write_shards(tmp_path_factory.mktemp("any"), sizes)
    size, total = world * local, 2 * sum(sizes)
    options: dict[str, Any] = {
        "read_streams": read_streams,
        "shuffle_window": shuffle_window,
        "global_size": size,
        "seed": seed,
    }
    alone = steps(loader(dataset, **options), 0, -(-total // size))
    ranks = [steps(loader(dataset, rank=rank, world_size=world, **options), 0, len(alone)) for rank in range(world)]
    by_position: dict[int, Row] = {}
    for number, step in enumerate(alone):
        together = [row for rank in ranks for row in rows_of(rank[number])]
        assert together == rows_of(step)
        assert {rank[number].cursor for rank in ranks} == {step.cursor}
        positions = range(number * size, (number + 1) * size)
        by_position |= zip(sorted(positions, key=lambda p: (p % read_streams, p)), together, strict=True)
    keys = [by_position[position][0] for position in range(total)]
    for epoch in (0, 1):
        epoch_keys = keys[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert sorted(epoch_keys) == [f"{i:04d}" for i in range(sum(sizes))]


@FEW
@given(
    cursor=st.integers(0, 100),
    size=st.integers(1, 60),
    micro_divides=st.integers(1, 60),
    other_size=st.integers(1, 30),
)
def test_a_run_goes_on_at_any_position_with_any_batch_size(
    dataset: ShardDataset, cursor: int, size: int, micro_divides: int, other_size: int
) -> None:
    """A position's row is the same whichever step it falls in, whatever came before, however it is cut."""
    micro_size = size // micro_divides if size % micro_divides == 0 and micro_divides <= size else size
    first, second = steps(loader(dataset, global_size=size, micro_size=micro_size), cursor, 2)
    assert (first.cursor, second.cursor) == (cursor + size, cursor + 2 * size)
    assert {len(batch) for batch in first.micro_batches} == {micro_size}

    def by_position(found: list[StepData], start: int, each: int) -> dict[int, Row]:
        placed: dict[int, Row] = {}
        for number, step in enumerate(found):
            positions = range(start + number * each, start + (number + 1) * each)
            placed |= zip(sorted(positions, key=lambda p: (p % 3, p)), rows_of(step), strict=True)
        return placed

    again = steps(loader(dataset, global_size=other_size), cursor, -(-2 * size // other_size))
    one, other = by_position([first, second], cursor, size), by_position(again, cursor, other_size)
    assert one == {position: other[position] for position in one}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_change_nothing(dataset: ShardDataset, num_workers: int) -> None:
    alone = steps(loader(dataset, global_size=6), 0, 12)
    assert [rows_of(step) for step in steps(loader(dataset, global_size=6, num_workers=num_workers), 0, 12)] == [
        rows_of(step) for step in alone
    ]
    tail = steps(loader(dataset, global_size=6, num_workers=num_workers), 7 * 6, 5)
    assert [rows_of(step) for step in tail] == [rows_of(step) for step in alone[7:]]
    assert [step.cursor for step in tail] == [step.cursor for step in alone[7:]]


def test_a_row_is_what_the_parts_make_of_its_sample(dataset: ShardDataset) -> None:
    """Order, reading, decoding and views put together by hand."""
    (step,) = steps(loader(dataset, global_size=6, micro_size=2), 23 * 4, 1)
    order = Order(dataset.shard_sizes, seed=5, read_streams=3, shuffle_window=4)
    indices = order.locate(order.step_positions(23 * 4, 6)).tolist()
    batch = step.micro_batches[1]
    for row, i in enumerate(indices[2:4]):
        assert batch.keys[row] == f"{i:04d}"
        assert batch.labels is not None
        assert batch.labels[row] == i % 3
        pixels = np.array(Image.open(io.BytesIO(dataset.read(i).fields["jpg"])))
        for view in (0, 1):
            expected = training_view(pixels, 8, Views(), seed=5, epoch=4, key=f"{i:04d}", view=view)
            assert torch.equal(batch.views[view][row], expected)
    assert batch.masks is not None
    assert batch.masks.sum(1).tolist() == [6, 6]
    assert batch.views[0].shape == (2, 3, 8, 8)
    assert batch.views[0].dtype == torch.uint8


def test_a_batch_without_labels_and_masks_has_none(dataset: ShardDataset) -> None:
    (step,) = steps(loader(dataset, BatchSpec(8)), 0, 1)
    assert step.micro_batches[0].labels is None
    assert step.micro_batches[0].masks is None
    assert len(step.micro_batches[0].views) == 1


def test_every_step_says_what_it_spent_its_time_on(dataset: ShardDataset) -> None:
    (step,) = steps(loader(dataset, num_workers=1), 0, 1)
    assert set(step.seconds) == {"read", "decode", "transform"}
    assert all(0 < seconds < 10 for seconds in step.seconds.values())


def test_the_generators_of_the_training_are_left_alone(dataset: ShardDataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for num_workers in (0, 1):
        steps(loader(dataset, num_workers=num_workers), 0, 2)
    assert torch.equal(torch.rand(4), expected)


def test_one_usable_sample_is_found_however_far_it_is(tmp_path: Path) -> None:
    """Streams of one sample each: no window has anything to offer, and the rest of the epoch has one."""
    bad = {i: {"jpg": b"no image", "cls": b"0"} for i in range(12) if i != 7}
    dataset = write_shards(tmp_path, [12], replaced=bad)
    (step,) = steps(loader(dataset, read_streams=12, shuffle_window=1, global_size=12), 0, 1)
    assert {key for key, _ in rows_of(step)} == {"0007"}
    assert len(step.bad) == 11


def test_a_bad_sample_is_replaced_within_its_window_and_reported(bad_dataset: ShardDataset) -> None:
    order = Order(bad_dataset.shard_sizes, seed=5, read_streams=3, shuffle_window=4)
    found = steps(loader(bad_dataset, global_size=7), 0, 4)  # two epochs of 14
    reported = [bad for step in found for bad in step.bad]
    assert sorted(bad.key for bad in reported) == sorted([*BAD, *BAD])
    for bad in reported:
        walk = order.locate(np.fromiter(order.replacements(bad.position), np.int64)).tolist()
        assert bad.replacement_key == next(key for i in walk if (key := f"{i:04d}") not in BAD)
        assert int(order.locate(np.array([bad.position]))[0]) == int(bad.key)
        assert bad.shard == ("part-000.tar" if int(bad.key) < 6 else "part-001.tar")
        assert bad.key in bad.reason
    keys = [key for step in found for key, _ in rows_of(step)]
    expected = [f"{i:04d}" for n in range(4) for i in order.locate(order.step_positions(7 * n, 7)).tolist()]
    stand_ins = {bad.position: bad.replacement_key for bad in reported}
    positions = [p for n in range(4) for p in order.step_positions(7 * n, 7).tolist()]
    assert keys == [stand_ins.get(p, key) for p, key in zip(positions, expected, strict=True)]


def test_bad_samples_do_not_depend_on_ranks_or_workers(bad_dataset: ShardDataset) -> None:
    alone = steps(loader(bad_dataset, global_size=4), 0, 7)
    workers = steps(loader(bad_dataset, global_size=4, num_workers=2), 0, 7)
    ranks = [steps(loader(bad_dataset, global_size=4, rank=rank, world_size=2), 0, 7) for rank in (0, 1)]
    for number, step in enumerate(alone):
        assert (rows_of(workers[number]), workers[number].bad) == (rows_of(step), step.bad)
        assert rows_of(ranks[0][number]) + rows_of(ranks[1][number]) == rows_of(step)
        assert ranks[0][number].bad + ranks[1][number].bad == step.bad


def test_the_reasons_name_what_is_wrong(bad_dataset: ShardDataset) -> None:
    reported: dict[str, BadSample] = {}
    for step in steps(loader(bad_dataset, global_size=7), 0, 2):
        reported |= {bad.key: bad for bad in step.bad}
    assert "do not decode" in reported["0002"].reason
    assert "do not decode" in reported["0003"].reason
    assert "an image" in reported["0007"].reason
    assert "crc32" in reported["0009"].reason


def test_an_image_over_the_limit_is_a_bad_sample(tmp_path: Path) -> None:
    large = write_shards(tmp_path, [8], replaced={3: {"jpg": photo(3, side=40), "cls": b"0"}})
    found = steps(loader(large, global_size=8, read_streams=1, shuffle_window=8, max_pixels=12 * 14), 0, 1)
    assert [(bad.key, "40" in bad.reason) for bad in found[0].bad] == [("0003", True)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_window_without_a_usable_sample_ends_the_run(tmp_path: Path, num_workers: int) -> None:
    bad = {i: {"jpg": b"no image", "cls": b"0"} for i in range(64)}
    dataset = write_shards(tmp_path, [80], replaced=bad)
    source = loader(dataset, read_streams=1, shuffle_window=64, num_workers=num_workers)
    with pytest.raises(RunError, match=r"part-000.tar: .* to stand in.* do not decode.* the next 63 .*verify"):
        steps(source, 0, 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanished_is_an_error_of_ours(tmp_path: Path, num_workers: int) -> None:
    dataset = write_shards(tmp_path, [8])
    (tmp_path / "part-000.tar").unlink()
    with pytest.raises(ShardError, match=r"part-000\.tar: .* No such file") as caught:
        steps(loader(dataset, num_workers=num_workers), 0, 1)
    assert caught.value.expected == "a readable shard"  # whole, after its way out of a worker


def test_a_batch_that_does_not_divide_is_refused(dataset: ShardDataset) -> None:
    with pytest.raises(DataError, match=r"batch.global_size: expected a multiple of 2 ranks x 3"):
        loader(dataset, global_size=8, micro_size=3, world_size=2)


def test_data_without_images_is_refused(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [1], replaced={0: {"txt": b"words", "cls": b"0"}})
    with pytest.raises(FieldError, match=r"image field: expected one of jpg.* found the fields cls, txt"):
        loader(dataset)


def test_missing_labels_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    none = write_shards(tmp_path / "none", [3], num_classes=None)
    with pytest.raises(FieldError, match=r"`cls`.*found the fields jpg"):
        loader(none)
    loader(none, replace(SPEC, num_classes=None))
    some = write_shards(tmp_path / "some", [3], replaced={1: {"jpg": photo(1)}})
    with pytest.raises(FieldError, match=r"`cls`.*found 1 of 3 samples without one"):
        loader(some)


def test_a_label_out_of_range_is_refused(dataset: ShardDataset) -> None:
    with pytest.raises(FieldError, match=r"labels in \[0, 2\).*found label 2.*num_classes to 3"):
        loader(dataset, replace(SPEC, num_classes=2))
    loader(dataset, replace(SPEC, num_classes=1000))


def test_photographs_go_all_the_way(shared_data: Path, tmp_path: Path) -> None:
    os.symlink(shared_data / "photos.tar", tmp_path / "photos.tar")
    index_shards(str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    (step,) = steps(loader(dataset, BatchSpec(32), global_size=64), 0, 1)
    assert not step.bad
    assert len(set(rows_of(step))) == 64
