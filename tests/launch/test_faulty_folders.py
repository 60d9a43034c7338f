"""Each command over a folder with a fault: one sentence with the path and what to do, never a traceback."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest

from tests.commands import pretrain
from tests.faulty_folders import FAULTS, call, leaf_commands
from tests.launch.run_folders import Commands
from tests.launch.test_cli import TINY, write_shards
from tests.shards import write_images

# The words of each command; {F} is the folder with the fault, where what {copy} names was copied to before.
DATA = ("--train", "shards", "--test", "shards", "--limit-train", "8", "--limit-test", "8")
EVAL = ("run", *DATA, "--cache", "{F}/cache", "--out", "{F}/report.json")
WRITING: dict[str, tuple[str, ...]] = {
    "train": ("recipe.yaml", "--out", "{F}/new"),
    "submit": ("recipe.yaml", "--cluster", "cluster.yaml", "--out", "{F}/new"),
    "drill": ("recipe.yaml", "--cluster", "cluster.yaml", "--out", "{F}/new"),
    "chain": ("chain.yaml", "--out", "{F}/new"),
    "demo": ("--out", "{F}/new"),
    "report": ("report.json", "--out", "{F}/new"),
    "data make": ("digits", "{F}/new", "--samples", "4"),
    "data convert": ("images", "{F}/new"),
    "data index": ("{F}/shards",),
    "data stats": ("shards", "--out", "{F}/sheet.png"),
    "data label": ("shards", "{F}/new", "--teacher", "run"),
    "data select": ("shards", "{F}/new", "--per-class", "2"),
    "eval knn": (*EVAL, "--k", "2"),
    "eval ncm": EVAL,
    "eval linear": (*EVAL, "--epochs", "1", "--lr", "0.1"),
    "eval fewshot": (*EVAL, "--shots", "1", "--seeds", "1"),
    "eval finetune": ("run", *DATA[:4], "--epochs", "1", "--out", "{F}/new/report.json"),
    "eval suite": ("suite.yaml", "--out", "{F}/new"),
}
READING: dict[str, tuple[str, ...]] = {
    "show": ("{F}/recipe.yaml",),
    "cancel": ("{F}/run",),
    "status": ("{F}/run",),
    "logs": ("{F}/run",),
    "doctor": ("{F}/recipe.yaml",),
    "data verify": ("{F}/shards",),
    "eval zeroshot": ("{F}/run", "--test", "{F}/shards"),
    "eval retrieval": ("{F}/run", "--test", "{F}/shards"),
    "eval rerun": ("{F}/report.json",),
    "eval compare": ("{F}/report.json", "{F}/report.json"),
}
# Further folders of a command.
MORE: dict[str, tuple[str, ...]] = {
    "train again": ("train", "longer.yaml", "--out", "{F}/run"),
    "train on two": ("train", "recipe.yaml", "--out", "{F}/new", "--nproc", "2"),
    "report of a run": ("report", "{F}/run"),
    "eval knn on two": ("eval", "knn", *EVAL, "--k", "2", "--nproc", "2"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a recipe of them, its run, a report on it, a suite and a chain."""
    folder = tmp_path_factory.mktemp("place")
    write_shards(folder / "shards")
    write_images(folder / "images", 6)
    (folder / "recipe.yaml").write_text(json.dumps(TINY))
    (folder / "longer.yaml").write_text(json.dumps({**TINY, "schedule": {"steps": 3}}))
    (folder / "cluster.yaml").write_text(json.dumps({"partition": "short", "time_minutes": 10}))
    suite = {"name": "s", "encoders": {"a": "run"}, "datasets": {"d": {"train": "shards", "test": "shards"}},
             "protocols": {"knn": {"kind": "knn", "k": [2]}}}  # fmt: skip
    (folder / "suite.yaml").write_text(json.dumps(suite))
    stages = {"name": "c", "stages": [{"name": "one", "train": "recipe.yaml"}]}
    (folder / "chain.yaml").write_text(json.dumps(stages))
    pretrain("train", "recipe.yaml", "--out", "run", folder=folder)
    pretrain("eval", "knn", "run", *DATA, "--k", "2", "--out", "report.json", folder=folder)
    return folder


def test_the_walk_covers_every_command() -> None:
    assert set(leaf_commands()) == WRITING.keys() | READING.keys()


CASES = {**WRITING, **READING, **MORE}


def drawn(name: str) -> str:
    """The fault that a command is tried with at each commit; the drills try them all."""
    if name in READING:
        return "failing"
    return FAULTS[zlib.crc32(name.encode()) % len(FAULTS)]


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_told_in_a_sentence(
    place: Path, cluster: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(place)
    assert_fault_is_told(tmp_path / "faulty", drawn(name), name)


def assert_fault_is_told(folder: Path, fault: str, name: str) -> None:
    """In the current folder, a command's own words are tried on `folder`, which is filled before it gets its fault."""
    folder.mkdir()
    for source in ("recipe.yaml", "report.json", "report.safetensors"):
        shutil.copy(source, folder)
    for source in ("run", "shards"):
        shutil.copytree(source, folder / source)
    words = CASES[name] if name in MORE else (*name.split(), *CASES[name])
    done = call(fault, folder, [word.replace("{F}", str(folder)) for word in words])
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert "[Errno" not in said, said
    assert " object at 0x" not in said, said
    must_fail = name not in READING or (fault == "failing" and name not in ("doctor", "status", "logs", "cancel"))
    assert done.status in ((1, 2) if must_fail else (0, 1, 2)), said
    if must_fail:
        assert "error: " in done.stderr, said
        assert str(folder) in done.stderr, said
