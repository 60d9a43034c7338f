"""The documentation lists every kind of the tables, with the keys that it has."""

from __future__ import annotations

from tests.contracts import listing


def test_the_readme_of_recipes_lists_what_the_tables_have() -> None:
    text = listing.README.read_text("utf-8")
    assert listing.written(text) == text, "run: python -m tests.contracts.listing"
