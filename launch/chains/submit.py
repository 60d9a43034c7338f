"""`pretrain chain FILE --cluster C`: a job for each stage that is left, started when those it takes from are done."""

from __future__ import annotations

from pathlib import Path

from launch.chains.check import Evaluations, check_chain
from launch.chains.config import Stage, stage_words
from launch.chains.folder import ChainFolder
from launch.chains.stage_job import StageJob, stage_record
from launch.jobs.queue import PlannedJob
from launch.jobs.submission import submit_jobs
from launch.slurm.cluster import Cluster, load_cluster
from pretrain.recipe.files import dump


def submit_chain(
    path: Path, cluster_path: Path, out: Path | None, evaluations: Evaluations, *, dry_run: bool = False
) -> None:
    """Queues what is left of a chain: training on the whole cluster file, other stages on one rank's share of it.

    A stage whose job fails has those that wait for it dropped; the same command then queues what is left.

    Args:
        path: the chain's file; jobs run a copy.
        cluster_path: the cluster file.
        out: the chain's folder, on storage that all nodes see; None: `runs/<name>`.
        evaluations: as of `check_chain`.
        dry_run: print the batch scripts; write and start nothing.

    Raises:
        InputError: something is wrong; nothing was started.
        RunError: SLURM refused a job; no job is left in its queue.
    """
    given, cluster = ChainFolder.open(path, out), load_cluster(cluster_path)
    chain = ChainFolder(given.chain, given.folder, given.out.resolve())
    check_chain(chain, cluster.world_size, evaluations)
    left = _left(chain)
    jobs = [_planned(chain, chain.stage(name), cluster, left) for name in left]

    def tell(job: PlannedJob, job_id: str) -> None:
        name = left[jobs.index(job)]
        after = [other for other in chain.references(chain.stage(name)) if other in left]
        waits = f", after {', '.join(after)}" if after else ""
        print(f"{name}: job {job_id}{waits}: {job.folder}")

    others = [path.parent.parent for path in chain.out.glob("*/job/submitted.json")]  # of stages that were taken out
    submit_jobs(jobs, cluster_path, chain.out, beside=others, dry_run=dry_run, prepare=chain.freeze, tell=tell)
    if left and not dry_run:
        print(f"follow it: pretrain status {chain.out}; stop it: pretrain cancel {chain.out}")


def _left(chain: ChainFolder) -> list[str]:
    """Returns the names of the stages that are not done, in their order; prints those that are.

    Raises:
        InputError: a stage was begun with other settings, or what it left is not what it was.
    """
    left: list[str] = []
    for stage in chain.stages:
        if set(left) & set(chain.references(stage)):
            chain.refuse_other_settings(stage)
            left.append(stage.name)
        elif chain.is_done(stage, begin=False):
            print(f"{stage.name}: done before")
        else:
            left.append(stage.name)
    return left


def _planned(chain: ChainFolder, stage: Stage, cluster: Cluster, left: list[str]) -> PlannedJob:
    """Plans the job of a stage, which waits for the jobs of those stages among `left` that it takes from."""
    record = {"chain": stage_record(chain, stage)}
    after = tuple(job_folder(chain, chain.stage(name)) for name in chain.references(stage) if name in left)
    folder, name = job_folder(chain, stage), f"{chain.chain.name}-{stage.name}"
    if stage.train is not None:
        return PlannedJob(folder, name, cluster, record, dump(chain.recipe(stage)), after, StageJob)
    words = stage_words(stage, chain.folder, chain.out, 1)
    return PlannedJob(folder, name, cluster.one_rank(), {"words": words, **record}, None, after, StageJob)


def job_folder(chain: ChainFolder, stage: Stage) -> Path:
    """Returns the folder in which a stage's job is kept: the run's, or one beside the command's output."""
    return stage.output(chain.out) if stage.train is not None else chain.out / f"{stage.name}.job"
