"""`pretrain eval suite FILE` makes the results that a suite lacks, on this machine or as jobs of a cluster.

Each result is made by a process of its own: one that is killed for want of memory, or whose device fails, takes no
other with it, and several devices work side by side. It costs some seconds of imports for each.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from data_pipeline.durable import write_text
from data_pipeline.errors import InputError
from data_pipeline.messages import killed_by
from launch.ranks.child import start_child
from launch.ranks.launcher import threads_per_process
from launch.suites.jobs import Commands, Questions, SuiteJob, suite_jobs
from pretrain.evals.suite import KEPT, Suite, dump_suite, load_suite

Say = Callable[[str], None]
RunCell = Callable[[SuiteJob, str | None, Say], int]  # a cell and the device it is given; returns the exit status


def run_suite(
    path: Path,
    out: Path | None,
    *,
    commands: Commands,
    dry_run: bool = False,
    devices: Sequence[str] | None = None,
    run: RunCell | None = None,
) -> int:
    """Runs what is missing, as many at a time as there are devices. Returns 0 when all of it is there, else 1.

    Args:
        path: the suite's file.
        out: its folder; None: `runs/<name>`.
        commands: those of `pretrain eval`.
        dry_run: says what would be run, and starts nothing.
        devices: each for one process, as CUDA_VISIBLE_DEVICES; None: the CUDA devices here. None of them: one process.
        run: how a cell is run; None: in a process of its own.

    Raises:
        InputError: the suite or its data are wrong, or a job is at work on a result; nothing was started.
    """
    from launch.jobs.queue import refuse_running

    suite, out, cells, questions = _opened(path, out, commands)
    left = [cell for cell in cells if not questions.answered(cell)]
    print(f"{suite.name}: {len(cells) - len(left)} of {len(cells)} results are there: {out}", flush=True)
    if dry_run:
        for cell in left:
            print(f"pretrain {shlex.join(cell.words)}")
        return 0
    if shutil.which("scontrol"):
        for cell in left:
            refuse_running(_job(out, cell))
    _begin(suite, out, left, questions)
    given: list[str | None] = [*(cuda_devices() if devices is None and left else devices or ())] or [None]
    failed = _run_all(left, given, questions, run or partial(_in_a_process, num_processes=len(given)))
    _say_results(cells, failed)
    print(f"compare them: pretrain report {shlex.quote(str(out))}")
    return 1 if failed else 0


def submit_suite(
    path: Path, cluster_path: Path, out: Path | None, *, commands: Commands, dry_run: bool = False
) -> None:
    """Queues a job for each result that is missing, on one rank's share of the cluster file.

    Args:
        path: the suite's file.
        cluster_path: the cluster file.
        out: the suite's folder, on storage that all nodes see; None: `runs/<name>`.
        commands: those of `pretrain eval`.
        dry_run: prints the batch scripts; writes and starts nothing.

    Raises:
        InputError: something is wrong; nothing was started.
        RunError: SLURM refused a job; no job is left in its queue.
    """
    from launch.jobs.queue import PlannedJob
    from launch.jobs.submission import submit_jobs
    from launch.slurm.cluster import load_cluster

    suite, out, cells, questions = _opened(path, out, commands, whole=True)
    cluster = load_cluster(cluster_path).one_rank()
    left = [cell for cell in cells if not questions.answered(cell)]
    print(f"{suite.name}: {len(cells) - len(left)} of {len(cells)} results are there: {out}")
    jobs = [PlannedJob(_job(out, cell), _job_name(suite, cell), cluster, {"words": list(cell.words)}) for cell in left]

    def tell(job: PlannedJob, job_id: str) -> None:
        print(f"{left[jobs.index(job)].name}: job {job_id}: {job.folder}")

    submit_jobs(
        jobs, cluster_path, out, code_in=out / KEPT, dry_run=dry_run, tell=tell,
        prepare=lambda: _begin(suite, out, left, questions),
    )  # fmt: skip
    if not dry_run:
        print(f"once they have ended: pretrain report {shlex.quote(str(out))}; the same command queues what failed")


def cuda_devices() -> list[str]:
    """Returns the numbers of the CUDA devices that this process may use."""
    import torch

    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] if visible else [str(number) for number in range(count)]


def _opened(
    path: Path, out: Path | None, commands: Commands, whole: bool = False
) -> tuple[Suite, Path, list[SuiteJob], Questions]:
    """Opens a suite: every command is read by its parser, every encoder and data set looked for."""
    from pretrain.evals.sources.load import check_source

    suite = load_suite(path)
    folder = out or Path("runs") / suite.name
    folder = folder.resolve() if whole else folder
    if (folder / "recipe.yaml").exists():
        raise InputError(f"--out {folder}", "a folder for the suite alone", "a run in it", "Choose another with --out.")
    cells, questions = suite_jobs(suite, folder, str(path), commands), Questions()
    for source, random_init in dict.fromkeys((cell.source, bool(cell.arguments.get("random_init"))) for cell in cells):
        check_source(source, random_init=random_init)
    for cell in cells:
        questions.of(cell)
    return suite, folder, cells, questions


def _begin(suite: Suite, out: Path, left: list[SuiteJob], questions: Questions) -> None:
    """Makes room for all results at once, so that no older result is left to be compared with a newer one."""
    for cell in left:
        questions.begin(cell)
    write_text(out / KEPT / "suite.yaml", dump_suite(suite))


def _run_all(left: list[SuiteJob], devices: Sequence[str | None], questions: Questions, run: RunCell) -> dict[str, str]:
    """Runs results on devices; returns the reason for each that failed, by its name."""
    free: SimpleQueue[str | None] = SimpleQueue()
    for device in devices:
        free.put(device)
    failed: dict[str, str] = {}

    def one(number: int, cell: SuiteJob) -> str | None:
        device, start = free.get(), time.monotonic()
        heard: list[str] = []

        def say(line: str) -> None:
            heard.append(line)
            print(f"{cell.name} | {line}", flush=True)

        try:
            on = f" on device {device}" if device is not None else ""
            print(f"[{number}/{len(left)}] {cell.name}{on}: pretrain {shlex.join(cell.words)}", flush=True)
            status = run(cell, device, say)
        except Exception as error:  # the others go on
            return f"{type(error).__name__}: {error}"
        finally:
            free.put(device)
        if status:
            errors = [line for line in heard if line.startswith("error: ")]
            how = killed_by(status - 128) if status > 128 else f"exit status {status}"
            return f"{how}: {(errors or heard or ['it said nothing'])[-1]}"
        if not questions.answered(cell):
            return f"no report that answers what was asked: {cell.path}"
        print(f"[{number}/{len(left)}] {cell.name}: done in {time.monotonic() - start:.0f} s", flush=True)
        return None

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            futures = {pool.submit(one, number, cell): cell for number, cell in enumerate(left, 1)}
            for future in as_completed(futures):
                if (why := future.result()) is not None:
                    cell = futures[future]
                    failed[cell.name] = why
                    print(f"{cell.name}: failed, {why}", file=sys.stderr, flush=True)
        except BaseException:  # such as Ctrl-C, which also went to what is running
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _in_a_process(cell: SuiteJob, device: str | None, say: Say, *, num_processes: int = 1) -> int:
    """Runs a result's command in a process of its own and passes its lines to `say`. Returns its exit status.

    Args:
        num_processes: that share the cores of this machine.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads_per_process(num_processes)),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": device} if device is not None else {}),
    }
    # Of the terminal's process group: Ctrl-C ends all results that are at work.
    with start_child("launch.cli", cell.words, environment=environment, piped=True, own_group=False) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _say_results(cells: Sequence[SuiteJob], failed: dict[str, str]) -> None:
    from rich.table import Table

    from launch.terminal import chance_text, columns, interval_text, terminal
    from pretrain.evals.result import EvalReport

    names = ("encoder", "data set", "protocol", "metric", "%", "±", "95 % interval", "chance", "n")
    table = Table(*columns(*names))
    for cell in cells:
        if cell.name in failed:
            table.add_row(cell.encoder, cell.dataset, cell.protocol, "failed", "", "", "", "", "")
            continue
        report = EvalReport.load(cell.path)
        spread = "" if report.spread is None else f"{report.spread:.2f}"
        row = (cell.encoder, cell.dataset, cell.protocol, report.metric, f"{report.value:.2f}", spread)
        table.add_row(*row, interval_text(report, report.metric), chance_text(report, report.metric), str(report.n))
    terminal().print(table)


def _job(out: Path, cell: SuiteJob) -> Path:
    return out / KEPT / "jobs" / f"{cell.encoder}+{cell.dataset}+{cell.protocol}"  # as no name holds a +


def _job_name(suite: Suite, cell: SuiteJob) -> str:
    return f"{suite.name}-{cell.encoder}-{cell.dataset}-{cell.protocol}"
