"""Handwritten digits as arrays and as image folders, and encoders small enough for them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.encoder import Encoder


class Digits(NamedTuple):
    """Pixels [N, 64] in [0, 1] and labels [N]; real handwriting."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Folders(NamedTuple):
    """Image folders, a folder per class."""

    train: str
    test: str


@pytest.fixture(scope="session")
def digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    values, labels = torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels)
    test = torch.arange(len(values)) % 4 == 0
    return Digits(values[~test], labels[~test], values[test], labels[test])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """300 training and 100 test digits of 8 x 8 pixels."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for i in range(400):
        folder = root / ("test" if i % 4 == 0 else "train") / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        grey = (images[i].reshape(8, 8) / 16 * 255).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / f"{i:04d}.jpg", quality=95)
    return Folders(str(root / "train"), str(root / "test"))


@pytest.fixture(scope="session")
def cifar10(shared_data: Path) -> dict[str, list[bytes]]:
    """By class, the first 250 JPEG files of CIFAR-10's test set, which comes first in the archive."""
    found: dict[str, list[bytes]] = {}
    with tarfile.open(shared_data / "cifar10.tar.gz", "r|gz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4 or len(found.setdefault(parts[2], [])) == 250:
                continue
            file = tar.extractfile(member)
            assert file is not None
            found[parts[2]].append(file.read())
            if len(found) == 10 and min(map(len, found.values())) == 250:
                break
    return found


def small_encoder(module: nn.Module | None = None, seed: int = 0) -> Encoder:
    """A random projection of 8 x 8 pixels with what must be switched off in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        default = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
    return Encoder(
        module or default,
        Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        tag="small",
        description={"source": "a test", "kind": "test"},
    )


@pytest.fixture
def encoder() -> Encoder:
    return small_encoder()


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ViT and one pair of towers in every layout."""
    from tests.evals.layouts import write_layouts  # which imports transformers

    folder = tmp_path_factory.mktemp("layouts")
    write_layouts(folder)
    return folder
