"""What a recipe's YAML means, and what of YAML it has no use for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.recipe.strict_yaml import StrictYamlError, read_yaml, write_yaml
from tests.recipe.recipes import bounded, scalars, words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("50_000", 50_000),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        ("e5", "e5"),
        ("'3e-4'", "3e-4"),
        ("true", True),
        ("~", None),
    ],
)
def test_a_scalar_is_read_as_it_looks(text: str, value: Any) -> None:
    read, found = read_yaml(f"key: {text}")
    assert (read, found) == ({"key": value}, [])
    assert type(read["key"]) is type(value)


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=12))
@bounded
def test_what_is_written_is_read_back(value: Any) -> None:
    read, found = read_yaml(write_yaml(value))
    assert found == []
    assert repr(read) == repr(value)  # tells 1 from 1.0 and from True


def test_a_key_that_stands_twice_is_told_with_both_lines() -> None:
    _, found = read_yaml("a: 1\nb: {x: 1,\n  x: 2}\na: 3\n")
    assert [re.findall(r"line (\d+)", problem) for problem in found] == [["4", "1"], ["3", "2"]]
    assert "'a'" in found[0]
    assert "'x'" in found[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x", "anchors"),
        ("b: *x", "anchors"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!float 3", "tag"),
        ("[" * 100, "levels"),
        ("a: 1\n---\nb: 2", "single document"),
        ("1: a", "quotes"),
        ("a: " + "9" * 5000, "digits"),
        ("a: [1", "line 1"),
        ("a: '" + "x" * 300_000 + "'", "characters"),
        ("a: \x00", "special characters"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused(text: str, said: str) -> None:
    with pytest.raises(StrictYamlError, match=said):
        read_yaml(text)
