"""The structure of the three packages as data: modules, their imports, the order of packages, sizes, names.

`python -m tests.house` prints the tree of packages that README shows, made from the first line of each `__init__`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "pretrain", "launch")

# From the ground up: a module imports only what stands in its own line or above it. A module belongs to the longest
# entry that it lies under. CONFIG stands for every `config.py` in pretrain (no torch), of which recipes are made.
CONFIG = "config.py"
ORDER = (
    "data_pipeline.url_secrets",
    "data_pipeline.messages", "data_pipeline.errors", "data_pipeline.local_paths", "data_pipeline.settings",
    "data_pipeline.durable",
    "data_pipeline.batch", "data_pipeline.parallel", "data_pipeline.progress", "data_pipeline",
    "data_pipeline.order", "data_pipeline.remote", "data_pipeline.shards",
    "data_pipeline.samples", "data_pipeline.datasets", "data_pipeline.ingest", "data_pipeline.inspect",
    "data_pipeline.procedural", "data_pipeline.assemble", "data_pipeline.workers", "data_pipeline.loader",
    "pretrain.recipe.base", "pretrain.recipe.strict_yaml", CONFIG, "pretrain.recipe", "pretrain.runtime",
    "pretrain.models", "pretrain.augment", "pretrain.objectives", "pretrain.optim", "pretrain.engine",
    "pretrain.checkpoints", "pretrain.monitoring", "pretrain.evals", "pretrain.callbacks", "pretrain.reports",
    "pretrain",
    "launch.terminal", "launch.ranks", "launch.slurm", "launch.jobs", "launch.chains", "launch.suites", "launch.doctor",
    "launch.demo",
    "launch.commands", "launch",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages: dotted name -> path relative to ROOT."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.relative_to(ROOT)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def tree_of_code(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def imports(module: str) -> list[str]:
    """The modules of the three packages that a module imports, inside functions and under conditions too."""
    found: dict[str, None] = {}
    for node in ast.walk(tree_of_code(modules()[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in full]
        else:
            continue
        found |= dict.fromkeys(name for name in names if name in modules() and name != module)
    return list(found)


def floor(module: str) -> int:
    """The place of a module's package in ORDER."""
    if module.startswith("pretrain.") and module.endswith(".config"):
        return ORDER.index(CONFIG)
    above = [entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")]
    return ORDER.index(max(above, key=len))


def upward(module: str) -> list[str]:
    """What a module imports although it stands above it."""
    return [name for name in imports(module) if floor(name) > floor(module)]


def circles() -> list[list[str]]:
    """Sets of modules that import each other, directly or through others (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for name in imports(module):
            if name not in index:
                visit(name)
                low[module] = min(low[module], low[name])
            elif name in stack:
                low[module] = min(low[module], index[name])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in modules():
        if module not in index:
            visit(module)
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of_code(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def takes_the_recipe() -> list[Path]:
    """Files in which a function has a parameter called `recipe`, or one of the type Recipe: the whole recipe."""

    def whole(argument: ast.arg) -> bool:
        annotation = argument.annotation
        typed = annotation is not None and any(
            isinstance(node, ast.Name) and node.id == "Recipe" for node in ast.walk(annotation)
        )
        return typed or (argument.arg == "recipe" and annotation is None)

    return [
        path
        for path in modules().values()
        if any(
            whole(argument)
            for function in functions(path)
            for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        )
    ]


def tree() -> str:
    """The packages with what lives in each, as README shows them."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("__init__.py"), key=_in_order):
            folder = path.parent.relative_to(ROOT)
            if len(folder.parts) > 2:
                continue
            said = (ast.get_docstring(tree_of_code(path.relative_to(ROOT))) or "").split("\n")[0]
            name = f"{'  ' * (len(folder.parts) - 1)}{folder.name}/"
            lines.append(f"{name:<17} {said}")
    return "\n".join(lines)


def _in_order(path: Path) -> tuple[int, int, str]:
    """The package itself first, then its folders in the order of imports."""
    folder = path.parent.relative_to(ROOT)
    return (0 if len(folder.parts) == 1 else 1, floor(".".join(folder.parts)), str(folder))


if __name__ == "__main__":
    print(tree())
