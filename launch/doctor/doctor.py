"""`pretrain doctor`: what would go wrong, found before anything is started; the checks are in launch/checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import PretrainError
from launch.doctor import machine, storage
from launch.doctor.cluster import slurm
from launch.doctor.finding import Finding, of_error

if TYPE_CHECKING:
    from launch.doctor.recipe import Free
    from launch.slurm.cluster import Cluster
    from pretrain.recipe.recipe import Recipe


def examine(
    recipe_path: Path | None, overrides: list[str], cluster_path: Path | None, num_ranks: int, out: Path | None
) -> int:
    """Prints every finding as it is made; returns the exit status, 1 where one is an error.

    Args:
        recipe_path: None: the machine alone is looked at.
        cluster_path: of a cluster file; then ranks and memory are the cluster's, and GPUs are not looked for here.
        num_ranks: on this machine, without a cluster file.
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
    """Everything, the quick checks first; as of `examine`."""
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
        yield of_error("recipe" if recipe_path is not None and recipe is None else "cluster", raised)
    yield from machine.python()
    yield from machine.packages()
    yield from slurm(cluster)
    out = out or Path("runs", *([recipe.name] if recipe is not None else []))
    yield from storage.writable(out)
    if cluster is not None:
        yield from storage.shared(out, cluster.nodes)
    device = recipe.runtime.device if recipe is not None and cluster is None else "cpu"
    yield from machine.cuda(device, num_ranks)
    if recipe is None:
        yield from machine.open_files()
    else:
        yield from of_recipe(recipe, cluster, num_ranks, out)


def of_recipe(recipe: Recipe, cluster: Cluster | None, num_ranks: int, out: Path) -> Iterator[Finding]:
    """Data, memory and disk that a recipe takes."""
    from launch.doctor import recipe as checks
    from pretrain.plan import build_on_meta, footprint

    local = num_ranks if cluster is None else cluster.ranks_per_node
    ranks = checks.Ranks(num_ranks if cluster is None else cluster.nodes * local, local)
    plan = None
    remote = list(checks.reachable(recipe))
    yield from remote
    if not any(finding.level == "error" for finding in remote):
        found = list(checks.data(recipe, ranks))
        yield from found
        if found[0].level == "ok":
            plan, fitting = checks.fits(recipe, ranks, out, evals_apart=cluster is not None and cluster.evals_apart)
            yield from fitting
            if plan is not None and cluster is None:
                yield from checks.workers(recipe, plan, ranks)
    try:
        needs = footprint(
            build_on_meta(recipe.model, recipe.objective) if plan is None else plan.objective,
            recipe.optim,
            recipe.engine,
            recipe.ema,
            world_size=ranks.total,
            probe_bytes=0 if plan is None else plan.probe_bytes,
        )
    except PretrainError as raised:
        yield of_error("model", raised)
        return
    yield from storage.disk_space(out, needs.checkpoint, recipe.checkpoint.keep_last)
    yield from checks.memory(needs, ranks, _free(recipe, cluster))


def _free(recipe: Recipe, cluster: Cluster | None) -> Free:
    """Of this machine, or of a node as the cluster file asks for it; a GPU is seen here alone, the fullest counts."""
    import torch

    from launch.doctor.recipe import Free

    if cluster is not None:
        on_gpu = recipe.runtime.device != "cpu" and bool(cluster.gpus_per_node)
        return Free(cluster.memory_gb * 1e9 if cluster.memory_gb else None, None, on_gpu)
    on_gpu = recipe.runtime.device != "cpu" and torch.cuda.is_available()
    gpus = range(torch.cuda.device_count() if on_gpu else 0)
    free = [float(torch.cuda.mem_get_info(i)[0]) for i in gpus]
    return Free(float(machine.available_memory()), min(free, default=None), on_gpu)
