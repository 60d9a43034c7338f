"""A comparison as files: table.md, table.csv, and report.html with its figures. Self-contained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_text
from data_pipeline.progress import track
from pretrain.evals.result import EvalReport
from pretrain.reports.comparison import (
    Column,
    Comparison,
    Result,
    difference_text,
    table_csv,
    table_markdown,
    value_text,
)
from pretrain.reports.comparison_figures import MAX_PAIRED, draw_class_accuracy, draw_confusion
from pretrain.reports.comparison_images import ImageComparison, Load, look
from pretrain.reports.page import render
from pretrain.reports.run_results import chance_level
from pretrain.runtime.run_folder import sha256_of


def write_comparison(comparison: Comparison, out: Path, load: Load) -> Path:
    """Writes the tables and the page. Returns the page's path.

    Args:
        out: a folder, made where it is not there.
        load: gives the encoder of a report.
    """
    write_text(out / "table.md", table_markdown(comparison))
    write_text(out / "table.csv", table_csv(comparison))
    write_text(out / "report.html", render("comparison.html.j2", build_page(comparison, load)))
    return out / "report.html"


def build_page(comparison: Comparison, load: Load) -> dict[str, Any]:
    """What the template is given."""
    shown = [_of_column(comparison, column) for column in track(comparison.columns, label="figures", total=None)]
    return {
        "name": comparison.name,
        "summary": f"{len(comparison.encoders)} encoders, {len(comparison.columns)} columns of data set and protocol, "
        f"{len(comparison.results)} results; differences are from {comparison.baseline}.",
        "comparison": comparison,
        "warnings": [*comparison.warnings, *_notes(comparison)],
        "values": _rows(comparison),
        "spread": any(result.report.spread is not None for result in comparison.results.values()),
        "differences": _differences(comparison),
        "columns": shown,
        "looks": _looks(comparison, load),
        "details": [_details(r) for r in _in_order(comparison)],
    }


def _in_order(comparison: Comparison) -> list[Result]:
    places = ((name, column) for column in comparison.columns for name in comparison.encoders)
    return [comparison.results[place] for place in places if place in comparison.results]


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    best = {column: comparison.best(column) for column in comparison.columns}
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": value_text(comparison.results.get((name, column))),
                    "best": name == best[column],
                }
                for column in comparison.columns
            ],
        }
        for name in comparison.encoders
    ]


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for name in comparison.encoders:
        if name == comparison.baseline:
            continue
        changes = [comparison.differences.get((name, column)) for column in comparison.columns]
        cells = [
            {"text": difference_text(change), "over": change.over if change else "",
             "side": 0 if change is None or not change.interval.excludes_zero else 1 if change.interval.low > 0 else -1}
            for change in changes
        ]  # fmt: skip
        rows.append({"name": name, "cells": cells})
    return rows


def _of_column(comparison: Comparison, column: Column) -> dict[str, Any]:
    """Figures by class, or why there are none."""
    results = {r.encoder: r.report for r in _in_order(comparison) if r.column == column}
    reports = list(results.values())
    name = " ".join(column)
    head = {
        "name": name,
        "metric": reports[0].metric,
        "n": reports[0].n,
        "chance": chance_level(reports[0]),
        "matrices": [],
        "by_class": None,
        "unpaired": "",
    }
    if any(not isinstance(r.data.get("num_classes"), int) for r in reports):
        return {**head, "skipped": f"{name}: nothing by class, as its outcomes are not classes"}
    if any(r.data.get("classes") != reports[0].data.get("classes") for r in reports):
        return {**head, "skipped": f"{name}: nothing by class, as the classes are not the same in all results"}
    classes = _classes(reports)
    many = len(classes) > MAX_PAIRED
    return {
        **head,
        "skipped": "",
        "by_class": draw_class_accuracy(name, {e: r.outcomes for e, r in results.items()}, classes),
        "matrices": [] if many else [draw_confusion(e, r.outcomes, classes) for e, r in results.items()],
        "unpaired": f"{name}: not shown, as it has more than {MAX_PAIRED:,} classes" if many else "",
    }


def _classes(reports: Sequence[EvalReport]) -> list[str]:
    known = list(reports[0].data.get("classes") or ())  # type: ignore[call-overload]
    largest = max(int(max(r.outcomes.labels.max(), r.outcomes.predicted.max())) for r in reports)
    return [*known, *(f"class {label}" for label in range(len(known), largest + 1))]


def _looks(comparison: Comparison, load: Load) -> list[ImageComparison]:
    """For each data set, of one report of each encoder: first those of an image encoder alone."""
    found: dict[str, dict[str, EvalReport]] = {}
    for result in sorted(_in_order(comparison), key=lambda r: "encoder" not in r.report.arguments):
        found.setdefault(result.column[0], {}).setdefault(result.encoder, result.report)
    return [
        look(dataset, {name: reports[name] for name in comparison.encoders if name in reports}, load)
        for dataset, reports in found.items()
    ]


def _notes(comparison: Comparison) -> list[str]:
    return [
        f"{result.encoder} by {' '.join(result.column)}: {note}"
        for result in _in_order(comparison)
        for note in result.report.notes
    ]


def _details(result: Result) -> dict[str, Any]:
    """All that is needed to get a number again."""
    report = result.report
    said = report.to_json()
    rows = {
        "arguments": _arguments(report),
        "weights, SHA-256": report.weights_sha256,
        "report": f"{result.path.name}, SHA-256 {sha256_of(result.path)}",
        "metrics, %": ", ".join(f"{name} {value:.2f}" for name, value in report.metrics.items()),
        "by seed, %": ", ".join(f"{value:.2f}" for value in report.by_seed),
        "seeds": ", ".join(f"{name} {value}" for name, value in report.seeds.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in report.versions.items()),
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()),
    }
    return {
        "name": f"{result.encoder}, {' '.join(result.column)}: {value_text(result)} %",
        "rows": {key: value for key, value in rows.items() if value},
        "protocol": json.dumps({key: said[key] for key in ("encoder", "protocol", "data")}, indent=1, default=str),
    }


def _arguments(report: EvalReport) -> str:
    """Returns those arguments of the command that say anything."""
    first = [key for key in ("command", "encoder", "towers") if key in report.arguments]
    ordered = {key: report.arguments[key] for key in dict.fromkeys([*first, *report.arguments])}
    given = {key: value for key, value in ordered.items() if value not in (None, False, [], ())}
    command = given.pop("command", "")
    texts = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for key, v in given.items()}
    return f"{command}: " + "; ".join(f"{key} {text}" for key, text in texts.items()) if command else ""
