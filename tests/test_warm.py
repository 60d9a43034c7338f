"""Processes of tests are forked from a warm one, and commands so begun are what they are as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World
from tests.commands import begun, pretrain, program
from tests.gate import until
from tests.ranks import run_ranks, started
from tests.runs import write_recipe
from tests.shards import write_shards


def loaded_by(_: World) -> tuple[int, int]:
    import tests.warm

    return tests.warm.LOADED_BY, os.getppid()


def test_what_is_slow_to_import_was_imported_before_the_fork() -> None:
    """A preload that fails is passed over in silence, and each rank would import it all."""
    ((loader, parent),) = run_ranks(loaded_by, 1)
    assert loader == parent


def imported_by_a_run(_: World, recipe: Path, out: Path) -> set[str]:
    before = set(sys.modules)
    from pretrain.run import run

    run(load_recipe(recipe), out, max_steps=2)
    return set(sys.modules) - before


def test_a_run_imports_next_to_nothing_more(tmp_path: Path) -> None:
    """The list in tests/warm.py follows what libraries and we import."""
    recipe = write_recipe(tmp_path / "r.yaml", write_shards(tmp_path / "shards", 16))
    with started(imported_by_a_run, 1, recipe, tmp_path / "run", joined=False) as ranks:
        (found,) = ranks.results()
    assert len(found) < 20, " ".join(sorted(found))


def speaks(status: object) -> None:
    print("out", os.environ.get("SAID"), Path.cwd(), os.getpgid(0) == os.getpid())
    print("err", file=sys.stderr)
    sys.exit(status)  # type: ignore[arg-type]


def test_a_command_has_its_own_folder_environment_streams_and_status(tmp_path: Path) -> None:
    for status, expected, err in ((None, 0, "err\n"), (7, 7, "err\n"), ("why", 1, "err\nwhy\n")):
        with begun(partial(speaks, status), tmp_path, {"SAID": "this"}) as command:
            done = command.wait()
        assert (done.status, done.stdout, done.stderr) == (expected, f"out this {tmp_path} True\n", err)
    assert os.environ.get("SAID") is None
    assert "Usage: pretrain" in pretrain("--help").stdout
    said = pretrain("show", "nowhere.yaml", status=2, folder=tmp_path).stderr
    assert said.startswith("error: ")
    assert said.count("nowhere.yaml") == 1


def starts_another(folder: Path) -> None:
    words = [sys.executable, "-u", "-m", "tests.test_warm", str(folder), str(os.getpid())]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, process_group=0, text=True)
    assert child.stdout is not None
    print(child.stdout.readline(), flush=True)
    sys.exit(child.wait() + 100)


def test_a_module_that_a_command_starts_is_its_child_and_can_be_signalled(tmp_path: Path) -> None:
    with begun(partial(starts_another, tmp_path)) as command:
        until((tmp_path / "group").is_file, meanwhile=command.running, said=command.said)
        os.killpg(int((tmp_path / "group").read_text()), signal.SIGTERM)
        done = command.wait()
    assert done.status == 100 - signal.SIGTERM
    assert done.stdout.split() == ["child", "True", "True"]


def test_torch_of_a_command_has_the_threads_that_its_environment_says(tmp_path: Path) -> None:
    with begun(partial(says_threads), environment={**os.environ, "OMP_NUM_THREADS": "2"}) as command:
        assert command.wait().stdout == "2\n"


def says_threads() -> None:
    import torch

    print(torch.get_num_threads())


def test_a_program_is_run_as_its_module(tmp_path: Path) -> None:
    with begun(program("pretrain", tmp_path / "nowhere.yaml")) as command:
        done = command.wait()
    assert done.status == 2
    assert done.stderr.count("error:") == 1


if __name__ == "__main__":  # what `starts_another` starts
    into, parent = Path(sys.argv[1]), int(sys.argv[2])
    print("child", os.getppid() == parent, "tests.warm" in sys.modules)
    (into / "part").write_text(str(os.getpgid(0)))
    (into / "part").rename(into / "group")
    time.sleep(60)
