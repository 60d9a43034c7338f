"""Names out of data are text on a terminal: no command obeys them, none leaves a part of them out.

Every command is walked: one that is new fails here until it is.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from data_pipeline.messages import visible
from launch.cli import COMMANDS
from pretrain.evals.config import KINDS
from tests.commands import Done, pretrain
from tests.launch.suites import make_run
from tests.shards import jpeg

CLASSES = ("$\\frac{$", "_private", "r[gpu4]", "r[/x]", "\x1b[31mred", "a,b;c\td", "中文 \u202egnp", ":smile:")
RUN = "r[gpu4]\x1b[31m[/x]\x07"  # of a folder: a slash in it is one between two
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose classes and keys are called so, and a run in a folder that is."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for split, more in (("train", 0), ("test", 100)):
        (folder / split).mkdir()
        with tarfile.open(folder / split / "shard-000000.tar", "w") as tar:
            for i in range(16):
                members = {"jpg": jpeg(i + more, 16, 3), "cls": str(i % len(CLASSES)).encode()}
                for field, data in members.items():
                    info = tarfile.TarInfo(f"\x1b[31m{more + i:03d}.{field}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        pretrain("data", "index", folder / split, "--classes", folder / "classes.txt", "--workers", 1)
    (folder / RUN).mkdir(parents=True)
    make_run(folder / "run", 0).rename(folder / RUN / "run")
    recipe = (folder / RUN / "run" / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("shards", '"[31m\\e/a"'))
    for name, k in (("a", 1), ("b", 3)):
        knn(folder, "--k", k, "--out", folder / f"{name}.json")
    return folder


def knn(folder: Path, *more: object) -> Done:
    encoder = folder / RUN / "run"
    return pretrain("eval", "knn", encoder, "--train", folder / "train", "--test", folder / "test", *more)


def commands() -> Iterator[str]:
    """All commands, as they are typed."""
    for name in COMMANDS:
        group: Any = typer.main.get_command(import_module(f"launch.commands.{name}").app)
        inside = getattr(group, "commands", {})
        yield from (f"{name} {own}" for own in inside) if len(inside) else [name]


# By command: words that make it say names, with what must stand there; {} is the folder, {run} the run in it.
SAID: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "show": (["show", "{}/recipe.yaml"], ("[31m\\e/a",)),
    "data verify": (["data", "verify", "{}/train", "--max-pixels", "9", "--workers", "1"], (r"\x1b[31m003",)),
    "data stats": (["data", "stats", "{}/train", "--out", "{}/sheet.png"], tuple(map(visible, CLASSES))),
    "eval knn": (
        ["eval", "knn", "{run}", "--train", "{}/train", "--test", "{}/test", "--k", "2", "--out", "{}/c.json"],
        (f"{visible(RUN)}/run (encoder)",),
    ),
    "eval rerun": (["eval", "rerun", "{}/a.json"], (f"{visible(RUN)}/run (encoder)", "the same number")),
    "eval compare": (["eval", "compare", "{}/a.json", "{}/b.json"], ("1b[31m[/x]\\x07/run (encoder)",)),
    "doctor": (["doctor", "{run}/r[/x].yaml"], ("expected a file in YAML",)),
    "report": (["report", "{}/a.json", "{}/b.json", "--out", "{}/report"], ("| run |",)),
}
# The others say such a name where a file is not there; what is printed at their end goes through the same functions.
REFUSED = {
    "data index": ["data", "index", "{run}/r[/x].yaml"],
    "train": ["train", "{run}/r[/x].yaml"],
    "submit": ["submit", "{run}/r[/x].yaml", "--cluster", "{run}/r[/x].yaml"],
    "drill": ["drill", "{run}/r[/x].yaml", "--cluster", "{run}/r[/x].yaml"],
    "cancel": ["cancel", "{run}/r[/x].yaml"],
    "chain": ["chain", "{run}/r[/x].yaml"],
    "status": ["status", "{run}/r[/x].yaml"],
    "logs": ["logs", "{run}/r[/x].yaml"],
    "data convert": ["data", "convert", "{run}/r[/x].yaml", "{}/out"],
    "data make": ["data", "make", "shapes", "{}/train", "--samples", "1"],
    "data label": ["data", "label", "{run}/r[/x].yaml", "{}/out", "--teacher", "{run}"],
    "data select": ["data", "select", "{run}/r[/x].yaml", "{}/out", "--per-class", "1"],
    "eval suite": ["eval", "suite", "{run}/r[/x].yaml"],
    "eval zeroshot": ["eval", "zeroshot", "{run}/r[/x].yaml", "--test", "{}/test"],
    "eval retrieval": ["eval", "retrieval", "{run}/r[/x].yaml", "--test", "{run}/r[/x].yaml"],
    **{
        f"eval {kind}": ["eval", kind, "{run}/r[/x].yaml", "--test", "{run}/r[/x].yaml", "--train", "{}/train"]
        for kind in KINDS
        if kind not in ("knn", "zeroshot", "retrieval")
    },
}
SILENT = {"demo": "makes its data itself, and its classes are numbered"}


def test_every_command_is_walked() -> None:
    assert set(commands()) == SAID.keys() | REFUSED.keys() | SILENT.keys()


@pytest.mark.parametrize("command", [*SAID, *REFUSED])
def test_a_command_shows_names_as_text(folder: Path, command: str) -> None:
    words, expected = SAID.get(command) or (REFUSED[command], ())
    run = str(folder / RUN / "run")
    given = [word.replace("{}", str(folder)).replace("{run}", run) for word in words]
    status = {"data verify": 2, "doctor": 1}.get(command, 0 if command in SAID else 2)
    done = pretrain(*given, status=status, folder=folder)
    said = done.stdout + done.stderr
    assert not OBEYED.findall(said), said
    assert "Traceback" not in said
    rows = re.sub(r"[│\s]", "", said)  # of a table, in which a long name is broken over lines
    for text in expected:
        assert text in said or re.sub(r"\s", "", text) in rows, said
    if command in REFUSED and command not in ("data make",):
        assert visible(f"{run}/r[/x].yaml") in said, said
