"""`pretrain doctor` finds what would go wrong before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import PretrainError
from launch.doctor import machine, storage
from launch.slurm.checks import check_folder_name, check_slurm
from launch.slurm.finding import Finding, from_error

if TYPE_CHECKING:
    from launch.doctor.recipe import CheckedRun, Free
    from launch.slurm.cluster import Cluster
    from pretrain.plan import Footprint
    from pretrain.preflight import Plan
    from pretrain.recipe.recipe import Recipe


def examine(
    recipe_path: Path | None, overrides: list[str], cluster_path: Path | None, num_ranks: int, out: Path | None
) -> int:
    """Prints every finding as it is made; returns the exit status, 1 where one is an error.

    Args:
        recipe_path: None: the machine alone is looked at.
        cluster_path: a cluster file; then ranks and memory are the cluster's, and GPUs are not looked for here.
        num_ranks: processes on this machine, without a cluster file.
        out: the run's folder; None: `runs/<name of the recipe>`.
    """
    counts: Counter[str] = Counter()
    for finding in findings(recipe_path, overrides, cluster_path, num_ranks, out):
        counts[finding.level] += 1
        print(finding, flush=True)
    print(f"{counts['error']} error(s), {counts['warning']} warning(s)")
    return 1 if counts["error"] else 0


def findings(
    recipe_path: Path | None, overrides: list[str], cluster_path: Path | None, num_ranks: int, out: Path | None
) -> Iterator[Finding]:
    """Yields what every check finds, the quick checks first; arguments as of `examine`."""
    recipe: Recipe | None = None
    cluster: Cluster | None = None
    try:
        if recipe_path is not None:
            from pretrain.recipe.files import load_recipe

            recipe = load_recipe(recipe_path, overrides)
        if cluster_path is not None:
            from launch.slurm.cluster import load_cluster

            cluster = load_cluster(cluster_path)
    except PretrainError as raised:
        yield from_error("recipe" if recipe_path is not None and recipe is None else "cluster", raised)
    yield from machine.python()
    yield from machine.packages()
    yield from check_slurm(cluster)
    out = out or Path("runs", *([recipe.name] if recipe is not None else []))
    yield from storage.writable(out)
    if cluster is not None:
        yield from check_folder_name(out)
        yield from storage.shared(out, cluster.nodes)
    device = recipe.runtime.device if recipe is not None and cluster is None else "cpu"
    yield from machine.cuda(device, num_ranks)
    if recipe is None:
        yield from machine.open_files()
        return
    from launch.doctor.precision import precision
    from launch.doctor.recipe import CheckedRun, Ranks
    from pretrain.objectives.kinds import build_objective
    from pretrain.plan import build_on_meta, footprint
    from pretrain.preflight import preflight

    whole: Recipe = recipe
    ranks = Ranks(num_ranks, num_ranks) if cluster is None else Ranks(cluster.world_size, cluster.ranks_per_node)

    def count(plan: Plan | None) -> Footprint:
        objective = build_on_meta(whole.model, whole.objective) if plan is None else plan.objective
        counted = (objective, whole.optim, whole.engine, whole.ema)
        return footprint(*counted, world_size=ranks.total, probe_bytes=0 if plan is None else plan.probe_bytes)

    run = CheckedRun(
        name=recipe.name,
        data=recipe.data,
        eval_paths=tuple(path for config in recipe.evals for path in config.datasets),
        num_workers=recipe.runtime.num_workers,
        keep_last=recipe.checkpoint.keep_last,
        ranks=ranks,
        preflight=partial(
            preflight, recipe, ranks.total, out, ranks.local, evals_apart=cluster is not None and cluster.evals_apart
        ),
        footprint=count,
    )
    yield from run_findings(run, recipe.runtime.device, cluster, out)
    if cluster is None:
        build = partial(build_objective, whole.model, whole.objective)
        yield from precision(recipe.engine.precision, recipe.runtime.device, recipe.resume_from, out, build)


def run_findings(run: CheckedRun, device: str, cluster: Cluster | None, out: Path) -> Iterator[Finding]:
    """Checks the data, memory and disk that a run takes.

    Args:
        device: the recipe's runtime.device.
        cluster: None: the run is started on this machine.
        out: the run's folder.
    """
    from launch.doctor import recipe as checks

    plan = None
    remote = list(checks.reachable(run.data, run.eval_paths))
    yield from remote
    if not any(finding.level == "error" for finding in remote):
        found = list(checks.training_data(run.data, run.num_workers, run.ranks))
        yield from found
        if found[0].level == "ok":
            plan, fitting = checks.fits(run.name, run.preflight)
            yield from fitting
            if plan is not None and cluster is None:
                yield from checks.workers(run.num_workers, plan, run.ranks)
    try:
        needs = run.footprint(plan)
    except PretrainError as raised:
        yield from_error("model", raised)
        return
    yield from storage.disk_space(out, needs.checkpoint, run.keep_last)
    yield from checks.memory(needs, run.ranks, _free_memory(device, cluster))


def _free_memory(device: str, cluster: Cluster | None) -> Free:
    """Returns what is free on this machine, or on a node as the cluster file asks for it; GPUs are seen here alone, and
    the fullest counts.
    """
    import torch

    from launch.doctor.recipe import Free

    if cluster is not None:
        on_gpu = device != "cpu" and bool(cluster.gpus_per_node)
        return Free(cluster.memory_gb * 1e9 if cluster.memory_gb else None, None, on_gpu)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    gpus = range(torch.cuda.device_count() if on_gpu else 0)
    free = [float(torch.cuda.mem_get_info(i)[0]) for i in gpus]
    return Free(float(machine.available_memory()), min(free, default=None), on_gpu)
