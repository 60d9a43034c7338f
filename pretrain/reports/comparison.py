"""Several results side by side: which encoder, by which data set and protocol, and how they differ from a baseline."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit  # quantiles of t; scipy.stats, which calls it, takes a second to import

from data_pipeline.errors import InputError
from data_pipeline.messages import visible
from pretrain.evals.result import EvalReport, compare
from pretrain.evals.suite import HOW, KEPT, load_suite, nearest, result_path
from pretrain.evals.uncertainty import Interval

# Arguments of a command that say which encoder it judges, on what and where, and not by which protocol.
_WHICH = {"encoder", "towers", "random_init", "seed", "model", "image_size", "option", "weights", "tokenizer"}
_WHERE = {"weights_key", "weights_prefix", "weights_ignore", "command", "train", "test", "device"}

Column = tuple[str, str]  # data set, protocol


@dataclass(frozen=True)
class Result:
    encoder: str
    column: Column
    report: EvalReport
    path: Path


@dataclass(frozen=True)
class Difference:
    """From the baseline, in points of percent, and its 95 % interval; `over` says of what it was taken."""

    interval: Interval
    over: str


@dataclass(frozen=True)
class Comparison:
    """Encoders x columns.

    Attributes:
        results: those that are there.
        differences: from the baseline, where both can be compared.
        warnings: what a reader must know of the table: results that are missing or cannot be compared.
    """

    name: str
    encoders: tuple[str, ...]
    columns: tuple[Column, ...]
    results: Mapping[tuple[str, Column], Result]
    baseline: str
    differences: Mapping[tuple[str, Column], Difference] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def best(self, column: Column) -> str | None:
        """The encoder that is better than every other of the column, by intervals above zero; None: none is."""
        reports = {name: result.report for (name, own), result in self.results.items() if own == column}
        first = max(reports, key=lambda name: reports[name].value)
        others = [report for name, report in reports.items() if name != first]
        try:
            clear = all(difference(reports[first], other).interval.low > 0 for other in others)
        except InputError:  # they cannot be compared
            clear = False
        return first if others and clear else None


def is_suite(folder: Path) -> bool:
    return (folder / KEPT / "suite.yaml").is_file()


def compare_results(paths: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Reads the results in suites' folders and reports (.json).

    Args:
        baseline: name of an encoder; None: the first.

    Raises:
        InputError: neither a suite nor a report, two results for one place, or no encoder of that name.
    """
    found, warnings, order = _collected(paths)
    results: dict[tuple[str, Column], Result] = {}
    for one in found:
        if (other := results.setdefault((one.encoder, one.column), one)) is not one:
            where = f"{one.encoder}, {' '.join(one.column)}"
            raise InputError(where, "one result", f"{other.path} and {one.path}", "Leave one of them out.")
    if not results:
        raise InputError(", ".join(map(str, paths)), "results to compare", "none yet", "Run the suite first.")
    encoders = [name for name in order[0] if any(name == own for own, _ in results)]
    columns = [column for column in order[1] if any(column == own for _, own in results)]
    first = baseline or encoders[0]
    if first not in encoders:
        raise InputError("--baseline", "the name of an encoder", first, nearest(first, encoders))
    differences: dict[tuple[str, Column], Difference] = {}
    for column in columns:
        base = results.get((first, column))
        for name in encoders:
            result = results.get((name, column))
            if result is None or base is None or result is base:
                continue
            try:
                differences[name, column] = difference(result.report, base.report)
            except InputError as error:
                warnings.append(f"{name} and {first} by {' '.join(column)} cannot be compared: {error}")
    warnings += _unlike(results.values(), columns)
    suites = [load_suite(path / KEPT / "suite.yaml").name for path in paths if is_suite(path)]
    called = ", ".join(suites) or "comparison"
    return Comparison(called, tuple(encoders), tuple(columns), results, first, differences, tuple(warnings))


def difference(a: EvalReport, b: EvalReport) -> Difference:
    """a - b: over the seeds' paired differences (t interval) where both have the same ones, else paired sample by
    sample (`compare`).

    Raises:
        InputError: they are not of the same test samples.
    """
    paired, n = compare(a, b), len(a.by_seed)
    if n != len(b.by_seed) or n < 2 or a.protocol.get("seeds") != b.protocol.get("seeds"):
        seeds = " of the first seeds" if a.by_seed or b.by_seed else ""
        return Difference(paired, f"{a.n:,} test samples{seeds}")
    pairs = np.subtract(a.by_seed, b.by_seed)
    mean = float(pairs.mean())
    half = float(stdtrit(n - 1, 0.975)) * float(pairs.std(ddof=1)) / math.sqrt(n)
    return Difference(Interval(mean, mean - half, mean + half), f"{n} seeds")


def table_markdown(comparison: Comparison) -> str:
    """Values, and differences from the baseline; `±` is the standard deviation over seeds."""
    head = [" ".join(column) for column in comparison.columns]
    values = [
        [name, *(value_text(comparison.results.get((name, column))) for column in comparison.columns)]
        for name in comparison.encoders
    ]
    parts = [_markdown(["encoder", *head], values)]
    if rows := [
        [name, *(difference_text(comparison.differences.get((name, column))) for column in comparison.columns)]
        for name in comparison.encoders
        if name != comparison.baseline
    ]:
        parts.append(f"Difference from {visible(comparison.baseline)}, points, with its 95 % paired interval:")
        parts.append(_markdown(["encoder", *head], rows))
    parts += [f"- {visible(warning)}" for warning in comparison.warnings]
    return "\n\n".join(parts) + "\n"


def table_csv(comparison: Comparison) -> str:
    """A row for each encoder; for each column its value, spread over seeds, n, difference, low, high, and weights."""
    kinds = ("value", "spread", "n", "difference", "low", "high", "weights_sha256")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["encoder", *(f"{' '.join(column)} {kind}" for column in comparison.columns for kind in kinds)])
    for name in comparison.encoders:
        row: list[object] = [name]
        for column in comparison.columns:
            result, change = comparison.results.get((name, column)), comparison.differences.get((name, column))
            row += [result.report.value, result.report.spread, result.report.n] if result else [None] * 3
            row += [change.interval.difference, change.interval.low, change.interval.high] if change else [None] * 3
            row.append(result.report.weights_sha256 if result else None)
        writer.writerow(row)
    return file.getvalue()


def value_text(result: Result | None) -> str:
    if result is None:
        return "–"
    spread = result.report.spread
    return f"{result.report.value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def difference_text(change: Difference | None) -> str:
    if change is None:
        return "–"
    return f"{change.interval.difference:+.2f} ({change.interval.low:+.2f} to {change.interval.high:+.2f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(visible(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _collected(paths: Sequence[Path]) -> tuple[list[Result], list[str], tuple[list[str], list[Column]]]:
    """Results, what is missing of them, and the order of encoders and columns."""
    found: list[Result] = []
    warnings: list[str] = []
    encoders: dict[str, None] = {}
    columns: dict[Column, None] = {}
    alone: list[tuple[Path, EvalReport]] = []
    for path in paths:
        if is_suite(path):
            suite = load_suite(path / KEPT / "suite.yaml")
            encoders |= dict.fromkeys(suite.encoders)
            columns |= dict.fromkeys(suite.columns())
            for encoder, dataset, protocol in suite.cells():
                file = result_path(path, encoder, dataset, protocol)
                if file.is_file():
                    found.append(Result(encoder, (dataset, protocol), EvalReport.load(file), file))
                else:
                    warnings.append(f"there is no result of {encoder} by {dataset} {protocol}")
        elif path.suffix == ".json":
            alone.append((path, EvalReport.load(path)))
        else:
            raise InputError(
                where=str(path), expected="a run, a suite's folder, or reports of `pretrain eval` (.json)",
                found="a folder with neither" if path.is_dir() else "none of them",
            )  # fmt: skip
    for result in _named(alone):
        found.append(result)
        encoders[result.encoder] = columns[result.column] = None
    return found, warnings, (list(encoders), list(columns))


def _named(alone: Sequence[tuple[Path, EvalReport]]) -> list[Result]:
    """Reports that no suite names: by their source, data and protocol, and by hashes where those are not enough."""
    reports = [report for _, report in alone]
    encoders = _told_apart([(_encoder_name(r), r.weights_sha256[:8]) for r in reports])
    datasets = _told_apart([(_data_name(r), _short(r.data)) for r in reports])
    protocols = _told_apart([(r.evaluator, _protocol(r, reports)) for r in reports])
    names = zip(alone, encoders, datasets, protocols, strict=True)
    return [Result(encoder, (data, protocol), report, path) for (path, report), encoder, data, protocol in names]


def _told_apart(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Names; with their marks, where several marks are of one name."""
    marks: dict[str, set[str]] = {}
    for name, mark in pairs:
        marks.setdefault(name, set()).add(mark)
    return [f"{name} {mark}" if len(marks[name]) > 1 else name for name, mark in pairs]


def _encoder_name(report: EvalReport) -> str:
    source, tag = Path(str(report.encoder.get("source", ""))), str(report.encoder.get("tag", ""))
    name = source.name if report.encoder.get("kind") != "checkpoint" else f"{source.parent.parent.name} {source.name}"
    return f"{name} random" if tag == "random" else name or tag


def _data_name(report: EvalReport) -> str:
    path = Path(str(report.arguments.get("test", "")))
    return path.parent.name if path.name in ("test", "val") and path.parent.name else path.name or "data"


def _short(data: Mapping[str, Any]) -> str:
    known = {key: value for key, value in data.items() if key != "classes"}
    return str(known.get("test", {}).get("fingerprint", json.dumps(known, sort_keys=True)))[:8]


def _protocol(report: EvalReport, reports: Iterable[EvalReport]) -> str:
    """Its arguments that are not the same in all reports of its evaluator."""
    others = [r.arguments for r in reports if r.evaluator == report.evaluator]
    keys = [key for key in report.arguments if key not in (_WHICH | _WHERE | HOW)]
    own = {key: report.arguments[key] for key in keys if any(o.get(key) != report.arguments[key] for o in others)}
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in own.items())


def _unlike(results: Collection[Result], columns: Sequence[Column]) -> list[str]:
    """What should be the same down a column, or of one encoder, and is not."""
    told = []
    for column in columns:
        reports = [result.report for result in results if result.column == column]
        for what, values in (
            ("metrics", {r.metric for r in reports}),
            ("protocols", {_protocol(r, reports) for r in reports}),
            ("training sets", {_fingerprint(r, "train") for r in reports}),
            ("test sets", {_fingerprint(r, "test") for r in reports}),
            ("numbers of test samples", {f"{r.n:,}" for r in reports}),
            ("versions of torch", {r.versions.get("torch", "unknown") for r in reports}),
            ("devices", {_device(r) for r in reports}),
        ):
            if len(values) > 1:
                told.append(f"results by {' '.join(column)} have several {what}: {'; '.join(sorted(values))}")
    weights: dict[tuple[str, ...], set[str]] = {}
    for result in results:
        weights.setdefault((result.encoder, *_part(result.report)), set()).add(result.report.weights_sha256[:12])
    for (name, *_), values in weights.items():
        if len(values) > 1:
            told.append(f"results of {name} are of several weights: {'; '.join(sorted(values))}")
    return told


def _part(report: EvalReport) -> tuple[str, str]:
    """What of an encoder was judged: one tower or both, for images of which size."""
    return "towers" if "towers" in report.arguments else "encoder", str(report.arguments.get("image_size"))


def _fingerprint(report: EvalReport, which: str) -> str:
    data = report.data.get(which)
    return str(data.get("fingerprint", "unknown"))[:12] if isinstance(data, Mapping) else "none"


def _device(report: EvalReport) -> str:
    features = report.protocol.get("features")
    return str(features.get("device", "unknown")) if isinstance(features, Mapping) else "unknown"
