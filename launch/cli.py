"""The console script `pretrain`. Whatever a command needs is imported inside it, so that help is instant."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import InputError, PretrainError
from pretrain.runtime import lean_imports


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    help="Pretrain vision encoders: WebDataset tars in, judged encoders out.",
    epilog=_examples(
        "pretrain demo",
        "pretrain data convert images.tar.gz data/images --split-by-folder",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain eval knn runs/mae_cifar10 --train data/cifar10/train --test data/cifar10/test",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as configs/recipes/*.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the recipe; may be repeated."),
]
NumRanks = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine.")]


def main() -> int:
    """The entry point, and the one place where an error becomes a message and an exit status."""
    lean_imports.install()
    try:
        app(prog_name="pretrain")
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("pretrain"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Prints the version and exits."),
    ] = False,
) -> None:
    """What stands before the command; the help is the application's own."""


@app.command(
    epilog=_examples(
        "pretrain show configs/recipes/mae_vit_b16.yaml --nproc 8",
        "pretrain show configs/recipes/mae_vit_b16.yaml --set batch.global_size=512",
    )
)
def show(recipe_path: RecipePath, overrides: Overrides = None, num_ranks: NumRanks = 1) -> None:
    """Prints a recipe with every value written out, and what follows from it at a number of processes."""
    from pretrain.recipe.files import dump, load_recipe, resolved_yaml
    from pretrain.recipe.resolve import resolve, split_batch

    recipe = load_recipe(recipe_path, overrides)
    split_batch(recipe, num_ranks)
    from data_pipeline.datasets.mixture import open_training
    from data_pipeline.errors import DataError

    try:
        num_samples = open_training(recipe.data.train, recipe.data.cache.spec()).num_samples
    except DataError as error:
        print(dump(recipe), end="")
        print(f"Without the data, no number of steps: {error}", file=sys.stderr)
    else:
        print(resolved_yaml(recipe, resolve(recipe, num_ranks, num_samples)), end="")


@app.command(
    epilog=_examples(
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --set optim.base_lr=3e-4 --out runs/lr3",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --max-steps 20 --overfit-batch",
    )
)
def train(
    recipe_path: RecipePath,
    num_ranks: NumRanks = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run [runs/<name of the recipe>].")
    ] = None,
    overrides: Overrides = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stops after so many steps, to debug.")] = None,
    overfit_batch: Annotated[
        bool, typer.Option("--overfit-batch", help="Trains on the first batch only, to debug.")
    ] = False,
    profile: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Writes a PyTorch trace of N steps to RUN/profile.")
    ] = None,
) -> None:
    """Trains a recipe on this machine, or goes on with a run that was interrupted."""
    from pretrain import __main__ as rank
    from pretrain.recipe.files import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    out = out or rank.default_out(recipe)
    arguments = [str(recipe_path), "--out", str(out)]
    arguments += [f"--set={override}" for override in overrides or []]
    arguments += ["--max-steps", str(max_steps)] if max_steps else []
    arguments += ["--overfit-batch"] if overfit_batch else []
    arguments += ["--profile", str(profile)] if profile else []
    if num_ranks == 1:
        raise typer.Exit(rank.main(arguments))
    from launch.ranks.launcher import launch
    from pretrain.preflight import preflight
    from pretrain.run import output_folder

    preflight(recipe, num_ranks, output_folder(out, overfit_batch))  # one message, before anything is started
    raise typer.Exit(launch(arguments, num_ranks, threads=recipe.runtime.threads))


@app.command(
    epilog=_examples(
        "pretrain submit configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --nodes 4",
        "pretrain submit configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --dry-run",
        "pretrain submit configs/recipes/cpu/mae_cifar10.yaml --cluster configs/cluster/two_nodes.yaml --local",
    )
)
def submit(
    recipe_path: RecipePath,
    cluster_path: Annotated[
        Path, typer.Option("--cluster", metavar="FILE", help="What is asked of SLURM, such as configs/cluster/*.yaml.")
    ],
    nodes: Annotated[int | None, typer.Option(min=1, help="Another number of nodes than the cluster file's.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run [runs/<name of the recipe>].")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prints the batch script and starts nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Runs the same job on this machine, without SLURM.")] = False,
) -> None:
    """Queues a run on a SLURM cluster, or goes on with one, and says how to follow it.

    Recipe, data and cluster are checked first. The job runs a copy of the code; it saves before its time is over
    or when it is preempted, is queued again, and goes on at any number of nodes.
    """
    from launch.jobs.submit import submit as queue

    queue(recipe_path, cluster_path, out=out, nodes=nodes, overrides=overrides, dry_run=dry_run, local=local)


@app.command(
    epilog=_examples("pretrain drill configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --nodes 2")
)
def drill(
    recipe_path: RecipePath,
    cluster_path: Annotated[
        Path, typer.Option("--cluster", metavar="FILE", help="What is asked of SLURM, such as configs/cluster/*.yaml.")
    ],
    nodes: Annotated[int | None, typer.Option(min=1, help="Another number of nodes than the cluster file's.")] = None,
    steps: Annotated[int, typer.Option(min=6, help="Of each of the two runs.")] = 30,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where both are kept [runs/drill-<name of the recipe>].")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Proves on this cluster, before the quota is spent, that a run which is disturbed ends as one that is not.

    Two short jobs: one is left alone; the other is warned of its time limit, then killed, and is queued again each
    time. Their losses are compared step by step. Exit status 1 where they differ.
    """
    from launch.jobs.drill import drill as run_drill

    run_drill(recipe_path, cluster_path, nodes=nodes, steps=steps, out=out, overrides=overrides)


@app.command(
    epilog=_examples(
        "pretrain cancel runs/mae_vit_b16",
        "pretrain cancel runs/mae_vit_b16 --now",
        "pretrain cancel runs/noisy_student",
    )
)
def cancel(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a chain: all of its jobs.")],
    now: Annotated[bool, typer.Option("--now", help="Does not save first.")] = False,
) -> None:
    """Stops what was submitted; a run saves first, so that submitting it again goes on from there."""
    from launch.jobs.cancel import cancel as stop

    stop(run, now)


@app.command(
    epilog=_examples(
        "pretrain chain configs/chains/cpu/noisy_student.yaml --nproc 2",
        "pretrain chain configs/chains/cpu/mae_pretraining.yaml --out runs/pre",
        "pretrain chain configs/chains/noisy_student.yaml --cluster configs/cluster/gpu.yaml",
    )
)
def chain(
    chain_path: Annotated[Path, typer.Argument(metavar="FILE", help="A chain, such as configs/chains/*.yaml.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the chain [runs/<its name>].")] = None,
    num_ranks: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes of each training on this machine [1].")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Queues stages as jobs there, each after those it takes from.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --cluster: prints the batch scripts and starts nothing.")
    ] = False,
) -> None:
    """Runs stages one after another: train, label, select, evaluate; or goes on where they were interrupted.

    All stages are checked before the first is started. What is finished is passed over, what was interrupted goes
    on, and a stage whose settings or inputs changed is refused.
    """
    if cluster is None:
        from launch.chains.run import run_chain

        if dry_run:
            raise InputError("--dry-run", "--cluster beside it", "none", "Name the cluster file, or leave it out.")
        raise typer.Exit(run_chain(chain_path, out, num_ranks or 1))
    from launch.chains.submit import submit_chain

    if num_ranks is not None:
        raise InputError("--nproc", "no --cluster beside it", str(cluster), "Set nodes and ranks_per_node there.")
    submit_chain(chain_path, cluster, out, dry_run=dry_run)


@app.command(
    epilog=_examples("pretrain status", "pretrain status runs/mae_cifar10", "pretrain status --json | jq .[].state")
)
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs, or folders that hold some [runs].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for machines.")] = False,
) -> None:
    """Shows a table of runs: state, progress, speed, time left, last checkpoint, requeues, last error."""
    from launch.jobs.status import show_status

    show_status(runs or [Path("runs")], as_json=as_json)


@app.command(
    epilog=_examples("pretrain logs runs/mae_cifar10 --follow", "pretrain logs runs/mae_cifar10 --rank 3 --lines 200")
)
def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Goes on with what comes, also after requeues, until the run is over.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of this rank alone [the node of rank 0].")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Of each file, from its end.")] = 50,
) -> None:
    """Prints what a run's newest job wrote."""
    from launch.jobs.logs import show_logs

    show_logs(run, follow=follow, rank=rank, lines=lines)


@app.command(
    epilog=_examples(
        "pretrain doctor",
        "pretrain doctor configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain doctor configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/a100.yaml",
    )
)
def doctor(
    recipe_path: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe; without one, the machine alone is looked at.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A cluster file: what the run is to be submitted to.")
    ] = None,
    num_ranks: NumRanks = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run [runs/<name of the recipe>].")
    ] = None,
) -> None:
    """Looks at machine, cluster, storage, data and memory; each line is ok, a warning or an error with what to do.

    Starts nothing and leaves nothing behind. The exit status is 1 where there is an error.
    """
    from launch.doctor.doctor import examine

    raise typer.Exit(examine(recipe_path, overrides or [], cluster, num_ranks, out))


@app.command(epilog=_examples("pretrain demo", "pretrain demo --out /tmp/demo"))
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all of it is written.")] = Path("runs/demo"),
) -> None:
    """Makes images and shards, trains MAE on two processes, judges it, writes a report: a few minutes."""
    from launch.demo import main as run_demo

    run_demo(out)


@app.command(
    epilog=_examples(
        "pretrain report runs/mae_cifar10",
        "pretrain report runs/cifar10 --baseline random",
        "pretrain report runs/a/evals/knn-encoder-1f.json runs/b/evals/knn-encoder-3c.json --out runs/a_and_b",
    )
)
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="A run; or a suite's folder, or reports of pretrain eval.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a comparison goes [the suite's folder].")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder that others are compared with [the first].")
    ] = None,
) -> None:
    """Writes report.html: a page about a run, or tables, figures and differences of several encoders."""
    from launch.commands.report import report as write

    write(paths, out, baseline)


def _mount(name: str, module: str, text: str, example: str) -> None:
    """A command that hands all its words to the app of another module, which is imported only then."""

    @app.command(
        name,
        help=text,
        epilog=_examples(example),
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
            "help_option_names": [],
        },
    )
    def hand_over(context: typer.Context) -> None:
        import_module(module).app(context.args or ["--help"], prog_name=f"pretrain {name}")


_mount("data", "launch.commands.data", "Makes, converts, checks, describes and labels shards.", "pretrain data --help")
_mount("eval", "launch.commands.eval", "Judges encoders: kNN, probe, zero-shot, retrieval.", "pretrain eval knn --help")


if __name__ == "__main__":
    sys.exit(main())
