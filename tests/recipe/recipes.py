"""A small recipe, ways to vary it, and strategies over whole recipes, for tests."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pretrain.evals import config as protocols
from pretrain.objectives.config import KINDS as OBJECTIVES
from pretrain.objectives.config import config_class
from pretrain.optim.config import KINDS as OPTIMS
from pretrain.optim.config import config_class as optim_class
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schema import groups_in

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"train": "shards"},
    "model": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 4},
    "objective": {"kind": "mae"},
    "optim": {"base_lr": 1.5e-4},
    "schedule": {"epochs": 3},
    "batch": {"global_size": 256},
    "evals": [{"kind": "knn", "train": "a", "test": "b"}],
}

bounded = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def write(folder: Path, tree: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), "utf-8")
    return path


def load(folder: Path, tree: Any, overrides: list[str] | None = None) -> Recipe:
    return load_recipe(write(folder, tree), overrides)


def changed(path: str, value: Any, tree: dict[str, Any] = SMALL) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return tree


def listed(path: str, tree: dict[str, Any] = SMALL) -> tuple[str, dict[str, Any]]:
    """A path of the recipe's classes as one into the first entry of its lists, and the tree with such entries.

    The objective, optimizer, schedule or protocol is one that has the key; a sum has one term, whose objective is.
    """
    if path.startswith("data.train."):
        tree = changed("data.train", [{"path": "shards"}], tree)
    if path.startswith("data.augment."):
        tree = changed("data.augment", [{}], tree)
    if path.startswith("model.") and path.split(".")[1] in {
        "context_length",
        "vocab_size",
        "embed_dim",
        "image",
        "text",
    }:
        tree = changed("model", {"library": "open_clip"}, tree)
    if path.startswith("objective."):
        *groups, key = path.split(".")
        objective = {"kind": _kind_with("terms" if "terms" in groups else path.split(".")[1])}
        if "terms" in groups:
            objective["terms"] = [{"objective": {"kind": _kind_with(key)}}] if groups[-1] == "objective" else [{}]
        tree = changed("objective", objective, tree)
    if path.startswith("optim."):
        tree = changed("optim.kind", next(k for k in OPTIMS if path[6:] in optim_class(k).model_fields), tree)
    if path in ("schedule.milestones", "schedule.gamma"):
        tree = changed("schedule.kind", "step", tree)
    if path.startswith("evals."):
        evaluation = {"kind": _evaluation_with(path.split(".")[1]), "train": "a", "test": "b"}
        tree = changed("evals", [evaluation], tree)
    for key in ("evals.", "data.train.", "data.augment.", "objective.terms."):
        path = path.replace(key, f"{key}0.")
    return path, tree


def _kind_with(key: str) -> str:
    return next(kind for kind in OBJECTIVES if key in config_class(kind).model_fields)


def _evaluation_with(key: str) -> str:
    return next(kind for kind in protocols.KINDS if key in protocols.config_class(kind).model_fields)


KINDS = ", ".join(map(repr, OBJECTIVES))
OPTIMIZERS = ", ".join(map(repr, OPTIMS))
shares = st.floats(0.001, 1)
sizes = st.integers(1, 10**6)
numberlike = [
    "3e-4",
    "1e5",
    "1_000",
    "010",
    "1:30",
    ".5",
    "no",
    "true",
    "null",
    "~",
    "",
    "<<",
    "=",
    "2026-01-01",
]
words = st.sampled_from(numberlike) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), words)
intervals = st.tuples(shares, shares).map(lambda pair: sorted(pair))
_single = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("supervised"), "num_classes": st.integers(2, 999)},
        optional={"label_smoothing": st.floats(0, 0.99)},
    ),
    st.fixed_dictionaries(
        {"kind": st.just("mae")},
        optional={"mask_ratio": st.floats(0.01, 0.99), "normalize_target": st.booleans()},
    ),
    st.fixed_dictionaries(
        {"kind": st.just("byol")}, optional={"base_decay": st.floats(0, 0.999), "out_width": st.integers(1, 512)}
    ),
    st.fixed_dictionaries({"kind": st.just("simsiam")}, optional={"fixed_predictor_lr": st.booleans()}),
    st.fixed_dictionaries({"kind": st.just("simmim")}, optional={"mask_patch": st.integers(1, 64)}),
)
_sums = st.lists(_single, min_size=2, max_size=3, unique_by=lambda objective: objective["kind"]).flatmap(
    lambda terms: st.fixed_dictionaries(
        {
            "kind": st.just("sum"),
            "terms": st.just([{"weight": 0.5, "objective": terms[0]}, *({"objective": t} for t in terms[1:])]),
        }
    )
)
objectives = _single | _sums
optimizers = st.sampled_from([{}, {"kind": "adamw"}, {"kind": "sgd", "momentum": 0.5}]).flatmap(
    lambda given: st.fixed_dictionaries(
        {**{key: st.just(value) for key, value in given.items()}, "base_lr": st.floats(1e-12, 1e3)},
        optional={"layer_decay": shares},
    )
)
schedule_kinds = [{}, {"kind": "cosine"}, {"kind": "constant"}, {"kind": "step", "milestones": [0.9, 0.95]}]
trees = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "data": st.fixed_dictionaries(
            {"train": words},
            optional={
                "val": st.none() | words,
                "views": st.fixed_dictionaries({}, optional={"scale": intervals, "flip": st.floats(0, 1)}),
            },
        ),
        "model": st.fixed_dictionaries(
            {"name": words},
            optional={
                "options": st.dictionaries(words, st.one_of(scalars.filter(lambda v: v not in (math.inf, -math.inf))))
            },
        ),
        "objective": objectives,
        "optim": optimizers,
        "schedule": st.tuples(st.sampled_from(["epochs", "steps", "samples"]), st.sampled_from(schedule_kinds)).flatmap(
            lambda of: st.fixed_dictionaries(
                {of[0]: sizes, **{key: st.just(value) for key, value in of[1].items()}},
                optional={"warmup": st.floats(0, 0.89)},
            )
        ),
        "batch": st.fixed_dictionaries({"global_size": sizes}, optional={"micro_size": st.none() | sizes}),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "evals": st.lists(st.fixed_dictionaries({"kind": st.just("knn"), "train": words, "test": words}), max_size=2),
        "checkpoint": st.fixed_dictionaries({}, optional={"every_minutes": st.none() | st.floats(0.1, 99)}),
    },
)


def all_paths(group: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a group and of the groups within it, of all kinds, by dotted path."""
    for name, field in group.model_fields.items():
        yield prefix + name
        for inner in groups_in(field.annotation):
            yield from all_paths(inner, f"{prefix}{name}.")
