"""Words to a user: names as text, as many problems counted as shown, JSON that is not taken to pieces too deep."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.durable import MAX_DEPTH, from_json, read_lines
from data_pipeline.errors import InputError, RecipeError
from data_pipeline.glyphs import in_fonts
from data_pipeline.inspect import stats
from data_pipeline.messages import visible


@given(st.text())
def test_a_visible_text_is_printed_as_it_is_and_keeps_what_can_be_seen(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert not set(shown) & set(map(chr, [*range(32), *range(127, 160)]))
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


def test_what_a_terminal_would_obey_is_an_escape() -> None:
    assert visible("\x1b[31mred\x07") == r"\x1b[31mred\x07"
    assert visible("a\nb\tc\r") == r"a\nb\tc\r"
    assert visible("a\nb\tc\r", lines=True) == "a\nb\tc\\r"
    assert visible("a\u202egnp.exe") == r"a\u202egnp.exe"
    assert visible(b"\xff.jpg".decode("utf-8", "surrogateescape")) == r"\udcff.jpg"
    assert visible("中文 ü r[/x] $x$ _a") == "中文 ü r[/x] $x$ _a"


def test_an_error_shows_names_as_text() -> None:
    assert str(InputError("\x1b[31m", "a", "b\x07\nc")) == "\\x1b[31m: expected a, found b\\x07\nc."
    assert "\x1b" not in str(RecipeError("\x1b", ["\x1b"]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_problems_are_counted_as_are_shown(count: int) -> None:
    error = RecipeError("recipe", [f"problem {i}." for i in range(count)], "Choose another.")
    head, *lines = str(error).splitlines()
    assert head == f"recipe: {count} problem{'s' * (count > 1)}"
    assert lines == [*(f"  problem {i}." for i in range(count)), "  Choose another."]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 400, 10**5])
@pytest.mark.parametrize(("head", "tail"), [("[", "]"), ('{"a":', "}")])
def test_json_that_is_nested_too_deep_is_a_value_error(tmp_path: Path, depth: int, head: str, tail: str) -> None:
    text = head * depth + "1" + tail * depth
    with pytest.raises(ValueError, match="more than 100 deep"):
        from_json(text)
    (tmp_path / "lines").write_text(f"{text}\n{json.dumps({'a': [1, {'b': 2}]})}\n")
    assert read_lines(tmp_path / "lines") == [{"a": [1, {"b": 2}]}]


def test_json_of_any_lesser_depth_is_read() -> None:
    text = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert json.dumps(from_json(text)) == text


def test_characters_that_no_font_has_are_escapes() -> None:
    assert "".join(run.text for run in in_fonts("Grüße, Привет, $x$")) == "Grüße, Привет, $x$"
    assert "".join(run.text for run in in_fonts("a\U000f1234b")) == r"a\U000f1234b", "of private use, in no font"
    assert "".join(run.text for run in in_fonts("\x1b")) == r"\x1b"


def test_captions_of_the_contact_sheet_are_wrapped_not_cut() -> None:
    for caption in (
        "a photograph of two dogs that sleep on a red sofa",
        "one_word_without_an_end" * 4,
        "Grüße an Лев",
        "",
    ):
        lines = ["".join(run.text for run in line) for line in stats._wrapped(caption)]
        assert "".join(lines).replace(" ", "") == caption.replace(" ", "")
        assert all(stats._width(line) <= stats.THUMBNAIL for line in lines)
    endless = stats._wrapped("word " * 1000)
    assert len(endless) == stats.MAX_LINES
    assert endless[-1][0].text == "…"
