"""The help of every command: nothing left of what makes it, and examples that are read and name what is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from launch.cli import COMMANDS
from launch.cli import app as root

ROOT = Path(__file__).resolve().parents[2]


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words, groups too."""
    yield "pretrain", get_command(root)
    for name in COMMANDS:
        command = get_command(import_module(f"launch.commands.{name}").app)
        yield f"pretrain {name}", command
        for inner, member in getattr(command, "commands", {}).items():
            yield f"pretrain {name} {inner}", member


ALL = dict(commands())


def told(words: str) -> str:
    command = ALL[words]
    with command.make_context(words, [], resilient_parsing=True) as context:
        return str(command.get_help(context))


def examples(words: str) -> list[str]:
    return [line.strip() for line in told(words).partition("Examples:")[2].splitlines() if line.strip()]


def test_there_are_all() -> None:
    assert {"pretrain train", "pretrain data convert", "pretrain eval finetune", "pretrain eval rerun"} <= ALL.keys()


@pytest.mark.parametrize("words", ALL)
def test_no_placeholder_is_left(words: str) -> None:
    usage, _, rest = told(words).partition("\n\n")
    arguments = usage.replace("\n", " ").split("[OPTIONS]")[1]
    assert not re.search(r"[{}]|\[\[|\]\]|\.{4}", arguments), usage
    assert not re.search(r"\{[A-Z]|\[\[|%\(|%s", rest), rest


@pytest.mark.parametrize("words", ALL)
def test_arguments_have_one_name(words: str) -> None:
    usage, _, rest = told(words).partition("\n\n")
    listed = rest.partition("Arguments:")[2].partition("Options:")[0]
    for argument in usage.replace("\n", " ").split("[OPTIONS]")[1].split():
        name = argument.strip("[].")
        assert name in {"COMMAND", "ARGS"} or re.search(rf"^  {re.escape(name)} ", listed, re.MULTILINE), argument


def test_the_job_that_is_run_here_is_one_of_one_node() -> None:
    for line in (line for words in ALL for line in examples(words) if "--local" in line.split()):
        assert "--nodes 1" in line, line


@pytest.mark.parametrize("words", ALL)
def test_files_of_the_configs_that_are_named_are_there(words: str) -> None:
    for path in re.findall(r"\bconfigs/[\w./*-]*[\w*]", told(words)):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("words", ALL)
def test_examples_are_read_by_the_commands_that_they_name(words: str) -> None:
    found = examples(words)
    assert found or hasattr(ALL[words], "commands"), "each command has an example"
    for line in found:
        given = shlex.split(line.partition(" | ")[0])
        assert given[0] == "pretrain", line
        name = max((other for other in ALL if given[: len(other.split())] == other.split()), key=len)
        with ALL[name].make_context(name, given[len(name.split()) :]):
            pass
