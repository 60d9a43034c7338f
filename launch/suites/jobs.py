"""The results that a suite asks for: the command of each, what decides its number, and whether it is there.

A result is there when `OUT/suite/asked/...json` holds the very question that is asked now (the command's arguments, the
SHA-256 of the encoder's files and of each further file that is named, the fingerprints of the data, and its state where
those do not tell all), and the report loads and says the same of its arguments and data. The question is
written once the old report is gone and before the command starts; a report appears whole, its outcomes before it.
Nothing unfinished can be taken for a result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.datasets.read import open_dataset
from data_pipeline.durable import write_text
from data_pipeline.errors import InputError, RecipeError
from launch.suites.words import command_words
from pretrain.evals.config import KINDS
from pretrain.evals.suite import FEATURES, HOW, KEPT, Option, Suite, nearest, result_path
from pretrain.runtime.run_folder import COMPLETE, sha256_of

Commands = Mapping[str, Any]  # by name, as click has them

_DECIDED = {"out", "cache"}  # by the suite


@dataclass(frozen=True)
class SuiteJob:
    """One result.

    Attributes:
        words: its command, without `pretrain`.
        source: of the encoder, as the command gets it.
        arguments: of the command, as its parser reads them, and as its report has them; without those of HOW.
        path: of the report.
        asked: file of the question that it answers.
    """

    encoder: str
    dataset: str
    protocol: str
    words: tuple[str, ...]
    source: str
    arguments: Mapping[str, Any]
    path: Path
    asked: Path

    @property
    def name(self) -> str:
        return f"{self.encoder} {self.dataset} {self.protocol}"


def suite_jobs(suite: Suite, out: Path, where: str, commands: Commands) -> list[SuiteJob]:
    """All that a suite asks for, each command read by its own parser.

    Args:
        out: folder of the suite.
        where: of the suite's file, for errors.
        commands: those of `pretrain eval`.

    Raises:
        RecipeError: with the problems of all cells.
    """
    cells, problems = [], []
    for names in suite.cells():
        try:
            cells.append(_cell(suite, *names, out, commands))
        except InputError as error:
            problems.append(str(error))
    if not cells and not problems:
        problems.append("expected an encoder and a data set for a protocol, found none.")
    if problems:
        raise RecipeError(where, list(dict.fromkeys(problems)))
    return cells


def _cell(suite: Suite, encoder: str, dataset: str, protocol: str, out: Path, commands: Commands) -> SuiteJob:
    judged, data, asked = suite.encoders[encoder], suite.datasets[dataset], suite.protocols[protocol]
    if asked.kind not in KINDS:
        raise InputError(
            f"protocols.{protocol}.kind", "a protocol of `pretrain eval`", asked.kind, nearest(asked.kind, KINDS)
        )
    command = commands[asked.kind]
    switches = _switches(command)
    names = encoder, dataset, protocol
    path = result_path(out, *names)
    own: dict[str, Option] = {"test": data.test, "train": data.train, "out": str(path), "cache": str(out / FEATURES)}
    values = {switches[key].name: value for key, value in own.items() if key in switches}
    values[next(p.name for p in command.params if p.param_type_name == "argument")] = judged.source
    given: dict[str, str] = {}
    for group, options in (
        (f"encoders.{encoder}", judged.options),
        (f"datasets.{dataset}", data.options),
        (f"protocols.{protocol}", asked.options),
    ):
        for key, value in options.items():
            where = f"{group}.{key}"
            if key not in switches:
                known = [name for name in switches if name not in _DECIDED]
                raise InputError(where, f"an option of `pretrain eval {asked.kind}`", key, nearest(key, known))
            if key in _DECIDED or key in ("train", "test"):
                raise InputError(where, "none, as the suite decides it", repr(value))
            if (name := switches[key].name) in given:
                raise InputError(where, f"an option once, as {given[name]} has it", repr(value))
            given[name] = where
            _refuse_unsayable(switches[key], value, where)
            values[name] = value
    words = ("eval", asked.kind, *command_words(command, values))
    arguments = _read(command, words, f"protocols.{protocol}, with encoder {encoder} and data set {dataset}")
    return SuiteJob(*names, words, judged.source, arguments, path, result_path(out / KEPT / "asked", *names))


def _switches(command: Any) -> dict[str, Any]:
    """Parameters by the name of their option, as YAML has it."""
    found = {}
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("--"):
                found[option.removeprefix("--").replace("-", "_")] = parameter
    return found


def _refuse_unsayable(parameter: Any, value: Option, where: str) -> None:
    """What has no words on a command line, or words that would be taken for others."""
    num = len(value) if isinstance(value, tuple) else None
    if getattr(parameter, "is_flag", False):
        expected, fits = "true or false", isinstance(value, bool)
    elif parameter.nargs > 1:
        expected, fits = f"a list of {parameter.nargs}", num == parameter.nargs
    elif parameter.multiple:
        expected, fits = "a value, or a list of one or more", num != 0 and not isinstance(value, bool)
    else:
        expected, fits = "one value, a number or a text", num is None and not isinstance(value, bool)
    if value is not None and not fits:
        raise InputError(where, expected, json.dumps(value))


def _read(command: Any, words: tuple[str, ...], where: str) -> dict[str, Any]:
    """The arguments as the command would get them, as JSON."""
    try:
        params = command.make_context(words[1], list(words[2:])).params
    except Exception as error:  # of the parser, which is typer's own in some of its versions and click's in others
        if not hasattr(error, "format_message"):
            raise
        raise InputError(where, f"what `pretrain eval {words[1]}` takes", error.format_message().rstrip(".")) from None
    return {key: value for key, value in _json(params).items() if key not in HOW}


def _json(params: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(params, default=str)))


class Questions:
    """What decides the number of each cell; files and data sets that several name are read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}

    def of(self, cell: SuiteJob) -> dict[str, Any]:
        """
        Raises:
            InputError: a data set is not there or damaged.
        """
        data = {key: self._once("data", cell.arguments[key]) for key in ("train", "test") if cell.arguments.get(key)}
        named = {text.rpartition("=")[2] for text in _texts([v for k, v in cell.arguments.items() if k not in data])}
        files = {text: self._once("file", text) for text in sorted(named) if text and Path(text).is_file()}
        question = {
            "arguments": cell.arguments,
            "encoder": self._once("encoder", cell.source),
            "data": data,
            "states": {key: self._once("state", cell.arguments[key]) for key in data},
            "files": files,
        }
        return _lean(_json(question))

    def answered(self, cell: SuiteJob) -> bool:
        """Whether the result is there."""
        if _asked(cell) != (question := self.of(cell)):
            return False
        from pretrain.evals.result import EvalReport

        try:
            report = EvalReport.load(cell.path)
        except InputError:
            return False
        said = _json(report.arguments)
        return all(said.get(key) == value for key, value in _json(cell.arguments).items()) and (
            set(question["data"].values()) <= set(_fingerprints(report.data))
        )

    def begin(self, cell: SuiteJob) -> None:
        """Makes room for the result; from here on what appears there answers the question as it is now.

        What a command keeps beside its report to go on from is kept for the same question alone.
        """
        question, before = self.of(cell), _asked(cell)
        cell.path.unlink(missing_ok=True)
        cell.path.with_suffix(".safetensors").unlink(missing_ok=True)
        if before not in (None, question):
            shutil.rmtree(cell.path.with_suffix(""), ignore_errors=True)
        write_text(cell.asked, json.dumps(question, indent=1) + "\n")

    def _once(self, what: str, path: str) -> str:
        if (what, path) not in self._known:
            make = {
                "data": lambda p: open_dataset(p).fingerprint,
                "state": lambda p: open_dataset(p).state,
                "file": lambda p: sha256_of(Path(p)),
                "encoder": digest,
            }
            self._known[what, path] = make[what](path)
        return self._known[what, path]


def _asked(cell: SuiteJob) -> Any:
    """The question that was asked last; None: none."""
    try:
        return _lean(json.loads(cell.asked.read_bytes()))
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _lean(question: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing, so that an option or an entry more does not make older answers old."""
    data, states = question["data"], question.get("states", {})
    return question | {
        "arguments": {key: value for key, value in question["arguments"].items() if value is not None},
        "states": {key: state for key, state in states.items() if state != data[key]},
    }


def digest(source: str) -> str:
    """SHA-256 over the files that make an encoder what it is; of what is no path, its name."""
    folder = Path(source)
    if (folder / "recipe.yaml").is_file():
        files = {"recipe.yaml": folder / "recipe.yaml", **_files(folder / "encoder")}
    elif (folder / COMPLETE).is_file():  # it holds the hashes of all others
        both = folder / COMPLETE, folder.resolve().parent.parent / "recipe.yaml"
        files = {path.name: path for path in both if path.is_file()}
    else:
        files = {folder.name: folder} if folder.is_file() else _files(folder)
    whole = hashlib.sha256(b"" if files else source.encode())
    for name, path in files.items():
        whole.update(f"{name} {sha256_of(path)}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """By their names in the folder, at any depth: a text tower lies in a folder of its own. What is hidden is what a
    download keeps for itself.
    """
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path for name, path in names.items() if not any(part.startswith(".") for part in name.parts)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _fingerprints(value: Any) -> Iterator[str]:
    """All that a report's data says of the identity of data sets, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "fingerprint":
                yield str(inner)
            else:
                yield from _fingerprints(inner)
