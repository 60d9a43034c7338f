"""What is said of weights whose name has no tag: the published ones of that name may want other pixels."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 4  # tags of one kind: there can be dozens


def note_on_tags(name: str, taken: Mapping[str, object], published: Mapping[str, Mapping[str, object]]) -> list[str]:
    """A note, where some published weights of `name` are used otherwise than was taken for it.

    Args:
        name: with what is to stand before a tag: `vit_base_patch16_224.`, `ViT-B-32:`.
        taken: preprocessing and whatever else belongs to weights.
        published: of each tag, the same keys.
    """
    others: dict[str, list[str]] = {}
    for tag, own in published.items():
        if differing := ", ".join(f"{key} {own[key]}" for key in taken if own[key] != taken[key]):
            others.setdefault(differing, []).append(tag)
    if not others:
        return []
    values = ", ".join(f"{key} {value}" for key, value in taken.items())
    told = "; ".join(f"those of {_some(tags)} have {differing}" for differing, tags in others.items())
    return [f"as no tag was given, {values} were taken; {told}. If these weights are of such a tag, name it: {name}TAG"]


def _some(tags: list[str]) -> str:
    return ", ".join(tags[:SHOWN]) + (f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else "")
