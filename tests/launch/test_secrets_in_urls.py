"""Passwords, signatures and tokens in URLs: no command prints one, none writes one into a file.

Every command is walked, with a URL in each of its options and arguments; and every key of a recipe, suite, chain and
cluster file. A command that reads files is walked with files that hold one.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from data_pipeline.errors import RecipeError
from launch import cli
from launch.chains.config import Chain
from launch.jobs.batch import batch_script
from launch.jobs.telling import comment, tell
from launch.slurm.cluster import Cluster, load_cluster
from pretrain import __main__ as rank
from pretrain.evals.suite import Suite
from pretrain.monitoring.log import MetricLog
from pretrain.monitoring.outlets import hide_secrets
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schema import groups_in
from pretrain.recipe.typed import validate_tree
from pretrain.runtime.failure import note_failure
from tests.commands import Done, begun, pretrain, program
from tests.launch.run_folders import Commands
from tests.launch.suites import make_run
from tests.launch.test_cli import TINY, write_shards
from tests.launch.test_urls_for_paths import OTHERS, commands, kinds_in

SECRET = "canary"
URLS = (
    f"https://user:{SECRET}@localhost:1/shards/{{000..012}}.tar",
    f"https://localhost:1/shards/000.tar?X-Amz-Signature={SECRET}",
    f"s3://bucket/shards#token={SECRET}",
    f"s3://{SECRET}:pass%20{SECRET}@bucket/%25/shards?{SECRET}",
)
COMMANDS = {name: command for name, command, _ in commands()}


def call_each(lines: list[list[str]]) -> None:
    """`pretrain WORDS` for each line of words, in this process."""
    typer.main.get_command = functools.cache(typer.main.get_command)
    for words in lines:
        sys.argv = ["pretrain", *words]
        try:
            status: object = cli.main()
        except SystemExit as end:
            status = end.code
        print(f"status {status}", flush=True)


def with_a_url(name: str) -> Iterator[list[str]]:
    """The words of a command with a URL in one of its options and arguments, for each of them."""
    command = COMMANDS[name]
    for number, parameter in enumerate(command.params):
        if parameter.name == "help" or getattr(parameter, "is_flag", False):
            continue
        options: list[str] = []
        arguments: list[str] = []
        for each in command.params:
            value = URLS[number % len(URLS)] if each is parameter else OTHERS.get(each.name, "1")
            if each.param_type_name == "argument":
                arguments.append(value)
            elif each is parameter or each.required:
                options += [each.opts[0], value]
        yield [*name.split(), *options, "--", *arguments]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_no_url_with_a_secret(tmp_path: Path, name: str) -> None:
    lines = [*with_a_url(name), [*name.split(), "--unknown", URLS[0]], [*name.split(), f"--unknown={URLS[1]}"]]
    with begun(partial(call_each, lines), tmp_path) as command:
        done = command.wait()
    assert_hidden(done)
    assert done.stdout.splitlines() == ["status 2"] * len(lines), done.stdout + done.stderr
    refusals = ("expected a URL without user", "expected a path of this machine", "Error: ")
    assert sum(done.stderr.count(refusal) for refusal in refusals) == len(lines), done.stderr
    assert list(tmp_path.iterdir()) == []


def string_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a typed file that take text, with those of all kinds of its groups."""
    for name, field in model.model_fields.items():
        if str in kinds_in(field.annotation):
            yield prefix + name
        for group in groups_in(field.annotation):
            yield from string_keys(group, f"{prefix}{name}.")


@pytest.mark.parametrize("model", [Recipe, Suite, Chain, Cluster])
def test_no_key_of_a_file_takes_a_url_with_a_secret(model: type[BaseModel]) -> None:
    keys = sorted(set(string_keys(model)))
    assert len(keys) > 5
    for number, key in enumerate(keys):
        tree: Any = URLS[number % len(URLS)]
        for part in reversed(key.split(".")):
            tree = {part: tree}
        with pytest.raises(RecipeError) as error:
            validate_tree(tree, model, where="file.yaml")
        assert [problem for problem in error.value.problems if problem.startswith(f"{key}: expected ")], key
        assert SECRET not in "".join(error.value.problems)


def test_what_is_wrong_besides_is_told_at_once() -> None:
    tree = {"name": "x", "data": {"train": [{"path": URLS[0]}, {"path": URLS[1], "weights": 1}]}, f"a {URLS[0]}": 1}
    with pytest.raises(RecipeError) as error:
        validate_tree(tree, Recipe, where="file.yaml")
    told = [problem.partition(":")[0] for problem in error.value.problems]
    assert {"data.train.0.path", "data.train.1.path", "data.train.1.weights", "recipe", "model"} <= set(told)
    assert SECRET not in "".join(error.value.problems)


# By command: words that make it read files with such URLs, and what must stand in its answer.
IN_RECIPE = "data.train: expected a URL without user, password, query or fragment, found one with them (not shown here)"
HIDDEN = "https://...@localhost:1/shards/{000..012}.tar"
EVAL = ("--train", "shards", "--test", "shards")
FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "show": (("recipe.yaml",), IN_RECIPE),
    "train": (("recipe.yaml", "--out", "new"), IN_RECIPE),
    "submit": (
        ("sound.yaml", "--cluster", "cluster.yaml", "--out", "new", "--dry-run"),
        "export HTTPS_PROXY=http://...@",
    ),
    "drill": (("recipe.yaml", "--cluster", "cluster.yaml", "--out", "new"), IN_RECIPE),
    "cancel": (("bad",), ""),
    "chain": (("chain.yaml", "--out", "new"), "stages.0.label.shards: expected a URL without"),
    "status": (("bad",), HIDDEN),
    "logs": (("bad",), HIDDEN),
    "doctor": (("recipe.yaml", "--cluster", "cluster.yaml"), IN_RECIPE),
    "report": (("bad",), IN_RECIPE),
    "data verify": (("shards", "--max-pixels", "9", "--workers", "1"), ""),
    "data stats": (("shards", "--out", "sheet.png"), HIDDEN),
    "data index": (("tars", "--classes", "classes.txt", "--workers", "1"), ""),
    "data label": (("shards", "new", "--teacher", "run"), ""),
    "data select": (("shards", "new", "--per-class", "1"), ""),
    "eval suite": (("suite.yaml", "--out", "new"), "datasets.d.test: expected a URL without"),
    "eval rerun": (("report.json",), f"{HIDDEN}: expected a URL without"),
    "eval compare": (("report.json", "report.json"), HIDDEN),
    "eval knn": (("run", *EVAL, "--k", "2", "--out", "new.json"), "report: new.json"),
    "eval fewshot": (("bad", *EVAL, "--shots", "1"), IN_RECIPE),
    "eval zeroshot": (("bad", "--test", "shards"), IN_RECIPE),
    "eval retrieval": (("bad", "--test", "shards"), IN_RECIPE),
    **{f"eval {kind}": (("bad", *EVAL), IN_RECIPE) for kind in ("ncm", "linear", "finetune")},
}
NONE = {
    "demo": "reads no file of a user's",
    "data make": "reads no file",
    "data convert": "reads images and tables, in which no place is named",
}


def test_every_command_is_walked_over_files() -> None:
    assert COMMANDS.keys() == FILES.keys() | NONE.keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose classes are called by URLs, a run, a report and files of settings with URLs in them."""
    folder = tmp_path_factory.mktemp("place")
    write_shards(folder / "shards", ("jpg", "cls", "txt"))
    (folder / "classes.txt").write_text("\n".join((URLS[0], "b", "c")))
    for path in folder.glob("shards/*.tar"):
        (folder / "tars").mkdir(exist_ok=True)
        shutil.copy(path, folder / "tars")
    manifest = folder / "shards" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": [URLS[0], "b", "c"]}))
    with_secret = json.dumps({**TINY, "data": {"train": URLS[0]}})
    (folder / "recipe.yaml").write_text(with_secret)
    (folder / "sound.yaml").write_text(json.dumps(TINY))
    proxy = f"export HTTPS_PROXY=http://user:{SECRET}@proxy"
    (folder / "cluster.yaml").write_text(json.dumps({"partition": "short", "time_minutes": 10, "setup": [proxy]}))
    label = {"shards": URLS[0], "teacher": "run"}
    (folder / "chain.yaml").write_text(json.dumps({"name": "c", "stages": [{"name": "one", "label": label}]}))
    suite = {"name": "s", "encoders": {"a": "run"}, "datasets": {"d": {"train": "shards", "test": URLS[0]}},
             "protocols": {"knn": {"kind": "knn", "k": [2]}}}  # fmt: skip
    (folder / "suite.yaml").write_text(json.dumps(suite))
    make_run(folder / "run", 0)
    shutil.copytree(folder / "run", folder / "bad")
    (folder / "bad" / "recipe.yaml").write_text(with_secret)
    (folder / "bad" / "log-rank0.txt").write_text(f"error: of {URLS[0]}\n")
    (folder / "bad" / "failure.json").write_text(json.dumps({"why": f"of {URLS[0]}", "rank": 0, "at": 0}))
    pretrain("eval", "knn", "run", *EVAL, "--k", "1", "--out", "report.json", folder=folder)
    report = json.loads((folder / "report.json").read_text())
    report |= {"encoder": {**report["encoder"], "source": URLS[0]}, "notes": [f"a note on {URLS[0]}"]}
    report["arguments"]["test"] = URLS[0]
    (folder / "report.json").write_text(json.dumps(report))
    shutil.copy(folder / "report.safetensors", folder / "other.safetensors")
    other = {**report, "weights_sha256": "a", "encoder": {**report["encoder"], "source": URLS[1]}}
    (folder / "other.json").write_text(json.dumps(other))
    return folder


# Further files of a command.
MORE = {"report of reports": (("report", "report.json", "other.json", "--out", "new"), "000.tar?...")}


@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_a_command_shows_no_secret_of_a_file(place: Path, cluster: Commands, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "place"
    shutil.copytree(place, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words, found = MORE[name] if name in MORE else ((*name.split(), *FILES[name][0]), FILES[name][1])
    with begun(program("launch.cli", *words), folder) as command:
        done = command.wait()
    assert done.status in (0, 1, 2)
    assert_hidden(done, found=found)
    for path in folder.rglob("*"):
        if path.is_file() and path not in before:
            data = path.read_bytes()
            known = path.suffix == ".json" and "classes" in data.decode()  # of data, as they are called
            assert known or SECRET.encode() not in data, path


def test_a_job_keeps_the_lines_that_its_shell_needs(place: Path, cluster: Commands, tmp_path: Path) -> None:
    loaded = load_cluster(place / "cluster.yaml")
    assert SECRET in loaded.setup[0]
    assert SECRET in batch_script(tmp_path / "run", "x", loaded, tmp_path)


def raise_and_print() -> None:
    """What no command is to do, and may do one day."""
    hide_secrets()
    print("printed", URLS[0], *URLS[1:], file=sys.stdout)
    warnings.warn(f"a warning about {URLS[1]}", stacklevel=1)
    logging.getLogger().error("an error at %s", URLS[2])
    raise KeyError(URLS[3])


def test_whatever_is_printed_shows_no_secret(tmp_path: Path) -> None:
    with begun(raise_and_print) as command:
        done = command.wait()
    assert done.status == 1
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout.startswith("printed https://...@localhost:1/shards/{000..012}.tar https://localhost:1/shards/")
    for said in ("a warning about https://localhost:1/shards/000.tar?...", "an error at s3://bucket/shards#...",
                 "KeyError: 's3://...@bucket/%25/shards?...'"):  # fmt: skip
        assert said in done.stderr


@pytest.mark.parametrize("url", URLS)
def test_a_rank_takes_none_and_says_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(TINY))
    for words in (["recipe.yaml", "--set", f"data.train={url}"], [url], ["recipe.yaml", f"--{url}"]):
        try:
            status: object = rank.main(words)
        except SystemExit as end:
            status = end.code
        assert status == 2
        said = "".join(capsys.readouterr())
        assert said
        assert SECRET not in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("url", URLS)
def test_what_a_run_keeps_of_its_end_holds_no_secret(tmp_path: Path, url: str) -> None:
    note_failure(tmp_path, f"of {url}", trace=f"at {url}\n")
    log = MetricLog(tmp_path, step=0, total_steps=1, active=True)
    log.say(f"reading {url}")
    log.close()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert {"failure.json", "log-rank0.txt"} <= kept.keys()
    assert "reading " in kept["log-rank0.txt"]
    assert SECRET not in "".join(kept.values())


@pytest.mark.parametrize("url", URLS)
def test_an_agent_of_a_job_tells_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr("launch.jobs.telling.slurm", lambda *words: told.extend(words))
    assert tell(f"error: of {url}")
    comment("7", f"of {url}")  # which every user of the cluster can read
    assert told[-1].startswith("Comment=pretrain: of ")
    said = "".join(capsys.readouterr())
    assert said.startswith("error: of ")
    assert SECRET not in said + "".join(told)


def assert_hidden(done: Done, *, found: str = "") -> None:
    said = done.stdout + done.stderr
    assert SECRET not in said, said
    assert "Traceback" not in said, said
    assert found in said, said
