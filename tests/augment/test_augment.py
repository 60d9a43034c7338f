"""From the loader's batch to the objective's: normalised as torchvision does, and augmented as the host drew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from data_pipeline.batch import Batch
from data_pipeline.loader import evaluation_batches
from data_pipeline.samples.config import Augmentation, Blur, Erasing, Jitter, Mixing, RandAugment
from data_pipeline.samples.draws import Value, draw, draw_mix
from pretrain.augment import augment
from pretrain.augment.augment import normalize, prepare
from tests.data_pipeline.tiny import SPEC, evaluated, loader, steps, write_shards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
EVERYTHING = Augmentation(
    rand_augment=RandAugment(),
    jitter=Jitter(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
    grayscale=0.2,
    blur=Blur(probability=0.5),
    solarize=0.2,
    erasing=Erasing(probability=0.5),
)


def make_batch() -> Batch:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    noise = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    return Batch(("a", "b"), (every_value, noise), labels=torch.tensor([1, 0]), masks=torch.ones(2, 4).bool())


def drawn_batch(count: int, size: int, *specs: Augmentation, mix: Mixing | None = None, seed: int = 0) -> Batch:
    """What the loader would hand out for `count` images of noise."""
    rows: list[dict[str, Value]] = []
    for i in range(count):
        row: dict[str, Value] = {}
        for view, spec in enumerate(specs):
            row |= draw(spec, size=size, seed=seed, epoch=0, key=str(i), view=view)
        if mix is not None:
            row |= draw_mix(mix, size=size, seed=seed, cursor=0, pair=i // 2)
        rows.append(row)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(
        tuple(map(str, range(count))),
        (pixels,) * len(specs),
        labels=torch.arange(count) % 3,
        augment={name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    values["keys"] = batch.keys[start:stop]
    values["views"] = tuple(view[start:stop] for view in batch.views)
    values["labels"] = None if batch.labels is None else batch.labels[start:stop]
    values["augment"] = {name: value[start:stop] for name, value in batch.augment.items()}
    return Batch(**values)


@pytest.mark.parametrize("function", [normalize, lambda batch, mean, std: prepare(batch, CPU, mean, std)])
def test_a_batch_without_draws_is_torchvision_s_normalisation(function: Callable[..., Batch]) -> None:
    batch = make_batch()
    before = tuple(view.clone() for view in batch.views)
    views = function(batch, MEAN, STD).views
    assert len(views) == 2
    for view, original, was in zip(views, batch.views, before, strict=True):
        expected = reference.normalize(reference.to_dtype(original, torch.float32, scale=True), list(MEAN), list(STD))
        assert view.dtype == torch.float32
        torch.testing.assert_close(view, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(original, was)


def test_nothing_but_the_views_changes() -> None:
    batch = make_batch()
    assert replace(normalize(batch, MEAN, STD), views=batch.views) == batch


def test_normalising_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8, found torch\.float32"):
        normalize(normalize(make_batch(), MEAN, STD), MEAN, STD)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 6),
    at=st.integers(0, 6),
    size=st.integers(2, 40),
    seed=st.integers(0, 10**6),
)
def test_cutting_a_batch_changes_no_bit(pairs: int, at: int, size: int, seed: int) -> None:
    """At a pair, with everything on, in both views: neither micro-batches nor ranks change a pixel."""
    whole = drawn_batch(2 * pairs, size, EVERYTHING, EVERYTHING, mix=Mixing(mixup=0.8, cutmix=1.0), seed=seed)
    parts = [cut(whole, 0, 2 * min(at, pairs)), cut(whole, 2 * min(at, pairs), 2 * pairs)]
    together = prepare(whole, CPU, MEAN, STD, 3)
    apart = [prepare(part, CPU, MEAN, STD, 3) for part in parts if len(part)]
    for number, view in enumerate(together.views):
        assert torch.equal(view, torch.cat([part.views[number] for part in apart]))
    assert together.labels is not None
    assert torch.equal(together.labels, torch.cat([part.labels for part in apart if part.labels is not None]))


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({"rand_augment": RandAugment()}, lambda d: (d["0/rand_augment"] >= 0).any(1)),
        (
            {"jitter": Jitter(probability=0.5, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)},
            lambda d: d["0/jitter_order"][:, 0] >= 0,
        ),
        ({"grayscale": 0.5}, lambda d: d["0/grayscale"]),
        ({"blur": Blur(probability=0.5, sigma=(0.5, 2.0))}, lambda d: d["0/blur"] > 0),
        ({"solarize": 0.5}, lambda d: d["0/solarize"]),
        ({"erasing": Erasing(probability=0.5)}, lambda d: d["0/erasing"][:, 2] > 0),
        ({"erasing": Erasing(probability=0.5, mode="const")}, lambda d: d["0/erasing"][:, 2] > 0),
    ],
    ids=["rand_augment", "jitter", "grayscale", "blur", "solarize", "erasing pixel", "erasing const"],
)
def test_each_operation_changes_the_images_it_was_drawn_for_and_no_other(
    change: dict[str, Any], chosen: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    batch = drawn_batch(24, 20, Augmentation(**change))
    before = batch.views[0].clone()
    plain = normalize(replace(batch, augment={}), MEAN, STD).views[0]
    found = prepare(batch, CPU, MEAN, STD)
    same = (found.views[0] == plain).flatten(1).all(1)
    expected = chosen(batch.augment)
    assert 0 < expected.sum() < 24
    if "rand_augment" in change:  # equalize, for one, may change nothing
        assert same[~expected].all()
        assert (~same).sum() > expected.sum() / 2
    else:
        assert torch.equal(~same, expected)
    assert torch.equal(batch.views[0], before)
    assert found.augment == {}
    assert found.labels is batch.labels


def test_each_view_has_its_own_draws() -> None:
    batch = drawn_batch(4, 8, Augmentation(solarize=1.0), Augmentation(grayscale=1.0))
    plain = normalize(replace(batch, augment={}), (0, 0, 0), (1, 1, 1)).views
    found = prepare(batch, CPU, (0, 0, 0), (1, 1, 1)).views
    assert torch.equal(found[0], reference.solarize(plain[0], 0.5))
    torch.testing.assert_close(found[1], reference.rgb_to_grayscale(plain[1], 3))


def test_operations_come_in_byol_s_order() -> None:
    """The chain put together by hand from torchvision, for one image that has all of it."""
    spec = Augmentation(
        jitter=Jitter(probability=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        grayscale=0.5,
        blur=Blur(probability=1.0, sigma=(1.0, 2.0)),
        solarize=1.0,
    )
    batch = drawn_batch(8, 50, spec)
    found = prepare(batch, CPU, MEAN, STD).views[0]
    adjust = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    drawn = batch.augment
    for row in range(8):
        image = reference.to_dtype(batch.views[0][row], torch.float32, scale=True)
        for turn in drawn["0/jitter_order"][row].tolist():
            image = adjust[turn](image, float(drawn["0/jitter"][row, turn]))
        if drawn["0/grayscale"][row]:
            image = reference.rgb_to_grayscale(image, 3)
        image = reference.gaussian_blur(image, [5, 5], [float(drawn["0/blur"][row])] * 2)
        near_threshold = (image - 0.5).abs() < 1e-4
        image = reference.normalize(reference.solarize(image, 0.5), list(MEAN), list(STD))
        assert ((found[row] - image).abs()[~near_threshold] < 2e-4).all()
    assert 0 < drawn["0/grayscale"].sum() < 8


def test_autocast_leaves_it_in_fp32() -> None:
    batch = drawn_batch(8, 32, EVERYTHING, mix=Mixing(mixup=0.8, cutmix=1.0))
    expected = prepare(batch, CPU, MEAN, STD, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = prepare(batch, CPU, MEAN, STD, 3)
    assert found.views[0].dtype == torch.float32
    assert torch.equal(found.views[0], expected.views[0])


def test_the_generators_of_the_training_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    prepare(drawn_batch(8, 32, EVERYTHING, mix=Mixing(mixup=0.8, cutmix=1.0)), CPU, MEAN, STD, 3)
    assert torch.equal(torch.rand(4), expected)


def test_neither_do_blocks_ranks_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shards to pixels: the step of one rank in one go, and of two ranks in micro-batches, image by image."""
    dataset = write_shards(tmp_path, [12])
    options: dict[str, Any] = {"augment": (EVERYTHING,) * 2, "mixing": Mixing(mixup=0.8, cutmix=1.0), "global_size": 12}
    (whole,) = steps(loader(dataset, **options), 0, 1)
    expected = prepare(whole.micro_batches[0], CPU, MEAN, STD, 3)
    monkeypatch.setattr(augment, "_PIXELS_IN_CACHE", 1)
    found: list[Batch] = []
    for rank in (0, 1):
        (step,) = steps(loader(dataset, **options, rank=rank, world_size=2, micro_size=2, num_workers=1), 0, 1)
        found += [prepare(batch, CPU, MEAN, STD, 3) for batch in step.micro_batches]
    assert len(found) == 6
    for number, view in enumerate(expected.views):
        assert torch.equal(view, torch.cat([batch.views[number] for batch in found]))
    assert expected.labels is not None
    assert torch.equal(expected.labels, torch.cat([batch.labels for batch in found if batch.labels is not None]))


def test_what_is_for_evaluation_has_no_draws_and_plain_labels(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [5])
    for batch in evaluation_batches(dataset, SPEC, evaluated(SPEC.image_size), batch_size=2, max_pixels=10**6):
        assert batch.augment == {}
        assert batch.labels is not None
        prepared = prepare(batch, CPU, MEAN, STD, 3)
        assert torch.equal(prepared.labels, batch.labels)  # type: ignore[arg-type]
        assert torch.equal(prepared.views[0], normalize(batch, MEAN, STD).views[0])
