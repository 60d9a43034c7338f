"""`make soak`: 20,000 steps without a disturbance, by which growth is judged; then again, killed every few minutes.

    python -m tests.soak [--steps 20000 | --minutes 60] [--kill-every 3] [--out runs/soak]

The exit status is 1 where something grows, or where the killed run has not ended in the state of the other, to the bit.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.soak import judge
from tests.soak.figure import draw
from tests.soak.local import GLOBAL_SIZE, Bench, Killer, Phase, Settings, prepared, seconds_per_step
from tests.soak.sampler import Sample


def soak(bench: Bench, killer: Killer) -> list[str]:
    """Both phases; returns what is wrong, and prints what was found."""
    began = time.monotonic()
    undisturbed = bench.train("undisturbed")
    print(f"without a disturbance: {bench.settings.steps} steps in {_minutes(began)}", flush=True)
    wrong = judge_growth(undisturbed, bench.settings.every)
    began = time.monotonic()
    killed = bench.train("killed", killer)
    samples, _ = draw_phase(killed)
    whom = ", ".join(f"{what} at {step}" for step, what in killer.kills)
    print(f"killed {len(killer.kills)} times, {_minutes(began)}: {whom}")
    print(f"temporary files: {samples[-1].tempfiles} at its end, {max(sample.tempfiles for sample in samples)} at most")
    print(f"the server: {len(bench.requests)} requests, {sum(map(bool, bench.faults))} answered wrongly on purpose")
    unequal = judge.differences(undisturbed.run, killed.run)
    print("the same to the bit: logged results, newest checkpoint, encoder" if not unequal else "NOT the same")
    return [*wrong, *(f"not the same in the killed run: {what}" for what in unequal)]


def judge_growth(phase: Phase, period: int) -> list[str]:
    """Draws the phase, prints how each measure goes, and returns those that grow, each as a sentence."""
    samples, step_seconds = draw_phase(phase)
    try:
        growths = judge.judge(samples, step_seconds, period)
    except ValueError as error:
        return [f"growth cannot be judged: {error}"]
    print(judge.table(growths), flush=True)
    return [f"{growth.measure} of {growth.who} grows" for growth in growths if growth.grows]


def draw_phase(phase: Phase) -> tuple[list[Sample], dict[int, float]]:
    samples = Sample.read(phase.samples)
    step_seconds = judge.logged_step_seconds(phase.run, GLOBAL_SIZE)
    draw(samples, step_seconds, phase.run.with_suffix(".png"))
    return samples, step_seconds


def _minutes(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} minutes"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of each phase [%(default)s]")
    parser.add_argument("--minutes", type=float, help="of each phase, about, in place of --steps: a short run is timed")
    parser.add_argument("--kill-every", type=float, default=3, help="minutes of training [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the kills and of the server's faults")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder [%(default)s]")
    given = parser.parse_args(words)
    if given.out.exists():
        parser.error(f"--out {given.out}: expected a new folder, found one that is there. Remove it, or name another.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends what it has started
    settings = Settings(given.steps, kill_seconds=60 * given.kill_every, seed=given.seed)
    if given.minutes is not None:
        steps = 60 * given.minutes / seconds_per_step(settings)
        settings = Settings(_whole(steps, settings.every), kill_seconds=60 * given.kill_every, seed=given.seed)
    with prepared(given.out.absolute(), settings) as bench:
        wrong = soak(bench, Killer(settings))
    print("\n".join(wrong) if wrong else "nothing grows")
    print(f"figures, samples and logs: {given.out}")
    return 1 if wrong else 0


def _whole(steps: float, every: int) -> int:
    """A multiple of the period, no fewer than can be judged by."""
    return max(judge.WARM_UP_PERIODS + judge.LEAST_PERIODS + 2, round(steps / every)) * every


if __name__ == "__main__":
    sys.exit(main())
