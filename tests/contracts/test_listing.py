"""The documentation lists every kind of the tables, with the keys that it has."""

from __future__ import annotations

from pretrain.objectives import config as objective_config
from pretrain.optim import config as optim_config
from tests.contracts import listing


def test_the_readme_of_recipes_lists_what_the_tables_have() -> None:
    text = listing.README.read_text("utf-8")
    assert listing.written(text) == text, "run: python -m tests.contracts.listing"


def test_every_folder_of_a_method_is_in_its_table() -> None:
    root = listing.README.parents[1] / "pretrain"
    for package, kinds in (("objectives", objective_config.KINDS), ("optim", optim_config.KINDS)):
        assert {path.parent.name for path in (root / package).glob("*/config.py")} == kinds.keys()
