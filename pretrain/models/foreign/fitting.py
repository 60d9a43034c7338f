"""Which tensors of a weights file are an architecture's, where their names differ or there are more of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from data_pipeline.errors import CheckpointError
from data_pipeline.messages import short_list

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")
_SHOWN = 6  # patterns, before a single one for all is shorter


def joined_chunks(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The same tensors with `blocks.CHUNK.N` called `blocks.N`, where the architecture has no chunks and they have.

    DINOv2 trains so for FSDP; N counts through all chunks.

    Args:
        state: names of a file.
        own: names of the architecture.
    """
    blocks = [name for name in state if name.startswith("blocks.")]
    renamed = {name: f"blocks.{m[1]}.{m[2]}" for name in blocks if (m := _CHUNKED.fullmatch(name))}
    fits = blocks and len(renamed) == len(blocks) == len(set(renamed.values()))
    if not fits or any(_CHUNKED.fullmatch(name) for name in own):
        return dict(state)
    return {renamed.get(name, name): tensor for name, tensor in state.items()}


def without_ignored(
    state: Mapping[str, Tensor], own: Collection[str], patterns: Sequence[str], *, option: str, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The state without what patterns name of it, and those names; what the architecture needs stays in any case.

    Args:
        state: names of a file.
        own: names of the architecture.
        patterns: of names, as of a shell (`*`, `?`, `[ab]`).
        option: which gave the patterns, for the error.
        where: the file, for the error.

    Raises:
        CheckpointError: a pattern names nothing that could be ignored.
    """
    beyond = sorted(state.keys() - set(own))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in beyond):
            needed = any(fnmatchcase(name, pattern) for name in state)
            raise CheckpointError(
                where=f"{option} {pattern}",
                expected=f"a pattern of tensors in {where} that the encoder does not need",
                found="one that names only what it needs" if needed else "one that no name fits",
                fix=f"These are not needed: {short_list(beyond)}." if beyond else "Leave it out: all are needed.",
            )
    ignored = [name for name in beyond if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: tensor for name, tensor in state.items() if name not in set(ignored)}, ignored


def note_on_ignored(names: Sequence[str]) -> str:
    """What a result says of them."""
    return f"of the weights file {len(names)} tensors were ignored, as asked: {short_list(names)}"


def advice(state: Mapping[str, Tensor], own: Collection[str], heads: Collection[str], prefix: str) -> str:
    """What would take an architecture's tensors out of a file: options, as a sentence; empty where nothing does.

    Args:
        state: names of the whole file.
        own: names of the architecture.
        heads: modules of its classifier, which is left out by itself.
        prefix: that was given.
    """
    fits = {}
    for candidate in _prefixes(state, own):
        under = _under(state, candidate, own)
        if under.keys() >= set(own):
            beyond = {name for name in under.keys() - set(own) if name.rpartition(".")[0] not in heads}
            fits[candidate] = ignore_words(beyond)
    if prefix in fits:
        return f"If the others are none of the encoder's, leave them out: {fits[prefix]}." if fits[prefix] else ""
    texts = [f"--weights-prefix {shlex.quote(p)} {more}".strip() if p else more for p, more in fits.items()]
    return f"Its names fit with {' or '.join(text or 'no --weights-prefix' for text in texts)}." if fits else ""


def ignore_words(beyond: Collection[str]) -> str:
    """The options that leave tensors out: `--weights-ignore mask_token ...`."""
    return " ".join(f"--weights-ignore {shlex.quote(pattern)}" for pattern in first_parts(beyond))


def first_parts(beyond: Collection[str]) -> list[str]:
    """Patterns of names by their first parts; one for all, where these are many."""
    firsts = dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in sorted(beyond))
    return list(firsts) if len(firsts) <= _SHOWN else ["*"]


def _prefixes(state: Mapping[str, Tensor], own: Collection[str]) -> list[str]:
    """What stands before one name of the architecture, wherever it occurs; blocks may be called otherwise."""
    probe = next((name for name in sorted(own) if not name.startswith("blocks.")), None)
    if probe is None:
        return []
    found = (name.removesuffix(probe) for name in state if name == probe or name.endswith(f".{probe}"))
    return sorted(dict.fromkeys(found), key=len)


def _under(state: Mapping[str, Tensor], prefix: str, own: Collection[str]) -> dict[str, Tensor]:
    under = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return joined_chunks(under, own)
