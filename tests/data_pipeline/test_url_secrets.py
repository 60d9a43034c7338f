"""What words show of URLs, and which places are refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError, RecipeError
from data_pipeline.messages import visible
from data_pipeline.remote.fetch import remote_url
from data_pipeline.url_secrets import hidden, holds_secrets, without_secrets

SHOWN = {
    "https://user:SECRET@host/x/{000..012}.tar": "https://...@host/x/{000..012}.tar",
    "s3:/key:SECRET@bucket/x": "s3:/...@bucket/x",  # as `Path` leaves it
    "https://user:SEC/RET@host/x": "https://...@host/x",
    "https://user:SEC#RET@host/x": "https://...",
    "https://host?sign=SECRET@more": "https://...",
    "found 'https://host/x.tar?X-Amz-Signature=SECRET&b=SECRET'.": "found 'https://host/x.tar?...'.",
    "(s3://bucket/x#SECRET), and more": "(s3://bucket/x#...), and more",
    "{https://a/x,https://u:SECRET@b/y}.tar": "{https://a/x,https://...@b/y}.tar",
    "https://u:SECRET@a/x,s3://k:SECRET@b/y?SECRET": "https://...@b/y?...",
    '{"url": "https://u:SECRET@host/x?SECRET", "b": 1}': '{"url": "https://...@host/x?...", "b": 1}',
}
PLAIN = (
    "https://host/%25/shard-{000..012}.tar", "s3://bucket/a@b/x", "http://127.0.0.1:80/a@b", "http://[::1]:80/a@b",
    "Is it https://host/x? Yes.", "C:/x@y?z", "/mnt/a#b/x?y@z", "a: b/c", "user@host", "lr:3/4", "",
)  # fmt: skip


@pytest.mark.parametrize("text", SHOWN)
def test_a_secret_is_not_shown(text: str) -> None:
    assert without_secrets(text) == SHOWN[text]
    assert without_secrets(SHOWN[text]) == SHOWN[text], "what is shown twice is not cut twice"
    assert visible(text) == SHOWN[text]
    assert holds_secrets(text) == ("://" in text)


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("place", [text for text in PLAIN if "Yes" not in text])
def test_other_places_are_taken(place: str) -> None:
    assert not holds_secrets(place)


@pytest.mark.parametrize(
    "url", ["https://user:SEC RET@host/x", "https://user:SEC/RET@host/x", 'https://u:SEC"RET@h', "s3://b/my x?SECRET",
            "https://host?SECRET", "https://user:SECRET@host"]
)  # fmt: skip
def test_a_place_is_refused_without_its_secret(url: str) -> None:
    assert holds_secrets(url)
    with pytest.raises(DataError, match=r"expected a URL without user, password, query or fragment") as error:
        remote_url(url)
    assert "SEC" not in str(error.value)
    assert "RET" not in str(error.value)


def test_all_messages_hide_secrets() -> None:
    for error in (DataError("https://u:SECRET@h", "s3://b?SECRET", "https://h#SECRET", "Ask https://u:SECRET@h."),
                  RecipeError("s3://b?SECRET", ["a: https://u:SECRET@h"], "https://h#SECRET")):  # fmt: skip
        assert "SECRET" not in str(error)


@given(st.text("ab1:/@?#.'\" {}\\", max_size=40), st.sampled_from(["https://", "x s3:/", "=http://"]))
def test_what_is_shown_stays_as_it_is(text: str, before: str) -> None:
    once = without_secrets(before + text)
    assert without_secrets(once) == once
    assert hidden(hidden(text)) == hidden(text)


@given(st.text("abc:/@?#.'{}\\", max_size=20), st.text("abc1:/@?#.'{}\\", max_size=20))
def test_no_secret_survives_whatever_is_in_it(before: str, after: str) -> None:
    assert "SECRET" not in without_secrets(f"found https://user:{before}SECRET{after}@host/x")
    assert "SECRET" not in without_secrets(f"found https://host/x?{before}SECRET{after}")


def test_long_texts_take_little_time() -> None:
    started = time.process_time()
    for text in ("aa:/" * 10**5, "aa:/u@" * 10**5, "a" * 10**6 + ":/", "aa:/:x" * 10**5 + "@", ":/" * 10**5):
        without_secrets(text)
    assert time.process_time() - started < 20, "it grows as the square of the length"
