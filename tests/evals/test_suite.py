"""The file of a suite: what it asks for, and what is told of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RecipeError
from pretrain.evals.suite import dump_suite, load_suite
from pretrain.recipe.strict_yaml import write_yaml

SUITE: dict[str, Any] = {
    "name": "small",
    "encoders": {
        "mae": "runs/mae",
        "random": {"source": "runs/mae", "random_init": True, "seed": 1},
        "clip": "runs/clip",
    },
    "datasets": {"a": {"train": "a/train", "test": "a/test"}, "b": {"test": "b/test"}},
    "protocols": {
        "knn": {"kind": "knn", "k": [20, 200], "datasets": ["a"]},
        "zeroshot": {"kind": "zeroshot", "encoders": ["clip"]},
    },
}


def load(tmp_path: Path, tree: dict[str, Any]) -> Any:
    path = tmp_path / "suite.yaml"
    path.write_text(write_yaml(tree))
    return load_suite(path)


def test_each_protocol_is_for_the_encoders_and_data_sets_it_names(tmp_path: Path) -> None:
    suite = load(tmp_path, SUITE)
    assert suite.cells() == [
        ("mae", "a", "knn"),
        ("random", "a", "knn"),
        ("clip", "a", "knn"),
        ("clip", "a", "zeroshot"),
        ("clip", "b", "zeroshot"),
    ]
    assert suite.columns() == [("a", "knn"), ("a", "zeroshot"), ("b", "zeroshot")]
    assert suite.encoders["mae"].source == "runs/mae"
    assert suite.encoders["random"].options == {"random_init": True, "seed": 1}
    assert suite.protocols["knn"].options == {"k": (20, 200)}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    suite = load(tmp_path, SUITE)
    (tmp_path / "again.yaml").write_text(dump_suite(suite))
    assert load_suite(tmp_path / "again.yaml") == suite


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dataset": {}}, "unknown key. Did you mean datasets?"),
        ({"encoders": {}}, "encoders: expected"),
        ({"encoders": {"a b": "runs/a"}}, "found 'a b'"),
        ({"encoders": {"features": "runs/a"}}, "found features, a folder"),
        ({"encoders": {"mae": {"random_init": True}}}, "encoders.mae.source: expected a value, found nothing"),
        ({"encoders": {"mae": {"source": "a", "seed": {"b": 1}}}}, "encoders.mae.seed: expected"),
        ({"datasets": {"a": {"train": "x"}}}, "datasets.a.test: expected a value, found nothing"),
        (
            {"protocols": {"knn": {"kind": "knn", "encoders": ["mea"]}}},
            "protocols.knn.encoders: expected one of encoders, found 'mea'. Did you mean mae?",
        ),
        ({"protocols": {"knn": {"kind": "knn", "datasets": ["x"]}}}, "Known here: a, b."),
        ({"protocols": {"knn": {"kind": "knn", "encoders": []}}}, "protocols.knn.encoders: expected"),
        ({"protocols": {"knn": {"k": 3}}}, "protocols.knn.kind: expected a value, found nothing"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, {**SUITE, **changed})
    assert told in str(error.value)


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(write_yaml(SUITE) + "name: other\n")
    with pytest.raises(RecipeError, match="found 'name' again"):
        load_suite(path)
