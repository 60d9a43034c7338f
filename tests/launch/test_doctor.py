"""Each check of `pretrain doctor` on what is sound, and on what is broken."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.scan import index_shards
from launch.doctor import doctor, machine, storage
from launch.doctor import recipe as checks
from launch.doctor.recipe import Free, Ranks
from launch.slurm.finding import Finding
from pretrain.plan import Footprint, build_on_meta, footprint
from pretrain.preflight import preflight
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from tests.data_pipeline.servers import served
from tests.launch.findings import asked, levels, problems
from tests.launch.run_folders import Commands, make_run
from tests.runs import write_recipe
from tests.shards import write_shards


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """MAE on four shards."""
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", write_shards(tmp_path / "shards", per_shard=25)))


def with_groups(recipe: Recipe, **groups: dict[str, Any]) -> Recipe:
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in groups.items()}
    )


# The machine.


def test_this_machine_is_sound() -> None:
    assert problems([*machine.python(), *machine.packages(), *machine.open_files(16)]) == ""


def test_python_and_packages_out_of_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "metadata", lambda _: {"Requires-Python": ">=3.99"})
    assert "expected >=3.99. Make a new environment" in problems(machine.python())
    needed = ["timm>=99", "not-there-at-all>=1", "numpy>=1", 'also-not-there>=1; extra == "dev"']
    monkeypatch.setattr(machine, "requires", lambda _: needed)
    found = list(machine.packages())
    assert levels(found) == [("error", "timm"), ("error", "not-there-at-all")]
    assert "expected >=99. pip install 'timm>=99'" in problems(found)


@pytest.mark.parametrize(
    ("build", "driver", "num_gpus", "device", "expected"),
    [
        ("13.2", "13.2", 8, "auto", "ok"),
        ("13.2", "13.2", 4, "auto", "error: expected one for each of 8 ranks"),
        ("13.2", "13.2", 4, "cpu", "ok"),
        ("13.2", "12.4", 0, "auto", "warning: torch is built for 13.2, and the driver supports 12.4 at most"),
        ("13.2", "12.4", 0, "cuda", "error: torch is built for 13.2, and the driver supports 12.4 at most"),
        ("12.10", "12.9", 0, "cuda", "error: torch is built for 12.10"),
        (None, "12.4", 0, "auto", "warning: a build of torch without it, beside a GPU"),
        ("12.4", "12.4", 0, "cuda", "error: the driver is there"),
        ("12.4", None, 0, "cuda", "error: no gpu here"),
        (None, None, 0, "auto", "ok"),
    ],
)
def test_gpus(build: str | None, driver: str | None, num_gpus: int, device: str, expected: str) -> None:
    found = machine.gpus(build, driver, num_gpus, device, num_ranks=8)
    level, _, what = expected.partition(": ")
    assert found.level == level
    assert what.lower() in found.found.lower()
    assert found.fix or level == "ok"


def test_the_driver_is_asked(commands: Commands) -> None:
    commands.says("nvidia-smi", "| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |")
    assert machine.driver_cuda() == "12.4"
    commands.says("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the driver.", status=9)
    assert machine.driver_cuda() is None


def test_too_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        assert "at most 256 in a process, expected 1024. ulimit -n 1024" in problems(machine.open_files())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_available_memory_is_that_of_the_cgroup_where_it_is_less(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "_cgroups", lambda: iter(()))
    free = machine.available_memory()
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("500\n")
    monkeypatch.setattr(machine, "_cgroups", lambda: iter([tmp_path / "nothing", tmp_path]))
    assert machine.available_memory() == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 10**6


# Storage.


def test_a_folder_that_is_sound_is_left_as_it_was(tmp_path: Path) -> None:
    assert levels(storage.writable(tmp_path / "runs" / "new")) == [("ok", "run folder")]
    assert levels(storage.writable(tmp_path)) == [("ok", "run folder")]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only() -> None:
    assert "/proc cannot be written" in problems(storage.writable(Path("/proc/runs/new")))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here (not root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    found = problems(storage.writable(small_disk / "run"))
    assert "No space left on device. Free space or raise the quota." in found
    assert levels(storage.shared(small_disk / "run", 2)) == [("warning", "run folder")]
    assert "on tmpfs" in problems(storage.shared(small_disk / "run", 2))


def test_storage_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (Path(a).write_bytes(b"zeros"), replace(a, b)))
    assert "does not give back what was written. Choose a folder on other storage" in problems(
        storage.writable(tmp_path)
    )


def test_storage_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refused)
        assert "files cannot be locked (No locks available)" in problems(storage.writable(tmp_path))
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)  # says that it has it, and has not
    assert "a lock is not seen by another process" in problems(storage.writable(tmp_path))


Usage = namedtuple("Usage", "free")


def test_disk_space_is_for_what_is_kept_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", saved=5)
    taken = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    for free, level in ((3 * 10**9 - taken - 1, "error"), (3 * 10**9, "warning"), (4 * 10**9, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        assert levels(storage.disk_space(run, 10**9, keep_last=2)) == [(level, "disk")]
    assert problems(storage.disk_space(tmp_path, 10**12, keep_last=2)).count("lower checkpoint.keep_last")


# Data.


def test_sound_shards(recipe: Recipe) -> None:
    found = list(checks.training_data(recipe.data, 0, Ranks(2, 2)))
    assert levels(found) == [("ok", "data"), ("ok", "shards"), ("ok", "read streams")]
    assert "4 of 4 read" in found[1].found


def test_a_shard_that_is_missing(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "shards" / "shard-000002.tar").unlink()
    found = problems(checks.training_data(recipe.data, 0, Ranks(1, 1)))
    assert "shard-000002.tar: expected a shard of" in found
    assert "found no such file. Copy the shard again." in found


def test_a_shard_with_one_other_byte(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "shards" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = problems(checks.training_data(recipe.data, 0, Ranks(1, 1)))
    assert "shard-000001.tar has another hash than in the manifest. Copy it again" in found


def test_samples_of_one_key_that_an_older_manifest_does_not_tell(recipe: Recipe, tmp_path: Path) -> None:
    assert isinstance(recipe.data.train, str)
    manifest = load_manifest(recipe.data.train)
    shutil.copy(manifest.path(0), tmp_path / "0.tar")
    shutil.copy(manifest.path(0), tmp_path / "1.tar")
    dataclasses.replace(index_shards(str(tmp_path)), keys=None).save()
    data = recipe.data.model_copy(update={"train": str(tmp_path)})
    found = problems(checks.training_data(data, 0, Ranks(1, 1)))
    assert "in 0.tar and again in 1.tar: they get the same crops and masks" in found
    assert "again in" not in problems(checks.training_data(recipe.data, 0, Ranks(1, 1)))


def test_fewer_streams_or_shards_than_ranks(recipe: Recipe) -> None:
    assert "Set data.read_streams=4" in problems(checks.training_data(recipe.data, 0, Ranks(4, 4)))  # it has 3
    more = with_groups(recipe, data={"read_streams": 16})
    assert problems(checks.training_data(more.data, 0, Ranks(4, 4))) == ""
    assert "16 read streams, 4 shards for 8 ranks" in problems(checks.training_data(more.data, 0, Ranks(8, 8)))


def test_a_batch_that_the_ranks_do_not_divide(recipe: Recipe, tmp_path: Path) -> None:
    plan, found = checks.fits(recipe.name, partial(preflight, recipe, 3, tmp_path / "run"))
    assert plan is None
    assert "expected a multiple of the number of processes, 3, found 8" in problems(found)


def test_data_behind_a_url(recipe: Recipe, tmp_path: Path) -> None:
    assert list(checks.reachable(recipe.data)) == []
    with served(tmp_path / "shards") as server:
        remote = with_groups(recipe, data={"train": server.url})
        remote = with_groups(remote, data={"cache": remote.data.cache.model_copy(update={"folder": str(tmp_path)})})
        assert levels(checks.reachable(remote.data)) == [("ok", "remote data")]
        server.choose = lambda number, name: "500"
        asked_before = len(server.requests)
        assert levels(checks.reachable(remote.data)) == [("error", "remote data")]
        assert len(server.requests) == asked_before + 1  # nobody waits for the attempts that training would make


# Memory.


NEEDS = Footprint(num_trained=0, num_frozen=0, device=10e9, host=1e9, checkpoint=8 * 10**9)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (Free(host=43e9, gpu=None, on_gpu=False), [("error", "memory")]),  # 4 x 11
        (Free(host=50e9, gpu=None, on_gpu=False), [("warning", "memory")]),
        (Free(host=90e9, gpu=None, on_gpu=False), [("ok", "memory")]),
        (Free(host=90e9, gpu=9e9, on_gpu=True), [("error", "GPU memory"), ("ok", "memory")]),
        (Free(host=3e9, gpu=80e9, on_gpu=True), [("ok", "GPU memory"), ("error", "memory")]),  # 4 x 1
        (Free(host=None, gpu=None, on_gpu=True), [("ok", "GPU memory")]),
    ],
)
def test_memory_against_the_plan(free: Free, expected: list[tuple[str, str]]) -> None:
    found = list(checks.memory(NEEDS, Ranks(8, 4), free))
    assert levels(found) == expected
    assert all(finding.fix for finding in found if finding.level != "ok")


def test_shared_memory_and_open_files_of_workers(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = with_groups(recipe, runtime={"num_workers": 4})
    plan, _ = checks.fits(many.name, partial(preflight, many, 2, tmp_path / "run", 2))
    assert plan is not None
    bytes_of_batches = 2 * (4 * 2 + 2) * 4 * 3 * 16 * 16  # ranks, steps of workers and taken, samples, channels, pixels
    for free, level in ((bytes_of_batches - 1, "error"), (bytes_of_batches, "warning"), (10**9, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        assert levels(checks.workers(4, plan, Ranks(2, 2)))[0] == (level, "/dev/shm")
    assert levels(checks.workers(0, plan, Ranks(2, 2))) == [("ok", "open files")]


# The command.


def examine(*arguments: Any) -> tuple[int, list[Finding]]:
    found = list(doctor.findings(*arguments))
    return int(any(finding.level == "error" for finding in found)), found


def test_a_recipe_that_would_run(
    recipe: Recipe,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12))
    before = sorted(tmp_path.rglob("*"))
    status = doctor.examine(tmp_path / "recipe.yaml", ["runtime.device=cpu"], None, 2, tmp_path / "runs" / "new")
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.splitlines()[-1] == "0 error(s), 0 warning(s)", said
    for what in ("Python", "packages", "SLURM", "run folder", "torch", "data", "recipe", "disk", "memory"):
        assert f"ok       {what:12}" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_memory_is_an_error_and_the_exit_status_says_so(
    recipe: Recipe, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    objective = build_on_meta(recipe.model, recipe.objective)
    needs = footprint(objective, recipe.optim, recipe.engine, recipe.ema, world_size=2)
    monkeypatch.setattr(machine, "available_memory", lambda: int(2 * (needs.device + needs.host)) - 1)
    assert doctor.examine(tmp_path / "recipe.yaml", ["runtime.device=cpu"], None, 2, tmp_path / "run") == 1
    assert "error    memory" in capsys.readouterr().out


def test_without_a_recipe_the_machine_alone(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, found = examine(None, [], None, 1, None)
    assert status == 0
    assert not {"data", "recipe", "memory", "disk"} & {what for _, what in levels(found)}


def test_a_wrong_recipe_does_not_keep_the_machine_from_being_looked_at(tmp_path: Path, commands: Commands) -> None:
    status, found = examine(tmp_path / "nowhere.yaml", [], None, 1, tmp_path / "run")
    assert status == 1
    assert ("error", "recipe") in levels(found)
    assert ("ok", "run folder") in levels(found)


def test_a_cluster_file_is_what_ranks_and_memory_are_of(recipe: Recipe, tmp_path: Path, cluster: Commands) -> None:
    file = asked(account="vision", gpus_per_node=0, memory_gb=1e-6)
    (tmp_path / "c.yaml").write_text(json.dumps(file.model_dump(mode="json")))
    status, found = examine(tmp_path / "recipe.yaml", [], tmp_path / "c.yaml", 1, tmp_path / "run")
    assert status == 1
    assert [pair for pair in levels(found) if pair[0] == "error"] == [("error", "memory")]
    text = "\n".join(map(str, found))
    assert "batch 8 = 8 x 1 x 1" in text
    assert "of 4 ranks" in text
