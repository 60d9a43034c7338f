"""Every command of the README runs, in its order, from a folder like a checkout; only sizes are cut down."""

from __future__ import annotations

import os
import re
import shlex
import tarfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.commands import begun, program
from tests.shards import write_images, write_shards

ROOT = Path(__file__).parents[1]
PROGRAMS = {"pretrain": "launch.cli", "torchrun": "torch.distributed.run"}
TARGETS = {"make demo", "make test"}  # run by whoever runs this, and by a person
SMALLER = {"--samples 8000": "--samples 208", "--samples 2000": "--samples 48", "--max-steps 20": "--max-steps 1"}
# A batch that few samples fill, and bounds for what would train or probe for minutes.
ADDED = {"pretrain train": "--max-steps 2 --set batch.global_size=16", "torchrun": "--set batch.global_size=16",
         "pretrain submit": "--dry-run",
         "pretrain doctor": "--set batch.global_size=16", "pretrain eval linear": "--min-steps 20"}  # fmt: skip


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def cut_down(command: str) -> str:
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    for start, more in ADDED.items():
        if command.startswith(start):
            command = f"{command} {more}"
    return command


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    commands = [command for command in readme_commands() if command not in TARGETS]
    assert len(commands) >= 10
    assert all(command.startswith(("pretrain ", "torchrun ")) for command in commands), commands
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for split in ("train", "test"):
        write_images(tmp_path / "cifar10" / split, 12)
    write_images(tmp_path / "photos", 6)
    rows = [f"{path.relative_to(tmp_path / 'photos')},a photo" for path in (tmp_path / "photos").rglob("*.jpg")]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    write_shards(tmp_path / "downloads", 20)
    with tarfile.open(tmp_path / "cifar10.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar10", "cifar10")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for command in commands:
        name, *words = shlex.split(cut_down(command))
        with begun(program(PROGRAMS[name], *words), tmp_path, environment) as started:
            done = started.wait()
        assert done.status == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "mae_fractals" / "encoder" / "model.safetensors").is_file()
    assert len(list((tmp_path / "runs" / "mae_fractals" / "evals").glob("*.json"))) == 3


def test_the_programs_that_they_name_are_installed_and_are_these_modules() -> None:
    found = {point.name: point.value for point in entry_points(group="console_scripts")}
    for name, module in PROGRAMS.items():
        assert found[name] == f"{module}:main"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / "README.md").read_text())) | {"demo", "test"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_and_tree_are_true() -> None:
    """Files that the README links to, or names in its annotated tree, are there."""
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    tree = text.split("## Where things are")[1].split("```")[1]
    folder = ROOT
    for line in tree.splitlines()[1:]:
        if not line.startswith(" ") and "/" in line:
            folder = ROOT / line.split("/")[0]
        for name in re.findall(r"[\w/]+\.(?:py|md)\b", line.split("  ")[1] if line.startswith("  ") else ""):
            assert (folder / name).exists(), f"{folder.name}/{name}"


def test_what_is_to_be_installed_is_on_an_index() -> None:
    """The program itself is on none: nothing may say `pip install pretrain[...]`."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts += [path for name in ("data_pipeline", "pretrain", "launch") for path in (ROOT / name).rglob("*.py")]
    history = ROOT / "CHANGELOG.md"  # says what older versions said
    found = [path for path in texts if path != history and re.search(r"install '?pretrain\b", path.read_text("utf-8"))]
    assert not found
