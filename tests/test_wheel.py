"""The wheel holds the code, the templates and `configs/`, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "pretrain", "launch")
BUILT_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "configs", "tests", *PACKAGES)

# Run in one process: what it imports takes longer than what it does. The words of a line are those of `pretrain`.
USE = """
import sys
from pathlib import Path
from launch import cli, demo
from launch.jobs.code_copy import copied_code
from pretrain.runtime.versions import commit

def pretrain(*words):
    sys.argv = ["pretrain", *words]
    try:
        status = cli.main()
    except SystemExit as end:
        status = end.code
    print("ended:", words[0], status or 0, flush=True)

for split, samples in (("train", "32"), ("test", "16")):
    pretrain("data", "make", "fractals", f"data/six/{split}", "--samples", samples, "--size", "32",
             "--classes", "6", "--split", split, "--workers", "1")
pretrain("train", "configs/recipes/cpu/mae_fractals.yaml", "--max-steps", "2")
pretrain("train", str(demo.RECIPE), "--max-steps", "2", "--set=batch.global_size=8", "--set=logging.tensorboard=false")
data = ["--train", "data/six/train", "--test", "data/six/test"]
pretrain("eval", "knn", "runs/simclr_fractals", *data, "--k", "5")
pretrain("report", "runs/simclr_fractals")
with copied_code(Path("code")):
    pass
modules = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES]
print("from elsewhere:", [path for path in modules if not Path(path).is_relative_to(Path.cwd().parent / "site")])
print("commit:", commit())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `pip wheel --no-deps .` builds it; of a copy, as building leaves files where it is done."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    stale = source / "build" / "lib" / "pretrain" / "configs" / "recipes" / "gone.yaml"
    stale.parent.mkdir(parents=True)
    stale.touch()
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def files(root: Path, *suffixes: str) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in suffixes}


def test_it_holds_code_templates_and_configs_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"{package}/{name}" for package in PACKAGES for name in files(ROOT / package, ".py", ".j2")}
    configs = {f"pretrain/configs/{name}" for name in files(ROOT / "configs", ".yaml", ".txt", ".md")}
    assert any(name.endswith(".j2") for name in code)
    assert {name.split("/")[2] for name in configs} >= {"base", "recipes", "chains", "suites", "cluster", "prompts"}
    assert held == code | configs


def test_it_works_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked below a repository of somebody else, whose commit is not that of the code."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    folder.mkdir()
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "--message", "theirs"]
    for words in (["init", "--quiet"], commit):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"PACKAGES = {PACKAGES}\n{USE}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("ended:")] == [
        "ended: data 0", "ended: data 0", "ended: train 2", "ended: train 0", "ended: eval 0", "ended: report 0",
    ], said  # fmt: skip
    assert lines[-2:] == ["from elsewhere: []", "commit: None"]
    installed = site / "pretrain" / "configs" / "recipes" / "cpu" / "mae_fractals.yaml"
    assert f"No such file or directory. The one that comes with pretrain is {installed}." in done.stderr
    run = folder / "runs" / "simclr_fractals"
    assert (run / "encoder" / "model.safetensors").is_file()
    assert len(list((run / "evals").glob("*.json"))) == 1
    assert "simclr_fractals" in (run / "report.html").read_text()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files(folder / "code", ".py", ".j2", ".yaml", ".txt", ".md") == held, "a job's copy is all that is installed"
