"""`python -m tests.slurm.soak`: twenty disturbances of one run, drawn at random, and no hand on it; half an hour.

Compares with an uninterrupted run, to the bit, and prints what was done and where the time went.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pretrain.monitoring.goodput import read_goodput
from tests.runs import losses, train
from tests.slurm.cluster import NODES, slurm_cluster
from tests.slurm.jobs import Place, Submitted, write_slurm_recipe

DISTURBANCES = 20
STEPS = 1200


def main(seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, slurm_cluster() as cluster:
        place = Place(cluster, Path(name))
        recipe = write_slurm_recipe(place.folder)
        train(recipe, place.folder / "whole", 2, f"schedule.steps={STEPS}")
        sets = (f"schedule.steps={STEPS}", "runtime.step_timeout_seconds=10")
        job = place.submit("run", *(word for one in sets for word in ("--set", one)), max_requeues=60, time_minutes=60)
        began = time.monotonic()
        for number in range(1, DISTURBANCES + 1):
            at = job.step()
            aim = min(at + rng.randrange(15, 40), STEPS - 1)
            job.wait(lambda aim=aim: job.step() >= aim and len(job.rank_pids()) == 2, 300, f"step {aim}")
            what = rng.choice(list(KINDS))
            events = len(job.events())
            KINDS[what](job, rng)
            print(f"{number:2} step {job.step():4} {what}", flush=True)
            job.wait(
                lambda n=events: "start" in job.events()[n:] or job.said_its_end(), 300, f"another attempt after {what}"
            )
        job.wait_until_over(1200)
        whole, run = losses(place.folder / "whole"), losses(job.run)
        equal = sum(run.get(step) == loss for step, loss in whole.items())
        print(f"{equal} of {len(whole)} losses equal to the bit; {job.events().count('start')} attempts, "
              f"{time.monotonic() - began:.0f} s; ended as {job.events()[-1]}")  # fmt: skip
        print(read_goodput(job.run))
        if equal != len(whole) or job.events()[-1] != "done":
            print(job.told())
            sys.exit(1)


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
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
