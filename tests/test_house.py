"""The structure holds: one order of packages, no circles, small files and functions, the words of the field."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import house

LINES_OF_A_FILE, LINES_OF_A_FUNCTION, FILES_OF_A_FOLDER = 300, 60, 20
TO_READ_FIRST = (
    "pretrain/run.py", "pretrain/loop.py", "pretrain/objectives/mae/config.py", "pretrain/objectives/mae/objective.py",
)  # fmt: skip
# Names of a private language that were replaced by the field's own; whoever adds one finds the word to use here.
REPLACED = {
    "Parts": "LoopContext, TowerModules", "Judged": "one name per idea", "Demand": "SignalRequests",
    "Asked": "Request", "TimedCheckpoints": "CheckpointSchedule", "Lasting": "Debounced", "Advise": "HealthCheck",
    "Looked": "what it holds", "looks": "what it does", "untagged": "what it does", "spool": "RowStore",
    "intake": "ImageNormalizer", "Inline": "Validation", "ema": "teachers, averages",
    "hurry": "shorten_requeue_delay", "FRUITLESS": "MAX_ATTEMPTS_WITHOUT_CHECKPOINT",
    "BESIDE": "AUXILIARY_PREFIX", "Word": "RankStatus", "blame": "stalled_ranks", "Shelf": "CacheEntry",
    "Canvas": "BatchBuffer", "Cell": "SuiteJob", "How": "ExecutionOptions", "undecayed": "constant_lr_modules",
    "_see": "verify_shared_folder", "_host": "host_rendezvous", "_meet": "join_rendezvous",
}  # fmt: skip


@pytest.mark.parametrize("module", house.modules())
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    assert not house.upward(module), f"{module} imports {house.upward(module)}; see ORDER in tests/house.py"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not house.circles()


def test_a_folder_says_what_lives_there_and_imports_nothing() -> None:
    for module, path in house.modules().items():
        if path.name == "__init__.py":
            code = house.tree_of_code(path)
            assert ast.get_docstring(code), f"{path} does not say what lives there"
            assert len(code.body) == 1, f"{path} holds more than its docstring"
        assert (house.ROOT / path.parent / "__init__.py").is_file(), f"{module} lies in a folder without __init__.py"


def test_files_functions_and_folders_are_small() -> None:
    for path in house.modules().values():
        lines = (house.ROOT / path).read_text("utf-8").count("\n")
        assert lines <= LINES_OF_A_FILE, f"{path} has {lines} lines: is it one idea?"
        for function in house.functions(path):
            size = (function.end_lineno or function.lineno) - function.lineno + 1
            assert size <= LINES_OF_A_FUNCTION, f"{path}: {function.name} has {size} lines: does it fit on a screen?"
    folders = Counter(path.parent for path in house.modules().values())
    folders.pop(Path("launch/commands"))  # a file for each command
    fullest, count = folders.most_common(1)[0]
    assert count <= FILES_OF_A_FOLDER, f"{fullest} holds {count} files"


def test_what_is_read_first_is_short() -> None:
    """The step loop, what it is made of, and one objective: fifteen minutes with the README."""
    assert sum((house.ROOT / path).read_text("utf-8").count("\n") for path in TO_READ_FIRST) <= 600


def test_the_whole_recipe_goes_no_further_than_it_must() -> None:
    found = house.takes_the_recipe()
    assert len(found) <= 12, "\n".join(map(str, found))


def test_the_readme_shows_the_tree_of_packages() -> None:
    """`python -m tests.house` prints it."""
    assert house.tree() in (house.ROOT / "README.md").read_text("utf-8")


def test_names_are_the_fields_own() -> None:
    for path in house.modules().values():
        for node in ast.walk(house.tree_of_code(path)):
            names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                assert name not in REPLACED, f"{path} defines {name}; say {REPLACED[name]}"


def test_docstrings_are_sentences_and_functions_say_what_they_do() -> None:
    riddles, suffixed = [], []
    for path in house.modules().values():
        for node in ast.walk(house.tree_of_code(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(node) or ""
                if re.match(r"Of\b", said):
                    riddles.append(f"{path}: {said.splitlines()[0]}")
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_of"):
                    suffixed.append(f"{path}: {node.name}")
    assert not riddles, "\n".join(riddles)
    assert len(suffixed) <= 10, "\n".join(suffixed)
