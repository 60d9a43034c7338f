"""What the evaluations of a run found: of its weights beside their random start, and step by step."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.evals.config import KINDS, ProtocolConfig, config_class
from pretrain.evals.result import EvalReport
from pretrain.evals.uncertainty import Interval
from pretrain.reports.comparison import difference
from pretrain.reports.report_figures import Picture, curve
from pretrain.runtime.run_folder import eval_name

_BY_STEP = re.compile(r"(?P<entry>.+)_step_\d+")  # file names of results that a recipe's `evals` asked for


@dataclass(frozen=True)
class KeptResult:
    """A result in a run's folder; `data` says of which test set, as far as that is known."""

    report: EvalReport
    data: str

    @property
    def question(self) -> str:
        """Equal for results that answer the same, whoever was asked."""
        report = self.report
        found = config_class(report.evaluator).found if report.evaluator in KINDS else frozenset()
        asked = {name: value for name, value in report.protocol.items() if name not in found}
        seeds = {name: value for name, value in report.seeds.items() if name != "init"}
        return json.dumps([report.evaluator, asked, report.data, seeds], sort_keys=True, default=str)

    @property
    def protocol(self) -> str:
        """The protocol in words."""
        report = self.report
        if report.evaluator not in KINDS:
            return report.evaluator
        return config_class(report.evaluator).title.format_map(report.protocol)


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol says of the trained weights, and of the same before training, where it was asked.

    Attributes:
        protocol: in words; with its test set, where several protocols are called alike.
        trained: of the run's weights.
        random: of those that it began with.
        interval: of trained - random, in points of percent.
    """

    protocol: str
    trained: EvalReport
    random: EvalReport | None
    interval: Interval | None

    @property
    def chance(self) -> float | None:
        """What guessing would reach, percent."""
        return chance_level(self.trained)


def kept_results(evals: Path, entries: Sequence[ProtocolConfig]) -> list[KeptResult]:
    """All results in the folder `evals` of a run whose recipe has these entries under `evals`.

    Raises:
        InputError: one of them is damaged.
    """
    tests = {eval_name(index, config.kind): config.test for index, config in enumerate(entries)}
    found = []
    for path in sorted(evals.glob("*.json")):
        report, match = EvalReport.load(path), _BY_STEP.fullmatch(path.stem)
        asked = report.arguments.get("test") or (tests.get(match["entry"]) if match else None)
        found.append(KeptResult(report, str(asked or "")))
    return found


def find_protocol_results(kept: Sequence[KeptResult], weights: Collection[str]) -> list[ProtocolResult]:
    """Results of these very weights, one for each question, beside that of fresh weights, where there is one.

    Args:
        kept: all results of a run.
        weights: SHA-256 of the encoder, and of both towers where there are two.
    """
    trained: dict[str, KeptResult] = {}
    data: dict[str, str] = {}
    for result in kept:
        if result.report.weights_sha256 in weights:
            trained.setdefault(result.question, result)
            data[result.question] = data.get(result.question) or result.data
    names = [result.protocol for result in trained.values()]
    found = []
    for question, result in trained.items():
        fresh = (r.report for r in kept if r.report.encoder["tag"] == "random" and r.question == question)
        random = next(fresh, None)
        interval = difference(result.report, random).interval if random is not None else None
        several = names.count(result.protocol) > 1 and data[question]
        name = f"{result.protocol}, {data[question]}" if several else result.protocol
        found.append(ProtocolResult(name, result.report, random, interval))
    return found


def chance_level(report: EvalReport) -> float | None:
    """What guessing would reach, percent, as the report says; of an older one, which did not, by its counts; None: it
    is not known.
    """
    if report.chance:
        return report.chance.get(report.metric)
    data = report.data
    num_classes, num_captions, num_texts = (data.get(name) for name in ("num_classes", "num_captions", "num_texts"))
    if isinstance(num_classes, int) and num_classes:
        return 100 / num_classes
    if isinstance(num_captions, int) and isinstance(num_texts, int) and report.n and num_texts:
        return 100 * num_captions / report.n / num_texts  # captions that are right for an image, of all texts
    return None


def curves_over_steps(kept: Sequence[KeptResult]) -> list[Picture]:
    """A figure for each question that was asked at several steps; the random start is step 0 of it."""
    values: dict[str, dict[int, float]] = {}
    first: dict[str, KeptResult] = {}
    data: dict[str, str] = {}
    for result in kept:
        step = 0 if result.report.encoder["tag"] == "random" else result.report.encoder.get("step")
        if isinstance(step, int):
            values.setdefault(result.question, {})[step] = result.report.value
            first.setdefault(result.question, result)
            data[result.question] = data.get(result.question) or result.data
    return [_curve(first[question], data[question], found) for question, found in values.items() if len(found) > 1]


def _curve(result: KeptResult, data: str, by_step: Mapping[int, float]) -> Picture:
    report, chance = result.report, chance_level(result.report)
    where = f" on {data}" if data else ""
    steps = sorted(by_step)
    lines = {"chance": chance} if chance is not None else {}
    title = f"{result.protocol}{where}: {report.metric}, %"
    return curve(title, [(result.protocol, steps, [by_step[step] for step in steps])], lines=lines)


def verdict(results: Sequence[ProtocolResult]) -> str:
    """Whether the encoder is better than at its random start, in a sentence or two."""
    compared = [(r.protocol, r.trained, r.random, r.interval) for r in results if r.random and r.interval]
    if not compared:
        return (
            "Whether it is better than its random start was not asked: the same evaluation with --random-init says so."
            if results
            else "Its encoder was not judged yet: `pretrain eval` does that."
        )
    told = []
    for name, trained, random, interval in compared:
        assert random is not None
        assert interval is not None
        word = "better" if interval.low > 0 else "worse" if interval.high < 0 else "not told apart"
        points = f"{interval.difference:+.1f} points, 95 % interval {interval.low:+.1f} to {interval.high:+.1f}"
        told.append(f"{word} by {name} ({trained.value:.1f} % after {random.value:.1f} %, {points})")
    return f"Beside its random start the encoder is {'; '.join(told)}."
