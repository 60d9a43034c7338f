"""The direction of imports, launch -> pretrain -> data_pipeline, and what must not be loaded where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    assert found == [Path("pretrain/engine/engine.py")]


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


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"torch", "numpy", "timm", "deepspeed", "pydantic", "yaml", "rich"}),
        (["train", "--help"], {"torch", "numpy", "timm", "deepspeed", "yaml"}),
        (["data", "--help"], {"torch", "timm", "deepspeed"}),
        (["status", "--help"], {"torch", "numpy", "timm", "deepspeed", "yaml"}),
        (["eval", "--help"], {"torch", "timm", "deepspeed"}),
        (["show", "no-such-file.yaml"], {"torch", "timm", "deepspeed"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",  # a set has no order to be named by
)
def test_a_command_loads_only_what_it_needs(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\n"
        "from launch import cli\n"
        f"sys.argv = ['pretrain', *{arguments}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end\n"
        "print('loaded:', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rsplit("loaded:", 1)[1].split())
    assert "launch.cli" in loaded
    assert not loaded & heavy
