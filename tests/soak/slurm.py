"""`python -m tests.soak.slurm`: twenty disturbances of a job, drawn at random, and no hand on it; half an hour.

Compares with an uninterrupted run, to the bit, and prints what was done and where the time went. Its ranks are sampled
and drawn like those of the soak on this machine; growth is not judged, as no attempt is long enough for that.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pretrain.monitoring.goodput import read_goodput
from tests.runs import train
from tests.slurm.cluster import NODES, slurm_cluster
from tests.slurm.jobs import Place, Submitted, write_slurm_recipe
from tests.soak.figure import draw
from tests.soak.judge import differences, logged_step_seconds
from tests.soak.sampler import Sample, Sampler

DISTURBANCES = 20
STEPS = 1200


def main(seed: int, disturbances: int, out: Path) -> int:
    rng = random.Random(seed)
    steps = STEPS * disturbances // DISTURBANCES
    with slurm_cluster() as cluster:
        place = Place(cluster, out)
        recipe = write_slurm_recipe(place.folder)
        train(recipe, place.folder / "whole", 2, f"schedule.steps={steps}")
        sets = (f"schedule.steps={steps}", "runtime.step_timeout_seconds=10")
        words = [word for one in sets for word in ("--set", one)]
        job = place.submit("run", *words, max_requeues=3 * disturbances, time_minutes=60)
        began = time.monotonic()
        temporary = place.folder / "tmp"  # of nobody: those of the nodes are not the run's alone
        with Sampler(lambda: _named_ranks(job), job.run, out / "run.samples.jsonl", temporary=temporary,
                     watched=(job.run,)):  # fmt: skip
            for number in range(1, disturbances + 1):
                _disturb(job, number, rng, steps)
            job.wait_until_over(1200)
        draw(Sample.read(out / "run.samples.jsonl"), logged_step_seconds(job.run, 8), out / "run.png")
        unequal = differences(place.folder / "whole", job.run)
        print(f"{job.events().count('start')} attempts, {time.monotonic() - began:.0f} s; ended as {job.events()[-1]}")
        print("\n".join(unequal) or "the same to the bit: logged results, newest checkpoint, encoder")
        print(read_goodput(job.run))
        if unequal or job.events()[-1] != "done":
            print(job.told())
            return 1
        return 0


def _disturb(job: Submitted, number: int, rng: random.Random, steps: int) -> None:
    """Some steps after the last disturbance; returns once another attempt has begun, or the run has ended."""
    aim = min(job.step() + rng.randrange(15, 40), steps - 1)
    job.wait(lambda: job.step() >= aim and len(job.rank_pids()) == 2, 300, f"step {aim}")
    what = rng.choice(list(KINDS))
    events = len(job.events())
    KINDS[what](job, rng)
    print(f"{number:2} step {job.step():4} {what}", flush=True)
    job.wait(lambda: "start" in job.events()[events:] or job.said_its_end(), 300, f"another attempt after {what}")


def _named_ranks(job: Submitted) -> dict[str, int]:
    return {f"rank {rank}": pid for rank, pid in enumerate(job.rank_pids())}


def _signal_all(name: str) -> Callable[[Submitted, random.Random], None]:
    return lambda job, rng: print(end=job.cluster.run("scancel", f"--signal={name}", job.job_id))


def _signal_rank(signum: int) -> Callable[[Submitted, random.Random], None]:
    def harm(job: Submitted, rng: random.Random) -> None:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(job.rank_pids()), signum)

    return harm


def _lose_a_node(job: Submitted, rng: random.Random) -> None:
    node = rng.choice(NODES)
    job.cluster.lose(node)
    time.sleep(2)
    job.cluster.start_slurmd(node)


KINDS: dict[str, Callable[[Submitted, random.Random], None]] = {
    "warning of the time limit": _signal_all("USR2"),
    "termination": _signal_all("TERM"),
    "scontrol requeue": lambda job, rng: print(end=job.cluster.run("scontrol", "requeue", job.job_id)),
    "SIGKILL of a rank": _signal_rank(signal.SIGKILL),
    "SIGSTOP of a rank": _signal_rank(signal.SIGSTOP),
    "a node lost": _lose_a_node,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak.slurm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    parser.add_argument("--disturbances", type=int, default=DISTURBANCES, help="and 60 steps for each [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    sys.exit(main(given.seed, given.disturbances, given.out.absolute()))
