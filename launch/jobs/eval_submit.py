"""`python -m launch.jobs.eval_submit RUN INDEX STEP` queues the job that judges a checkpoint by an entry of `evals`."""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.errors import PretrainError
from launch.jobs.eval_jobs import hold, let_go
from launch.jobs.folder import JobFolder
from launch.jobs.submit import queue
from launch.slurm.cluster import load_cluster
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import InlineKnn
from pretrain.runtime.run_folder import eval_name, folder_name


def queue_evaluation(run: Path, index: int, step: int) -> None:
    """Holds a checkpoint and queues the job that judges it."""
    job = JobFolder(run)
    recipe, cluster = load_recipe(job.recipe), load_cluster(job.cluster)
    name = f"{eval_name(index)}_{folder_name(step)}"
    held = hold(run, index, step)
    words = _words(recipe.evals[index], held, run / "evals" / f"{name}.json")
    folder, code = run / "evals" / f"{name}.job", Path(job.submitted()["code"])
    what = {"words": words, "held": str(held)}
    try:
        job_id = queue(folder, f"{recipe.name}-{name}", cluster.one_rank(), code, what)
    except PretrainError:
        let_go(held)
        raise
    print(f"{name}: job {job_id}")


def _words(config: InlineKnn, checkpoint: Path, report: Path) -> list[str]:
    options = {
        "train": config.train, "test": config.test, "k": config.k, "temperature": config.temperature,
        "limit-train": config.max_train, "limit-test": config.max_test, "out": report,
    }  # fmt: skip
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return ["eval", config.kind, str(checkpoint), *given]


if __name__ == "__main__":
    try:
        queue_evaluation(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
