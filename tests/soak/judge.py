"""Whether something grows in a run, by what was sampled; and whether two runs have ended in the same state.

Of each measure the least value is taken in each period, which is from one evaluation and save to the next: what comes
and goes within a period drops out, and what is left behind stays. Through the periods of the second half of the run
goes a line of Theil and Sen: the median of the slopes between any two of them, with the bounds of its 95 % interval. A
measure grows where even the lower bound is above the limit.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from scipy.stats import theilslopes

from data_pipeline.durable import read_lines
from pretrain.runtime.run_folder import complete_checkpoints
from tests.soak.sampler import Sample

ALL = "all"  # the run's processes together
OTHERS = "others"  # those together that are not judged by themselves, as they live shortly
WARM_UP_PERIODS = 20  # are never judged: the heaps of a run that evaluates and saves rise by MB until they have settled
LEAST_PERIODS = 8  # judged, or nothing is
PRESENT = 0.8  # share of the samples in which a process is to be seen, to be judged by itself
CONFIDENCE = 0.95

# What a period may leave behind. A leak of one file, or of 100 kB, at each save or evaluation is twice as much.
LIMITS: dict[str, float] = {
    "memory": 50_000, "files": 0.5, "threads": 0.5, "mappings": 0.5, "tempfiles": 0.5, "processes": 0.5,
}  # fmt: skip
# Share by which time may rise over the judged periods together. Others' work on the machine slows a run for a while:
# hence the greater limit for time on the clock, which depends on it the more, and the least value of each period.
RISES: dict[str, float] = {"cpu per step": 0.25, "seconds per step": 0.5}


@dataclass(frozen=True)
class Growth:
    """How one measure goes over the judged periods.

    Attributes:
        who: the process, or OTHERS, or ALL.
        measure: what was measured: a key of LIMITS or RISES.
        level: the median of the judged periods.
        per_period: its rise from a period to the next.
        at_least: the lower bound of that.
        limit: what `at_least` may be; None: the measure is shown and not judged.
        period: steps of a period.
        periods: judged ones that have a value.
    """

    who: str
    measure: str
    level: float
    per_period: float
    at_least: float
    limit: float | None
    period: int
    periods: int

    @property
    def grows(self) -> bool:
        return self.limit is not None and self.at_least > self.limit

    @property
    def per_1000_steps(self) -> float:
        return 1000 / self.period * self.per_period


Points = list[tuple[int, float]]  # (step, value)


def judge(samples: Sequence[Sample], step_seconds: Mapping[int, float], period: int) -> list[Growth]:
    """How each measure goes in the second half of a run that was not disturbed, the warm-up left out.

    Args:
        samples: of the run.
        step_seconds: logged step -> seconds of one step since the step logged before.
        period: steps from one evaluation and save to the next.

    Raises:
        ValueError: the samples are of too few periods to judge by.
    """
    last = max((sample.step for sample in samples), default=0)
    first = max(last / 2, WARM_UP_PERIODS * period)
    judged = [sample for sample in samples if sample.step >= first]
    found = [
        _growth(who, measure, _by_period(points, period, min), LIMITS.get(measure), period)
        for (who, measure), points in _points(judged).items()
    ]
    for who, points in _cpu_points(judged).items():
        rates = _rates(points, period)
        found.append(_growth(who, "cpu per step", rates, _limit(rates, RISES["cpu per step"]), period))
    times = _by_period([point for point in step_seconds.items() if point[0] >= first], period, min)
    found.append(_growth(ALL, "seconds per step", times, _limit(times, RISES["seconds per step"]), period))
    return found


def _points(samples: Sequence[Sample]) -> dict[tuple[str, str], Points]:
    """By process and measure."""
    found: dict[tuple[str, str], Points] = {}

    def add(who: str, measure: str, step: int, value: float) -> None:
        found.setdefault((who, measure), []).append((step, value))

    lasting = _lasting(samples)
    for sample in samples:
        add(ALL, "tempfiles", sample.step, sample.tempfiles)
        add(ALL, "processes", sample.step, len(sample.processes))
        for measure in ("pss", "memory", "files", "threads", "mappings"):
            others = 0.0
            for process in sample.processes:
                value = float(getattr(process, measure))
                if process.name in lasting:
                    add(process.name, measure, sample.step, value)
                else:
                    others += value
            add(OTHERS, measure, sample.step, others)
    return found


def _lasting(samples: Sequence[Sample]) -> set[str]:
    seen = Counter(process.name for sample in samples for process in sample.processes)
    return {name for name, count in seen.items() if count >= PRESENT * len(samples)}


def _cpu_points(samples: Sequence[Sample]) -> dict[str, Points]:
    found: dict[str, Points] = {name: [] for name in sorted(_lasting(samples))}
    for sample in samples:
        for process in sample.processes:
            if process.name in found:
                found[process.name].append((sample.step, process.cpu))
    return found


def _by_period(points: Iterable[tuple[int, float]], period: int, keep: Callable[[list[float]], float]) -> Points:
    values: dict[int, list[float]] = {}
    for step, value in points:
        values.setdefault(step // period, []).append(value)
    return [(number, keep(values[number])) for number in sorted(values)]


def _rates(points: Points, period: int) -> Points:
    """Of a count that rises: by how much a step, from the first sample of each period to that of the next one seen."""
    firsts: dict[int, tuple[int, float]] = {}
    for step, value in points:
        firsts.setdefault(step // period, (step, value))
    numbers = sorted(firsts)
    return [
        (number, (firsts[after][1] - firsts[number][1]) / (firsts[after][0] - firsts[number][0]))
        for number, after in pairwise(numbers)
    ]


def _limit(points: Points, rise: float) -> float:
    """Per period, so that the judged ones together rise by that share of their median."""
    numbers = [number for number, _ in points] or [0]
    return rise * statistics.median([value for _, value in points] or [0.0]) / max(1, numbers[-1] - numbers[0])


def _growth(who: str, measure: str, points: Points, limit: float | None, period: int) -> Growth:
    if len(points) < LEAST_PERIODS:
        raise ValueError(
            f"{who}, {measure}: expected samples of {LEAST_PERIODS} periods of {period} steps or more in the second "
            f"half of the run and after its first {WARM_UP_PERIODS} periods, found {len(points)}. Take more steps, or "
            "sample more often."
        )
    numbers, values = [number for number, _ in points], [value for _, value in points]
    slope, _, low, _ = theilslopes(values, numbers, alpha=CONFIDENCE)
    return Growth(who, measure, statistics.median(values), float(slope), float(low), limit, period, len(points))


def logged_step_seconds(run: Path, global_size: int) -> dict[int, float]:
    """Logged step -> seconds of one step since the step logged before, evaluations and saves left out."""
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: global_size / line["images_per_second"] for line in lines if "images_per_second" in line}


# By which a run is the same whatever happens to it; what else is logged is of time and of what it ran on.
RESULTS = ("loss", "grad_norm", "lr", "samples_seen", "skipped_steps", "bad_samples")


def differences(whole: Path, other: Path) -> list[str]:
    """What is not the same to the bit in two runs of one recipe: logged results, newest checkpoint, encoder."""
    found = []
    logs = [_results(run) for run in (whole, other)]
    keys = sorted(logs[0].keys() | logs[1].keys())
    unequal = [key for key in keys if logs[0].get(key) != logs[1].get(key)]
    if not keys or unequal:
        first = f"; the first is {unequal[0][1]} at step {unequal[0][0]}" if unequal else ""
        found.append(f"{len(unequal)} of {len(keys)} logged results{first}")
    for what, files in (("checkpoint", _newest_tensors), ("encoder", _encoder)):
        contents = [{path.name: path.read_bytes() for path in files(run)} for run in (whole, other)]
        if not contents[0] or contents[0] != contents[1]:
            found.append(f"the {what}: {sorted(contents[0])} and {sorted(contents[1])}")
    return found


def _results(run: Path) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): value
        for line in read_lines(run / "metrics.jsonl")
        for name, value in line.items()
        if name in RESULTS or name.startswith(("val/", "knn/"))
    }


def _newest_tensors(run: Path) -> list[Path]:
    return sorted(complete_checkpoints(run / "checkpoints")[-1].glob("*.safetensors"))


def _encoder(run: Path) -> list[Path]:
    return sorted((run / "encoder").iterdir())


def table(growths: Sequence[Growth]) -> str:
    """A line for each, those that grow first."""
    rows = [("", "process", "measure", "level", "per 1,000 steps", "at least", "limit")]
    for growth in sorted(growths, key=lambda growth: (not growth.grows, growth.measure, growth.who)):
        scale = 1000 / growth.period
        limit = "-" if growth.limit is None else _number(scale * growth.limit)
        figures = (growth.level, growth.per_1000_steps, scale * growth.at_least)
        level, rise, low = map(_number, figures)
        rows.append(("GROWS" if growth.grows else "", growth.who, growth.measure, level, rise, low, limit))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
