"""What of a recipe's inputs can be looked at in a moment and without torch: model name, data, labels, evaluations.

All that is wrong is told at once; what takes longer to find out is for preflight.py.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from data_pipeline.datasets.dataset import Dataset, singles
from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import InputError, RecipeError
from data_pipeline.messages import nearest
from pretrain.models.config import Model
from pretrain.recipe.recipe import Recipe

T = TypeVar("T")

# Of timm's modules, and of our own in `pretrain.models`, those whose models can be trained (encoders.py).
_TIMM_MODULES = ("vision_transformer", "deit", "swin_transformer", "swin_transformer_v2", "resnet")
_OUR_MODULES = ("cifar_resnet",)


def refuse_wrong_inputs(recipe: Recipe) -> None:
    """Opens all data sets that a recipe names, and looks its model up.

    Raises:
        InputError: one of them is wrong; a RecipeError that lists them, where several are.
    """
    found: list[tuple[str, InputError]] = []

    def opened(name: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except InputError as error:
            found.append((name, error))
            return None

    data, open_data = recipe.data, partial(open_dataset, cache=recipe.data.cache)
    opened("", lambda: _refuse_unknown_model(recipe))
    train = opened("data.train", lambda: open_training(data.train, data.cache))
    val = opened("data.val", partial(open_data, data.val)) if data.val else None
    for name, dataset in (("data.train", train), ("data.val", val)):
        if dataset is not None and recipe.objective.kind == "supervised":
            opened(name, partial(_refuse_unlabeled, dataset, "label field `cls`", "Train an objective without labels"))
        elif dataset is not None and recipe.online_probe is not None:
            opened("", partial(_refuse_unlabeled, dataset, f"online_probe, {name}", "Leave online_probe out"))
    for i, config in enumerate(recipe.evals):
        for key in ("train", "test"):
            if (path := getattr(config, key)) is not None and path not in (data.train, data.val):
                opened(f"evals.{i}.{key}", partial(open_data, path))
    if len(found) == 1:
        raise found[0][1]
    if found:
        raise RecipeError(recipe.name, [f"{name}: {error}" if name else str(error) for name, error in found])


def _refuse_unlabeled(dataset: Dataset, where: str, instead: str) -> None:
    for part in singles(dataset):
        if part.label_counts is None and part.num_soft_classes is None:
            raise InputError(
                where=where,
                expected="a class number with every image",
                found=f"the fields {', '.join(part.fields) or '(none)'}",
                fix=f"{instead}, or convert an image folder whose folders are classes.",
            )


def _refuse_unknown_model(recipe: Recipe) -> None:
    """A name that no source of a model has; what it can be given is for encoders.py to say."""
    model = recipe.model
    if isinstance(model, Model) and (known := trainable_names()) and model.name not in known:
        raise InputError(
            where="model.name",
            expected="the name of a timm ViT, Swin or ResNet",
            found=repr(model.name),
            fix=nearest(model.name.split(".")[0], known),  # a tag of weights names none
        )


def trainable_names() -> frozenset[str]:
    """Names of timm models that can be trained, read in timm's files, as importing it takes seconds."""
    places = [(_folder("timm") / "models", _TIMM_MODULES), (Path(__file__).parent / "models", _OUR_MODULES)]
    files = [folder / f"{name}.py" for folder, names in places for name in names]
    texts = [file.read_text("utf-8") for file in files]
    return frozenset(name for text in texts for name in re.findall(r"^@register_model\b.*\n+def (\w+)\(", text, re.M))


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None  # it is required
    assert found.origin is not None
    return Path(found.origin).parent
