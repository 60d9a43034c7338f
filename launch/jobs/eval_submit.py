"""`python -m launch.jobs.eval_submit RUN INDEX STEP` queues the job that judges a checkpoint by an entry of `evals`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.errors import PretrainError
from launch.jobs.eval_jobs import hold, release
from launch.jobs.folder import JobFolder
from launch.jobs.queue import PlannedJob, mend_submission, queue_jobs
from launch.jobs.record import load_job
from launch.slurm.cluster import load_cluster
from pretrain.recipe.files import load_recipe
from pretrain.runtime.run_folder import eval_name, folder_name


def queue_evaluation(run: Path, index: int, step: int) -> None:
    """Holds a checkpoint and queues the job that judges it, with the code of the run's own job.

    What queued one of this entry before and was killed on the way is mended.
    """
    job = JobFolder(run)
    recipe, cluster = load_recipe(job.recipe), load_cluster(job.cluster)
    config = recipe.evals[index]
    entry = eval_name(index, config.kind)
    name = f"{entry}_{folder_name(step)}"
    folder, code = run / "evals" / f"{name}.job", Path(job.submitted()["code"])
    for earlier in run.glob(f"evals/{entry}_step_*.job"):
        mend_submission(earlier)
    if (before := load_job(folder)) is not None and before.released:
        print(f"{name}: job {before.job_id}, which was queued before")
        return
    held = hold(run, entry, step)
    words = ["eval", config.kind, str(held), *config.words(), f"--out={run / 'evals' / name}.json"]
    planned = PlannedJob(folder, f"{recipe.name}-{name}", cluster.one_rank(), {"words": words, "held": str(held)})
    with ExitStack() as undo:
        undo.callback(release, held)
        queue_jobs([planned], code, tell=lambda _, job_id: print(f"{name}: job {job_id}"), may_start=undo.pop_all)


if __name__ == "__main__":
    try:
        queue_evaluation(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
