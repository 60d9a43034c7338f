"""Shards that are damaged while a run reads them: each sample hit is replaced, named and counted, no other moves."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.batch import BatchSpec, TokenSpec
from data_pipeline.datasets.dataset import Part
from data_pipeline.datasets.mixture import Mixture
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.samples.captions import CaptionReader
from data_pipeline.samples.config import Captions
from tests.data_pipeline.test_captions import Codes
from tests.data_pipeline.tiny import Row, loader, photo, rows_of, write_shards

SPEC = BatchSpec(8, num_classes=3, tokens=TokenSpec("codes", 12))
FIELDS = ("cls", "jpg", "txt")


def source(folder: Path, count: int) -> ShardDataset:
    members = {i: {"jpg": photo(i), "cls": str(i % 3).encode(), "txt": f"caption {i}".encode()} for i in range(count)}
    return write_shards(folder, [count // 2, count - count // 2], replaced=members)


def hit(dataset: ShardDataset, shard: int, row: int, field: str) -> None:
    """One bit of a member, in the file that is being read."""
    index = dataset.manifest.index(shard)
    with dataset.manifest.path(shard).open("r+b") as file:
        file.seek(int(index.offsets[row, index.fields.index(field)]))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def read(stream: TrainLoader, damage: dict[int, list[tuple[ShardDataset, int, int, str]]]) -> list[StepData]:
    """Six steps of eight; before step n the damage of n happens."""
    found = []
    with closing(stream.steps(0)) as steps:  # type: ignore[type-var]
        for number, step in enumerate(islice(steps, 6)):
            found.append(step)
            for place in damage.get(number + 1, []):
                hit(*place)
    return found


def by_key(steps: list[StepData]) -> dict[str, set[Row]]:
    rows: dict[str, set[Row]] = {}
    for step in steps:
        for row in rows_of(step):
            rows.setdefault(row[0], set()).add(row)
    return rows


def test_a_mixture_with_labels_and_captions_goes_on_while_its_shards_rot(tmp_path: Path) -> None:
    one, two = source(tmp_path / "one", 8), source(tmp_path / "two", 9)
    both = Mixture([Part("one", one, 2), Part("two", two, 1)])
    options = {"global_size": 8, "captions": CaptionReader(Codes(), Captions())}
    sound = read(loader(both, SPEC, **options), {})
    # Two steps are whole; then a label, an image and a caption go, in either source.
    damage = {2: [(one, 0, 1, "cls"), (one, 1, 2, "jpg"), (two, 0, 3, "txt")]}
    hurt = read(loader(both, SPEC, **options), damage)
    expected = {"0:0001": "part-000.tar", "0:0006": "part-001.tar", "1:0003": "part-000.tar"}
    reported = [bad for step in hurt for bad in step.bad]
    assert not any(step.bad for step in hurt[:2])
    assert {bad.key for bad in reported} == set(expected)
    for bad in reported:
        name, number = ("one", "0") if bad.key.startswith("0") else ("two", "1")
        assert bad.shard == f"{name}: {expected[bad.key]}"
        assert "crc32" in bad.reason
        assert bad.replacement_key.startswith(f"{number}:")
        assert bad.replacement_key not in expected
    for before, after in zip(sound, hurt, strict=True):
        replaced = {bad.key for bad in after.bad}
        for (key, row), (other, other_row) in zip(rows_of(before), rows_of(after), strict=True):
            if key not in replaced:
                assert (key, row) == (other, other_row)
    lost = sum(1 for step in sound[2:] for key, _ in rows_of(step) if key in expected)
    assert len(reported) == lost > 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("field", FIELDS)
def test_each_kind_of_member_is_checked_at_each_reading(tmp_path: Path, field: str, num_workers: int) -> None:
    dataset = source(tmp_path, 8)
    for row in range(3):
        hit(dataset, 0, row, field)
    stream = loader(dataset, SPEC, global_size=8, captions=CaptionReader(Codes(), Captions()), num_workers=num_workers)
    for step in read(stream, {}):
        assert sorted(bad.key for bad in step.bad) == ["0000", "0001", "0002"]
        assert {key for key, _ in rows_of(step)} == {"0003", "0004", "0005", "0006", "0007"}


def test_a_shard_cut_short_loses_only_what_was_cut(tmp_path: Path) -> None:
    dataset = source(tmp_path, 8)
    stream = loader(dataset, SPEC, global_size=8, captions=CaptionReader(Codes(), Captions()))
    index = dataset.manifest.index(1)
    with closing(stream.steps(0)) as steps:  # type: ignore[type-var]
        assert not next(steps).bad
        with dataset.manifest.path(1).open("r+b") as file:
            file.truncate(int(index.offsets[2, 0]))
        for step in islice(steps, 2):
            assert sorted(bad.key for bad in step.bad) == ["0006", "0007"]
