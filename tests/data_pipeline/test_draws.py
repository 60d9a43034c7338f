"""Draws: from (seed, epoch, key, view) and nothing else, with the distributions they are said to have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data import auto_augment

from data_pipeline.batch import Batch
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.samples.config import Augmentation, Blur, Erasing, Jitter, Mixing, RandAugment
from data_pipeline.samples.draws import NO_BOX, Value, draw, draw_mix
from data_pipeline.samples.rand_augment import RandOp, operation_argument
from tests.data_pipeline.tiny import SPEC, loader, steps, write_shards

EVERYTHING = Augmentation(
    rand_augment=RandAugment(),
    jitter=Jitter(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
    grayscale=0.2,
    blur=Blur(probability=0.5),
    solarize=0.2,
    erasing=Erasing(probability=0.25),
)
BOTH = Mixing(mixup=0.8, cutmix=1.0)


def drawn(number: int = 0, spec: Augmentation = EVERYTHING, **changes: Any) -> dict[str, Value]:
    arguments = {"size": 32, "seed": 0, "epoch": 0, "key": str(number), "view": 0} | changes
    return draw(spec, **arguments)


def column(name: str, count: int = 4000, spec: Augmentation = EVERYTHING) -> np.ndarray:
    return np.array([drawn(i, spec)[f"0/{name}"] for i in range(count)])


def test_what_is_drawn_for_a_key_never_changes() -> None:
    """A run that goes on under a later version must go on with its colours: these are a promise."""
    found = draw(EVERYTHING, size=224, seed=3, epoch=1, key="n01440764/10069", view=1)
    expected: dict[str, Value] = {
        "1/rand_augment": (8, 3),
        "1/rand_augment_arguments": pytest.approx((1.8259645081153675, -26.664323567671797)),
        "1/jitter_order": (1, 2, 0, 3),
        "1/jitter": (0.7724980162605829, 0.9975845683246842, 0.9163444884089877, 5.2307818083185964e-05),
        "1/grayscale": False,
        "1/blur": 1.1664700411373625,
        "1/solarize": True,
        "1/erasing": (98, 145, 78, 72),
        "1/erasing_noise": 9104325495915822484,
    }
    assert found == expected
    mixed = draw_mix(BOTH, size=224, seed=3, cursor=512, pair=1)
    assert mixed == {"mix/lam": pytest.approx(0.1649894685499123), "mix/box": NO_BOX}
    cut = draw_mix(BOTH, size=224, seed=3, cursor=512, pair=3)
    assert cut == {"mix/lam": 0.5366908482142857, "mix/box": (0, 0, 123, 189)}


def test_every_part_of_the_key_counts_and_nothing_else_does() -> None:
    variants: list[dict[str, Any]] = [{}, {"seed": 1}, {"epoch": 1}, {"key": "1"}, {"view": 1}]
    found = [tuple(drawn(**variant).values()) for variant in variants]
    assert len(set(found)) == len(variants)
    torch.manual_seed(1)
    np.random.seed(1)
    assert tuple(drawn().values()) == found[0]


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"rand_augment": None}, {"rand_augment", "rand_augment_arguments"}),
        ({"jitter": None}, {"jitter", "jitter_order"}),
        ({"grayscale": 0.0}, {"grayscale"}),
        ({"blur": None}, {"blur"}),
        ({"solarize": 0.0}, {"solarize"}),
        ({"erasing": None}, {"erasing", "erasing_noise"}),
        ({"erasing": Erasing(probability=0.25, mode="const")}, {"erasing_noise"}),
    ],
)
def test_an_operation_that_is_off_is_absent_and_leaves_the_others_their_draws(
    change: dict[str, Any], gone: set[str]
) -> None:
    for number in range(20):
        everything = drawn(number)
        rest = drawn(number, EVERYTHING.model_copy(update=change))
        assert rest == {name: value for name, value in everything.items() if name.removeprefix("0/") not in gone}


def test_probabilities_are_kept() -> None:
    """Within five standard errors."""
    shares = {
        "grayscale": (column("grayscale"), 0.2),
        "solarize": (column("solarize"), 0.2),
        "blur": (column("blur") > 0, 0.5),
        "jitter": (column("jitter_order")[:, 0] >= 0, 0.8),
        "erasing": (column("erasing")[:, 2] > 0, 0.25),
        "rand_augment": (column("rand_augment") >= 0, 0.5),
    }
    for name, (chosen, probability) in shares.items():
        error = 5 * np.sqrt(probability * (1 - probability) / chosen.size)
        assert abs(chosen.mean() - probability) < error, name


def test_jitter_is_uniform_in_factors_and_order() -> None:
    order, factors = column("jitter_order"), column("jitter")
    applied = order[:, 0] >= 0
    assert (factors[~applied] == [1, 1, 1, 0]).all()
    for values, low, high in zip(factors[applied].T, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), strict=True):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
    counts = Counter(map(tuple, order[applied].tolist()))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    assert all(sorted(turns) == [0, 1, 2, 3] for turns in counts)


def test_jitter_leaves_out_what_has_no_strength() -> None:
    order = column("jitter_order", 50, Augmentation(jitter=Jitter(probability=1.0, brightness=0.4, hue=0.1)))
    assert all(sorted(turns) == [-1, -1, 0, 3] for turns in order.tolist())


def test_blur_is_uniform_in_sigma() -> None:
    sigma = column("blur")
    assert stats.kstest(sigma[sigma > 0], "uniform", (0.1, 1.9)).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), key=st.text(max_size=6), area=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_an_erased_box_lies_within_the_view(size: int, key: str, area: tuple[float, float]) -> None:
    spec = Augmentation(erasing=Erasing(probability=1.0, area=(min(area), max(area))))
    box = draw(spec, size=size, seed=0, epoch=0, key=key, view=0)["0/erasing"]
    assert isinstance(box, tuple)
    top, left, height, width = box
    assert box == NO_BOX or (0 < height < size and 0 < width < size)
    assert 0 <= top <= size - height
    assert 0 <= left <= size - width


def test_erased_areas_are_spread_over_their_range() -> None:
    spec = Augmentation(erasing=Erasing(probability=1.0, area=(0.02, 1 / 3)))
    boxes = np.array([drawn(i, spec, size=1000)["0/erasing"] for i in range(2000)])
    shares = boxes[:, 2] * boxes[:, 3] / 1000**2
    assert stats.kstest(shares, "uniform", (0.02, 1 / 3 - 0.02)).pvalue > 1e-4


@pytest.mark.parametrize("increasing", [False, True])
def test_arguments_are_timm_s(increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = auto_augment.rand_augment_choices("", increasing)
    assert [name.lower().removesuffix("increasing").removesuffix("rel") for name in names] == [
        operation.name.lower().replace("_", "") for operation in RandOp
    ]
    for operation, name in zip(RandOp, names, strict=True):
        to_argument = auto_augment.LEVEL_TO_ARG[name]
        for tenth in (0.0, 2.5, 5.0, 9.0, 9.77):
            for sign in (-1, 1):
                monkeypatch.setattr(auto_augment.random, "random", lambda sign=sign: 0.5 - 0.25 * sign)
                expected = to_argument(tenth, {})[0] if to_argument else 0.0
                if operation is RandOp.POSTERIZE:
                    expected = max(1, expected)
                assert operation_argument(operation, tenth / 10, sign, increasing) == pytest.approx(expected)


def test_operations_are_equally_likely_and_magnitudes_normal() -> None:
    spec = Augmentation(rand_augment=RandAugment(num_ops=3, magnitude=5, magnitude_std=0.5, probability=1.0))
    operations, arguments = column("rand_augment", 3000, spec), column("rand_augment_arguments", 3000, spec)
    assert stats.chisquare(np.bincount(operations.flatten(), minlength=15)).pvalue > 1e-4
    degrees = arguments[operations == RandOp.ROTATE]
    assert stats.kstest(abs(degrees) / 3, "norm", (5, 0.5)).pvalue > 1e-4
    assert abs((degrees > 0).mean() - 0.5) < 0.1


def mixes(spec: Mixing, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    found = [draw_mix(spec, size=100, seed=0, cursor=64 * (i // 32), pair=i % 32) for i in range(count)]
    return np.array([d["mix/lam"] for d in found]), np.array([d["mix/box"] for d in found])


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 3.0])
def test_mixup_shares_are_beta(alpha: float) -> None:
    lam, boxes = mixes(Mixing(mixup=alpha))
    assert stats.kstest(lam, "beta", (alpha, alpha)).pvalue > 1e-4
    assert not boxes.any()


def test_cutmix_boxes_have_the_area_that_the_label_says() -> None:
    lam, boxes = mixes(Mixing(cutmix=1.0))
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 100)).all()
    assert lam == pytest.approx(1 - height * width / 100**2)
    unclipped = (top > 0) & (left > 0) & (top + height < 100) & (left + width < 100)
    assert (height == width)[unclipped].all()
    centres = (top + height / 2)[height < 30]
    assert stats.kstest(centres, "uniform", (0, 100)).pvalue > 1e-6


def test_a_pair_is_mixed_one_way_or_the_other_or_not_at_all() -> None:
    lam, boxes = mixes(BOTH.model_copy(update={"probability": 0.6, "switch_probability": 0.3}))
    cut = boxes[:, 2] > 0
    assert abs((lam < 1).mean() - 0.6) < 0.04
    assert abs(cut.sum() / (lam < 1).sum() - 0.3) < 0.04


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), [9, 12])


class TestInTheLoader:
    """What comes with a sample is the same however many ranks, workers and micro-batches there are."""

    options: dict[str, Any] = {  # noqa: RUF012
        "augment": (EVERYTHING, Augmentation(grayscale=0.5)), "mixing": BOTH, "global_size": 8,
    }  # fmt: skip

    def rows(self, batches: list[Batch]) -> list[dict[str, object]]:
        return [
            {"key": key} | {name: values[row].tolist() for name, values in batch.augment.items()}
            for batch in batches
            for row, key in enumerate(batch.keys)
        ]

    def test_ranks_workers_and_micro_batches_change_nothing(self, dataset: ShardDataset) -> None:
        alone = steps(loader(dataset, **self.options), 0, 4)
        cut = steps(loader(dataset, **self.options, micro_size=2, num_workers=1), 0, 4)
        ranks = [steps(loader(dataset, **self.options, rank=rank, world_size=2), 0, 4) for rank in (0, 1)]
        for number, step in enumerate(alone):
            whole = self.rows(list(step.micro_batches))
            assert self.rows(list(cut[number].micro_batches)) == whole
            assert [row for rank in ranks for row in self.rows(list(rank[number].micro_batches))] == whole

    def test_they_are_what_is_drawn_for_the_sample(self, dataset: ShardDataset) -> None:
        """Of each view, in the epoch of the sample; a pair has one mix, which the step's cursor has a say in."""
        (step,) = steps(loader(dataset, **self.options), 24, 1)
        (batch,) = step.micro_batches
        for row, key in enumerate(batch.keys):
            expected: dict[str, Value] = {}
            for view, spec in enumerate(self.options["augment"]):
                expected |= draw(spec, size=8, seed=5, epoch=1, key=key, view=view)
            expected |= draw_mix(BOTH, size=8, seed=5, cursor=24, pair=row // 2)
            assert set(batch.augment) == set(expected)
            for name, value in expected.items():
                assert torch.equal(batch.augment[name][row], torch.tensor(value)), name

    def test_nothing_is_drawn_where_nothing_is_asked_for(self, dataset: ShardDataset) -> None:
        (step,) = steps(loader(dataset), 0, 1)
        assert step.micro_batches[0].augment == {}

    def test_pairs_are_not_cut_apart(self, dataset: ShardDataset) -> None:
        with pytest.raises(DataError, match=r"batch.micro_size: expected an even number.* found 3"):
            loader(dataset, SPEC, mixing=BOTH, global_size=6, micro_size=3)

    def test_a_stand_in_has_its_own_draws(self, tmp_path: Path) -> None:
        bad = {i: {"jpg": b"no image", "cls": b"0"} for i in range(6) if i != 4}
        dataset = write_shards(tmp_path, [6], replaced=bad)
        (step,) = steps(loader(dataset, augment=(EVERYTHING,), global_size=6), 0, 1)
        found = self.rows(list(step.micro_batches))
        assert len(found) == 6
        assert all(row == found[0] for row in found)
