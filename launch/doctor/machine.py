"""Checks of Python, packages, CUDA and the limits of this machine."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from launch.slurm.finding import Finding, error, ok, warning

_NAMED = ("deepspeed", "webdataset", "open_clip_torch", "timm", "submitit")  # in the line that says all is well


def python() -> Iterator[Finding]:
    found = platform.python_version()
    try:
        wanted = SpecifierSet(metadata("pretrain")["Requires-Python"] or "")
    except PackageNotFoundError:
        yield warning(
            "Python", f"{found}; pretrain is not installed, so what it needs is not known", "pip install -e ."
        )
        return
    if wanted.contains(found, prereleases=True):
        yield ok("Python", found)
    else:
        yield error("Python", f"{found}, expected {wanted}", "Make a new environment with such a Python.")


def packages() -> Iterator[Finding]:
    """Compares each package with its range in pyproject.toml, as it was when pretrain was installed."""
    try:
        needed = [Requirement(line) for line in requires("pretrain") or []]
    except PackageNotFoundError:
        return
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for requirement in needed:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            wanted = f"expected {requirement.specifier or 'any version'}"
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            yield error(requirement.name, f"{found or 'not installed'}, {wanted}", fix)
    if not wrong:
        names = {requirement.name for requirement in needed}
        some = ", ".join(f"{name} {version(name)}" for name in _NAMED if name in names)
        yield ok("packages", f"{len(needed)} in their ranges: {some}")


def cuda(device: str, num_ranks: int) -> Iterator[Finding]:
    """Checks torch, and whether there are GPUs for the ranks of this machine.

    Args:
        device: the recipe's runtime.device; "cpu" of a recipe that needs none.
        num_ranks: processes on this machine.
    """
    try:
        import torch
        import torchvision
    except Exception as broken:  # what is wrong with a build comes as any of them
        yield error("torch", f"cannot be imported: {broken}", "Install torch and torchvision anew, from one index.")
        return
    yield ok("torch", f"{torch.__version__}, torchvision {torchvision.__version__}")
    driver = driver_cuda()
    build, num_gpus = torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield gpus(build, driver, num_gpus, device, num_ranks)
    if num_gpus and torch.distributed.is_nccl_available():
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    elif num_gpus:
        yield error("NCCL", "not in this build of torch", "Install a build of torch for CUDA on Linux.")


def gpus(build: str | None, driver: str | None, num_gpus: int, device: str, num_ranks: int) -> Finding:
    """Checks whether torch can use the GPUs that are there.

    Args:
        build: CUDA that torch was built for; None: none.
        driver: the newest CUDA that the driver supports; None: there is no driver.
        num_gpus: that torch sees.
        device, num_ranks: as of `cuda`.
    """
    on_cpu = "set runtime.device=cpu"
    if num_gpus:
        found = f"{num_gpus} GPU(s), driver for {driver}, torch built for {build}"
        if device != "cpu" and num_gpus < num_ranks:
            return error("CUDA", f"{found}, expected one for each of {num_ranks} ranks", f"Start fewer, or {on_cpu}.")
        return ok("CUDA", found)
    wanted = error if device == "cuda" else warning
    if driver is not None and build is None:
        return wanted("CUDA", "a build of torch without it, beside a GPU", "Install torch for CUDA.")
    if driver is not None and build is not None and _numbers(driver) < _numbers(build):
        fix = f"Update the driver, or install torch built for CUDA {driver} or older."
        return wanted("CUDA", f"torch is built for {build}, and the driver supports {driver} at most", fix)
    if driver is not None:
        fix = "See nvidia-smi, and whether CUDA_VISIBLE_DEVICES hides them."
        return wanted("CUDA", f"the driver is there (for {driver}), and torch sees no GPU", fix)
    if device == "cuda":
        return error("CUDA", "no GPU here, and the recipe asks for one", f"Run it where there is one, or {on_cpu}.")
    return ok("CUDA", "no GPU here: ranks train on CPUs, over gloo")


def driver_cuda() -> str | None:
    """Returns the newest CUDA that the driver supports, such as "12.4"; None: there is no driver or GPU."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"CUDA[\w ]*Version: *(\d+\.\d+)", said.stdout)
    return match[1] if match and said.returncode == 0 else None


def open_files(needed: int = 1024) -> Iterator[Finding]:
    """Compares the limit of a process with the number of files that a rank and its loader need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield ok("open files", f"up to {'any number' if soft == resource.RLIM_INFINITY else soft} in a process")
    else:
        how = "" if hard == resource.RLIM_INFINITY or hard >= needed else ", which here only an administrator can"
        yield error("open files", f"at most {soft} in a process, expected {needed}", f"ulimit -n {needed}{how}.")


def available_memory() -> int:
    """Returns the bytes of CPU memory that are still available, on the machine and within this process's cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    available = int(kilobytes) * 1024
    for folder in _cgroups():
        try:
            limit = int((folder / "memory.max").read_text())
            available = min(available, limit - int((folder / "memory.current").read_text()))
        except (OSError, ValueError):  # no such limit, or the word `max`
            continue
    return available


def _cgroups() -> Iterator[Path]:
    """Yields the folder of this process's cgroup and those of the cgroups around it (version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    folder = root / own.removeprefix("0::").lstrip("/")
    yield folder
    yield from (parent for parent in folder.parents if parent.is_relative_to(root))


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))
