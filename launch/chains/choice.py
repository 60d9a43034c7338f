"""The options of `pretrain data select` that go together; a chain's stages are held to the same."""

from __future__ import annotations

from data_pipeline.errors import InputError


def check_choice(
    source: str, by_labels: bool, threshold: float | None, per_class: int | None, top_k: int | None
) -> None:
    """Raises InputError unless the options name one way to choose: by soft labels, or by true ones."""
    given = _given(threshold=threshold, per_class=per_class, top_k=top_k)
    if by_labels and given not in ("--threshold", "--threshold, --per-class", "--top-k"):
        raise InputError(
            where="pretrain data select",
            expected="--threshold, perhaps with --per-class; or --top-k alone",
            found=given,
        )
    if not by_labels and given != "--per-class":
        raise InputError(
            where="pretrain data select",
            expected=f"--per-class alone, as {source} is no folder of soft labels",
            found=given,
        )


def _given(**options: float | None) -> str:
    names = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    return ", ".join(names) or "none of them"
