"""Every protocol of the table: its folder, its command, its entry in a recipe, and that both ask the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import pretrain.evals
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError, RecipeError
from data_pipeline.remote.config import CacheConfig
from data_pipeline.shards.scan import index_shards
from launch.commands.eval import app
from launch.commands.protocol_options import build_config
from pretrain.evals.config import KINDS, ProtocolConfig, config_class
from pretrain.evals.features.extract import Extraction
from pretrain.evals.protocols import build_evaluator, check_evaluations
from pretrain.recipe.files import dump
from tests.evals.conftest import Folders, small_encoder
from tests.recipe.recipes import changed, load
from tests.shards import write_shards

COMMANDS: Any = typer.main.get_command(app)
# Beside the defaults, something else for each field that a command has an option for.
CHOSEN: dict[str, list[dict[str, Any]]] = {
    "knn": [{"k": (3, 5), "temperature": (0.1, 0.2), "max_train": 7, "pooling": "cls", "blocks": 2}],
    "linear": [
        {
            "paper": "mae",
            "epochs": 20,
            "crop_scale": (0.5, 1.0),
            "seed": 3,
            "pooling": ("cls", "mean"),
            "blocks": (1, 2),
        },
        {"paper": "mae", "epochs": 10, "warmup_epochs": 1.0},
        {"solver": "lbfgs", "inverse_penalties": (0.1,), "max_test": 5},
        {"augment": True, "batch_norm": True, "learning_rates": (1e-5, 0.3), "weight_decays": (0.0, 0.1)},
    ],
    "fewshot": [{"shots": (2, 3), "seeds": 2, "classifier": "linear"}, {"fraction": (0.1, 0.5)}],
    "finetune": [{"paper": "mae", "epochs": 3.0, "overrides": ("ema=null", "seed=3"), "num_ranks": 2, "device": "cpu"}],
    "zeroshot": [{"templates": "photo", "class_names": "names.txt", "group": ("a=b.txt", "c=d.txt"), "max_test": 5}],
    "retrieval": [{"caption_field": "json", "caption_key": "texts"}, {"caption_lines": True}],
}


def entry(kind: str, **chosen: Any) -> ProtocolConfig:
    """A protocol's group, on data sets of its own."""
    config = config_class(kind)
    data = {"train": "a", "test": "b"} if config.model_fields["train"].is_required() else {"test": "b"}
    return config.model_validate({"kind": kind, **data, **chosen})


def problems(folder: Path, tree: dict[str, Any]) -> list[str]:
    """What is wrong with a recipe."""
    with pytest.raises(RecipeError) as error:
        load(folder, tree)
    return error.value.problems


def asked_by(kind: str, words: list[str]) -> ProtocolConfig:
    """What a command line asks for, read by the parser of its command."""
    params = dict(COMMANDS.commands[kind].make_context(kind, ["encoder", *words]).params)
    return build_config(config_class(kind), dict(params), params)


def test_the_table_has_every_folder_with_a_protocol() -> None:
    folder = Path(pretrain.evals.__file__).parent
    assert sorted(path.parent.name for path in folder.glob("*/protocol.py")) == sorted(KINDS)
    assert all((folder / kind / "config.py").is_file() for kind in KINDS)


def test_the_table_and_all_its_configs_load_no_torch() -> None:
    code = (
        "import sys, pretrain.evals.config as c; c.config_classes(); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_of_a_recipe_asks_the_same_as_its_command_line(kind: str) -> None:
    for chosen in ({}, *CHOSEN.get(kind, [])):
        config = entry(kind, **chosen)
        assert asked_by(kind, config.words()) == config, chosen


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_takes_every_protocol_and_comes_back_from_its_file(kind: str, tmp_path: Path) -> None:
    config = config_class(kind)
    for chosen in ({}, *CHOSEN.get(kind, [])):
        tree = entry(kind, **chosen).model_dump(mode="json", exclude_unset=True)
        if config.judges == "towers":
            (problem,) = problems(tmp_path, changed("evals", [tree]))
            assert f"expected objective.kind clip or siglip with evals.0.kind {kind}" in problem
        else:
            recipe = load(tmp_path, changed("evals", [tree]))
            assert recipe.evals == (entry(kind, **chosen),)
            assert load(tmp_path, dump(recipe)) == recipe


def test_every_field_that_decides_a_number_has_an_option() -> None:
    """But for those that no command ever had: the share kept apart, and when an entry is due."""
    for kind in KINDS:
        config = config_class(kind)
        without = {name for name in config.model_fields if name not in config.options()}
        constant = {name for name in without if config.model_fields[name].annotation is type(None)}
        assert without - constant <= {"kind", "every_epochs", "val_share"}, kind


def test_an_entry_that_trains_is_refused_beside_a_run_and_checked_apart(folders: Folders, tmp_path: Path) -> None:
    tuned = entry("finetune", train=folders.train, test=folders.test)
    knn = entry("knn", train=folders.train, test=folders.test)
    cache = CacheConfig()
    with pytest.raises(InputError, match=r"evals\.1\.kind: expected a protocol that leaves.*\n?.*evals_apart"):
        check_evaluations([knn, tuned], cache, apart=False)
    check_evaluations([knn, tuned], cache, apart=True)
    with pytest.raises(InputError, match="nowhere"):
        check_evaluations([entry("finetune", train=folders.train, test="nowhere")], cache, apart=True)


@pytest.mark.parametrize(
    ("kind", "chosen", "told"),
    [
        ("linear", {"solver": "lbfgs", "epochs": 3}, "evals.0: epochs: expected options of the chosen solver"),
        ("linear", {"warmup_epochs": 10}, "evals.0: warmup_epochs: expected less than the 10 epochs, found 10.0."),
        ("fewshot", {"shots": [2], "fraction": [0.1]}, "evals.0: fraction: expected it or shots, found both."),
        ("knn", {"k": 0}, "evals.0.k: expected at least 1 or a list, found 0."),
    ],
)
def test_wrong_entries_are_told_by_their_place(tmp_path: Path, kind: str, chosen: dict[str, Any], told: str) -> None:
    tree = changed("evals", [{"kind": kind, "train": "a", "test": "b", **chosen}])
    (problem,) = problems(tmp_path, tree)
    assert problem.startswith(told)


def test_older_entries_are_what_they_were(tmp_path: Path) -> None:
    given = {"kind": "knn", "train": "a", "test": "b", "every_epochs": 2, "k": 5, "temperature": 0.1, "max_test": 9}
    (config,) = load(tmp_path, changed("evals", [given])).evals
    assert config.model_dump(include=given.keys()) == given


def test_samples_of_one_key_are_told_before_any_feature_is_computed(tmp_path: Path) -> None:
    """In an older manifest, which took keys as they are; a new one makes them unique by their shard."""
    write_shards(tmp_path / "test", 6, per_shard=6)
    shutil.copy(tmp_path / "test" / "shard-000000.tar", tmp_path / "test" / "shard-000001.tar")
    (tmp_path / "test" / "manifest.json").unlink()
    write_shards(tmp_path / "train", 6)
    knn = config_class("knn").model_validate(
        {"kind": "knn", "train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "k": 3}
    )
    manifest = index_shards(str(tmp_path / "test"), classes=["class0", "class1", "class2"])
    report = build_evaluator(knn, Extraction(), open_dataset).run(small_encoder())
    assert report.n == 12
    assert report.outcomes.keys[0] == "shard-000000.tar/000000"
    replace(manifest, keys=None).save()
    with pytest.raises(InputError, match=r"found the key 000000 in shard-000000\.tar and again in shard-000001\.tar"):
        check_evaluations([knn], CacheConfig(), apart=False)
    first = knn.model_copy(update={"max_test": 6})
    check_evaluations([first], CacheConfig(), apart=False)
