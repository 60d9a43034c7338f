"""What is said of crops that no image has: counted where they are made, logged, and told once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.batch import BatchSpec
from data_pipeline.loader import TrainLoader
from data_pipeline.samples.config import Views
from pretrain.callbacks.health import UndrawnCrops, usual_checks
from pretrain.runtime.state import Progress, RunState
from tests.data_pipeline.tiny import photo, steps, write_shards

STATE = RunState(Progress(1, 10, 0), 0)
SHAPES = {number: {"jpg": photo(number, side=40 if number == 2 else 4)} for number in range(4)}  # 40 x 42, else 4 x 6


@pytest.mark.parametrize(
    ("views", "share"),
    [(Views(scale=(0.9, 1.0), ratio=(1, 1)), 0.75), (Views(crop="square"), 0.0), (Views(), 0.0)],
)
def test_crops_that_fit_in_no_image_are_counted_over_views_and_micro_batches(
    tmp_path: Path, views: Views, share: float
) -> None:
    dataset = write_shards(tmp_path, [4], num_classes=None, replaced=SHAPES)
    loader = TrainLoader(
        dataset, BatchSpec(8, num_views=2), views, seed=0, read_streams=1, shuffle_window=4, global_size=4,
        micro_size=2, max_pixels=10**6,
    )  # fmt: skip
    crops, (first, second) = UndrawnCrops(), steps(loader, 0, 2)
    assert float(crops.after_step(STATE, first.micro_batches)["undrawn_crops"]) == share
    assert float(crops.after_step(STATE, second.micro_batches)["undrawn_crops"]) == share


def test_many_of_them_are_told_once() -> None:
    few, many = {"undrawn_crops": 0.01}, {"undrawn_crops": 0.9}
    checks = usual_checks(0, 1)
    assert not any(check(few) for check in checks for _ in range(5))
    said = [text for check in checks for _ in range(1000) if (text := check(many))]
    assert len(said) == 1
    assert said[0].startswith("90% of the crops so far are not drawn")
    assert "data.views.crop=square" in said[0]
