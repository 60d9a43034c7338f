"""The direction of imports, launch -> pretrain -> data_pipeline, and what must not be loaded where."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain.evals.result import EvalReport, Outcomes
from tests.launch.run_folders import make_run
from tests.runs import write_recipe
from tests.shards import write_images, write_shards

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for package in ("data_pipeline", "pretrain", "launch")
    for path in (ROOT / package).rglob("*.py")
)
# Files below a path, and the modules (with all below them) that these never import.
FORBIDDEN = {
    "data_pipeline": ["pretrain", "launch", "torch.distributed", "deepspeed", "timm", "open_clip"],
    "pretrain": ["launch"],
    "pretrain/objectives": [
        "pretrain.engine",
        "pretrain.evals",
        "pretrain.checkpoints",
        "pretrain.loop",
        "pretrain.run",
        "torch.distributed",
    ],
    "pretrain/models": [
        "pretrain.objectives",
        "pretrain.engine",
        "pretrain.evals",
        "pretrain.checkpoints",
    ],
    "pretrain/evals": ["pretrain.engine", "pretrain.loop", "pretrain.run"],
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions and under conditions too."""
    package = path.with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], node.module or "")) if node.level else ""
            base = base.rstrip(".") or node.module or ""
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    forbidden = [m for below, modules in FORBIDDEN.items() if path.is_relative_to(below) for m in modules]
    wrong = [m for m in imports(path) if any(within(m, parent) for parent in forbidden)]
    assert not wrong, f"{path} must not import {wrong}"


def test_only_the_engine_imports_deepspeed() -> None:
    found = [path for path in FILES if any(within(m, "deepspeed") for m in imports(path))]
    assert found == [Path("pretrain/engine/deepspeed_library.py")]


def test_the_check_sees_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "pretrain" / "evals").mkdir(parents=True)
    (tmp_path / "pretrain/evals/x.py").write_text(
        "import a.b as c\nfrom d import e\nfrom ..engine import f\nfrom . import g\n"
        "def h():\n    if True:\n        from pretrain import loop\n"
    )
    assert list(imports(Path("pretrain/evals/x.py"))) == [
        "a.b",
        "d.e",
        "pretrain.engine.f",
        "pretrain.evals.g",
        "pretrain.loop",
    ]


# What is loaded stays so: of one process, each set holds for its command and for all before it.
MODELS = {"timm", "deepspeed", "open_clip", "transformers", "fairscale"}
COMPILERS = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
UNUSED = {"wandb", "scipy.stats", "sklearn", "tensorboard", "pandas", "s3fs", "submitit"}
WITHOUT_MODEL = {"torch", *MODELS, *UNUSED}


def commands(folder: Path) -> list[tuple[list[str], set[str]]]:
    """Commands in the order of what they may load, with what they must not; `{folder}` holds shards and a run."""
    data = ["--train", f"{folder}/train", "--test", f"{folder}/test"]
    results = [f"{folder}/results/{name}.json" for name in "ab"]
    run = f"{folder}/run"
    return [
        (["--help"], {"numpy", "pydantic", "yaml", "rich", *WITHOUT_MODEL}),
        (["train", "--help"], {"numpy", "yaml", *WITHOUT_MODEL}),
        (["status", "--help"], {"numpy", "yaml", *WITHOUT_MODEL}),
        (["data", "--help"], WITHOUT_MODEL),
        (["eval", "--help"], WITHOUT_MODEL),
        (["show", f"{folder}/recipe.yaml"], {"pyarrow", "matplotlib", *WITHOUT_MODEL}),
        (["status", f"{folder}/left"], {"pyarrow", "matplotlib", *WITHOUT_MODEL}),
        (["logs", f"{folder}/left"], {"pyarrow", "matplotlib", *WITHOUT_MODEL}),
        (["data", "make", "shapes", f"{folder}/shapes", "--samples", "4", "--workers", "1"], WITHOUT_MODEL),
        (["data", "convert", f"{folder}/images", f"{folder}/shards", "--workers", "1"], {"pyarrow", *WITHOUT_MODEL}),
        (["data", "index", f"{folder}/bare", "--workers", "1"], {"pyarrow", *WITHOUT_MODEL}),
        (["data", "verify", f"{folder}/train", "--workers", "1"], {"pyarrow", *WITHOUT_MODEL}),
        (["eval", "compare", *results], {"matplotlib", *WITHOUT_MODEL}),
        (["data", "stats", f"{folder}/train", "--out", f"{folder}/sheet.png"], {"pyarrow", *WITHOUT_MODEL}),
        (["report", *results, "--out", f"{folder}/comparison"], WITHOUT_MODEL),
        (["doctor"], {*MODELS, *COMPILERS, *UNUSED}),
        (["eval", "knn", f"{folder}/left", "--random-init", "--k", "5", *data], {"deepspeed", *COMPILERS, *UNUSED}),
        (["train", f"{folder}/recipe.yaml", "--max-steps", "2", "--out", run], {"open_clip", *COMPILERS, *UNUSED}),
        (["report", run], {"open_clip", "transformers", "fairscale", *COMPILERS, *UNUSED}),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a recipe, a run's folder, two results whose images are elsewhere."""
    folder = tmp_path_factory.mktemp("commands")
    write_shards(folder / "train", 24)
    write_shards(folder / "test", 12)
    write_images(folder / "images", 4)
    shutil.copytree(folder / "test", folder / "bare", ignore=shutil.ignore_patterns("*.json", "*.idx"))
    write_recipe(folder / "recipe.yaml", folder / "train")
    make_run(folder / "left", logged=3)
    for name, right in (("a", 3), ("b", 2)):
        save_report(folder / "results" / f"{name}.json", name, right)
    return folder


def save_report(path: Path, name: str, right: int) -> None:
    """Of kNN on four samples of four classes, of which the first `right` are."""
    labels = np.arange(4, dtype=np.int32)
    EvalReport(
        evaluator="knn", metric="top1_k5", value=25.0 * right, n=4, metrics={}, protocol={}, seeds={}, versions={},
        encoder={"tag": "encoder", "source": name}, data={"num_classes": 4, "classes": list("abcd")},
        weights_sha256=name * 64, seconds={}, notes=[],
        outcomes=Outcomes(("0", "1", "2", "3"), labels, np.where(labels < right, labels, 0).astype(np.int32)),
    ).save(path)  # fmt: skip


def test_a_command_loads_only_what_it_needs(folder: Path) -> None:
    """In one process, the lightest first; among the last an eager step, an evaluation, and a page with pictures."""
    asked = [(arguments, sorted(heavy)) for arguments, heavy in commands(folder)]
    code = (
        "import sys\n"
        "from launch import cli\n"
        f"for arguments, heavy in {asked}:\n"
        "    sys.argv = ['pretrain', *arguments]\n"
        "    try:\n        status = cli.main()\n    except SystemExit as end:\n        status = end.code\n"
        "    assert not status or arguments == ['doctor'], (arguments, status)\n"  # which looks at this machine
        "    print('loaded by', arguments, sorted(sys.modules.keys() & heavy))\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("loaded by")]
    assert lines == [f"loaded by {arguments} []" for arguments, _ in asked]
