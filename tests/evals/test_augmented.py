"""Through the encoder: the loader's own views, every sample once an epoch, the same for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.views import training_view
from pretrain.evals.classifiers.augmented import augmented_examples, augmented_views
from pretrain.evals.classifiers.heads import Rates, Training, train
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.protocol import Linear
from pretrain.runtime.collectives import World
from tests.evals.conftest import Folders, small_encoder
from tests.ranks import run_ranks

CROP = (0.3, 1.0)
Batches = list[tuple[Tensor, Tensor]]


def first_batches(encoder: Encoder, folder: str, count: int, size: int, extraction: Extraction) -> Batches:
    """Features [size, D] and labels [size] of each of the first batches."""
    examples = augmented_examples(
        encoder,
        open_dataset(folder),
        extraction,
        augmented_views(encoder, CROP),
        num_classes=10,
        batch_size=size,
        seed=3,
    )
    return [(values[0], labels) for values, labels in (next(examples) for _ in range(count))]


def by_row(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both in an order that is the features' own: they stay beside each other."""
    order = torch.from_numpy(np.lexsort(values.round(decimals=3).numpy().T))
    return values[order], labels[order]


def sorted_rows(values: Tensor) -> Tensor:
    return by_row(values, values)[0]


def test_views_are_those_of_the_training_loader(folders: Folders) -> None:
    """An encoder that does nothing gives the pixels back: each sample's own crop of each epoch."""
    encoder = small_encoder(nn.Sequential(nn.Flatten(), nn.Linear(192, 192)))
    linear: Any = encoder.module[1]  # type: ignore[index]
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    dataset = open_dataset(folders.train)
    found = first_batches(encoder, folders.train, 2, dataset.num_samples, Extraction())
    for epoch, (values, labels) in enumerate(found):
        views = []
        for i in range(dataset.num_samples):
            sample = dataset.read(i)
            image = decode_image(sample.fields["jpg"], max_pixels=10_000, where="")
            spec = augmented_views(encoder, CROP)
            views.append(training_view(image, 8, spec, seed=3, epoch=epoch, key=sample.key, view=0).flatten())
        expected = (torch.stack(views).float() / 255 - 0.5) / 0.5
        torch.testing.assert_close(sorted_rows(values), sorted_rows(expected), rtol=1e-4, atol=1e-4)
        assert dataset.label_counts is not None
        assert labels.bincount().tolist() == dataset.label_counts.tolist()


def test_batches_do_not_depend_on_the_size_of_a_forward_pass(folders: Folders) -> None:
    encoder = small_encoder()
    whole, cut = (
        first_batches(encoder, folders.train, 3, 60, Extraction(batch_size=size, num_workers=workers))
        for size, workers in ((256, 0), (7, 1))
    )
    for (values, labels), (others, other_labels) in zip(whole, cut, strict=True):
        (values, labels), (others, other_labels) = by_row(values, labels), by_row(others, other_labels)
        torch.testing.assert_close(values, others)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(whole[0][1], whole[1][1])


def on_a_rank(world: World, folder: str) -> tuple[Batches, Tensor]:
    """The first batches, and what is trained on them."""
    encoder = small_encoder()
    extraction = Extraction(batch_size=16, rank=world.rank, world_size=world.size)
    found = first_batches(encoder, folder, 3, 60, extraction)
    examples = iter([((values,), labels) for values, labels in found])
    (probes,) = train(
        examples,
        [(torch.zeros(32), torch.ones(32))],
        [Rates(0.5, 0.0), Rates(5.0, 0.0)],
        Training(num_steps=3, batch_size=60, seed=0, optimizer="lars", batch_norm=True),
        num_classes=10,
        device=torch.device("cpu"),
        label="",
    )
    return found, probes.weight


def test_two_ranks_train_what_one_trains(folders: Folders) -> None:
    alone, weight = on_a_rank(World(), folders.train)
    for found, of_rank in run_ranks(on_a_rank, 2, folders.train):
        for (values, labels), (expected, expected_labels) in zip(found, alone, strict=True):
            (values, labels), (wanted, wanted_labels) = by_row(values, labels), by_row(expected, expected_labels)
            torch.testing.assert_close(values, wanted)
            assert torch.equal(labels, wanted_labels)
        torch.testing.assert_close(of_rank, weight)


def test_a_batch_that_ranks_cannot_share_is_refused(folders: Folders) -> None:
    with pytest.raises(InputError, match="multiple of the 7 ranks"):
        first_batches(small_encoder(), folders.train, 1, 60, Extraction(world_size=7))


def test_a_grid_on_augmented_views_is_chosen_on_samples_as_they_are(folders: Folders) -> None:
    encoder = small_encoder()
    encoder.module.train()
    config = LinearConfig(
        train="", test="", augment=True, min_steps=60, batch_size=64, learning_rates=(1e-4, 0.1), crop_scale=(0.5, 1.0)
    )
    state = torch.get_rng_state()
    report = Linear(open_dataset(folders.train), open_dataset(folders.test), config).run(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in encoder.module.modules())
    assert report.value > 50
    assert report.protocol["learning_rate"] == 0.1
    assert report.protocol["chosen_on"] == "30 random training samples, fitted on the other 270"
    augmentation: Any = report.protocol["augmentation"]
    assert augmentation["random_resized_crop"]["scale"] == [0.5, 1.0]


def test_the_preset_of_mae_is_what_the_paper_says_and_learns(folders: Folders) -> None:
    mae = LinearConfig(train="", test="", paper="mae")
    assert (mae.learning_rates, mae.batch_size, mae.epochs, mae.warmup_epochs) == ((0.1,), 16384, 90, 10)
    assert mae.training(1_281_167).num_steps == 7038
    assert mae.training(1_281_167).warmup_steps == 782
    # Few steps on few digits: a learning rate to go with them.
    config = LinearConfig(
        train="",
        test="",
        paper="mae",
        epochs=20,
        warmup_epochs=2,
        batch_size=50,
        learning_rates=(30.0,),
        crop_scale=(0.7, 1.0),
    )
    report = Linear(open_dataset(folders.train), open_dataset(folders.test), config).run(small_encoder())
    assert report.value > 40
    assert report.protocol["paper"] == "mae"
    assert str(report.protocol["optimizer"]).startswith("LARS, momentum 0.9, trust coefficient 0.001, linear warmup")
    assert str(report.protocol["standardised"]).startswith("by batch norm without affine")
    assert (report.protocol["num_steps"], report.protocol["warmup_steps"]) == (120, 12)
