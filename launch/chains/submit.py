"""`pretrain chain FILE --cluster C`: a job for each stage that is left, started when those it takes from are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from launch.chains.check import check_chain
from launch.chains.config import Stage, words_of
from launch.chains.folder import ChainFolder
from launch.jobs.folder import JobFolder
from launch.jobs.submit import check_folder, check_slurm, copy_code, digest_of_code, queue, refuse_running, script
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import slurm
from pretrain.recipe.files import dump


def submit_chain(path: Path, cluster_path: Path, out: Path | None, *, dry_run: bool = False) -> None:
    """Queues what is left of a chain: training on the whole cluster file, other stages on one rank's share of it.

    A stage whose job fails has those that wait for it dropped; the same command then queues what is left.

    Args:
        path: of the chain's recipe; jobs run a copy.
        cluster_path: what is asked of SLURM.
        out: the chain's folder, on storage that all nodes see; None: `runs/<name>`.
        dry_run: print the batch scripts; write and start nothing.

    Raises:
        InputError: of whatever is wrong; nothing was started.
        RunError: SLURM refused.
    """
    given, cluster = ChainFolder.of(path, out), load_cluster(cluster_path)
    chain = ChainFolder(given.chain, given.folder, given.out.resolve())
    check_chain(chain, cluster.world_size)
    check_slurm(cluster, cluster_path, dry_run)
    if any(stage.train is None for stage in chain.stages):
        check_slurm(cluster.one_rank(), cluster_path, dry_run)
    for submitted in chain.out.glob("*/job/submitted.json"):  # also of stages that the file no longer has
        refuse_running(submitted.parent.parent)
    left = _left(chain)
    code = chain.out / "code" / digest_of_code()
    if not dry_run:
        check_folder(chain.out)
        copy_code(code)
        chain = chain.freeze()
    jobs: dict[str, str] = {}
    try:
        for stage in map(chain.stage, left):
            after = [name for name in chain.references(stage) if name in jobs]
            jobs[stage.name] = _queue(chain, stage, cluster, code, [jobs[name] for name in after], dry_run)
            if not dry_run:
                waits = f", after {', '.join(after)}" if after else ""
                print(f"{stage.name}: job {jobs[stage.name]}{waits}: {job_folder(chain, stage)}")
    except RunError:
        if jobs and not dry_run:
            slurm("scancel", *jobs.values())  # all or nothing
        raise
    if left and not dry_run:
        print(f"follow it: pretrain status {chain.out}; stop it: pretrain cancel {chain.out}")


def _left(chain: ChainFolder) -> list[str]:
    """Names of the stages that are not done, in their order; those that are, are told.

    Raises:
        InputError: one was begun otherwise, or is not what it was.
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


def _queue(chain: ChainFolder, stage: Stage, cluster: Cluster, code: Path, after: Sequence[str], dry_run: bool) -> str:
    """Returns the job's id, or what stands for it in a dry run, which prints the script."""
    folder, name = job_folder(chain, stage), f"{chain.chain.name}-{stage.name}"
    asked = cluster if stage.train is not None else cluster.one_rank()
    if dry_run:
        print(script(folder, name, asked, code, after))
        return f"<job of {stage.name}>"
    return queue(folder, name, asked, code, _what(chain, stage), after=after)


def job_folder(chain: ChainFolder, stage: Stage) -> Path:
    """Where a stage's job is kept: the run's folder, or one beside what the command makes."""
    return stage.output(chain.out) if stage.train is not None else chain.out / f"{stage.name}.job"


def _what(chain: ChainFolder, stage: Stage) -> dict[str, Any]:
    here = {"file": str(chain.folder / "chain.yaml"), "out": str(chain.out), "stage": stage.name}
    if stage.train is None:
        return {"words": words_of(stage, chain.folder, chain.out, 1), "chain": here}
    JobFolder(job_folder(chain, stage)).write("recipe.yaml", dump(chain.recipe(stage)))
    return {"chain": here}
