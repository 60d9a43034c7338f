"""Recipes: YAML in; a typed recipe out, or every problem at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import RecipeError
from pretrain.evals.config import KINDS as PROTOCOLS
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.recipe import Captions, Recipe, Source
from pretrain.recipe.resolve import identity
from pretrain.recipe.strict_yaml import write_yaml
from tests.recipe.recipes import (
    KINDS,
    OPTIMIZERS,
    SMALL,
    all_paths,
    bounded,
    changed,
    listed,
    load,
    scalars,
    trees,
    words,
    write,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def problems(folder: Path, tree: Any, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, tree, overrides)
    assert caught.value.exit_status == 2
    return caught.value.problems


@given(trees)
@bounded
def test_a_dumped_recipe_loads_to_an_equal_one(tmp_path: Path, tree: dict[str, Any]) -> None:
    recipe = load(tmp_path, write_yaml(tree))
    assert load(tmp_path, dump(recipe)) == recipe


def test_maps_merge_with_the_parent_and_lists_replace(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path, {**SMALL, "extends": "oldest.yaml"}, "base/parent.yaml")
    write(tmp_path, {"seed": 5, "data": {"val": "other", "train": "never"}}, "base/oldest.yaml")
    child = {
        "extends": "base/parent.yaml",
        "optim": {"weight_decay": 0.3},
        "evals": [],
        "data": {"views": {"scale": [0.5, 1.0]}},
    }
    recipe = load(tmp_path, child)
    assert recipe.optim.base_lr == SMALL["optim"]["base_lr"]
    assert recipe.optim.weight_decay == 0.3
    assert recipe.evals == ()
    assert (recipe.seed, recipe.data.train, recipe.data.val) == (5, "shards", "other")
    assert recipe.data.views.scale == (0.5, 1.0)


def test_parents_that_do_not_end_or_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"(?s)gone\.yaml.*No such file"):
        load(tmp_path, {"extends": "gone.yaml"})
    assert problems(tmp_path, {"extends": ["a.yaml"]}) == [
        "extends: expected the path of one parent, found ['a.yaml']."
    ]


def test_a_duplicate_key_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    parent = write(tmp_path, "seed: 1\nseed: 2\n", "parent.yaml")
    (problem,) = problems(tmp_path, {**SMALL, "extends": "parent.yaml"})
    assert problem.startswith(f"{parent}, line 2: ")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optim.base_lr", "3e-4", 3e-4),
        ("seed", "7", 7),
        ("data.views.scale", "[0.1, 0.9]", [0.1, 0.9]),
        ("evals.0.k", "5", 5),
        ("data.val", "null", None),
        ("model.options.depth", "2", 2),
        ("objective", "{kind: supervised, num_classes: 3}", {"kind": "supervised", "num_classes": 3}),
        ("data.train", "a=b", "a=b"),
    ],
)
def test_an_override_does_what_editing_the_file_does(tmp_path: Path, path: str, text: str, value: Any) -> None:
    assert load(tmp_path, SMALL, [f"{path}={text}"]) == load(tmp_path, changed(path, value))
    assert load(tmp_path, SMALL) != load(tmp_path, changed(path, value)) or path == "data.val"


def test_the_last_of_two_overrides_holds(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "KEY.KEY=VALUE"),
        ("=3", "KEY.KEY=VALUE"),
        ("optim..x=3", "KEY.KEY=VALUE"),
        ("name.x=3", "found a single value"),
        ("evals.4.k=3", "found a list of 1"),
        ("seed=[", "flow node"),
        ("data={train: a, train: b}", "'train' again"),
        ("optim.lr=3", "Did you mean optim.base_lr?"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, SMALL, [override]))


def test_all_problems_are_told_at_once_each_with_its_path(tmp_path: Path) -> None:
    text = """
        name: x
        name: y
        data: {train: d, views: {scale: [0.9, 0.1], flip: 2}, std: [0, 1, 1]}
        model: {name: vit, image_size: "224", options: {embed_dim: {a: 1}}}
        objective: {kind: mae, mask_ratoi: 0.6, num_classes: 3}
        optim: {lr: 3e-4, weight_decay: true, betas: [0.9, 0.9, 0.9]}
        schedule: {epochs: 3, steps: 4}
        batch:
        evals: [{kind: knn, train: a, test: b, every_epoch: 3}]
        engine: {zero_stage: 4}
        epochs: 7
    """
    assert problems(tmp_path, text) == [
        "line 3: expected each key once, found 'name' again (first on line 2). Remove one of them.",
        "data.views.scale: expected [smallest, largest], found [0.9, 0.1].",
        "data.views.flip: expected at most 1, found 2.",
        "data.std.0: expected more than 0, found 0.",
        "model.image_size: expected a whole number, found '224'.",
        "model.options.embed_dim: expected a whole number or a number or true or false or text or a list, "
        "found {a: 1}.",
        "objective.mask_ratoi: unknown key. Did you mean objective.mask_ratio?",
        "objective.num_classes: unknown key. Known here: kind, mask_ratio, decoder_width, decoder_depth, "
        "decoder_heads, normalize_target.",
        "optim.base_lr: expected a value, found nothing.",
        "optim.betas: expected a list of 2, found [0.9, 0.9, 0.9].",
        "optim.weight_decay: expected a number, found true.",
        "optim.lr: unknown key. Did you mean optim.base_lr?",
        "schedule: expected exactly one of epochs, steps, samples, found epochs and steps. "
        "Set those you do not want to null.",
        "batch: expected a map, found null.",
        "engine.zero_stage: expected 0, 1, 2 or 3, found 4.",
        "evals.0.every_epoch: unknown key. Did you mean evals.0.every_epochs?",
        "epochs: unknown key. Did you mean schedule.epochs?",
    ]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("objective", {}, f"objective.kind: expected one of {KINDS}, found nothing."),
        ("objective.kind", "mea", f"objective.kind: expected one of {KINDS}, found 'mea'."),
        ("objective", "mae", "objective: expected a map, found 'mae'."),
        ("model.library", "tmim", "model.library: expected one of 'timm', 'open_clip', found 'tmim'."),
        (
            "evals.0.kind",
            "probe",
            f"evals.0.kind: expected one of {', '.join(map(repr, PROTOCOLS))}, found 'probe'.",
        ),
        (
            "model.patch_size",
            7,
            "model: expected an image_size that patch_size 7 divides, found 32. Nearest: 35 or 28.",
        ),
        (
            "objective.decoder_heads",
            7,
            "objective: expected a decoder_width that decoder_heads 7 divides, found 512.",
        ),
        ("schedule", {}, "schedule: expected exactly one of epochs, steps, samples, found none."),
        ("optim.kind", "adam", f"optim.kind: expected one of {OPTIMIZERS}, found 'adam'."),
        ("optim", [], "optim: expected a map, found []."),
        ("schedule.kind", "step", "schedule.milestones: expected a value, found nothing."),
        ("optim.eps", math.inf, "optim.eps: expected a finite number, found .inf."),
        ("seed", -1, "seed: expected at least 0, found -1."),
        (
            "name",
            "../x",
            "name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, found '../x'.",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(tmp_path: Path, path: str, value: Any, problem: str) -> None:
    assert problems(tmp_path, write_yaml(changed(path, value))) == [problem]


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_optimizers_that_take_norms_of_parameters_are_refused_where_there_are_only_pieces(
    tmp_path: Path, kind: str
) -> None:
    tree = changed("optim.kind", kind)
    (problem,) = problems(tmp_path, tree)
    assert "expected engine.zero_stage 0" in problem
    assert "norm of each whole parameter" in problem
    assert load(tmp_path, changed("engine.zero_stage", 0, tree)).optim.kind == kind


@pytest.mark.parametrize("path", dict.fromkeys(p for p in all_paths(Recipe) if len(p.split(".")[-1]) > 4))
def test_a_slip_in_any_key_names_the_right_one(tmp_path: Path, path: str) -> None:
    """Two letters swapped, at every place of the recipe that a key can stand."""
    path, tree = listed(path)
    *parents, key = path.split(".")
    slip = key[:2] + key[3] + key[2] + key[4:] if key[2] != key[3] else key + "s"
    misspelt = ".".join([*parents, slip])
    said = f"{misspelt}: unknown key. Did you mean {'.'.join([*parents, key])}?"
    assert said in problems(tmp_path, changed(misspelt, 1, tree))


@given(st.data())
@bounded
def test_whatever_stands_in_a_recipe_the_answer_is_a_recipe_or_its_problems(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([*all_paths(Recipe), "x", "data.x", "model.options.x"]))
    value = data.draw(
        st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=4)
    )
    path, tree = listed(path)
    found: list[str] | None = None
    try:
        load(tmp_path, write_yaml(changed(path, value, tree)))
    except RecipeError as error:
        found = error.problems
    if found is not None:
        assert found
        assert all(problem.startswith(path.split(".")[0]) for problem in found), found


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    assert problems(tmp_path, "[1, 2]") == ["expected a map of groups, found list."]
    assert problems(tmp_path, "") == ["expected a map of groups, found NoneType."]
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_ours_loads_and_opens_with_what_to_expect(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    opening = [line.split()[1] for line in path.read_text().splitlines()[:8] if re.match(r"# \w+:", line)]
    assert opening == ["Paper:", "Expected:", "Cost:", "Command:"]
    assert str(path.relative_to(CONFIGS.parent)) in path.read_text()


def test_training_data_are_one_path_or_several_with_weights(tmp_path: Path) -> None:
    several = load(tmp_path, changed("data.train", [{"path": "a", "weight": 3}, {"path": "b"}]))
    assert several.data.train == (Source(path="a", weight=3), Source(path="b", weight=1))
    assert load(tmp_path, dump(several)) == several
    assert load(tmp_path, SMALL, ["data.train=[{path: a, weight: 3}, {path: b}]"]) == several
    assert identity(several) == identity(load(tmp_path, SMALL))  # which data they are, the fingerprint says


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "data.train: expected"),
        ([{"path": "a", "weight": 0}], "data.train.0.weight: expected more than 0, found 0."),
        ([{"path": "a", "weigth": 2}], "data.train.0.weigth: unknown key. Did you mean data.train.0.weight?"),
        ([{"weight": 2}], "data.train.0.path: expected a value, found nothing."),
        ({"path": "a"}, "data.train: expected text or a list, found {path: a}."),
        (["a", "b"], "data.train.0: expected a map, found 'a'."),
    ],
)
def test_wrong_training_data_are_told(tmp_path: Path, value: Any, said: str) -> None:
    assert any(said in problem for problem in problems(tmp_path, changed("data.train", value)))


def test_captions_are_lines_or_an_entry_not_both(tmp_path: Path) -> None:
    changed_captions = changed("data.captions", {"field": "json", "key": "texts"})
    assert load(tmp_path, changed_captions).data.captions == Captions(field="json", key="texts")
    wrong = changed("data.captions", {"key": "texts", "lines": True})
    assert problems(tmp_path, wrong) == [
        "data.captions: expected key (of a JSON member) or lines (of a text member), found both."
    ]


@pytest.mark.parametrize(
    ("further", "problem"),
    [
        ({"target_threshold": 0.2}, "objective: expected loss bce with target_threshold, found ce."),
        ({"over_classes": "sum"}, "objective: expected loss bce with over_classes sum, found ce."),
        (
            {"loss": "bce", "target_threshold": 0.95, "label_smoothing": 0.1},
            "objective: expected a target_threshold that tells the label of an image from its other classes, in "
            "[0.01, 0.91) with label_smoothing 0.1, found 0.95.",
        ),
    ],
)
def test_binary_targets_must_mean_something(tmp_path: Path, further: dict[str, Any], problem: str) -> None:
    tree = changed("objective", {"kind": "supervised", "num_classes": 10, **further})
    assert problems(tmp_path, tree) == [problem]


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        ("mae", "lr", "optim.base_lr"),  # not objective.fixed_predictor_lr, which is SimSiam's
        ("simsiam", "fixed_predictor", "objective.fixed_predictor_lr"),
        ("mae", "temperature", None),  # SimCLR's
        ("mae", "cosine", None),
    ],
)
def test_a_key_of_another_kind_is_never_suggested(tmp_path: Path, kind: str, key: str, meant: str | None) -> None:
    tree = {**SMALL, "objective": {"kind": kind}, "evals": [], key: 1}
    with pytest.raises(RecipeError) as error:
        load(tmp_path, tree)
    (problem,) = error.value.problems
    assert problem.startswith(f"{key}: unknown key. {f'Did you mean {meant}?' if meant else 'Known here: '}")
